"""What a run says of itself, by a clock that the test turns: every number is computed by hand."""

import json
import math
import re
import resource
import struct
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
from PIL import Image
import pytest
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c

from tests.helpers import tiny
from tests.train.test_goodput import Clock, wait_for_step
from voco_jax.config import typed
from voco_jax.data.plan import Amount
from voco_jax.errors import UserError
from voco_jax.optim import learning_rates, make_schedule
from voco_jax.train.actions import StepDone
from voco_jax.train.goodput import CATEGORIES, Goodput
from voco_jax.train.loop import train
from voco_jax.train.metrics import MetricsLog, Speed
from voco_jax.train.writers import open_writers

opened = []  # files stay open, as those of a killed run do until it is gone
AMOUNT = Amount(conversations=12, tokens=700, images=3)
SPEED = Speed(flops=6e12, peak=4e12, compress_length=100)  # a step takes 1.5 s at least
COMPILE, STEP, DATA, CHECKPOINT, EVALUATION = 50.0, 2.0, 0.5, 20.0, 9.0


def result(step: int, **changes) -> dict[str, jax.Array]:
    values = {"loss": 8.0 / step, "grad_norm": float(step)} | changes
    return {name: jnp.float32(value) for name, value in values.items()}


def run(workdir, start=0, stop=12, clock=None, of_step=result, speed=SPEED, sheet=None, **changes) -> MetricsLog:
    """Steps by the clock: 50 s of compilation, then half a second of waiting for data and two of computing, each.
    After each 5th comes a checkpoint (20 s), after the 8th an evaluation (9 s). Ends as a kill does: all is open."""
    changes = dict(train__steps=12, train__log_every=4, train__checkpoint_every=5) | changes
    config, clock = tiny.config(workdir, **changes), clock or Clock()
    workdir.mkdir(exist_ok=True)
    goodput = Goodput(workdir / "goodput.json", start, clock=clock)
    opened.append(open_writers(workdir, start, tensorboard=config.train.tensorboard))
    writers = opened[-1].__enter__()
    settings, steps = typed(config), range(start + 1, config.train.steps + 1)
    rates = learning_rates(settings.optim, config.train.steps)
    log = MetricsLog(writers, steps, settings.train, goodput, rates, lambda batch: AMOUNT, speed=speed).__enter__()
    with goodput.during("steps"):
        for step in range(start + 1, stop + 1):
            with goodput.during("data"):
                clock.pass_(DATA)
            first = step == start + 1
            with goodput.during("compile" if first else "steps"):
                clock.pass_(COMPILE if first else 0)
                log.after_step(StepDone(step, of_step(step)))
            clock.pass_(0 if first else STEP)
            wait_for_step(goodput)
            if step == 8:
                log.settle()
                with goodput.during("evaluation"):
                    clock.pass_(EVALUATION)
                log.evaluated(step, {"eval_loss": 1.23456789, "accuracy": None}, sheet)
            if step % 5 == 0 or step == config.train.steps:
                log.settle()
                with goodput.during("checkpoint"):
                    clock.pass_(CHECKPOINT)
                goodput.mark(step)
    return log


def lines(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_the_numbers_of_a_line(tmp_path):
    run(tmp_path)
    first, second, third, evaluation, fourth, _ = lines(tmp_path)
    assert [line["step"] for line in lines(tmp_path)] == [4, 5, 8, 8, 10, 12]
    assert first["loss"] == pytest.approx((8 + 4 + 8 / 3 + 2) / 4) and first["grad_norm"] == 2.5
    assert third["loss"] == pytest.approx((8 / 6 + 8 / 7 + 1) / 3)
    config = tiny.config(tmp_path, train__steps=12)
    for line in (first, second, third, fourth):  # of the update that the step makes
        schedule = make_schedule(typed(config).optim, 12)
        assert line["learning_rate"] == pytest.approx(float(schedule(line["step"] - 1)), rel=1e-6)
    # 4: steps 2 to 4 and the wait for the fifth's data; 5: the step alone; 8: three, without the checkpoint's 20 s
    for line, steps, seconds in ((first, 3, 8.0), (second, 1, 2.0), (third, 3, 7.5), (fourth, 2, 5.0)):
        assert line["questions_per_second"] == pytest.approx(12 * steps / seconds)
        assert line["images_per_second"] == pytest.approx(3 * steps / seconds)
        per_device = (700 + 3 * 100) * steps / seconds / jax.device_count()
        assert line["tokens_per_second_per_device"] == pytest.approx(per_device)
        assert line["mfu"] == pytest.approx(6e12 * steps / seconds / 4e12)
    assert evaluation == {"step": 8, "eval_loss": 1.234568, "accuracy": None}
    # Step 8: all but the first have taken two seconds each; a checkpoint; eight waits for data
    total = COMPILE + 7 * STEP + CHECKPOINT + 8 * DATA
    assert third["seconds"] == pytest.approx(total) and third["goodput"] == pytest.approx(7 * STEP / total, abs=1e-4)


def test_a_metric_that_some_steps_do_not_know(tmp_path):
    """A batch without a label that is taught has no KL divergence: it is not 0."""
    known = {2: 3.0, 4: 5.0}
    run(tmp_path, stop=8, of_step=lambda step: result(step, kl=known.get(step, math.nan)))
    assert [line["kl"] for line in lines(tmp_path) if "kl" in line] == [4.0, None, None]


def test_a_peak_that_is_not_known(tmp_path, capsys):
    run(tmp_path, stop=5, speed=Speed())
    assert [line["mfu"] for line in lines(tmp_path)] == [None, None]
    assert "MFU" not in capsys.readouterr().err


def test_the_first_line_may_be_of_the_step_that_compiles(tmp_path):
    run(tmp_path, stop=3, train__log_every=1)
    first, second = lines(tmp_path)
    assert first["loss"] == 8 and first["questions_per_second"] is first["mfu"] is None
    assert second["questions_per_second"] == pytest.approx(12 / 2.5)


# ---- What a person sees ------------------------------------------------------------------------------------------


def test_lines_of_a_log_file(tmp_path, capsys):
    """Not more often than every 10 s, and the last. A resumed run counts neither compilation nor what was before."""
    run(tmp_path)
    said = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in said] == ["step 4/12", "step 8/12", "step 8/12", "step 10/12", "step 12/12"]
    assert said[0] == (
        "step 4/12  loss 4.167  grad 2.5  375 tokens/s/device  1.1 images/s  4.5 questions/s  MFU 56.2 %  21 s left"
    )  # 8 steps at 8 s for 3
    assert said[2] == "step 8/12  evaluation  eval loss 1.235"
    assert "left" not in said[-1]


