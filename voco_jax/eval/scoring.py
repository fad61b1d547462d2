"""Scores: exact answers, by kind of question, beside what can be had without looking."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
import dataclasses


@dataclasses.dataclass(frozen=True)
class Answer:
    """One test question with the model's answer."""

    image: str
    question: str
    truth: str
    given: str

    @property
    def correct(self) -> bool:
        return normalize(self.given) == normalize(self.truth)


def normalize(text: str) -> str:
    """Case, surrounding space and a final full stop do not matter."""
    return text.strip().rstrip(".").strip().lower()


def accuracy_by_kind(
    questions: Sequence[Answer], kind: Callable[[str], str], answers: Iterable[str] | None = None
) -> dict[str, tuple[int, int]]:
    """(right, all) for each kind of question and 'overall', of the answers given or of others in their place."""
    counts = defaultdict(lambda: [0, 0])
    given = [answer.given for answer in questions] if answers is None else answers
    for answer, text in zip(questions, given, strict=True):
        for key in ("overall", kind(answer.question)):
            counts[key][0] += dataclasses.replace(answer, given=text).correct
            counts[key][1] += 1
    return {key: (right, total) for key, (right, total) in counts.items()}


def table(columns: dict[str, dict[str, tuple[int, int]]]) -> str:
    """A Markdown table: a row for each kind of question ('overall' last), a column in per cent for each answerer."""
    kinds = sorted(next(iter(columns.values())), key=lambda kind: (kind == "overall", kind))
    lines = ["| questions | number | " + " | ".join(columns) + " |", "|---|---:|" + "---:|" * len(columns)]
    for kind in kinds:
        shares = [f"{100 * counts[kind][0] / counts[kind][1]:.1f} %" for counts in columns.values()]
        lines.append(f"| {kind} | {next(iter(columns.values()))[kind][1]:,} | " + " | ".join(shares) + " |")
    return "\n".join(lines)
