"""Trainings with a teacher as their users meet them: they go on bit for bit; what cannot teach is refused in a line."""

import json
from pathlib import Path
import re
import shutil

from flax import nnx
import jax
import numpy as np
import pytest

from tests.helpers import tiny
from voco_jax.checkpoint.resume import TEACHER, check_same_run
from voco_jax.checkpoint.run import load_run
from voco_jax.config import load_config, save_config, set_value, typed
from voco_jax.data.tokenizer import load_run_tokenizer
from voco_jax.errors import UserError
from voco_jax.parallel.mesh import make_mesh
from voco_jax.train.distillation_checks import check_keys, check_models
from voco_jax.train.loop import train
from voco_jax.train.teachers import find_teacher, load_teacher, place_teacher

SHORT = dict(train__steps=4, train__checkpoint_every=2, train__log_every=1, optim__warmup_steps=0)


def distilling(workdir: Path, teacher, **changes):
    changes = {f"train__distill__{key}": value for key, value in changes.items()}
    return tiny.config(workdir, train__loss="distillation", train__distill__teacher=str(teacher), **SHORT, **changes)


def state(run: Path, step: int = 4) -> dict[str, int]:
    """Checksums of parameters and optimizer."""
    checkpoint = json.loads((run / "checkpoints" / str(step) / "run" / "metadata").read_text())
    return checkpoint["checksums"]["params"] | checkpoint["checksums"]["opt_state"]


@pytest.mark.slow
def test_a_run_with_a_running_mean_goes_on_bit_for_bit(tmp_path):
    config = distilling(tmp_path / "run", "ema", ema_decay=0.5, alpha_end=1.0)
    run = train(config)
    whole = state(run)
    assert any(name.startswith("inner.ema.llama") for name in whole)
    shutil.rmtree(run / "checkpoints" / "4")
    train(config)
    assert state(run) == whole


@pytest.mark.slow
def test_a_run_that_was_taught_goes_on_bit_for_bit(tiny_run, tmp_path, capsys):
    """With the teacher's newest checkpoint of then, wherever it lies now; not with one of other parameters."""
    teacher, workdir = tmp_path / "teacher", tmp_path / "run"
    shutil.copytree(tiny_run, teacher)
    newest = max(int(path.name) for path in (teacher / "checkpoints").iterdir())
    shutil.move(teacher / "checkpoints" / str(newest), tmp_path / "later")
    config = distilling(workdir, teacher)
    run = train(config)
    whole, note = state(run), json.loads((run / TEACHER).read_text())
    assert note["run"] == str(teacher) and note["step"] < newest
    assert "reads images whole" in capsys.readouterr().out
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(line["kl"] > 0 and line["taught"] == 1 for line in lines)

    shutil.move(tmp_path / "later", teacher / "checkpoints" / str(newest))  # it trains on
    teacher = teacher.rename(tmp_path / "moved")
    shutil.rmtree(run / "checkpoints" / "4")
    train(distilling(workdir, teacher))
    assert state(run) == whole and f"teacher: {teacher}, step {note['step']}" in capsys.readouterr().out

    shutil.rmtree(run / "checkpoints" / "4")
    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    (other / "checkpoints" / str(note["step"])).rename(other / "checkpoints" / "1")
    shutil.copytree(other / "checkpoints" / str(newest), other / "checkpoints" / str(note["step"]))
    with pytest.raises(UserError, match=r"checkpoints/\d+: the checkpoint is damaged: run"):  # it says which it is
        train(distilling(workdir, other))
    (run / TEACHER).write_text(json.dumps(note | {"sha256": "0" * 64}))
    with pytest.raises(
        UserError, match=f"teacher: this run was taught by step {note['step']} of .*, and that of .* is a"
    ):
        train(distilling(workdir, teacher))
    assert not (run / "checkpoints" / "4").exists()


# ---- What cannot teach ---------------------------------------------------------------------------------------------


