"""Counts of what became of records, and when there are too many bad ones."""

import pytest

from voco_jax.data.records import MISSING, NO_ANSWER, BadRecord
from voco_jax.data.reports import Report
from voco_jax.errors import UserError


def report(seen: int, bad: int) -> Report:
    report = Report(seen=seen)
    for i in range(bad):
        report.add_skipped(BadRecord(MISSING, f"{i}.jpg: not found"), f"row {i}")
    return report


@pytest.mark.parametrize(
    ("seen", "bad", "total", "stops"),
    [
        (1, 1, 100_000, False),  # the first bad record ends no run
        (500, 10, 100_000, False),
        (500, 11, 100_000, True),  # 1 % of the least number that is looked at, 1,000
        (5000, 50, 100_000, False),
        (5000, 51, 100_000, True),
        (100, 1, 100, False),  # there are no more than these
        (100, 2, 100, True),
    ],
)
def test_too_many(seen, bad, total, stops):
    if not stops:
        return report(seen, bad).check(0.01, total)
    with pytest.raises(UserError, match=f"data: {bad} of the first {seen} .* {bad}× missing file: row 0: 0.jpg: not"):
        report(seen, bad).check(0.01, total)


def test_a_report_that_an_earlier_version_stored():
    """Caches of indices and shards' reports have other words for the same."""
    of_then = {"seen": 3, "bad": {"no answer": 1}, "odd": {"CMYK picture": 2}, "cut": 0, "tokens_cut": 0}
    stored = of_then | {"examples": {"no answer": ["row 0: turn 1"], "CMYK picture": ["row 1"]}}
    assert Report.from_dict(stored).lines() == [
        "3 records: 2 good, 1 skipped",
        "  1 skipped: no answer; row 0: turn 1",
        "  2 read with a warning: CMYK picture; row 1",
    ]


def test_merged_and_stored():
    first, second = report(10, 2), report(7, 5)
    second.add_skipped(BadRecord(NO_ANSWER, "turn 1"), "row 9")
    second.add_warned("CMYK picture", "row 3")
    first.merge(Report.from_dict(second.to_dict()))
    assert first.lines() == [
        "17 records: 9 good, 8 skipped",
        "  7 skipped: missing file; row 0: 0.jpg: not found | row 1: 1.jpg: not found | row 2: 2.jpg: not found",
        "  1 skipped: no answer; row 9: turn 1",
        "  1 read with a warning: CMYK picture; row 3",
    ]
