"""A teacher's logits, stored beforehand (`voco store-logits`), as a batch has them beside the student's rows.

A directory of shards (`shards/files.py`). Shard by shard, record by record and conversation by conversation they hold
what the teacher says at every label: the `k` largest logits with their tokens. A shard's first record is the table of
its conversations, which say by a checksum what their answers are; each conversation has a record of its own. All are
MessagePack, plain values only (nothing in it can be code):

    {"records": int64, "conversations": int32, "answers": int64}              [n], of the shard's n conversations
    {"labels": int32 [m], "ids": uint16 or uint32 [m, k], "logits": float16 or float32 [m, k]}           m labels

Arrays are bytes, little-endian. Logits are less the largest one at their label, which changes no softmax. The student
may have another number of VoCo tokens, template or `row_length` than when they were stored: only its answers have to be
the same.
"""

import bisect
from collections.abc import Callable, Mapping, Sequence
import dataclasses
import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
import numpy as np

from voco_jax.config_keys import DataConfig
from voco_jax.data.contents import visual_checksums
from voco_jax.data.conversations import Sample
from voco_jax.data.index import Index
from voco_jax.data.plan import PackedExample
from voco_jax.data.records import BadRecord, Record, Source
from voco_jax.data.shards.files import LOGITS, SHARD, check_complete, shard_names
from voco_jax.data.teaching import OTHER_ANSWER, Placed
from voco_jax.errors import UserError
from voco_jax.io.paths import in_bucket
from voco_jax.terminal import count_of

KEY = "config.train.distill.logits"
DTYPES = ("float16", "float32")
NOTHING = "not taught: no stored logits"
_TABLE = {"records": "<i8", "conversations": "<i4", "answers": "<i8"}


class Form(NamedTuple):
    """How the logits of a label are stored: `k` of them, tokens and logits of these types."""

    k: int
    ids: np.dtype
    logits: np.dtype


def form_of(k: int, vocab_size: int, dtype: str) -> Form:
    return Form(k, np.dtype("<u2" if vocab_size <= 2**16 else "<u4"), np.dtype(dtype).newbyteorder("<"))


class Logits(NamedTuple):
    """Of one conversation: its labels [m], and at each of them tokens [m, k] and their logits [m, k], largest first."""

    labels: np.ndarray
    ids: np.ndarray
    logits: np.ndarray


# ---- Records of a shard ---------------------------------------------------------------------------------------------


def pack_table(index: Index) -> bytes:
    """The table of a shard that holds all conversations of an index."""
    records = np.repeat(index.records, np.diff(index.offsets))
    columns = dict(records=records, conversations=index.conversations, answers=index.answers)
    return msgpack.packb({name: columns[name].astype(dtype).tobytes() for name, dtype in _TABLE.items()})


def pack_logits(found: Logits | None, form: Form) -> bytes:
    """A conversation's record; of one that the teacher could not read (None) it is empty."""
    if found is None:
        found = Logits(np.zeros(0), *np.zeros((2, 0, form.k)))
    largest = found.logits.max(axis=1, keepdims=True, initial=-np.inf)
    relative = found.logits - np.where(np.isfinite(largest), largest, 0)
    arrays = dict(labels=found.labels.astype("<i4"), ids=found.ids.astype(form.ids))
    with np.errstate(over="ignore"):  # a float16 has no smaller ones: -inf, a probability of 0
        arrays["logits"] = relative.astype(form.logits)
    return msgpack.packb({name: array.tobytes() for name, array in arrays.items()})


def unpack_table(content: bytes) -> dict[str, np.ndarray]:
    """The inverse of `pack_table`; ValueError for anything else."""
    found = _unpack(content, _TABLE)
    if len({len(column) for column in found.values()}) != 1:
        raise ValueError("columns of different lengths")
    return found


