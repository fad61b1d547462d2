"""Memories of embeddings ('voco_embedding'), by the same commands, files and calls as those of keys and values."""

import contextlib
import dataclasses
import os
from pathlib import Path
import subprocess
import sys

import easy_vqa
from flax import nnx
from flax.traverse_util import flatten_dict
import jax
import ml_dtypes
import numpy as np
import pytest

from tests.eval.test_answering import with_random_parameters
from tests.helpers import tiny
from tests.helpers.commands import run_main
from tests.helpers.shared import make_once
import voco_jax
from voco_jax import ask, chat, compress, memory
from voco_jax.api import Model, Request
from voco_jax.checkpoint.checkpointer import Checkpointer
from voco_jax.checkpoint.run import load_run
from voco_jax.convert import __main__ as convert
from voco_jax.convert import golden
from voco_jax.errors import UserError
from voco_jax.infer.image_cache import ImageCache
from voco_jax.infer.memory import MemoryBank, join
from voco_jax.infer.memory_file import MemoryFile
from voco_jax.models.build import abstract_model, init_params
from voco_jax.models.voco import Read
from voco_jax.train.loop import train

PICTURES = [str(p) for p in sorted(Path(easy_vqa.__file__).parent.rglob("images/*.png"))[:4]]
QUESTIONS = ["what shape is in the image?", "is it red?"]


@pytest.fixture(scope="module")
def run(tiny_run, tmp_path_factory) -> Path:
    """That begins with a run of keys and values. Tests must not write into it."""
    changes = dict(
        model__compressor="voco_embedding", model__num_voco_tokens=2, init_from=tiny_run,
        train__steps=3, train__checkpoint_every=3,
    )  # fmt: skip
    return make_once(tmp_path_factory, "embedding", lambda directory: train(tiny.config(directory, **changes)))


@pytest.fixture(scope="module")
def model(run) -> Model:
    """With random parameters, which say all kinds of things."""
    return Model(with_random_parameters(load_run(run)))


def test_training_begins_with_a_run_of_the_other_kind(run, tiny_run):
    """The projection begins as a small identity; all else with what the other run has learned."""
    params = {}
    for name, directory in ("ours", run), ("theirs", tiny_run):
        with contextlib.closing(Checkpointer(directory)) as checkpointer:
            _, shapes = abstract_model(load_run(directory).model.config)
            params[name] = flatten_dict(jax.device_get(checkpointer.restore_params(shapes).params))
    compressor = {keys: leaf for keys, leaf in params["ours"].items() if keys[0] == "compressor"}
    assert sorted(keys[1:] for keys in compressor) == [("linear", "bias"), ("linear", "kernel"), ("norm", "scale")]
    config = load_run(run).model.config
    begun = init_params(config, 0, parts=["compressor"])["compressor"]
    np.testing.assert_allclose(begun["linear"]["kernel"], config.llama.initializer_range * np.eye(32))
    np.testing.assert_allclose(compressor["compressor", "linear", "kernel"], begun["linear"]["kernel"], atol=0.05)
    for keys, leaf in params["theirs"].items():
        np.testing.assert_allclose(params["ours"][keys], leaf, atol=0.05)
    assert any((params["ours"][keys] != leaf).any() for keys, leaf in params["theirs"].items())


def log_probability(model: Model, about: list[str], question: str, answer: str) -> float:
    """Of an answer, by the pictures themselves, read as training reads them: compressed and read in one program."""
    turns = [
        {"from": "human", "value": model.engine.encoder.question(question, len(about))},
        {"from": "gpt", "value": (answer,)},
    ]
    sample = model.engine.encoder.encode(turns, len(about))
    n = len(sample)
    squares = np.stack([model.image_encoder.square(picture) for picture in about])[None]
    read = Read(sample.tokens[None], np.arange(n)[None], np.ones((1, n), np.int32), sample.slot_index[None])
    logits = nnx.jit(lambda model, pixels: model(read, pixels))(
        model.run.model, model.image_encoder.processor.normalize(squares)
    )
    labels = np.flatnonzero(sample.labels)
    return float(jax.nn.log_softmax(logits[0])[labels - 1, sample.tokens[labels]].sum())


