"""Fourth of sources → index → plan → pipeline → batches: the Grain pipeline makes batches of the plan's packs.

The batches have a fixed shape; threads and worker processes load them. A batch depends on its number alone, not on the
number of hosts, workers and threads. So that number is the whole state of the iterator, and a run can go on anywhere.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import gc
import json
import math
import re
import sys
import time
from typing import Any

from absl import flags
import grain
import numpy as np
from PIL import Image

from voco_jax.data.augment import Augmentation
from voco_jax.data.contents import difference
from voco_jax.data.conversations import Sample
from voco_jax.data.images import ImageProcessor
from voco_jax.data.packing import OF_PACKS, pack_row
from voco_jax.data.plan import Amount, Pack, PackedExample, Plan
from voco_jax.data.processes import Watch, begin_worker, ended, free_shared_memory, uninterrupted, usable_cores
from voco_jax.data.records import TOO_LONG, BadRecord, Record, Source
from voco_jax.data.reports import Report
from voco_jax.data.samples import SampleMaker
from voco_jax.data.teaching import Placed, Teaching
from voco_jax.errors import UserError


@dataclasses.dataclass
class PackLoader(grain.transforms.Map):
    """A `Pack` to its arrays: read rows [rows, T] as in `packing.Row`, and pictures.

    `pixel_values` [images, size, size, 3] are uint8, to be normalised where they are used; places without a picture
    are zero, and never read. A record that cannot be loaded leaves its places empty, and is counted in `report`.

    With `elastic_k` there is `num_tokens` too, an int32 scalar: how many of an image's VoCo tokens this pack reads,
    drawn evenly from those numbers; with `teaching`, the arrays that a batch has of a teacher.
    """

    sources: Sequence[Source]
    maker: SampleMaker
    plan: Plan
    processor: ImageProcessor
    weighting: str
    augmentation: Augmentation = Augmentation()
    elastic_k: Sequence[int] = ()
    teaching: Teaching | None = None

    def map(self, pack: Pack) -> dict:
        examples, shape, report = pack.examples, self.plan.shape, Report()
        rows: list[list[Placed]] = [[] for _ in range(shape.rows)]
        pixels = np.zeros((shape.images, self.processor.size, self.processor.size, 3), np.uint8)
        num_images = 0
        for item in sorted({p.item for p in examples}):
            conversations = [p for p in examples if p.item == item]
            loaded = self._load_item(conversations, rows, shape.images - num_images, report)
            if loaded is None:
                continue
            images, samples = loaded
            for p, sample, of_teacher in samples:
                where = self.sources[p.source].where(p.record)
                rows[p.row].append(Placed(sample, num_images, of_teacher, where))
            for image in images:
                pixels[num_images] = self.processor.square(image)
                num_images += 1
        packed = [self._row(row, report) for row in rows]
        arrays = {name: np.stack([row[name] for row in packed]) for name in packed[0]}
        if self.elastic_k:
            own = np.random.default_rng(np.random.SeedSequence(self.plan.seed, spawn_key=(pack.number,)))
            arrays["num_tokens"] = np.array(own.choice(self.elastic_k), np.int32)
        return arrays | {"pixel_values": pixels, "report": json.dumps(report.to_dict())}

    def _row(self, row: list[Placed], report: Report) -> dict[str, np.ndarray]:
        length, visual_tokens = self.plan.shape.row_length, self.maker.encoder.num_visual_tokens
        firsts = [placed.first_image * visual_tokens for placed in row]
        arrays = pack_row([placed.sample for placed in row], length, firsts, self.weighting).arrays()
        return arrays if self.teaching is None else arrays | self.teaching.arrays(row, length, report.add_warned)

    def _load_item(
        self, conversations: list[PackedExample], rows: list[list[Placed]], room: int, report: Report
    ) -> tuple[list[Image.Image], list[tuple[PackedExample, Sample, Any]]] | None:
        """(images, [(place, sample, what the teacher has of it)]) of conversations that share their images, of which
        there is room for `room`; None where nothing of it is usable."""
        samples: list[tuple[PackedExample, Sample, Any]] = []
        images: list[Image.Image] | None = None
        images_of = 0
        records: dict[tuple[int, int], Record] = {}
        for p in conversations:
            report.seen += 1
            source = self.sources[p.source]
            try:
                if (p.source, p.record) not in records:
                    records = {(p.source, p.record): source[p.record]}
                record = records[p.source, p.record]
                times = self._times(conversations[0], record)  # the frames are the same for all
                sample = self.maker.sample(record, p.conversation, times).sample
                before = [*(placed.sample for placed in rows[p.row]), *(s for q, s, _ in samples if q.row == p.row)]
                used = sum(map(len, before))
                if used + len(sample) > self.plan.shape.row_length:
                    raise BadRecord(TOO_LONG, "conversation: longer than it was when the index was made")
                if sample.num_images > room:
                    raise BadRecord(TOO_LONG, "conversation: has more images than when the index was made")
                if images is None:  # all of an item have the same; the first that can be read gives them
                    warned: list[str] = []
                    images = self.maker.load_images(record, times, self.processor, warned.append, self._change(p))
                    for kind in warned:
                        report.add_warned(kind, source.where(p.record))
                    images_of = sample.num_images
                if sample.num_images != images_of:
                    raise BadRecord(TOO_LONG, "conversation: has other images than when the index was made")
            except BadRecord as error:
                report.add_skipped(error, source.where(p.record))
                continue
            samples.append((p, sample, self._of_teacher(p, record, times, sample, report)))
        return (images, samples) if images is not None and samples else None

    def _of_teacher(self, p: PackedExample, record: Record, times, sample: Sample, report: Report) -> Any:
        """What the teacher has of a conversation; None where it has nothing, which the report counts."""
        try:
            return None if self.teaching is None else self.teaching.for_conversation(p, record, times, sample)
        except BadRecord as error:
            report.add_warned(error.kind, f"{self.sources[p.source].where(p.record)}: {error}")
            return None

    def _change(self, p: PackedExample) -> Callable[[Image.Image], Image.Image] | None:
        """What augmentation makes of a picture; all frames of a clip are changed alike."""
        if not self.augmentation.changes_pictures:
            return None
        return lambda image: self.augmentation(image, self._rng(p))

    def _rng(self, p: PackedExample) -> np.random.Generator:
        return np.random.default_rng((self.plan.seed, p.epoch, p.source, p.record))

    def _times(self, p: PackedExample, record: Record) -> np.ndarray | None:
        moved = record.video is not None and self.augmentation.random_offset
        return self.maker.frame_times(record, self._rng(p) if moved else None)


class _Packs:
    """This host's packs in the order of its batches, from batch `first` on: what Grain reads from."""

    def __init__(self, plan: Plan, batch_size: int, shard: Sequence[int], first: int, num_batches: int):
        self._plan, self._batch_size, self._shard, self._first = plan, batch_size, list(shard), first
        self._num_batches = num_batches

    def __len__(self):
        return (self._num_batches - self._first) * len(self._shard)

    def __getitem__(self, i: int) -> Pack:
        batch, row = divmod(i, len(self._shard))
        number = (self._first + batch) * self._batch_size + self._shard[row]
        return Pack(number, self._plan[number])