def unpack_logits(content: bytes, form: Form) -> Logits:
    """The inverse of `pack_logits`; ValueError for anything else."""
    found = _unpack(content, {"labels": "<i4", "ids": form.ids, "logits": form.logits})
    shape = len(found["labels"]), form.k
    return Logits(found["labels"], found["ids"].reshape(shape), found["logits"].reshape(shape))


def _unpack(content: bytes, types: Mapping[str, Any]) -> dict[str, np.ndarray]:
    try:
        values = msgpack.unpackb(content, strict_map_key=True, max_map_len=len(types))
    except Exception as error:  # msgpack raises ValueError, and several of its own that share no base
        raise ValueError("not MessagePack") from error
    if not isinstance(values, dict) or any(not isinstance(values.get(name), bytes) for name in types):
        raise ValueError(f"expected {', '.join(types)}")
    return {name: np.frombuffer(values[name], dtype) for name, dtype in types.items()}


# ---- Reading --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class StoredLogits:
    """A `Teaching` from a directory of shards.

    Arrays of a batch: `teacher_ids` int32 and `teacher_logits` float32 [rows, T, top_k], and `taught` bool [rows, T].
    Where a place predicts no label that was stored, `taught` is false, and the logits are -inf.

    first: of each shard its first record among those of all. keys, places: of each of the student's sources the
    conversations (record << 32 | conversation), ascending, and which of all shards' records they are. digest: of all
    shards.
    """

    directory: Path
    files: Sequence[str]
    first: Sequence[int]
    form: Form
    top_k: int
    moves_frames: bool
    keys: list[np.ndarray]
    places: list[np.ndarray]
    digest: str
    _opened: Any = None

    def __getstate__(self):
        return self.__dict__ | {"_opened": None}  # each process opens the files itself

    def fingerprint(self) -> str:
        return self.digest

    def for_conversation(
        self, example: PackedExample, record: Record, times: np.ndarray | None, sample: Sample
    ) -> Logits:
        """What was stored of a conversation, for the labels that the sample has."""
        if record.video is not None and self.moves_frames:
            raise UserError(_frames_move(KEY))
        keys, key = self.keys[example.source], example.record << 32 | example.conversation
        at = int(np.searchsorted(keys, key))
        if at == len(keys) or keys[at] != key:
            raise BadRecord(NOTHING, f"{self.directory} has nothing of conversation {example.conversation}")
        found = self._read(int(self.places[example.source][at]))
        if not len(found.labels):
            raise BadRecord(NOTHING, "the teacher could not read it")
        labels = sample.tokens[sample.labels]
        count = min(len(labels), len(found.labels))
        if not np.array_equal(labels[:count], found.labels[:count]):
            raise BadRecord(OTHER_ANSWER, "other tokens than when the logits were stored")
        return Logits(*(array[:count] for array in found))

    def arrays(self, row: Sequence[Placed], length: int, warn: Callable[[str, str], Any]) -> dict[str, np.ndarray]:
        ids = np.zeros((length, self.top_k), np.int32)
        logits = np.full((length, self.top_k), -np.inf, np.float32)
        taught = np.zeros(length, bool)
        start = 0
        for placed in row:
            if placed.of_teacher is not None:
                at = np.flatnonzero(placed.sample.labels)[: len(placed.of_teacher.labels)]
                predicted = at > 0  # by a token before it
                here = start + at[predicted] - 1
                ids[here] = placed.of_teacher.ids[predicted, : self.top_k]
                logits[here] = placed.of_teacher.logits[predicted, : self.top_k]
                taught[here] = True
            start += len(placed.sample)
        return {"teacher_ids": ids, "teacher_logits": logits, "taught": taught}

    def _read(self, i: int) -> Logits:
        """Of all shards' records the i-th. UserError for one that is damaged."""
        try:
            if self._opened is None:
                self._opened = _open(self.files)
            return unpack_logits(self._opened[i], self.form)
        except (ValueError, RuntimeError) as error:  # a checksum that is not right
            file, reason = self.files[bisect.bisect(self.first, i) - 1], str(error).splitlines()[0]
            hint = f"delete it, and give the command {LOGITS.command} again"
            raise UserError(f"{KEY}: {file}: damaged ({reason:.100}); {hint}") from None


