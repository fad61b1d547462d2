"""A small share of the fuzz suite, of every kind (`make fuzz` runs it in full)."""

import os
import time

import pytest

from tests.fuzz import TARGETS, target
from tests.fuzz.harness import HANG, OVER, REFUSED, SILENT, SOUND, TRACEBACK, Target, run
from voco_jax.errors import UserError

SHARE = 0.01


class Faulty(Target):
    """What the suite has to notice."""

    def case(self, rng, directory):
        def fail(error):
            raise error

        reads = [
            lambda: None, lambda: fail(UserError("a line")), lambda: fail(ValueError("a traceback")),
            lambda: time.sleep(60), lambda: bytearray(b"x") * (2**30 + 2**27) and None, lambda: "other numbers",
            lambda: os._exit(3), lambda: fail(UserError("")), lambda: print("\x1b[2J"),
        ]  # fmt: skip
        return "", reads[int(rng.bit_generator.seed_seq.entropy[-1])]


@pytest.mark.slow
def test_what_goes_wrong_is_noticed():
    report = run("tests.test_fuzz:Faulty", range(9), seconds=5)
    expected = [SOUND, REFUSED, TRACEBACK, HANG, OVER, SILENT, TRACEBACK, TRACEBACK, TRACEBACK]
    assert [outcome.kind for outcome in report.outcomes] == expected
    assert "ValueError: a traceback" in report.outcomes[2].said and len(report.bad) == 7


class Unmade(Target):
    def make(self, directory):
        raise ValueError("no input")


def test_a_target_that_cannot_be_made_ends_the_suite():
    with pytest.raises(RuntimeError, match="its inputs were not made: (.*\\n)*ValueError: no input"):
        run("tests.test_fuzz:Unmade", range(5))


MARKS = {
    **dict.fromkeys(("safetensors", "bin"), pytest.mark.peer),  # whose values are compared with what PyTorch reads
    **dict.fromkeys(("runs", "checkpoints", "tokenizers"), pytest.mark.slow),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS.get(name, ())) for name in TARGETS])
def test_hostile_input_is_a_line_or_a_result(name):
    report = run(name, range(max(5, round(target(name).count * SHARE))), seed=1, seconds=30)  # others run beside
    assert not report.bad, "\n".join([str(report), *(f"case {bad.case}: {bad}" for bad in report.bad[:5])])
