"""A teacher's logits, stored and read back: what it says itself, for the right labels; and what is refused."""

import contextlib
import dataclasses
import json
from pathlib import Path
import shutil
import sys
import tempfile

from flax import nnx
from grain.sources import ArrayRecordDataSource
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from tests.data.test_video import write_clip
from tests.helpers import tiny
from tests.helpers.commands import run_main
from tests.helpers.eight_devices import failures_of, run_checks
from tests.helpers.shared import make_once
from voco_jax import store_logits
from voco_jax.arguments import mesh_of
from voco_jax.checkpoint.checkpointer import Checkpointer
from voco_jax.checkpoint.run import load_run
from voco_jax.config import save_config, source, sources, typed
from voco_jax.data.from_config import make_model_config
from voco_jax.data.images import load_image
from voco_jax.data.packing import pack_row
from voco_jax.data.stored_logits import Logits, form_of, pack_logits, unpack_logits
from voco_jax.data.teaching import TeacherFormat
from voco_jax.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from voco_jax.data.training_data import open_training_data
from voco_jax.errors import UserError
from voco_jax.models.build import abstract_model
from voco_jax.models.read import Read
from voco_jax.train.loop import train
from voco_jax.train.loss_types import LossConfig, LossExtra
from voco_jax.train.losses import make_loss

