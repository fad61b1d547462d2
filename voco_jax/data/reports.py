"""What became of the records: how many were seen, and by kind how many were skipped or read with a warning."""

from collections import Counter
import dataclasses

from voco_jax.data.records import BadRecord
from voco_jax.errors import UserError
from voco_jax.terminal import count_of, one_line

EXAMPLES = 3  # that are named of each kind
_STORED_AS = {"bad": "skipped", "odd": "warned"}  # keys of reports that earlier versions stored


@dataclasses.dataclass
class Report:
    """Counts by kind. `skipped` records are not used; `warned` ones are, and yet are unusual (a CMYK picture, …).

    `cut` counts conversations that lost text to the row's length, `tokens_cut` how much.
    """

    seen: int = 0
    skipped: Counter = dataclasses.field(default_factory=Counter)
    warned: Counter = dataclasses.field(default_factory=Counter)
    cut: int = 0
    tokens_cut: int = 0
    examples: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    @property
    def num_skipped(self) -> int:
        return sum(self.skipped.values())

    def add_skipped(self, error: BadRecord, where: str = "") -> None:
        self.skipped[error.kind] += 1
        self._example(error.kind, f"{where}: {error.message}" if where else error.message)

    def add_warned(self, kind: str, where: str) -> None:
        self.warned[kind] += 1
        self._example(kind, where)

    def _example(self, kind: str, text: str) -> None:
        examples = self.examples.setdefault(kind, [])
        text = one_line(text)
        if text not in examples and len(examples) < EXAMPLES:
            examples.append(text)

    def merge(self, other: "Report") -> "Report":
        """Add another's counts to these; returns self."""
        self.seen += other.seen
        self.skipped.update(other.skipped)
        self.warned.update(other.warned)
        self.cut += other.cut
        self.tokens_cut += other.tokens_cut
        for kind, examples in other.examples.items():
            for text in examples:
                self._example(kind, text)
        return self

    def to_dict(self) -> dict:
        """For JSON."""
        return {**dataclasses.asdict(self), "skipped": dict(self.skipped), "warned": dict(self.warned)}

    @classmethod
    def from_dict(cls, values: dict) -> "Report":
        """The inverse of `to_dict`, also for reports stored by earlier versions."""
        values = {_STORED_AS.get(key, key): value for key, value in values.items()}
        return cls(**values | {key: Counter(values[key]) for key in ("skipped", "warned")})

    def lines(self, unit: str = "record") -> list[str]:
        """`665298 records: 665290 good, 8 skipped` and a line for each kind with its first examples."""
        head = f"{count_of(self.seen, unit)}: {self.seen - self.num_skipped} good"
        if self.cut:
            head += f" ({self.cut} cut by {count_of(self.tokens_cut, 'token')})"
        if self.skipped:
            head += f", {self.num_skipped} skipped"
        lines = [head]
        for counts, what in (self.skipped, "skipped"), (self.warned, "read with a warning"):
            for kind, n in counts.most_common():
                lines.append(f"  {n} {what}: {kind}; {' | '.join(self.examples[kind])}")
        return lines

    def check(
        self,
        max_skipped_fraction: float,
        total: int,
        least: int = 1000,
        option: str = "config.data.max_skipped_fraction",
        name: str = "data",
    ) -> None:
        """UserError when more than `max_skipped_fraction` of the records are skipped; the user calls it `option`, and
        the records `name`.

        The fraction is of at least `least` records (or of `total`, all that there are): the first skipped record of a
        run must not end it.
        """
        allowed = max_skipped_fraction * max(self.seen, min(total, least))
        if self.num_skipped > allowed:
            worst, n = self.skipped.most_common(1)[0]
            raise UserError(
                f"{name}: {self.num_skipped} of the first {self.seen} records cannot be used, more than {option} = "
                f"{max_skipped_fraction:g} allows; {n}× {worst}: {self.examples[worst][0]}"
            )