def test_time_left_of_a_resumed_run(tmp_path, capsys):
    before = {"version": 1, "seconds": dict.fromkeys(CATEGORIES, 600), "step": 5, "kept": {"5": 600}}
    (tmp_path / "goodput.json").write_text(json.dumps(before))
    run(tmp_path, start=5, stop=10, train__steps=1000)
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("step 8/1000") and said[0].endswith("  41 min 20 s left")  # 992 steps at 5 s for 2
    # With the evaluation: 990 steps at 10 + 9 s for 4
    assert said[-1].startswith("step 10/1000") and said[-1].endswith("  1 h 18 min left")


def test_a_bar_on_a_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    run(tmp_path).__exit__()
    shown = capsys.readouterr().err
    assert "training: 100%|" in shown and "| 12/12, loss 0.6970  " in shown and shown.endswith("\n")
    assert "step 4/12" not in shown and "step 8/12  evaluation  eval loss 1.235\n" in shown


# ---- Kill and resume, TensorBoard --------------------------------------------------------------------------------


def events(workdir) -> list:
    """Of all files of a run in their order; checksums are looked at."""
    found = []
    for file in sorted((workdir / "tensorboard").iterdir()):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            record = data[12 : 12 + length]
            sums = struct.unpack("<I", data[8:12]) + struct.unpack("<I", data[12 + length : 16 + length])
            assert sums == (masked_crc32c(data[:8]), masked_crc32c(record))
            found.append(event_pb2.Event.FromString(record))
            data = data[16 + length :]
    return found


def shown_by_tensorboard(workdir) -> dict[str, list[tuple[int, float]]]:
    """By tag: a start at a step makes TensorBoard forget what it has of that step and later ones."""
    scalars = {}
    for event in events(workdir):
        if event.session_log.status == event_pb2.SessionLog.START:
            scalars = {tag: [(s, v) for s, v in values if s < event.step] for tag, values in scalars.items()}
        for value in event.summary.value:
            if value.WhichOneof("value") == "simple_value":
                scalars.setdefault(value.tag, []).append((event.step, value.simple_value))
    return scalars


def test_a_killed_run_says_the_same_again(tmp_path, monkeypatch):
    """Killed in step 9, after the checkpoint of the fifth; what was logged and evaluated since comes a second time."""
    clock = "questions_per_second", "images_per_second", "tokens_per_second_per_device", "mfu", "seconds", "goodput"
    without_clock = lambda run: [{k: v for k, v in line.items() if k not in clock} for line in lines(run)]  # noqa: E731
    run(tmp_path / "whole")
    killed = tmp_path / "killed"
    run(killed, stop=9)
    assert [line["step"] for line in lines(killed)] == [4, 5, 8, 8]
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    monkeypatch.setattr("time.time", lambda: 9e9)  # files are told apart, and ordered, by it
    run(killed, start=5)
    assert without_clock(killed) == without_clock(tmp_path / "whole")
    again, whole = shown_by_tensorboard(killed), shown_by_tensorboard(tmp_path / "whole")
    assert again["train/loss"] == whole["train/loss"] and again["eval/loss"] == whole["eval/loss"]
    assert len(list((killed / "tensorboard").iterdir())) == 2