SMALL = {
    "model__llama__hidden_size": 16, "model__llama__intermediate_size": 16, "model__llama__head_dim": 8,
    "model__llama__vocab_size": 8,
    "model__llama__num_attention_heads": 2, "model__llama__num_key_value_heads": 2,
    "model__vision__hidden_size": 8, "model__vision__intermediate_size": 8, "model__vision__num_attention_heads": 1,
    "model__dtype": "float32", "data__batch_size": 1, "data__images_per_pack": 2, "data__conversations_per_record": 0,
    "data__video__random_offset": False,
}  # fmt: skip
RECORDS = 13


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Two files of rows: conversations about a picture, one about two, one about none; a tokenizer; a teacher, which is
    plain LLaVA of another size, with pictures of another size and other prompts."""
    return make_once(tmp_path_factory, "store logits", _make_files)


def _make_files(directory: Path) -> None:
    directory.mkdir()
    rng, rows, words = np.random.default_rng(0), [], ["red", "blue", "a cat", "it is a dog"]
    for i in range(RECORDS):
        count = 2 if i == 3 else 0 if i == 5 else 1
        names = [f"{i}-{n}.png" for n in range(count)]
        for name in names:
            Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(directory / name)
        turns = []
        for turn in range(1 + i % 3):
            images = "<image>\n" * count if not turn else ""
            turns += [
                {"from": "human", "value": f"{images}what is it?"},
                {"from": "gpt", "value": words[(i + turn) % 4]},
            ]
        rows.append({"image": names, "conversations": turns} if count else {"conversations": turns})
    (directory / "rows.json").write_text(json.dumps(rows))
    (directory / "more.json").write_text(json.dumps(rows[::-1]))
    tokenizer = train_tokenizer(["USER: what is it? ASSISTANT: a red blue dog cat\n"] * 9, 300)
    save_tokenizer(tokenizer, directory / "tokenizer")
    make_run(directory, directory / "teacher", model__compressor="none", model__num_voco_tokens=0,
             model__vision__image_size=32, model__llama__num_hidden_layers=1, data__template="llava_v1")  # fmt: skip


def make_config(files: Path, workdir: Path, names=("mine",), **changes):
    config = tiny.config(workdir, tokenizer__source=files / "tokenizer", **SMALL | changes)
    files_of = {"mine": files / "rows.json", "more": files / "more.json"}
    config.data.train = sources(
        **{name: source("llava", file=str(files_of[name]), images=str(files)) for name in names}
    )
    return config


def make_run(files: Path, run: Path, **changes) -> None:
    config, tokenizer = make_config(files, run, **changes), load_tokenizer(files / "tokenizer")
    run.mkdir()
    save_config(config, run / "config.json")
    save_tokenizer(tokenizer, run / "tokenizer")
    rng = np.random.default_rng(1)
    draw = lambda x: jnp.asarray(0.5 * rng.normal(size=x.shape), x.dtype)  # noqa: E731
    params = jax.tree.map(draw, abstract_model(make_model_config(config, tokenizer))[1])
    with contextlib.closing(Checkpointer(run, create=True, config=config)) as checkpointer:
        checkpointer.save(1, params, {"m": jnp.zeros(2)}, {"batches": 1})


def put(files, out, names=("mine",), **options):
    """Store the logits of the teacher."""
    defaults = dict(k=5, dtype="float16", batch_size=2, records_per_shard=4)
    return store_logits.store(make_config(files, out, names), load_run(files / "teacher"), out, **defaults | options)


@pytest.fixture(scope="module")
def stored(files, tmp_path_factory) -> Path:
    """Five logits a label, in float16: four shards. Tests take copies."""
    return make_once(tmp_path_factory, "stored", lambda out: put(files, out))


def opened(files, tmp_path, logits, **changes):
    """The training data of a student that learns from logits."""
    keys = dict(train__loss="distillation", train__distill__logits=logits, model__num_voco_tokens=2)
    config = make_config(files, tmp_path / "student", **keys | changes)
    return open_training_data(config, log=lambda line: None)


def epoch_of(data) -> list[dict]:
    batches = data.batches
    with contextlib.closing(batches):
        return [next(batches) for _ in range(-(-len(batches.loader.plan.packs(0)) // batches.batch_size))]


def says(run, rows) -> list[np.ndarray]:
    """What the teacher says at the labels of each row of the file, one at a time: [labels, V]."""
    graphdef, state = nnx.split(run.model)

    @jax.jit
    def logits(state, read, pixels):
        return nnx.merge(graphdef, state)(read, pixels)

    found = []
    for row in rows:
        names = row.get("image", [])
        sample = run.encoder.encode(row["conversations"], len(names))
        laid_out = pack_row([sample], 220)
        pixels = np.zeros((1, 2, 32, 32, 3), np.float32)
        for i, name in enumerate(names):
            pixels[0, i] = run.processor(load_image(name))
        read = Read(*(getattr(laid_out, name)[None] for name in Read._fields))
        found.append(np.asarray(logits(state, read, pixels))[0, np.flatnonzero(sample.labels) - 1])
    return found


def relative(logits: np.ndarray) -> np.ndarray:
    return logits - logits.max(axis=-1, keepdims=True)


def conversations(data, batch) -> list[tuple[str, np.ndarray, np.ndarray, np.ndarray]]:
    """(text, ids, logits, which are taught) of each conversation of a batch, at its labels."""
    found = []
    for r, segments in enumerate(batch["segment_ids"]):
        for segment in range(1, segments.max() + 1):
            at = np.flatnonzero((segments == segment) & (batch["weights"][r] > 0))
            text = data.tokenizer.decode(batch["tokens"][r][segments == segment])
            found.append((text, *(batch[name][r, at] for name in ("teacher_ids", "teacher_logits", "taught"))))
    return found


def test_all_logits_come_back(files, tmp_path):
    """k is the whole vocabulary, in float32: at every label of every conversation what the model says itself."""
    run = load_run(files / "teacher")
    vocab_size = run.model.config.llama.vocab_size
    names = ("mine", "more")  # two sources
    manifest, report = put(files, tmp_path / "out", names, k=vocab_size, dtype="float32")
    assert not report.skipped and manifest["rows"] == 2 * RECORDS and len(manifest["shards"]) == 8
    data = opened(files, tmp_path, tmp_path / "out", names=names)
    rows = json.loads((files / "rows.json").read_text())
    rows = [row | {"image": [files / name for name in row.get("image", [])]} for row in rows]
    expected = {}  # several records have the same text
    for row, logits in zip(rows, says(run, rows), strict=True):
        sample = data.batches.loader.maker.encoder.encode(row["conversations"], len(row["image"]))
        expected.setdefault(data.tokenizer.decode(sample.tokens), []).append(relative(logits))
    seen = 0
    for batch in epoch_of(data):
        assert (batch["teacher_ids"].dtype, batch["teacher_logits"].dtype) == (np.int32, np.float32)
        assert not batch["taught"][batch["weights"] == 0].any()
        assert np.isneginf(batch["teacher_logits"][~batch["taught"]]).all()
        for text, ids, logits, taught in conversations(data, batch):
            assert taught.all() and (np.diff(logits, axis=1) <= 0).all()
            dense = np.zeros_like(logits)
            np.put_along_axis(dense, ids, logits, axis=1)
            assert (np.sort(ids, axis=1) == np.arange(vocab_size)).all()
            np.testing.assert_allclose(min(np.abs(dense - other).max() for other in expected[text]), 0, atol=2e-5)
            seen += 1
    assert seen == 2 * RECORDS and len(expected) > 6


def test_a_run_goes_on_with_its_own_logits(files, stored, tmp_path):
    put(files, tmp_path / "others", k=4)
    state = opened(files, tmp_path, stored).batches.get_state()
    shutil.copytree(stored, tmp_path / "moved")
    opened(files, tmp_path, tmp_path / "moved").batches.set_state(json.loads(json.dumps(state)))
    with pytest.raises(UserError, match="^config.train.distill.logits: expected the logits that this run began with"):
        opened(files, tmp_path, tmp_path / "others").batches.set_state(state)


@pytest.mark.slow
def test_the_loss_is_that_of_the_teacher_in_process(files, tmp_path):
    """With all logits, in float32: loss, KL divergence and the gradient of every parameter, at a temperature."""
    make_run(files, tmp_path / "teacher", model__compressor="none", model__num_voco_tokens=0, data__template="llava_v1")
    teacher = load_run(tmp_path / "teacher")
    k = len(teacher.encoder.tokenizer)
    config = make_config(files, tmp_path / "student", model__num_voco_tokens=2, data__batch_size=3)
    options = dict(k=k, dtype="float32", batch_size=2, records_per_shard=20)
    store_logits.store(config, teacher, tmp_path / "out", **options)
    config.train.loss, config.train.distill.temperature, config.train.distill.alpha = "distillation", 2.0, 0.7
    found = []
    for name in ("teacher", "logits"):
        config.train.distill.update(teacher="", logits="")
        config.train.distill[name] = str(tmp_path / ("teacher" if name == "teacher" else "out"))
        form = TeacherFormat(teacher.encoder) if name == "teacher" else None
        data = open_training_data(config, teacher=form, log=lambda line: None)
        batch = data.batches.peek()
        batch["pixel_values"] = np.asarray(teacher.processor.normalize(batch["pixel_values"]))
        most = data.batches.loader.teaching.images_per_row if form else 1
        loss = make_loss(
            LossConfig("distillation", True, typed(config).train.distill, 9, most, by_rows=form is not None)
        )
        graphdef, shapes = abstract_model(data.model_config)
        rng = np.random.default_rng(3)
        params = jax.tree.map(lambda x, rng=rng: 0.5 * rng.normal(size=x.shape).astype(x.dtype), shapes)

        def value(params, batch, loss=loss, graphdef=graphdef, own=teacher.model if form else None):
            output = loss(nnx.merge(graphdef, params), batch, LossExtra(0, own))
            return output.means()["loss"], output.means()

        found.append(jax.device_get(jax.jit(jax.grad(value, has_aux=True))(params, batch)))
    (gradient, means), (expected, in_process) = found[1], found[0]
    assert means.keys() == in_process.keys() >= {"kl"} and means["taught"] == 1 and means["kl"] > 0.1
    for name in means:
        np.testing.assert_allclose(means[name], in_process[name], rtol=1e-5, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradient, expected)


@pytest.mark.slow
def test_a_training_goes_on_bit_for_bit(files, stored, tmp_path):
    """From stored logits, each pack with its own number of VoCo tokens: in one go, and from its second step on."""
    keys = dict(
        train__loss="distillation", train__distill__logits=stored, model__num_voco_tokens=3, data__batch_size=4,
        train__elastic_k=(1, 2, 3), optim__schedule="constant", optim__warmup_steps=1, train__checkpoint_every=2,
        train__log_every=1, train__tensorboard=False,
    )  # fmt: skip
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(make_config(files, whole, train__steps=4, **keys))
    shutil.copytree(whole, stopped)
    shutil.rmtree(stopped / "checkpoints" / "4")
    train(make_config(files, stopped, train__steps=4, **keys))
    lines = [[json.loads(line) for line in (run / "metrics.jsonl").open()] for run in (whole, stopped)]
    values = [
        [{key: line[key] for key in ("step", "loss", "kl", "taught", "grad_norm")} for line in of] for of in lines
    ]
    assert values[0] == values[1] and [line["taught"] for line in values[0]] == [1] * 4
    runs = (load_run(run) for run in (whole, stopped))
    jax.tree.map(np.testing.assert_array_equal, *(nnx.to_pure_dict(nnx.state(run.model)) for run in runs))


@pytest.mark.slow
def test_the_largest_in_half_the_bytes(files, stored, tmp_path):
    """Five logits as float16; the student may take fewer of them, have another K, template and row length."""
    put(files, tmp_path / "whole", k=5, dtype="float32")
    data = opened(files, tmp_path, tmp_path / "whole")
    whole = {text: found for batch in epoch_of(data) for text, *found in conversations(data, batch)}
    data = opened(files, tmp_path, stored, train__distill__top_k=3)
    for batch in epoch_of(data):
        assert batch["teacher_ids"].shape[-1] == 3
        for text, ids, logits, taught in conversations(data, batch):
            if text.count("it?") == 3:  # texts of one turn stand in several records
                np.testing.assert_array_equal(ids, whole[text][0][:, :3])
                np.testing.assert_array_equal(logits, whole[text][1][:, :3].astype(np.float16))
            assert taught.all()
    other = opened(files, tmp_path, stored, model__num_voco_tokens=3, data__template="voco_v1")
    assert all(taught.all() for batch in epoch_of(other) for *_, taught in conversations(other, batch))
    short = opened(files, tmp_path, stored, data__row_length=24)
    assert any((batch["weights"] > 0).any() for batch in epoch_of(short))
    assert all(taught.all() for batch in epoch_of(short) for *_, taught in conversations(short, batch))


def test_a_stopped_command_goes_on(files, stored, tmp_path, monkeypatch):
    """Killed while the third shard is written: the others are not made again, and all are byte for byte the same."""
    out, asked = tmp_path / "out", []
    write, shard = store_logits.pack_logits, store_logits.Storing.shard
    monkeypatch.setattr(store_logits.Storing, "shard", lambda self, *a: asked.append(a[-2].name) or shard(self, *a))

    def interrupted(*arguments):
        if len(asked) == 3:
            raise KeyboardInterrupt
        return write(*arguments)

    monkeypatch.setattr(store_logits, "pack_logits", interrupted)
    with pytest.raises(KeyboardInterrupt):
        put(files, out)
    monkeypatch.setattr(store_logits, "pack_logits", write)
    names = [f"data-{i:05d}-of-00004.array_record" for i in range(4)]
    assert [name for name in names if (out / name).exists()] == names[:2]
    (out / f".{names[2]}.0123abcd.new").write_bytes(b"a killed process leaves this")
    with pytest.raises(UserError, match="not complete; run voco store-logits again"):
        opened(files, tmp_path, out)
    with pytest.raises(UserError, match=r"was begun with k = 5, not 4; nothing was changed"):
        put(files, out, k=4)
    asked.clear()
    put(files, out)
    assert asked == names[2:]
    assert sorted(file.name for file in out.iterdir()) == sorted(file.name for file in stored.iterdir())
    for file in out.iterdir():
        assert file.read_bytes() == (stored / file.name).read_bytes()


def test_the_command(files, tmp_path, monkeypatch, capsys):
    config = tmp_path / "student.py"
    config.write_text(
        "from voco_jax.config import default_config, source, sources\n\n\ndef get_config():\n"
        "    config = default_config()\n"
        f"    mine = source('llava', file={str(files / 'rows.json')!r}, images={str(files)!r})\n"
        "    config.data.train = sources(mine=mine)\n"
        f"    config.tokenizer.source = {str(files / 'tokenizer')!r}\n"
        "    return config\n"
    )
    keys = [f"--config.{key.replace('__', '.')}={value}" for key, value in SMALL.items()]
    arguments = ["--run", files / "teacher", f"--config={config}", "--out", tmp_path / "out", "--k=2", *keys]
    status, said, err = run_main(store_logits, monkeypatch, capsys, *arguments)
    assert (status, "error" in err) == (0, False)
    data = opened(files, tmp_path, tmp_path / "out")
    labels = sum(int(taught.sum()) for batch in epoch_of(data) for *_, taught in conversations(data, batch))
    assert f"({RECORDS} conversations, {labels} tokens, 0." in said.splitlines()[-1]
    status, _, err = run_main(store_logits, monkeypatch, capsys, *arguments, "--config.data.random_crop=0.5")
    expected = "config.data.random_crop: expected 1 with voco store-logits: a teacher that was asked beforehand saw"
    assert status == 2 and err.startswith(f"error: {expected}")


# ---- What is refused -------------------------------------------------------------------------------------------------


def edit(file: Path, change) -> None:
    rows = json.loads(file.read_text())
    change(rows)
    file.write_text(json.dumps(rows))


def another_answer(files: Path, out: Path) -> None:
    edit(files / "rows.json", lambda rows: rows[4]["conversations"][1].update(value="green"))


def another_picture(files: Path, out: Path) -> None:
    Image.new("RGB", (20, 24)).save(files / "7-0.png")


def fewer_records(files: Path, out: Path) -> None:
    edit(files / "rows.json", lambda rows: rows.pop())


def another_tokenizer(files: Path, out: Path) -> None:
    shutil.rmtree(files / "tokenizer")
    save_tokenizer(train_tokenizer(["what else is it?"] * 9, 300), files / "tokenizer")


def cut_off(files: Path, out: Path) -> None:
    shard = out / "data-00001-of-00004.array_record"
    shard.write_bytes(shard.read_bytes()[:-100])


def gone(files: Path, out: Path) -> None:
    (out / "data-00002-of-00004.array_record").unlink()


def damaged(files: Path, out: Path) -> None:
    shard = out / "data-00001-of-00004.array_record"
    content = shard.read_bytes()
    shard.write_bytes(content[:70] + bytes(90) + content[160:])  # where the table is


def of_records(files: Path, out: Path) -> None:
    edit(out / "manifest.json", lambda manifest: manifest.update(format="voco_jax records"))


def odd_manifest(files: Path, out: Path) -> None:
    edit(out / "manifest.json", lambda manifest: manifest["arguments"].pop("teacher"))


@pytest.mark.parametrize(
    "spoil, changes, message",
    [
        (another_answer, {}, r"OUT: 1 conversation of config.data.train.mine had other answers when they were "
         r"stored, or another template around them; the first: rows.json\[4\]$"),
        (another_picture, {}, r"OUT: rows.json\[7\] had another picture or clip$"),
        (fewer_records, {}, r"OUT: config.data.train.mine had 13 records when they were stored, now 12$"),
        (another_tokenizer, {}, r"OUT: of another tokenizer: its vocabulary is not that of this run$"),
        (None, dict(data__template="custom", data__custom_template__answer=" so, "), r"OUT: 13 conversations of"),
        (cut_off, {}, r"OUT/data-00001-of-00004.array_record: expected \d+ bytes, found \d+ bytes; the manifest says"),
        (gone, {}, r"OUT/data-00002-of-00004.array_record: expected \d+ bytes, found none; the manifest says so$"),
        (damaged, {}, r"OUT/data-00001-of-00004.array_record: damaged \("),
        (of_records, {}, r"OUT/manifest.json: expected the manifest of voco_jax logits, version 1$"),
        (odd_manifest, {}, r"OUT: not the manifest of voco store-logits \(KeyError\('teacher'\)\)$"),
    ],
)  # fmt: skip
def test_logits_of_something_else(files, stored, tmp_path, spoil, changes, message):
    here, out = tmp_path / "files", tmp_path / "out"
    shutil.copytree(files, here)
    shutil.copytree(stored, out)
    if spoil is not None:
        spoil(here, out)
    with pytest.raises(UserError) as caught:
        opened(here, tmp_path, out, **changes)
    assert "\n" not in str(caught.value)
    assert caught.match(r"^config.train.distill.logits: " + message.replace("OUT", str(out)))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(data__random_crop=0.9), "config.data.random_crop: expected 1 with config.train.distill.logits"),
        (dict(data__color_jitter=0.1), "config.data.color_jitter: expected 0 with config.train.distill.logits"),
        (dict(train__distill__top_k=6), "config.train.distill.top_k: expected at most 5, as many as "),
        (dict(train__distill__logits="/nowhere"), "config.train.distill.logits: expected a directory that voco store-"),
    ],
)
def test_what_does_not_go_with_stored_logits(files, stored, tmp_path, changes, message):
    with pytest.raises(UserError, match="^" + message):
        opened(files, tmp_path, stored, **changes)


def test_frames_of_clips_are_those_that_the_teacher_saw(files, stored, tmp_path):
    out, turns = tmp_path / "out", [{"from": "human", "value": "<video>\nwhat?"}, {"from": "gpt", "value": "red"}]
    shutil.copytree(stored, out)
    shutil.copytree(files, tmp_path / "files")
    write_clip(tmp_path / "files" / "clip.mp4")
    (tmp_path / "files" / "rows.json").write_text(json.dumps([{"video": "clip.mp4", "conversations": turns}]))
    of_clip = {"size": 1, "visual": {}, "shards": [0, 1]}
    edit(out / "manifest.json", lambda manifest: manifest["arguments"]["sources"].update(mine=of_clip))
    keys = dict(data__images_per_pack=8)
    with pytest.raises(UserError, match="^config.data.video.random_offset: expected false with config.train.distill.l"):
        opened(tmp_path / "files", tmp_path, out, data__video__random_offset=True, **keys)
    with pytest.raises(UserError, match=f"^config.train.distill.logits: {out}: of other frames: config.data.video was"):
        opened(tmp_path / "files", tmp_path, out, data__video__num_frames=4, **keys)
    opened(tmp_path / "files", tmp_path, out, **keys)  # record 0 had the same answer


def test_a_record_that_is_damaged_ends_the_training(files, stored, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(stored, out)
    for shard in out.glob("data-0000[0-2]*.array_record"):
        content = shard.read_bytes()
        last = max(i for i in range(2**16) if content[i])  # of the records; what follows tells where they are
        spoilt = slice(last * 6 // 10, last * 7 // 10)
        shard.write_bytes(content[: spoilt.start] + bytes(spoilt.stop - spoilt.start) + content[spoilt.stop :])
    data = opened(files, tmp_path, out)
    with pytest.raises(
        UserError, match=rf"^config.train.distill.logits: {out}/data-0000\d-of-00004.array_record: damaged \("
    ):
        epoch_of(data)


def test_teachers_that_cannot_teach(files, tmp_path):
    with pytest.raises(UserError, match=r"^--k: expected at most \d+, the vocabulary; found 100000$"):
        put(files, tmp_path / "out", k=100_000)
    run = load_run(files / "teacher")
    config = make_config(files, tmp_path)
    config.tokenizer.source = "train"
    options = dict(k=2, dtype="float16", batch_size=2, records_per_shard=4)
    with pytest.raises(UserError, match="^--run: .*: expected the tokenizer of the config, found another vocabulary$"):
        store_logits.store(config, run, tmp_path / "out", **options)
    encoder = dataclasses.replace(run.encoder, template=dataclasses.replace(run.encoder.template, answer=" so, "))
    with pytest.raises(UserError, match="^--run: 13 of 13 conversations have other tokens in the teacher's answers; "):
        store_logits.store(
            make_config(files, tmp_path), dataclasses.replace(run, encoder=encoder), tmp_path / "out", **options
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("vocab_size, dtype", [(300, "float16"), (100_000, "float32")])
def test_records(vocab_size, dtype):
    rng, form = np.random.default_rng(0), form_of(3, vocab_size, dtype)
    logits = np.sort(rng.normal(size=(4, 3)).astype(np.float32))[:, ::-1]
    ids, labels = rng.integers(0, vocab_size, (4, 3)), rng.integers(0, vocab_size, 4)
    found = unpack_logits(pack_logits(Logits(labels, ids, logits), form), form)
    np.testing.assert_array_equal(found.labels, labels)
    np.testing.assert_array_equal(found.ids, ids)
    np.testing.assert_array_equal(found.logits, relative(logits).astype(dtype))
    assert len(unpack_logits(pack_logits(None, form), form).labels) == 0
    for content in b"", b"\x80", pack_logits(None, form)[:-1], b"\x83" + b"\xa3ids\xc4\x00" * 3:
        with pytest.raises(ValueError):
            unpack_logits(content, form)


# ---- Over a mesh ----------------------------------------------------------------------------------------------------


def over_a_mesh_the_same_is_stored():
    """Rows and images on eight devices, and a batch that is rounded up to them."""
    with tempfile.TemporaryDirectory() as directory:
        files, out = Path(directory) / "files", Path(directory) / "out"
        _make_files(files)
        form, stored = form_of(5, 300, "float32"), []
        for mesh in (None, mesh_of("data=2,fsdp=2,frame=2")):
            run, its_out = load_run(files / "teacher", mesh=mesh), out.with_name(f"out {mesh is None}")
            config = make_config(files, its_out)
            store_logits.store(config, run, its_out, k=5, dtype="float32", batch_size=3, records_per_shard=20)
            source = ArrayRecordDataSource([str(its_out / "data-00000-of-00001.array_record")])
            stored.append([unpack_logits(source[i], form) for i in range(1, 1 + RECORDS)])
        for alone, spread in zip(*stored, strict=True):
            np.testing.assert_array_equal(alone.labels, spread.labels)
            np.testing.assert_array_equal(alone.ids, spread.ids)
            np.testing.assert_allclose(alone.logits, spread.logits, atol=2e-5)


@pytest.mark.slow
def test_over_a_mesh():
    assert failures_of(__name__) == {}


if __name__ == "__main__":
    run_checks({"over_a_mesh_the_same_is_stored": over_a_mesh_the_same_is_stored}, sys.argv[1:])