def _open(files: Sequence[str]):
    """All records of some shards. ValueError where they are none."""
    from grain.sources import ArrayRecordDataSource

    try:
        source = ArrayRecordDataSource(list(files))
        len(source)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(str(error).splitlines()[0]) from None
    return source


def open_stored_logits(
    directory: str,
    data: DataConfig,
    by_name: Mapping[str, tuple[Source, Index]],
    vocabulary: str,
    top_k: int,
    log: Callable[[str], None],
) -> StoredLogits:
    """The logits of a directory for the sources of `config.data.train`, each with its index, in the plan's order.

    `vocabulary` is the student's tokenizer's `vocabulary_sum`; `top_k` how many logits of a label are wanted, 0 for
    all. UserError for logits of other data, of another tokenizer or of other answers, for augmentation that shows the
    student other pixels than the teacher saw, and for shards that are damaged or cut off.
    """
    path = Path(directory).expanduser()
    if in_bucket(directory) or not path.is_dir():
        raise UserError(
            f"{KEY}: expected a directory that voco store-logits wrote on this machine, found {directory!r}"
        )
    check_pixels_stay(data, by_name, KEY)
    try:
        manifest = check_complete(path, LOGITS)
    except UserError as error:
        raise UserError(f"{KEY}: {error}") from None
    about = _About.of(manifest, path)
    if about.vocabulary != vocabulary:
        raise UserError(f"{KEY}: {path}: of another tokenizer: its vocabulary is not that of this run")
    if top_k > about.form.k:
        expected = f"expected at most {about.form.k}, as many as {path} has"
        raise UserError(f"config.train.distill.top_k: {expected}; found {top_k}")
    keys: list[np.ndarray] = []
    places: list[np.ndarray] = []
    untaught = 0
    for name, (source, index) in by_name.items():
        if name not in about.sources:
            stored = ", ".join(about.sources)
            raise UserError(f"{KEY}: {path}: expected logits of config.data.train.{name}, found those of {stored}")
        about.sources[name].check(path, f"config.data.train.{name}", source)
        if about.video != frames_of(data) and has_video(source, index):
            raise UserError(f"{KEY}: {path}: of other frames: config.data.video was {about.video}")
        its_keys, answers, its_places = _read_tables(about, about.sources[name].shards)
        at = index.find(its_keys)
        there = np.flatnonzero(at >= 0)
        if len(other := there[answers[at[there]] != index.answers[there]]):
            where = source.where(index.locate(int(other[0]))[0])
            raise UserError(
                f"{KEY}: {path}: {count_of(len(other), 'conversation')} of config.data.train.{name} had other answers "
                f"when they were stored, or another template around them; the first: {where}"
            )
        untaught += len(at) - len(there)
        keys.append(its_keys)
        places.append(its_places)
    few = f"; {count_of(untaught, 'conversation')} without any" if untaught else ""
    log(f"teacher: logits of {about.teacher}, {about.form.k} a token{few}")
    return StoredLogits(
        path, about.files, about.first.tolist(), about.form, top_k or about.form.k, data.video.random_offset, keys,
        places, about.digest,
    )  # fmt: skip


class _OfSource(NamedTuple):
    """What a manifest says of a source: its records, checksums of the pictures or clips of some, and its shards."""

    size: int
    visual: dict[int, str]
    shards: range

    def check(self, directory: Path, key: str, source: Source) -> None:
        """UserError for a source of other records; their text is another matter."""
        if self.size != len(source):
            was = count_of(self.size, "record")
            raise UserError(f"{KEY}: {directory}: {key} had {was} when they were stored, now {len(source):,}")
        now = visual_checksums(source, list(self.visual))
        if changed := [i for i, checksum in self.visual.items() if now.get(str(i)) != checksum]:
            raise UserError(f"{KEY}: {directory}: {source.where(min(changed))} had another picture or clip")