def test_what_tensorboard_shows(tmp_path):
    Image.new("RGB", (7, 5), "red").save(tmp_path / "sheet.png")
    run(tmp_path, sheet=tmp_path / "sheet.png")
    shown, found = shown_by_tensorboard(tmp_path), lines(tmp_path)
    assert events(tmp_path)[0].file_version == "brain.Event:2"
    assert {tag: [step for step, _ in values] for tag, values in shown.items()} == {
        **dict.fromkeys(("train/loss", "train/grad_norm", "train/learning_rate"), [4, 5, 8, 10, 12]),
        **dict.fromkeys(("speed/questions_per_second", "speed/images_per_second", "speed/mfu"), [4, 5, 8, 10, 12]),
        "speed/tokens_per_second_per_device": [4, 5, 8, 10, 12],
        **dict.fromkeys(("time/seconds", "time/goodput"), [4, 5, 8, 10, 12]),
        "eval/loss": [8],
    }
    logged = {line["step"]: line["loss"] for line in found if "loss" in line}
    assert {step: pytest.approx(value) for step, value in shown["train/loss"]} == logged
    (picture,) = [value.image for event in events(tmp_path) for value in event.summary.value if value.HasField("image")]
    assert (picture.width, picture.height) == (7, 5)
    assert picture.encoded_image_string == (tmp_path / "sheet.png").read_bytes()


def test_without_tensorboard(tmp_path):
    run(tmp_path, train__tensorboard=False)
    assert lines(tmp_path) and not (tmp_path / "tensorboard").exists()


@pytest.mark.peer
def test_weights_and_biases_offline(tmp_path, monkeypatch):
    """A run that goes on is the same one there; its numbers are under TensorBoard's tags."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    for start in 0, 2:
        with open_writers(
            tmp_path, start, tensorboard=False, wandb="voco", run="runs/a", config={"seed": 1}
        ) as writers:
            for writer in writers:
                writer.scalars(start + 1, {"loss": 1.5, "mfu": None, "accuracy": 0.5})
    logs = [*tmp_path.glob("wandb/offline-run-*/run-*.wandb")]
    assert len(logs) == 2 and len({log.name for log in logs}) == 1

    def all_written() -> bool:
        return all(tag in log.read_bytes() for log in logs for tag in (b"train/loss", b"eval/accuracy"))

    for _ in range(300):  # wandb's own process writes the file
        if all_written():
            break
        time.sleep(0.1)
    assert all_written()


def test_weights_and_biases_are_not_installed(tmp_path, monkeypatch):
    """It is said before data is read."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    message = "config.train.wandb: found 'voco', but wandb is not installed: pip install wandb"
    with pytest.raises(UserError, match=re.escape(message)):
        train(tiny.config(tmp_path / "run", train__wandb="voco"))
    assert not (tmp_path / "run").exists()


def test_torch_is_not_imported(tmp_path):
    """Beside jax it would bring other CUDA libraries; tensorboardX takes it where it is."""
    code = "import sys; from voco_jax.train import writers as t; t._tensorboardx(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("tensorboard", [True, False])
def test_a_full_disk_is_one_line(tmp_path, tensorboard, capsys):  # captured in memory: files are limited
    """Files may grow no further, here by the process's own limit."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    name = "tensorboard/events.*" if tensorboard else "metrics.jsonl"
    resource.setrlimit(resource.RLIMIT_FSIZE, (60, limits[1]))
    try:
        with pytest.raises(OSError, match=rf"{tmp_path}/{name}") as error:
            run(tmp_path, train__tensorboard=tensorboard)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value)


# ---- Bad steps ---------------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number(tmp_path):
    with pytest.raises(
        UserError, match=r"training: loss is nan at step 3 \(batch 2\); a lower optim.learning_rate may help"
    ):
        run(tmp_path, of_step=lambda step: result(step, loss=float("nan") if step == 3 else 1.0))


def test_a_step_that_is_bad(tmp_path):
    with pytest.raises(
        UserError, match=r"training: loss is 77, a spike or with .* at step 3 \(batch 2\); a lower optim"
    ):
        run(tmp_path, of_step=lambda step: result(step, loss=77.0, bad=float(step == 3)))


def test_steps_that_are_skipped(tmp_path, capsys):
    """They are in no mean, and said; too many in a row end the run."""
    bad = {2, 3, 6, 7, 8}
    nan = float("nan")
    of_step = lambda step: result(step, **(dict(loss=nan, bad=1.0) if step in bad else dict(bad=0.0)))  # noqa: E731
    run(tmp_path, of_step=of_step, train__on_bad_step="skip", train__max_skipped=3)
    found = [line for line in lines(tmp_path) if "loss" in line]
    assert [line["skipped"] for line in found] == [2, 0, 3, 0, 0]
    assert found[0]["loss"] == pytest.approx((8 + 2) / 2) and found[2]["loss"] is None
    said = capsys.readouterr().err
    assert "training: step 3 skipped: loss nan, grad_norm 3 (batch 2)\n" in said
    assert re.search("step 8/12  loss unknown .*3 skip", said)
    with pytest.raises(
        UserError, match=r"training: 3 steps in a row were bad, up to step 8 \(train.max_skipped is 2\)"
    ):
        run(tmp_path / "other", of_step=of_step, train__on_bad_step="skip", train__max_skipped=2)