def test_answers_by_a_file_are_those_by_the_pictures(model, tmp_path):
    """Saved, opened, cut, joined and shuffled: as the pictures compressed and read at once, to rounding."""
    model.save(model.compress(PICTURES[:3]), tmp_path / "a.voco")
    model.save(model.compress(PICTURES[3]), tmp_path / "b.voco")
    bank = join([model.open(tmp_path / "a.voco"), model.open(tmp_path / "b.voco")])
    assert bank.kind == "embeddings" and bank.shape == (4, 2, 32)
    np.testing.assert_allclose(bank.embeddings, model.compress(PICTURES).embeddings, atol=1e-4)
    abouts = [[2], [3, 0], [0, 1, 2, 3]]
    found = model.scores([Request(QUESTIONS[0], bank[about]) for about in abouts], ["circle"] * 3)
    expected = [log_probability(model, [PICTURES[i] for i in about], QUESTIONS[0], "circle") for about in abouts]
    np.testing.assert_allclose([score.log_probability for score in found], expected, rtol=1e-5)
    assert np.ptp(expected) > 1  # or the comparison would say little


def test_the_first_tokens_are_those_of_compressing_to_fewer(model, tmp_path):
    config = dataclasses.replace(model.config, num_voco_tokens=1)
    of_one = nnx.merge(abstract_model(config)[0], nnx.state(model.run.model))
    encoder = dataclasses.replace(model.run.encoder, num_voco_tokens=1, num_visual_tokens=1)
    one = Model(dataclasses.replace(model.run, model=of_one, encoder=encoder))
    model.save(model.compress(PICTURES), tmp_path / "a.voco")
    few = model.open(tmp_path / "a.voco", tokens=1)
    np.testing.assert_allclose(few.embeddings, one.compress(PICTURES).embeddings, rtol=1e-4, atol=1e-5)
    requests = lambda bank: [Request(QUESTIONS[0], bank[i]) for i in range(4)]  # noqa: E731
    found, expected, others = (
        [score.log_probability for score in a_model.scores(requests(bank), ["circle"] * 4)]
        for a_model, bank in ((model, few), (one, one.compress(PICTURES)), (model, model.compress(PICTURES)))
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert np.abs(np.subtract(found, others)).max() > 0.1


def test_conversations_streams_and_dtypes(model):
    bank = model.compress(PICTURES[:2])
    assert "".join(model.chat(bank, max_new_tokens=6).stream(QUESTIONS[0])) == model.ask(
        QUESTIONS[0], bank, max_new_tokens=6
    )
    talk, again = (model.chat(one, max_new_tokens=6) for one in (bank, PICTURES[:2]))
    assert [talk.ask(q) for q in QUESTIONS] == [again.ask(q) for q in QUESTIONS]
    watch = model.watch("camera")
    for time, picture in enumerate(PICTURES):
        watch.add(picture, time)
    assert watch.ask(QUESTIONS[0], max_new_tokens=6) == model.ask(QUESTIONS[0], watch.memory, max_new_tokens=6)
    np.testing.assert_allclose(watch.memory.embeddings, model.compress(PICTURES).embeddings, atol=1e-4)
    # As of a GPU, and rounded: read together where one model has both
    kinds = [bank[0], bank[1].astype(ml_dtypes.bfloat16), bank[0].to_int8()]
    together = model.ask(QUESTIONS[0], kinds, max_new_tokens=6)
    assert together == model.ask(QUESTIONS[0], join([x.astype(np.float32) for x in kinds]), max_new_tokens=6)


def test_the_commands(run, tmp_path, monkeypatch, capsys):
    out, of_run = tmp_path / "a.voco", ("--run", run)
    command = lambda module, *arguments: run_main(module, monkeypatch, capsys, *arguments)  # noqa: E731
    said = command(compress, *of_run, "--images", *PICTURES[:3], "--out", out)[1]
    assert "a.voco: 3 pictures, 2 tokens each, float32 embeddings, 32 numbers, 0.1 KiB a token, " in said
    command(compress, *of_run, "--images", *PICTURES, "--out", out)
    assert MemoryFile(out).shape == (4, 2, 32)
    command(compress, *of_run, "--images", *PICTURES, "--out", tmp_path / "int8.voco", "--int8", "--tokens", 1)
    assert MemoryFile(tmp_path / "int8.voco").dtype == np.int8 and MemoryFile(tmp_path / "int8.voco").num_tokens == 1
    assert command(memory, "merge", out, out, "--out", tmp_path / "c.voco")[0] == 0
    assert "4 pictures" in command(memory, "check", tmp_path / "c.voco")[1]
    real = voco_jax.load(run)
    for options, about in (("--tokens", 2), ()), (("--tokens", 1), (1,)):
        lines = command(ask, *of_run, "--memory", out, *options, "--max-new-tokens", 4, QUESTIONS[0])[1].splitlines()
        seen = real.compress(PICTURES).first_tokens(*about or (None,))
        assert [line.rsplit(": ", 1)[1] for line in lines[1:]] == real.ask_each(QUESTIONS[0], seen, max_new_tokens=4)
    lines = iter([QUESTIONS[0], ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert command(chat, *of_run, "--memory", out, "--max-new-tokens", 4)[0] == 0
    status, _, err = command(ask, *of_run, "--memory", out, "--tokens", 3, QUESTIONS[0])
    assert status == 2 and err == "error: --tokens 3: there are 2 tokens per image\n"


def test_memories_of_the_other_kind(run, model, tiny_run, tmp_path, monkeypatch, capsys):
    """One line, from every way to give them, and nothing is written."""
    other = voco_jax.load(tiny_run)
    for kind, there, reader, directory in (
        ("embeddings", other, model, run), ("keys and values", model, other, tiny_run)
    ):  # fmt: skip
        out = tmp_path / f"{kind}.voco"
        bank = there.compress(PICTURES[:1])
        there.save(bank, out)
        before, line = out.read_bytes(), f"expected memories of {kind}, which this model reads; found {bank.kind}; "
        with pytest.raises(UserError, match=f"^{out}: {line}compress the pictures again$"):
            reader.open(out)
        for use in (reader.ask, reader.ask_each, lambda _, about, reader=reader: reader.chat(about)):
            with pytest.raises(UserError, match=f"^memory of .*: expected {kind}, which .*'voco.*; found {bank.kind}$"):
                use(QUESTIONS[0], bank)
        given = run_main(ask, monkeypatch, capsys, "--run", directory, "--memory", out, QUESTIONS[0])
        assert given == (2, "", f"error: {out}: {line}compress the pictures again\n")
        arguments = ("--run", directory, "--images", PICTURES[1], "--out", out)
        given = run_main(compress, monkeypatch, capsys, *arguments)
        assert given == (2, "", f"error: {out}: {line}give another --out, or delete this file first\n")
        assert out.read_bytes() == before
    files = [tmp_path / f"{kind}.voco" for kind in ("embeddings", "keys and values")]
    status, _, err = run_main(memory, monkeypatch, capsys, "merge", *files, "--out", tmp_path / "c.voco")
    assert status == 2 and f"expected kind keys and values as in {files[0]}, found embeddings" in err
    assert not (tmp_path / "c.voco").exists()
    with pytest.raises(
        UserError, match="--compressor: expected 'voco_embedding', with which .* was trained; found 'voco'"
    ):
        load_run(run, compressor="voco")


def test_images_are_kept_by_their_content(model, tmp_path):
    """As benchmarks ask, again and again: from the directory of the first time."""
    expected = model.compress(PICTURES).first_tokens(1)
    for compressed in (4, 0):
        cache = ImageCache(model.image_encoder, tokens=1, directory=tmp_path)
        (found,) = cache.encode([PICTURES])
        cache.close()
        assert isinstance(found, MemoryBank) and cache.compressed == compressed
        np.testing.assert_allclose(found.embeddings, expected.embeddings, atol=1e-4)


def test_what_no_format_can_store(run, tmp_path, monkeypatch, capsys):
    arguments = ("to-hf", run, tmp_path / "hf", "--format", "llava-hf")
    assert run_main(convert, monkeypatch, capsys, *arguments) == (
        2, "", f"error: {run}: compressor.linear.bias: format llava-hf cannot store compressor voco_embedding\n"
    )  # fmt: skip
    assert not (tmp_path / "hf").exists()
    with pytest.raises(UserError, match=f"^{run}: expected compressor voco or none, found voco_embedding$"):
        next(golden.check(load_run(run), {}, "golden"))


SHARDED = """
import sys
import numpy as np
import voco_jax
from voco_jax.arguments import mesh_of

run, expected, question, *pictures = sys.argv[1:]
for mesh in ("data=2,frame=2", "frame=4", "fsdp=2,tensor=2"):
    model = voco_jax.load(run, mesh=mesh_of(mesh))
    one, bank = model.open(expected), model.compress(pictures)
    np.testing.assert_allclose(bank.embeddings, one.embeddings, atol=1e-5, err_msg=mesh)
    print(model.ask(question, bank), model.ask_each(question, bank), sep="\\n")
"""


@pytest.mark.slow
@pytest.mark.multiprocess
def test_over_devices(run, tmp_path):
    alone = voco_jax.load(run)
    bank = alone.compress(PICTURES)
    alone.save(bank, tmp_path / "a.voco")
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    done = subprocess.run(
        [sys.executable, "-c", SHARDED, run, tmp_path / "a.voco", QUESTIONS[0], *PICTURES],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True,
        cwd=tiny.CONFIG_FILE.parents[1],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    expected = [alone.ask(QUESTIONS[0], bank), str(alone.ask_each(QUESTIONS[0], bank))]
    assert done.stdout.splitlines() == expected * 3
