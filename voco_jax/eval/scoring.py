"""Scores: exact answers, by kind of question, beside what can be had without looking."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
import dataclasses
import string

OVERALL = "overall"


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


SHORTEST_LIMIT, LONGEST_LIMIT = 8, 256  # tokens, where the test set chooses


def longest_answer(given: int, truths: Iterable[str], tokenizer: Callable) -> int:
    """`config.eval.max_new_tokens` if it is not 0; else room for the longest of the expected answers, and its end."""
    if given:
        return given
    longest = max((len(tokenizer(text, add_special_tokens=False).input_ids) for text in set(truths)), default=0)
    return min(max(SHORTEST_LIMIT, longest + 1), LONGEST_LIMIT)


class Guesser:
    """What can be had without the picture: the most frequent answer to each training question, and of all."""

    def __init__(self, questions_answers: Iterable[tuple[str, str]]):
        by_question: defaultdict[str, Counter[str]] = defaultdict(Counter)
        every: Counter[str] = Counter()
        for question, answer in questions_answers:
            by_question[question][answer] += 1
            every[answer] += 1
        self._by_question = {question: counts.most_common(1)[0][0] for question, counts in by_question.items()}
        self.majority = every.most_common(1)[0][0] if every else ""

    def __call__(self, question: str) -> str:
        return self._by_question.get(question, self.majority)


def token_f1(given: str, truth: str) -> float:
    """How much of the words two answers share, from 0 to 1, in whatever order: SQuAD's F1 with its normalisation
    (Rajpurkar et al., arXiv:1606.05250): lower case, no punctuation, no articles.

    >>> token_f1("The red circle.", "a circle, red"), round(token_f1("a red box", "two red circles"), 2)
    (1.0, 0.4)
    """
    words, expected = (_words(text) for text in (given, truth))
    if not words or not expected:
        return float(words == expected)
    shared = sum((Counter(words) & Counter(expected)).values())
    return 2 * shared / (len(words) + len(expected))


def _words(text: str) -> list[str]:
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return [word for word in text.split() if word not in ("a", "an", "the")]


def normalize(text: str) -> str:
    """Case, surrounding space and a final full stop do not matter."""
    return text.strip().rstrip(".").strip().lower()


def count_by_kind(answers: Sequence[Answer], kinds: Sequence[str]) -> dict[str, tuple[int, int]]:
    """(right, all) for each kind and 'overall', of answers with the kinds of their questions ('': of none)."""
    counts: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])
    for answer, kind in zip(answers, kinds, strict=True):
        for key in (OVERALL, kind) if kind else (OVERALL,):
            counts[key][0] += answer.correct
            counts[key][1] += 1
    return {key: (right, total) for key, (right, total) in counts.items()}


def by_kind(counts: Iterable[str]) -> list[str]:
    """The kinds in the order in which they are shown: 'overall' last."""
    return sorted(counts, key=lambda kind: (kind == OVERALL, kind))


def table(columns: dict[str, dict[str, tuple[int, int]]]) -> str:
    """A Markdown table: a row for each kind of question ('overall' last), a column in per cent for each engine."""
    kinds = by_kind(next(iter(columns.values())))
    lines = ["| questions | number | " + " | ".join(columns) + " |", "|---|---:|" + "---:|" * len(columns)]
    for kind in kinds:
        shares = [f"{100 * counts[kind][0] / counts[kind][1]:.1f} %" for counts in columns.values()]
        lines.append(f"| {kind} | {next(iter(columns.values()))[kind][1]:,} | " + " | ".join(shares) + " |")
    return "\n".join(lines)
