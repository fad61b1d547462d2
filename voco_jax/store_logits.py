"""voco store-logits --run TEACHER --config=STUDENT --out DIR [--config.KEY=VALUE …]

Asks a run about all training data of a config, and stores what it says at every token of the answers: the logits of the
most likely tokens. A training with config.train.distill.logits=DIR learns from them, without the teacher at hand.

The teacher may be a run of any size and compressor, plain LLaVA too, with image size and prompts of its own; its
tokenizer is the student's. The student's K, template and row length may change later, its data and answers not. What
was stopped goes on where it was when the command is given again.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import hashlib
import json
import math
from pathlib import Path
import sys
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
from tqdm import tqdm

from voco_jax.arguments import add_model_arguments, mesh_of
from voco_jax.checkpoint.init_from import begin_with_run
from voco_jax.checkpoint.run import Run, load_run
from voco_jax.command_line import parse_arguments
from voco_jax.config import typed
from voco_jax.config_keys import DataConfig
from voco_jax.data.best_fit import PackShape
from voco_jax.data.contents import contents_of
from voco_jax.data.from_config import make_encoder, make_model_config, take_template
from voco_jax.data.index import Index, make_index
from voco_jax.data.pipeline import Batches, Loading, PackLoader
from voco_jax.data.plan import PackedExample, Plan, cheapest_rows
from voco_jax.data.records import Record, Source
from voco_jax.data.reports import Report
from voco_jax.data.samples import SampleMaker
from voco_jax.data.shards.build import file_digest, open_writer, read_result, split_records
from voco_jax.data.shards.files import LOGITS, MANIFEST, REPORT, SHARD, begin, shard_names, write_json
from voco_jax.data.sources import open_sources
from voco_jax.data.stored_logits import (
    DTYPES,
    Form,
    Logits,
    check_pixels_stay,
    form_of,
    frames_of,
    pack_logits,
    pack_table,
)
from voco_jax.data.teaching import Placed, find_taught
from voco_jax.data.tokenizer import vocabulary_sum
from voco_jax.data.training_data import make_indices, make_sample_maker, make_tokenizer
from voco_jax.errors import UserError, one_line_errors
from voco_jax.infer.engine import bucket
from voco_jax.io.atomic import replacing
from voco_jax.models.compressors import COMPRESSORS
from voco_jax.models.voco import Read
from voco_jax.options import at_least_1
from voco_jax.parallel.mesh import ROWS, axis_size
from voco_jax.parallel.sharding import put_batch
from voco_jax.terminal import count_of

OPTIONS = "group_size:1"  # each conversation by itself, for any order; compressed
CHUNK_LOGITS = 2**26  # numbers: so many logits are whole at a time
ROOM = 512  # tokens by which a teacher's prompt may be longer than the student's, beside its images


@dataclasses.dataclass(frozen=True)
class _Numbers:
    """A `Teaching` that says which conversation each label belongs to: `conversation` int32 [rows, T], its place among
    `keys`; -1 for all else."""

    keys: np.ndarray

    def fingerprint(self) -> str:
        return ""

    def for_conversation(
        self, example: PackedExample, record: Record, times: np.ndarray | None, sample: Any
    ) -> int | None:
        key = example.record << 32 | example.conversation
        at = int(np.searchsorted(self.keys, key))
        return at if at < len(self.keys) and self.keys[at] == key else None

    def arrays(self, row: Sequence[Placed], length: int, warn: Callable[[str, str], Any]) -> dict[str, np.ndarray]:
        numbers, start = np.full(length, -1, np.int32), 0
        for placed in row:
            at = np.flatnonzero(placed.sample.labels)
            if placed.of_teacher is not None:
                numbers[start + at[at > 0] - 1] = placed.of_teacher
            start += len(placed.sample)
        return {"conversation": numbers}


class Asker:
    """Asks a run: batches of the pipeline to its largest logits, over its mesh."""

    def __init__(self, run: Run, k: int):
        self._run, self._mesh = run, run.mesh
        graphdef, state = nnx.split(run.model)
        self._params = nnx.to_pure_dict(state)
        normalize, vocab_size = run.processor.normalize, len(run.encoder.tokenizer)

        @jax.jit
        def ask(params: dict, batch: dict) -> tuple[jax.Array, jax.Array]:
            model, places = nnx.merge(graphdef, params), batch["places"]
            rows, labels = places.shape
            hidden = model.hidden(Read(*(batch[name] for name in Read._fields)), normalize(batch["pixel_values"]))
            hidden = jnp.take_along_axis(hidden, places[..., None], axis=1)
            # The head of a few labels at a time: logits of all would not fit
            chunks = math.gcd(labels, max(1, 2 ** math.ceil(math.log2(rows * labels * vocab_size / CHUNK_LOGITS))))
            parts = hidden.reshape(rows, chunks, labels // chunks, -1).swapaxes(0, 1)
            # Spare rows of the head are no tokens
            logits, ids = jax.lax.map(lambda part: jax.lax.top_k(model.llama.logits(part)[..., :vocab_size], k), parts)
            return ids.swapaxes(0, 1).reshape(rows, labels, k), logits.swapaxes(0, 1).reshape(rows, labels, k)

        self._ask = ask

    def __call__(self, batch: dict) -> Iterator[tuple[int, Logits]]:
        """(number of the conversation, its logits) of a batch with `_Numbers`'s array. Nothing is waited for before the
        first is taken."""
        numbers, targets = batch.pop("conversation"), batch["targets"]
        at = [np.flatnonzero(row >= 0) for row in numbers]
        most = max(map(len, at))
        if not most:
            return iter(())
        places = np.zeros((len(at), bucket(most, 16)), np.int32)
        for row, here in zip(places, at, strict=True):
            row[: len(here)] = here
        arrays = {name: batch[name] for name in (*Read._fields, "pixel_values")} | {"places": places}
        arrays = arrays if self._mesh is None else put_batch(self._mesh, arrays)
        found = self._ask(self._params, arrays)

        def taken() -> Iterator[tuple[int, Logits]]:
            ids, logits = map(np.asarray, found)
            for r, here in enumerate(at):
                of_row = numbers[r, here]
                for conversation in dict.fromkeys(of_row.tolist()):
                    its = np.flatnonzero(of_row == conversation)
                    yield conversation, Logits(targets[r, here[its]], ids[r, its], logits[r, its])

        return taken()

    def on_mesh(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)


@dataclasses.dataclass(frozen=True)
class Storing:
    """What is asked and how: a teacher's `run` about `data`, by its own `maker`, in packs of a `shape`, of which
    `batch_size` are a batch."""

    run: Run
    data: DataConfig
    maker: SampleMaker
    shape: PackShape
    batch_size: int
    form: Form

    def shard(
        self, source: Source, ours: Index, theirs: Index, asker: Asker, file: Path, step: Callable[[], Any]
    ) -> None:
        """Write the conversations of `ours` into a new shard, as far as the teacher can read them (`theirs`). `step` is
        called once for each."""
        found: dict[int, Logits] = {}
        report = Report()
        for number, logits in self._ask(source, ours, theirs, asker, report) if len(theirs) else ():
            found[number] = logits
            step()
        for _ in range(len(ours.keys) - len(found)):
            step()
        tokens = sum(len(logits.labels) for logits in found.values())
        with replacing(file, shared=True) as temporary:
            temporary.touch(exist_ok=False)  # OSError here; ArrayRecord would say nothing until there is much to write
            with open_writer(temporary, OPTIONS) as write:
                write(pack_table(ours))
                for i in range(len(ours.keys)):
                    write(pack_logits(found.get(i), self.form))
            result = {"records": 1 + len(ours.keys), "tokens": tokens, **file_digest(temporary)}
            write_json(file.with_suffix(".json"), result | {"report": report.to_dict()})

    def _ask(
        self, source: Source, ours: Index, theirs: Index, asker: Asker, report: Report
    ) -> Iterator[tuple[int, Logits]]:
        """(place among the conversations of `ours`, logits), in any order."""
        plan = Plan(
            [theirs], [1.0], self.shape, seed=0, batch_size=self.batch_size, share_images=self.data.share_images,
            epochs=1,
        )  # fmt: skip
        numbers, processor = _Numbers(ours.keys), self.run.processor
        loader = PackLoader([source], self.maker, plan, processor, "token", teaching=numbers)
        loading = Loading(0, self.data.num_threads, self.data.prefetch, 1.0)
        count = math.ceil(plan.use().packs / self.batch_size)
        with contextlib.closing(Batches(loader, loading, self.batch_size, num_batches=count)) as batches:
            asked: Iterator[tuple[int, Logits]] = iter(())
            for batch in batches:
                coming = asker(batch)  # while a device computes it, the batch before is taken
                yield from asked
                asked = coming
            yield from asked
            report.merge(batches.report)


def prepare(
    config: ConfigDict, run: Run, *, k: int, dtype: str, batch_size: int
) -> tuple[Storing, dict[str, tuple[Source, Index, Index]]]:
    """What to ask how, and by name each source with the student's index and the teacher's.

    UserError for a teacher that cannot teach this config's data.
    """
    data, name, llama = typed(config).data, str(run.directory), run.model.config.llama
    sources, weights = open_sources(data, "train")
    tokenizer = make_tokenizer(config, sources, None)
    if vocabulary_sum(tokenizer) != vocabulary_sum(run.encoder.tokenizer):
        raise UserError(f"--run: {name}: expected the tokenizer of the config, found another vocabulary")
    if k > len(tokenizer):
        raise UserError(f"--k: expected at most {len(tokenizer)}, the vocabulary; found {k}")
    take_template(config, tokenizer)
    maker = make_sample_maker(data, make_encoder(config, tokenizer, make_model_config(config, tokenizer)))
    indices = make_indices(data, "train", sources, maker, print)
    names = sorted(data.train)
    check_pixels_stay(data, dict(zip(names, zip(sources, indices, strict=True), strict=True)), "voco store-logits")

    # What a student with rows so long does not read, the teacher need not read either
    longest = llama.max_position_embeddings
    if data.row_length:
        longest = min(longest, data.row_length + data.images_per_pack * run.encoder.num_visual_tokens + ROOM)
    own = dataclasses.replace(maker, encoder=run.encoder, row_length=longest)
    theirs = [
        make_index(source, own, data.cache_dir, data.num_workers, f"{of} for the teacher")
        for of, source in zip(names, sources, strict=True)
    ]
    by_name = dict(zip(names, zip(sources, indices, theirs, strict=True), strict=True))
    find_taught(by_name, own, maker, "--run", print)

    row_length = max(int(index.lengths.max()) for index in theirs if len(index))
    try:
        run.model.config.check_kernels(row_length, training=False)
    except ValueError as error:
        raise UserError(f"--run: {name}: {error}") from None
    shape, segment = PackShape(0, row_length, data.images_per_pack), run.model.config.compress_length
    rows, _ = cheapest_rows(theirs, weights, shape, segment, seed=0, share_images=data.share_images)
    form = form_of(k, len(tokenizer), dtype)
    return Storing(run, data, own, dataclasses.replace(shape, rows=rows), batch_size, form), by_name


def store(
    config: ConfigDict, run: Run, out: Path, *, k: int, dtype: str, batch_size: int, records_per_shard: int
) -> tuple[dict, Report]:
    """Write the shards that are not there yet; returns the manifest and what became of the records.

    UserError, before anything is written, as `prepare`, and for a directory of something else.
    """
    asker = Asker(run, k)
    with asker.on_mesh():
        together = axis_size(*ROWS)
    batch_size = -(-batch_size // together) * together
    storing, by_name = prepare(config, run, k=k, dtype=dtype, batch_size=batch_size)
    tasks: list[tuple[str, range]] = []  # of each shard its source's name, and the records of the index
    contents: dict[str, dict] = {}
    for name, (source, index, _) in by_name.items():
        ranges = split_records(len(index), records_per_shard)
        shards = len(tasks), len(tasks) + len(ranges)
        contents[name] = {"size": len(source), "shards": shards, **contents_of(source, index)}
        tasks += [(name, records) for records in ranges]
    checksum = hashlib.sha256(json.dumps(sorted(run.checksums.items())).encode()).hexdigest()
    arguments = {
        "k": k, "dtype": dtype, "vocab_size": len(run.encoder.tokenizer),
        "vocabulary": vocabulary_sum(run.encoder.tokenizer),
        "teacher": {
            "run": run.directory.name, "step": run.step, "sha256": checksum,
            "compressor": run.model.config.compressor,
        },
        "video": frames_of(storing.data), "records_per_shard": records_per_shard, "sources": contents,
    }  # fmt: skip
    arguments = json.loads(json.dumps(arguments))  # as it is read back
    report, results = Report(), []
    total = sum(len(index.keys) for _, index, _ in by_name.values())
    bar = tqdm(total=total, unit=" conversations", desc=out.name, delay=0.5, file=sys.stderr)
    with begin(out, arguments, len(tasks), LOGITS) as manifest, bar, asker.on_mesh():
        for (name, records), shard in zip(tasks, shard_names(len(tasks)), strict=True):
            source, index, other = by_name[name]
            ours, file = index.select(np.arange(records.start, records.stop)), out / f"{shard}{SHARD}"
            if file.exists():
                bar.update(len(ours.keys))
            else:
                theirs = other.select(np.flatnonzero(np.isin(other.records, ours.records)))
                storing.shard(source, ours, theirs, asker, file, bar.update)
            result = read_result(out, shard)
            report.merge(Report.from_dict(result.pop("report")))
            report.check(storing.data.max_skipped_fraction, total)
            results.append(result)
        write_json(out / REPORT, report.to_dict())
        count = sum(result["records"] for result in results)
        manifest |= {"complete": True, "rows": total, "records": count, "shards": results}
        write_json(out / MANIFEST, manifest)
    return manifest, report


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="new or empty directory, or one to go on with"
    )
    parser.add_argument(
        "--k",
        type=at_least_1,
        default=64,
        metavar="N",
        help="logits of a token that are kept, the largest (default 64)",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float16", help="in which they are kept, less the largest (default float16)"
    )
    parser.add_argument(
        "--compressor", choices=COMPRESSORS,
        help="run the teacher with another compressor than it was trained with ('none': it reads images whole)",
    )  # fmt: skip
    parser.add_argument(
        "--batch-size", type=at_least_1, default=8, metavar="N", help="packs that are asked together (default 8)"
    )
    parser.add_argument(
        "--records-per-shard", type=at_least_1, default=1000, metavar="N",
        help="what a stopped command has to do again, at most (default 1000)",
    )  # fmt: skip


@one_line_errors
def main() -> None:
    config, args = parse_arguments(sys.argv, _add_arguments, __doc__)
    config = begin_with_run(config)
    check_pixels_stay(typed(config).data, {}, "voco store-logits")  # before the run is read
    run = load_run(
        args.run, step=args.step, compressor=args.compressor, attention=args.attention, mesh=mesh_of(args.mesh)
    )
    manifest, report = store(
        config, run, args.out, k=args.k, dtype=args.dtype, batch_size=args.batch_size,
        records_per_shard=args.records_per_shard,
    )  # fmt: skip
    if report.skipped or report.warned:
        print("\n".join(report.lines("conversation")))
    size = sum(shard["bytes"] for shard in manifest["shards"])
    tokens = sum(shard["tokens"] for shard in manifest["shards"])
    told = f"{count_of(manifest['rows'], 'conversation')}, {count_of(tokens, 'token')}, {size / 2**20:,.1f} MiB"
    keys = f"--config.train.loss=distillation --config.train.distill.logits={args.out}"
    print(f"written: {args.out} ({told}); train with {keys}")


if __name__ == "__main__":
    main()
