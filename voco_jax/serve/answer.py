"""An answer while its tokens come: which text is sure, and when it has ended."""

from collections.abc import Sequence
import dataclasses
import time

from voco_jax.infer.continuous import Step
from voco_jax.infer.engine import Engine


@dataclasses.dataclass(frozen=True)
class Token:
    """A token of an answer, with its log-probability (nats) and, where they are asked for, the likeliest ones'."""

    id: int
    log_probability: float
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Update:
    """What is new of an answer: text that no later token changes, its tokens, and how it `finish`ed if it has: 'stop',
    'length', 'cancelled', 'deadline' or 'error' (then `error` says why).

    `log_probabilities` are those of the tokens, and of one that ended it. `read_with`: how many tokens of each image it
    was read with, where that was chosen for it.
    """

    text: str = ""
    tokens: tuple[Token, ...] = ()
    finish: str = ""
    error: str = ""
    log_probabilities: tuple[float, ...] = ()
    read_with: int | None = None


class Answer:
    """Joined, the texts of its updates are what `Engine.generate` returns, which ends before the first of `until`."""

    def __init__(self, engine: Engine, until: Sequence[str] = ()):
        self._engine, self._until = engine, [end for end in until if end]
        self._stop = {*engine.encoder.stop_ids}
        self._began = time.monotonic()
        self.ids: list[int] = []
        self.text = ""  # said so far

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def add(self, step: Step, most: int) -> Update:
        """The next tokens, of at most so many in all."""
        tokens, sure, finish = [], step.log_probabilities.tolist(), ""
        i = -1
        for i, token in enumerate(step.ids.tolist()):
            top = zip(step.top_ids[i].tolist(), step.top_log_probabilities[i].tolist(), strict=True)
            if token in self._stop:
                finish = "stop"
                break
            self.ids.append(token)
            tokens.append(Token(token, sure[i], tuple(top)))
            if len(self.ids) == most:
                finish = "length"
                break
        whole = self._engine.text(self.ids) if finish else self._engine.sure_text(self.ids)
        if self._until:
            whole, ended = self._before_until(whole, bool(finish))
            if ended:  # what came with it, after it, is none of the answer's
                finish, count = "stop", self._count_until(len(self.ids) - len(tokens))
                tokens = tokens[: len(tokens) - (len(self.ids) - count)]
                i = len(tokens) - 1
                del self.ids[count:]
        said, self.text = self.text, whole if len(whole) > len(self.text) else self.text
        return Update(self.text[len(said) :], tuple(tokens), finish, log_probabilities=tuple(sure[: i + 1]))

    def _count_until(self, before: int) -> int:
        """How many tokens it takes for the first of `until` to stand in the text."""
        counts = range(before + 1, len(self.ids))
        return next(
            (n for n in counts if any(end in self._engine.text(self.ids[:n]) for end in self._until)), len(self.ids)
        )  # fmt: skip

    def _before_until(self, text: str, is_all: bool) -> tuple[str, bool]:
        """The text up to the first of `until`, and whether there is one; else without what may be the beginning of
        one."""
        found = [at for end in self._until if (at := text.find(end)) >= 0]
        if found:
            return text[: min(found)].strip(), True
        if is_all:
            return text.strip(), False
        held = max(
            (n for end in self._until for n in range(1, len(end)) if text.endswith(end[:n])),
            default=0,
        )
        return text[: len(text) - held].rstrip(), False
