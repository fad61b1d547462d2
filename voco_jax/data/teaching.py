"""What batches have of a teacher beside the student's rows: one conversation at a time, then row by row.

`TeacherRows` is for a teacher whose prompts have another form (plain LLaVA with the image inside the prompt, another
template, another number of VoCo tokens): the same conversations, in the same order in the same rows, as it reads them.
`stored_logits.py` is for a teacher that was asked beforehand.
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any, NamedTuple, Protocol

import numpy as np

from voco_jax.data.conversations import Encoder, Sample
from voco_jax.data.index import Index, make_index
from voco_jax.data.packing import pack_row
from voco_jax.data.plan import PackedExample, Plan
from voco_jax.data.records import BadRecord, Record, Source
from voco_jax.data.samples import SampleMaker
from voco_jax.errors import UserError
from voco_jax.terminal import count_of, shortened

# Why a conversation is not taught, as reports name it
OTHER_ANSWER = "not taught: other tokens in the teacher's answer"
NO_ROOM = "not taught: no room in the teacher's row"

KEY = "config.train.distill.teacher"


class Placed(NamedTuple):
    """A conversation in a read row: the student's sample, the first of the pack's images that it speaks of, what the
    teacher has of it (None: nothing), and its name in messages."""

    sample: Sample
    first_image: int
    of_teacher: Any
    where: str


class Teaching(Protocol):
    """What `PackLoader` asks for beside the student's rows. Worker processes get a pickled copy."""

    def fingerprint(self) -> str:
        """Of what it says: the same in all processes, and where a run goes on; '' where others see to that."""

    def for_conversation(self, example: PackedExample, record: Record, times: np.ndarray | None, sample: Sample) -> Any:
        """What the teacher has of a conversation; BadRecord where it has nothing, which the report counts."""

    def arrays(self, row: Sequence[Placed], length: int, warn: Callable[[str, str], Any]) -> dict[str, np.ndarray]:
        """Of a row of `length` tokens the arrays that a batch has of it. `warn` gets kind and name of conversations
        that are not taught after all."""


@dataclasses.dataclass(frozen=True)
class TeacherFormat:
    """How a teacher reads conversations.

    encoder: the form of its prompts (`make_encoder` of its run's config). images_per_row: most images of one of its
    rows; 0: as many as the first epoch needs. row_length: tokens of its rows; 0: as many as the first epoch needs.
    Conversations for which there is no room are not taught.
    """

    encoder: Encoder
    images_per_row: int = 0
    row_length: int = 0


@dataclasses.dataclass(frozen=True)
class TeacherRows:
    """Rows of `row_length` tokens about at most `images_per_row` images, of which the longest conversation has
    `longest` tokens.

    Arrays of a batch: `teacher_tokens`, `teacher_positions`, `teacher_segment_ids` and `teacher_slot_index` int32
    [rows, row_length], as `packing.Row` has them; and `teacher_places` int32 [rows, T]: for each place of the student's
    row that predicts a label the place of the teacher's row that predicts the same; -1 where there is none.
    """

    maker: SampleMaker
    row_length: int
    images_per_row: int
    longest: int

    def fingerprint(self) -> str:
        return ""  # plan and teacher are looked at by themselves

    def for_conversation(
        self, example: PackedExample, record: Record, times: np.ndarray | None, sample: Sample
    ) -> Sample:
        """The conversation as the teacher reads it, up to the last label that both have."""
        return teacher_sample_of(self.maker, record, example.conversation, times, sample)

    def arrays(self, row: Sequence[Placed], length: int, warn: Callable[[str, str], Any]) -> dict[str, np.ndarray]:
        places = np.full(length, -1, np.int32)
        read: list[Sample] = []
        firsts: list[int] = []
        start = used = images = 0
        for placed in row:
            own, sample = placed.of_teacher, placed.sample
            if own is not None:
                if used + len(own) <= self.row_length and images + own.num_images <= self.images_per_row:
                    theirs, ours = labels_of_both(own, sample)
                    places[start + ours - 1] = used + theirs - 1
                    read.append(own)
                    firsts.append(placed.first_image * self.maker.encoder.num_visual_tokens)
                    used, images = used + len(own), images + own.num_images
                else:
                    warn(NO_ROOM, placed.where)
            start += len(sample)
        laid_out = pack_row(read, self.row_length, firsts).arrays()
        names = ("tokens", "positions", "segment_ids", "slot_index")
        return {f"teacher_{name}": laid_out[name] for name in names} | {"teacher_places": places}