@dataclasses.dataclass(frozen=True)
class Loading:
    """How batches are loaded: `prefetch` of them ahead, by `num_threads` threads (0: from the machine's cores) in each
    of `num_workers` processes (0: in this one). More than `max_skipped_fraction` of the records skipped is an error."""

    num_workers: int = 0
    num_threads: int = 0
    prefetch: int = 2
    max_skipped_fraction: float = 0.01


class Batches(Iterator):
    """An iterator of batches that can start at any batch, and whose position can be saved.

    `report` counts the records of the batches given so far. When too many were skipped, `next` raises a UserError.
    """

    def __init__(
        self,
        loader: PackLoader,
        loading: Loading,
        batch_size: int,
        shard: Sequence[int] | None = None,
        num_batches: int = 2**40,
        contents: dict[str, dict] | None = None,
    ):
        """`shard` are the packs of each global batch that are loaded here (None: all). `contents` has the checksums of
        each source by its name (`contents.py`); with the plan's they tell whether a state belongs to these data."""
        self.loader, self.loading, self.batch_size, self.report = loader, loading, batch_size, Report()
        self.shard = list(range(batch_size)) if shard is None else list(shard)
        self.num_batches, self._next, self._asked = num_batches, 0, math.inf
        self._iterator: Any = None  # Grain's
        self._watch: Watch | None = None
        self._fingerprint, self._contents = loader.plan.fingerprint(), contents or {}
        self._total = loader.plan.num_conversations

    def dataset(self) -> grain.MapDataset:
        """Batches from the next one on, by number."""
        packs = _Packs(self.loader.plan, self.batch_size, self.shard, self._next, self.num_batches)
        return grain.MapDataset.source(packs).map(self.loader).batch(len(self.shard), batch_fn=_join)

    def __next__(self) -> dict[str, np.ndarray]:
        begins = self._iterator is None
        if begins:
            self._iterator = iter(self._ahead())
            if self.loading.num_workers:
                self._watch = Watch(lambda: time.monotonic() - self._asked)
        self._asked = time.monotonic()
        try:
            with uninterrupted() if begins else contextlib.nullcontext():  # Grain starts workers when it is first asked
                batch = next(self._iterator)
        except RuntimeError as error:
            status = re.search(r"terminated unexpectedly with exit code (-?\d+)", str(error))  # Grain's words
            if status is None:
                raise
            raise ended(int(status[1])) from error
        finally:
            self._asked = math.inf
        return self._account(batch)

    def _ahead(self) -> grain.IterDataset:
        """Batches made before they are asked for, by threads and worker processes."""
        how = self.loading
        threads = how.num_threads or default_threads(how.num_workers, self._batch_bytes())
        # A thread makes a batch at a time: with fewer batches ahead than threads, some would have nothing to do
        options = grain.ReadOptions(threads, prefetch_buffer_size=max(threads, how.prefetch))
        dataset = self.dataset().to_iter_dataset(options)
        if not how.num_workers:
            return dataset
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain's workers look at flags of its own, and refuse before that
        if not self._fits_shared_memory():
            dataset = grain.experimental.WithOptionsIterDataset(
                dataset, grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
            )
        workers = grain.MultiprocessingOptions(how.num_workers, per_worker_buffer_size=max(1, how.prefetch))
        return dataset.mp_prefetch(workers, begin_worker)

    def _fits_shared_memory(self) -> bool:
        """Whether shared memory has room for all batches that Grain may hold at a time. If not, prints a line."""
        how, free = self.loading, free_shared_memory()
        # Of each worker: those that wait on its side and on this one, and one that is being written
        needed = how.num_workers * (2 * max(1, how.prefetch) + 2) * int(1.1 * self._batch_bytes())
        if free is None or needed < free:
            return True
        print(
            f"data: /dev/shm has {free / 2**20:,.0f} MiB free, of {needed / 2**20:,.0f} that batches may take "
            "(config.data.num_workers, .prefetch): they go through pipes instead, which is slower",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        return False

    def _batch_bytes(self) -> int:
        """Bytes of the pictures in this host's part of a batch."""
        return len(self.shard) * self.loader.plan.shape.images * self.loader.processor.size**2 * 3

    def amount(self, batch: int) -> Amount:
        """What a batch of this number holds, in the packs of all hosts."""
        return self.loader.plan.amount(range(batch * self.batch_size, (batch + 1) * self.batch_size))

    def describe(self, batch: int) -> str:
        """Which records stand in a batch by its number: the first three, and how many more."""
        packs = range(batch * self.batch_size, (batch + 1) * self.batch_size)
        records = list(dict.fromkeys((p.source, p.record) for i in packs for p in self.loader.plan[i]))
        told = ", ".join(self.loader.sources[source].where(record) for source, record in records[:3])
        more = f" and {len(records) - 3} more" if len(records) > 3 else ""
        return f"batch {batch}: {told}{more}"

    def peek(self) -> dict[str, np.ndarray]:
        """The next batch; the position does not change."""
        batch = self.dataset()[0]
        batch.pop("report")
        return batch

    def _account(self, batch: dict) -> dict[str, np.ndarray]:
        self._next += 1
        # Copied, as shared memory is freed only when its arrays are, and jax may keep them for long
        batch = {name: np.array(x) if isinstance(x, np.ndarray) else x for name, x in batch.items()}
        for said in batch.pop("report"):
            self.report.merge(Report.from_dict(json.loads(said)))
        self.report.check(self.loading.max_skipped_fraction, self._total)
        return batch

    def get_state(self) -> dict:
        """The position of the iterator, for JSON; the same on all hosts."""
        return self.state_at(self._next)

    def state_at(self, batches: int) -> dict:
        """The position after so many batches."""
        teaching = self.loader.teaching.fingerprint() if self.loader.teaching is not None else ""
        of_teacher = {"teaching": teaching} if teaching else {}
        return {"batches": batches, "plan": self._fingerprint, "contents": self._contents} | of_teacher

    def set_state(self, state: dict) -> None:
        """Go on from where `get_state` was asked; UserError for the state of other data, wherever they are.

        Of records that are the same, the paths may be others.
        """
        before = state.get("contents", {})  # the first runs have none
        for (name, now), source in zip(self._contents.items(), self.loader.sources, strict=False):
            if found := difference(before[name], now, source) if name in before else "":
                raise UserError(
                    f"config.data.train.{name}: {found}; a run goes on with the same records, wherever they are: "
                    "begin another with init_from"
                )
        if state.get("plan") != self._fingerprint:
            raise UserError(
                f"data: expected the records that this run began with (plan {state.get('plan')}), found others "
                f"({self._fingerprint}): a file has changed; begin another run with init_from"
            )
        if (state.get("teaching") or "") != self.state_at(0).get("teaching", ""):
            raise UserError(
                "config.train.distill.logits: expected the logits that this run began with, found others; begin "
                "another run with init_from"
            )
        self.close()
        self._next = int(state["batches"])

    def close(self) -> None:
        """Stop the workers; a later `next` goes on."""
        if self._iterator is not None:
            if self._watch is not None:
                self._watch.stop()
            self._iterator.close()
            self._iterator = self._watch = None
            gc.collect()  # what ends Grain's threads holds the last batches in cycles, and their shared memory


def default_threads(num_workers: int, batch_bytes: int) -> int:
    """Threads that load batches, in each process: the cores that one thread of the trainer leaves, at most 16.

    Each has a batch at hand, and those of a process together are at most 2 GiB. Pillow decodes and resizes without
    Python's lock, so threads do that at once.
    """
    others = usable_cores() - 1
    return max(1, min(16, others // max(1, num_workers), 2 * 2**30 // max(1, batch_bytes)))


def _join(packs: Sequence[dict]) -> dict[str, Any]:
    """Arrays of packs to those of a batch: rows [packs·rows, …], those of `OF_PACKS` [packs, …], one report a pack."""
    batch = {name: np.stack([arrays[name] for arrays in packs]) for name in packs[0] if name != "report"}
    rows = {name: x if name in OF_PACKS else x.reshape(-1, *x.shape[2:]) for name, x in batch.items()}
    return rows | {"report": [arrays["report"] for arrays in packs]}