def keys(**changes):
    config = tiny.config(Path("run"))
    config.train.loss = "distillation"
    for name, value in changes.items():
        set_value(
            config,
            f"train.{name}" if name in ("loss", "elastic_k", "compress_gradients") else f"train.distill.{name}",
            value,
        )
    return config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(loss="cross_entropy", beta=1.0), "beta: expected 0.0 with train.loss = 'cross_entropy'; 'distillation'"),
        (dict(), "distill: expected a teacher ('self', 'ema', 'prefix' or a run's directory), or stored logits; found"),
        (dict(teacher="self", logits="x"), "or stored logits; found teacher 'self' and logits 'x'"),
        (dict(teacher="self", alpha=0.0), "alpha: expected above 0, or beta, attention or whole_weight; found none"),
        (dict(teacher="self", alpha=0.0, whole_weight=1.0, top_k=3), "top_k: expected 0 with alpha 0; found 3"),
        (dict(teacher="runs/a", whole_weight=0.5), "whole_weight: expected 0 with teacher 'runs/a'; found 0.5"),
        (dict(teacher="self", ema_decay=0.5), "ema_decay: expected 0.999 with teacher 'self'; found 0.5"),
        (dict(teacher="prefix", beta=0.5), "beta: expected 0 with teacher 'prefix', which does not read images whole"),
        (dict(logits="x", attention=0.5), "attention: expected 0 with stored logits, which does not read images whole"),
        (dict(teacher="self", layers=(0,)), "layers: expected () with beta 0; found (0,)"),
        (dict(teacher="self", attention=0.5), "attention_layers: expected some layers with attention 0.5; found ()"),
        (
            dict(teacher="self", attention=0.5, attention_layers=(0,), compress_gradients=False),
            "attention: expected 0 with train.compress_gradients = False: it would go through that stream; found 0.5",
        ),
        (
            dict(teacher="prefix"),
            "elastic_k: expected several numbers of VoCo tokens, with train.distill.teacher 'prefix'; found ()",
        ),
    ],
)  # fmt: skip
def test_keys_that_do_not_fit_together(changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        check_keys(typed(keys(**changes)).train)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(train__distill__beta=1.0, train__distill__layers="(2,)"), "layers: expected numbers from 0 to 1 (of 2"),
        (
            dict(train__distill__attention=1.0, train__distill__attention_layers="(1,)"),
            "attention_layers: expected numbers from 0 to 0 (of 2 layers: the last compresses nothing); found (1,)",
        ),
        (
            dict(model__llama__max_position_embeddings=70),
            "teacher: the teacher 'self' has room for 70 tokens (max_position_embeddings), and a conversation with its "
            "images whole has 84",
        ),
        (
            dict(model__compressor="qformer"),
            "teacher: expected a run's directory with compressor 'qformer', which has no compress stream; found 'self'",
        ),
    ],
)  # fmt: skip
def test_models_that_cannot(tmp_path, changes, message):
    """Nothing is written."""
    changes = dict(train__loss="distillation", train__distill__teacher="self") | changes
    with pytest.raises(UserError, match=re.escape(message)):
        train(tiny.config(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def place(config, directory: Path, student_run: Path):
    """Find a teacher, and check it as the training of a run does."""
    found = find_teacher(config)
    student = load_run(student_run).model.config
    teacher = place_teacher(found, student, load_run_tokenizer(student_run), make_mesh(config.mesh))
    check_models(typed(config).train.distill, student, teacher)
    return teacher


@pytest.fixture
def other_run(tiny_run, tmp_path):
    """A copy of a run's config and tokenizer, with changes."""

    def make(**changes) -> Path:
        directory = tmp_path / "teacher"
        directory.mkdir()
        shutil.copytree(tiny_run / "tokenizer", directory / "tokenizer")
        config = load_config(tiny_run / "config.json")
        for key, value in changes.items():
            set_value(config, key.replace("__", "."), value)
        save_config(config, directory / "config.json")
        return directory

    return make


@pytest.mark.parametrize(
    ("theirs", "ours", "message"),
    [
        (dict(data__aspect_ratio="crop"), {}, "teacher: expected a run of the same pixels; .* has data.aspect_ra"),
        (
            dict(model__vision__image_size=128), {},
            "teacher: expected a run of the same pixels; .* has model.vision.image_size 128, not 64",
        ),
        (
            dict(model__compressor="average_pool"), {},
            "teacher: expected a run that can read images whole .compressor 'voco' or .*none'.; .* has 'average_pool'",
        ),
        (
            dict(data__template="voco_v1"), {},
            "expected LLaVA, or a run with the prompts of this one, .* compresses, and .*template 'voco_v1'",
        ),
        (
            dict(model__llama__hidden_size=64), dict(beta=1.0, layers=(0,)),
            "beta: expected 0 with the teacher .*: model.llama.hidden_size 64, here 32; found 1.0",
        ),
        (
            dict(model__compressor="none", model__num_voco_tokens=0), dict(attention=1.0, attention_layers=(0,)),
            "attention: expected 0 with the teacher .*, whose prompt is another: it reads rows of its own; found 1.0",
        ),
    ],
)  # fmt: skip
def test_runs_that_cannot_teach(tiny_run, other_run, theirs, ours, message):
    directory = other_run(**theirs)
    with pytest.raises(UserError, match=message):
        place(distilling(Path("run"), directory, **ours), directory, tiny_run)


def test_a_run_of_another_tokenizer(tiny_run, other_run):
    directory = other_run()
    file = directory / "tokenizer" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocab = tokenizer["model"]["vocab"]
    a, b = list(vocab)[-2:]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    file.write_text(json.dumps(tokenizer))
    message = (
        f"expected a run of the same tokenizer; of .* 2 tokens differ, the first: .* is id {vocab[min(a, b)]}, here"
    )
    with pytest.raises(UserError, match=message):
        place(distilling(Path("run"), directory), directory, tiny_run)


def test_a_teacher_that_is_not_there(tmp_path):
    message = "teacher: expected 'self', 'ema', 'prefix' or a run's directory: .*slef/config.json: .*not"
    with pytest.raises(UserError, match=message):
        train(distilling(tmp_path / "run", tmp_path / "slef"))
    assert not (tmp_path / "run").exists()


def test_a_run_trained_uncompressed_reads_whole(tiny_run, other_run):
    """Compressor 'none' with VoCo tokens in its text: the same parameters, with a compress stream."""
    directory = other_run(model__compressor="none", model__num_voco_tokens=3)
    teacher = place(distilling(Path("run"), directory), directory, tiny_run)
    assert not teacher.by_rows and teacher.model_config.compress_length and teacher.model_config.num_voco_tokens == 3


def test_a_teacher_is_restored_as_it_is_used(tiny_run):
    teacher = place(distilling(Path("run"), tiny_run), tiny_run, tiny_run)
    params, note = load_teacher(teacher)
    expected = load_run(tiny_run)
    jax.tree.map(np.testing.assert_array_equal, params, nnx.to_pure_dict(nnx.state(expected.model)))
    assert note["step"] == expected.step
    with pytest.raises(UserError, match=f"was taught by step {note['step']} of .*, and that of .* is another"):
        load_teacher(teacher, note | {"sha256": ""})


def test_what_may_change_when_a_run_goes_on(tiny_run, tmp_path):
    """Where a teacher lies may; who teaches may not, nor alpha at the steps done."""
    directory = tmp_path / "run"
    directory.mkdir()
    stored = distilling(directory, "runs/a", alpha_end=1.0)
    stored.optim.schedule = "constant"
    save_config(stored, directory / "config.json")

    def check(**changes):
        config = stored.copy_and_resolve_references()
        for key, value in changes.items():
            set_value(config, key.replace("__", "."), value)
        check_same_run(config, directory, [2])

    check()
    check(train__distill__teacher="runs/b")
    with pytest.raises(UserError, match="holds a run with train.distill.teacher = 'runs/a', this config has 'ema'"):
        check(train__distill__teacher="ema")
    with pytest.raises(UserError, match="holds a run with train.distill.beta = 0.0, this config has 1.0"):
        check(train__distill__beta=1.0)
    with pytest.raises(
        UserError,
        match="config.train.steps: .* has 4, this config 9; step 2, which is done, had another train.distill.al",
    ):
        check(train__steps=9)
