"""Where the time went, by a clock that the test turns."""

import json
import threading
import time

import jax
import jax.numpy as jnp
import pytest

from voco_jax.train.goodput import CATEGORIES, Goodput, summary


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def pass_(self, seconds: float) -> None:
        self.now += seconds


class Result:
    """Of a step that ends when the test says so."""

    def __init__(self):
        self._ended = threading.Event()

    def block_until_ready(self):
        assert self._ended.wait(30)

    def end(self, goodput) -> None:
        self._ended.set()
        wait_for_step(goodput)


def wait_for_step(goodput) -> None:
    """Until the account's thread has seen the end of the newest step."""
    while goodput._steps.busy_until(float("inf")) == float("inf"):
        time.sleep(1e-4)


def nonzero(goodput) -> dict[str, float]:
    return {category: pytest.approx(seconds) for category, seconds in goodput.seconds.items() if seconds}


def test_every_second_is_in_one_category():
    clock = Clock()
    with Goodput(None, clock=clock, since=90.0) as goodput:
        clock.pass_(2)
        with goodput.during("steps"):
            clock.pass_(5)
            with goodput.during("evaluation"):
                clock.pass_(3)
                with goodput.during("data"):
                    clock.pass_(1)
                clock.pass_(3)
            clock.pass_(7)
            with pytest.raises(RuntimeError), goodput.during("checkpoint"):
                clock.pass_(4)
                raise RuntimeError
        clock.pass_(1)
        assert goodput.seconds == dict.fromkeys(CATEGORIES, 0.0) | {
            "setup": 13, "steps": 12, "evaluation": 6, "data": 1, "checkpoint": 4,
        }  # fmt: skip
        assert goodput.total == 36 and goodput.share == pytest.approx(12 / 36)


def test_waiting_for_data_behind_a_step_costs_nothing():
    """Data takes 5 s each time: while no step runs, beside a step of 3 s, and beside one of 9 s."""
    clock = Clock()
    with Goodput(None, clock=clock) as goodput, goodput.during("steps"):
        with goodput.during("data"):
            clock.pass_(5)
        assert nonzero(goodput) == {"data": 5}
        short = Result()
        goodput.started(short)
        with goodput.during("data"):
            clock.pass_(3)
            short.end(goodput)
            clock.pass_(2)
        assert nonzero(goodput) == {"data": 7, "steps": 3}
        long = Result()
        goodput.started(long)
        clock.pass_(1)
        with goodput.during("data"):
            clock.pass_(5)
        assert nonzero(goodput) == {"data": 7, "steps": 9}
        clock.pass_(3)
        long.end(goodput)
        assert nonzero(goodput) == {"data": 7, "steps": 12}


def test_what_jax_compiles_is_compilation():
    """Also in a step long after the first, as where a batch has another shape."""
    with Goodput(None) as goodput, goodput.during("steps"):
        before = goodput.seconds
        jax.jit(lambda x: jnp.sort(x) * 3)(jnp.arange(7.0)).block_until_ready()
        after = goodput.seconds
    assert before["compile"] == 0 < after["compile"]
    assert after["steps"] >= before["steps"] > 0
    jax.jit(lambda x: jnp.sort(x) * 4)(jnp.arange(7.0))
    assert goodput.seconds["compile"] == after["compile"]  # not ours any more


def run(file, clock, start, stop, *, checkpoint_every, seconds=2.0, said=None):
    """Steps of so many seconds each; ends as a killed process does: nothing is tidied up."""
    goodput = Goodput(file, start, clock=clock, log=(said if said is not None else []).append)
    block = goodput.during("steps")
    block.__enter__()
    for step in range(start + 1, stop + 1):
        clock.pass_(seconds)
        goodput.step_ended()
        if step % checkpoint_every == 0:
            with goodput.during("checkpoint"):
                clock.pass_(1)
            goodput.mark(step)
    return goodput


def test_killed_and_resumed(tmp_path):
    """Of 47 steps, 40 are in a checkpoint; the last that the file knows of is the 45th (it is written every 10 s)."""
    file, clock = tmp_path / "goodput.json", Clock()
    run(file, clock, 0, 47, checkpoint_every=20)
    goodput = run(file, clock, 40, 40, checkpoint_every=20)
    assert nonzero(goodput) == {"steps": 80, "checkpoint": 2, "lost": 10}
    goodput = run(file, clock, 40, 60, checkpoint_every=20)
    assert nonzero(goodput) == {"steps": 120, "checkpoint": 3, "lost": 10}
    # The newest checkpoint was damaged; and the account does not know of the newest
    assert nonzero(run(file, clock, 40, 40, checkpoint_every=20)) == {"steps": 80, "checkpoint": 3, "lost": 50}
    assert nonzero(run(file, clock, 45, 45, checkpoint_every=20)) == {"steps": 80, "checkpoint": 3, "lost": 50}
    assert nonzero(run(file, clock, 0, 1, checkpoint_every=20)) == {"steps": 2}  # another run
    assert [path.name for path in tmp_path.iterdir()] == ["goodput.json"]


@pytest.mark.parametrize(
    "content",
    ['{"version": 1', "[]", '{"version": 2}', '{"version": 1, "seconds": {"steps": 3}}', b"\xff\x00", None],
)
def test_a_file_that_cannot_be_used(tmp_path, content):
    file, said = tmp_path / "goodput.json", []
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    goodput = run(file, Clock(), 20, 23, checkpoint_every=20, said=said)
    assert len(said) == 1 and "\n" not in said[0] and str(file) in said[0]
    assert said[0].startswith("goodput: ") and said[0].endswith("; counted from step 20 on")
    assert nonzero(goodput) == {"steps": 6}
    goodput.write()
    assert json.loads(file.read_text())["seconds"]["steps"] == 6


def test_numbers_that_are_no_times(tmp_path):
    file, said = tmp_path / "goodput.json", []
    run(file, Clock(), 0, 20, checkpoint_every=20)
    content = json.loads(file.read_text())
    content["seconds"]["data"] = float("nan")
    file.write_text(json.dumps(content))
    assert nonzero(run(file, Clock(), 20, 20, checkpoint_every=20, said=said)) == {}
    assert "not an account of goodput" in said[0]


def test_a_file_that_cannot_be_written(tmp_path):
    said = []
    run(tmp_path / "gone" / "goodput.json", Clock(), 0, 20, checkpoint_every=20, said=said)
    assert said and all(line.startswith("goodput: not written: ") for line in said)


def test_the_summary():
    seconds = dict.fromkeys(CATEGORIES, 0.0) | {"steps": 3000.0, "profile": 1.26, "lost": 199.0}
    assert summary(seconds) == (
        "goodput 93.7 %: steps 3,000 s; set-up 0 s, compile 0 s, data 0 s, checkpoint 0 s, evaluation 0 s, "
        "profile 1.3 s, lost 199 s"
    )