def labels_of_both(own: Sample, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    """Where the same labels stand in two samples of one conversation, but for one that nothing stands before."""
    theirs, ours = np.flatnonzero(own.labels), np.flatnonzero(sample.labels)
    count = min(len(theirs), len(ours))
    theirs, ours = theirs[:count], ours[:count]
    predicted = (theirs > 0) & (ours > 0)
    return theirs[predicted], ours[predicted]


def teacher_sample_of(
    maker: SampleMaker, record: Record, conversation: int, times: np.ndarray | None, sample: Sample
) -> Sample:
    """A conversation as a teacher's `maker` has it, up to the last label that `sample`, the student's, has too.

    BadRecord where the labels of both are other tokens.
    """
    own = maker.sample(record, conversation, times).sample
    theirs, ours = labels_of_both(own, sample)
    expected, found = sample.tokens[ours], own.tokens[theirs]
    if not np.array_equal(expected, found):
        first = int(np.argmax(expected != found))
        answers = (each.tokens[each.labels][first : first + 8] for each in (sample, own))
        of_both = (shortened(maker.encoder.tokenizer.decode(tokens)) for tokens in answers)
        raise BadRecord(OTHER_ANSWER, "expected an answer that goes on with {}, found {}".format(*of_both))
    end = int(theirs[-1]) + 1 if len(theirs) else 0
    return Sample(own.tokens[:end], own.labels[:end], own.slot_index[:end], own.num_images)


def make_teacher_rows(
    teacher: TeacherFormat,
    maker: SampleMaker,
    plan: Plan,
    by_name: dict[str, tuple[Source, Index]],
    cache_dir: str,
    num_workers: int,
    log: Callable[[str], None],
) -> TeacherRows:
    """Look at all conversations as the teacher reads them; the first epoch says what room its rows need.

    `maker` and `by_name` (each source with its index, in the plan's order) are the student's. UserError where most
    answers have other tokens in the teacher's prompts.
    """
    own = dataclasses.replace(maker, encoder=teacher.encoder, row_length=0)
    both = {
        name: (source, index, make_index(source, own, cache_dir, num_workers, f"{name} for the teacher"))
        for name, (source, index) in by_name.items()
    }
    lengths: list[np.ndarray] = []
    for taught, (source, index, other) in zip(find_taught(both, own, maker, KEY, log), both.values(), strict=True):
        length = np.zeros(len(taught), np.int64)
        length[taught] = other.lengths[index.find(other.keys)[taught]]
        # What the student does not read of a conversation, the teacher need not read either
        cut = np.flatnonzero(taught & (index.lengths == maker.row_length)) if maker.row_length else ()
        for place in cut:
            length[place] = _cut_length(source, own, maker, *index.locate(int(place)))
        lengths.append(length)
    rows, conversations, images = plan.placed()
    most = teacher.images_per_row or plan.most_images_in_a_row()
    all_lengths = np.concatenate(lengths)
    tokens, seen = np.zeros((2, int(rows.max()) + 1), np.int64)
    for row, length, count in zip(rows.tolist(), all_lengths[conversations].tolist(), images.tolist(), strict=True):
        if length and seen[row] + count <= most:
            tokens[row] += length
            seen[row] += count
    row_length = teacher.row_length or int(tokens.max())
    if not row_length:
        raise UserError(f"config.train.distill.images_per_row: no conversation has so few images, found {most}")
    log(f"teacher: rows of {count_of(row_length, 'token')}, about {count_of(most, 'image')} at most")
    return TeacherRows(own, row_length, most, min(row_length, int(all_lengths.max())))


def find_taught(
    by_name: dict[str, tuple[Source, Index, Index]],
    own: SampleMaker,
    maker: SampleMaker,
    key: str,
    log: Callable[[str], None],
) -> list[np.ndarray]:
    """Of each source which conversations of the student's index have the same answers in the teacher's, bool [m].

    `own` and `maker` are the teacher's and the student's. `log` gets a line about the others; UserError, of the option
    or config `key`, where these are most.
    """
    found: list[np.ndarray] = []
    differ: list[tuple[Source, int, int]] = []  # the first of each source
    for source, index, other in by_name.values():
        at = index.find(other.keys)
        same = at >= 0
        same[same] = other.answers[at[same]] == index.answers[same]
        found.append(same)
        differ += [(source, *index.locate(place)) for place in np.flatnonzero(~same)[:1]]
    total, untaught = sum(map(len, found)), sum(int((~same).sum()) for same in found)
    if untaught:
        source, record, conversation = differ[0]
        told = f"{untaught:,} of {count_of(total, 'conversation')} have other tokens in the teacher's answers"
        reason = _why(source, own, maker, record, conversation)
        if 2 * untaught > total:
            raise UserError(f"{key}: {told}; {source.where(record)}: {reason}")
        log(f"teacher: {told}, and are not taught; {source.where(record)}: {reason}")
    return found


def _both(source: Source, own: SampleMaker, maker: SampleMaker, record: int, conversation: int) -> Sample:
    found = source[record]
    times = maker.frame_times(found)
    return teacher_sample_of(own, found, conversation, times, maker.sample(found, conversation, times).sample)


def _cut_length(source: Source, own: SampleMaker, maker: SampleMaker, record: int, conversation: int) -> int:
    try:
        return len(_both(source, own, maker, record, conversation))
    except BadRecord:
        return 0  # it can no longer be read: training will say so


def _why(source: Source, own: SampleMaker, maker: SampleMaker, record: int, conversation: int) -> str:
    try:
        _both(source, own, maker, record, conversation)
    except BadRecord as error:
        return str(error)
    return "other tokens beyond config.data.row_length"