class _About(NamedTuple):
    """What a manifest says. first: of each shard its first record among those of all, and the number of all."""

    form: Form
    teacher: str
    vocabulary: str
    video: dict
    sources: dict[str, _OfSource]
    files: list[str]
    first: np.ndarray
    digest: str

    @classmethod
    def of(cls, manifest: dict, directory: Path) -> "_About":
        """UserError for a manifest of another form."""
        said, count = manifest["arguments"], manifest["num_shards"]
        try:
            sources = {
                name: _OfSource(of["size"], {int(i): x for i, x in of["visual"].items()}, range(*of["shards"]))
                for name, of in said["sources"].items()
            }
            if not all(0 <= of.shards.start <= of.shards.stop <= count for of in sources.values()):
                raise ValueError("shards")
            sums = "".join(shard["sha256"] for shard in manifest["shards"])
            return cls(
                form_of(said["k"], said["vocab_size"], said["dtype"]),
                f"{said['teacher']['run']}, step {said['teacher']['step']}", said["vocabulary"], said["video"], sources,
                [str(directory / f"{name}{SHARD}") for name in shard_names(count)],
                np.cumsum([0, *(shard["records"] for shard in manifest["shards"])]),
                hashlib.sha256(sums.encode()).hexdigest()[:16],
            )  # fmt: skip
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{KEY}: {directory}: not the manifest of {LOGITS.command} ({error!r:.100})") from None


def _read_tables(about: _About, shards: range) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of the conversations of some shards, all [n]: their keys, as `Index.keys`; checksums of their answers; and which
    of all records they are."""
    tables = [(np.zeros(0, np.int64),) * 3]
    for shard in shards:
        try:
            table = unpack_table(_open([about.files[shard]])[0])
            if 1 + len(table["records"]) != about.first[shard + 1] - about.first[shard]:
                raise ValueError("not as many conversations as the manifest says")
        except (ValueError, RuntimeError, IndexError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{KEY}: {about.files[shard]}: damaged ({reason:.100})") from None
        places = about.first[shard] + 1 + np.arange(len(table["records"]))
        tables.append((table["records"] << 32 | table["conversations"], table["answers"], places))
    keys, answers, places = (np.concatenate(column) for column in zip(*tables, strict=True))
    return keys, answers, places


def check_pixels_stay(data: DataConfig, by_name: Mapping[str, tuple[Source, Index]], what: str) -> None:
    """UserError for augmentation, which shows the student other pixels than the teacher saw; of frames where a source
    has videos."""
    for name, neutral in (("random_crop", 1.0), ("color_jitter", 0.0)):
        if (found := getattr(data, name)) != neutral:
            raise UserError(
                f"config.data.{name}: expected {neutral:g} with {what}: a teacher that was asked beforehand saw the "
                f"pictures as they are; found {found:g}"
            )
    if data.video.random_offset and any(has_video(*pair) for pair in by_name.values()):
        raise UserError(_frames_move(what))


def frames_of(data: DataConfig) -> dict:
    """What says which frames of a clip are looked at."""
    return {name: getattr(data.video, name) for name in ("num_frames", "fps", "max_frames", "incomplete")}


def _frames_move(what: str) -> str:
    return (
        f"config.data.video.random_offset: expected false with {what}: a teacher that was asked beforehand saw frames "
        "evenly spaced; found true"
    )


def has_video(source: Source, index: Index) -> bool:
    """Whether one of some records, spread evenly, is about a video."""
    places = np.unique(np.linspace(0, len(index) - 1, min(16, len(index))).round().astype(np.int64))
    for i in index.records[places].tolist():
        try:
            if source[i].video is not None:
                return True
        except BadRecord:  # training will count it
            continue
    return False
