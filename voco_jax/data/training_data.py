"""The training set of a config, opened from top to bottom: sources → index → plan → pipeline → batches.

1. `sources/`: records, by their place in a source.
2. `index.py`: every record is looked at once; what is usable, and how long (`samples.py` makes a record's samples).
3. `plan.py`: which conversations stand in which pack of which epoch, from the index and the seed alone.
4. `pipeline.py`: packs of the plan are loaded and laid out as arrays (`packing.py`), by threads and worker processes.
5. Batches: packs side by side, by their number.
"""

from collections.abc import Callable, Sequence
import dataclasses
import math
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from voco_jax.config import typed
from voco_jax.config_keys import DataConfig
from voco_jax.data.augment import Augmentation
from voco_jax.data.best_fit import PackShape
from voco_jax.data.contents import contents_of
from voco_jax.data.conversations import Encoder
from voco_jax.data.from_config import (
    check_elastic_k,
    make_encoder,
    make_model_config,
    make_processor,
    take_template,
    template_of,
)
from voco_jax.data.index import Index, make_index
from voco_jax.data.packing import WEIGHTINGS
from voco_jax.data.pipeline import Batches, Loading, PackLoader
from voco_jax.data.plan import Plan, cheapest_rows
from voco_jax.data.records import BadRecord, Source, tiles_of
from voco_jax.data.reports import Report
from voco_jax.data.samples import SampleMaker
from voco_jax.data.sources import open_sources
from voco_jax.data.stored_logits import open_stored_logits
from voco_jax.data.teaching import TeacherFormat, Teaching, make_teacher_rows
from voco_jax.data.tokenizer import load_run_tokenizer, load_tokenizer, train_tokenizer, vocabulary_sum
from voco_jax.data.video import FrameSampling
from voco_jax.errors import UserError
from voco_jax.models.voco import VoCoConfig
from voco_jax.terminal import count_of

MOSTLY_PADDING = 0.5  # share of the tokens used, below which `log` gets a line about what would be better


class TrainingData(NamedTuple):
    """Batches and what they were made with. `longest` is the longest conversation, in tokens."""

    tokenizer: object
    model_config: VoCoConfig
    batches: Batches
    longest: int


def open_training_data(
    config: ConfigDict,
    *,
    run: Path | None = None,
    shard: Sequence[int] | None = None,
    teacher: TeacherFormat | None = None,
    log: Callable[[str], None] = print,
) -> TrainingData:
    """Look at the training set of a config, and plan its first epoch.

    A config that asks for the tokenizer's chat template gets it. `run` is a directory whose tokenizer is taken, `shard`
    the packs of every batch that this process loads, `teacher` the form of prompts in which batches have the
    conversations too. `log` gets lines about what was found. UserError for what cannot be trained on.
    """
    data = typed(config).data
    _check(data)
    processor = make_processor(config)
    check_elastic_k(config)
    sources, weights = open_sources(data, "train")
    tokenizer = make_tokenizer(config, sources, run)
    for said in take_template(config, tokenizer):
        log(f"data: {said}")
    model_config = make_model_config(config, tokenizer)
    maker = make_sample_maker(data, make_encoder(config, tokenizer, model_config))
    indices = make_indices(data, "train", sources, maker, log)
    longest = max((int(index.lengths.max()) for index in indices if len(index)), default=0)
    if not longest:
        raise UserError("config.data.train: no usable conversation")

    plan = _make_plan(data, config.seed, indices, weights, longest, model_config.compress_length, log)
    augmentation = Augmentation(data.random_crop, data.color_jitter, data.video.random_offset)
    by_name = dict(zip(sorted(data.train), zip(sources, indices, strict=True), strict=True))
    teaching: Teaching | None = None
    distill = config.train.distill
    if config.train.loss == "distillation" and distill.logits:
        vocabulary = vocabulary_sum(tokenizer)
        teaching = open_stored_logits(distill.logits, data, by_name, vocabulary, distill.top_k, log)
    elif teacher is not None:
        teaching = make_teacher_rows(teacher, maker, plan, by_name, data.cache_dir, data.num_workers, log)
    loader = PackLoader(
        sources, maker, plan, processor, data.loss_weighting, augmentation, config.train.elastic_k, teaching
    )
    loading = Loading(data.num_workers, data.num_threads, data.prefetch, data.max_skipped_fraction)
    contents = {name: contents_of(source, index) for name, (source, index) in by_name.items()}
    batches = Batches(loader, loading, data.batch_size, shard, config.train.steps, contents)
    return TrainingData(tokenizer, model_config, batches, longest)


def make_sample_maker(data: DataConfig, encoder: Encoder) -> SampleMaker:
    """What makes samples of records as a config says."""
    video = data.video
    sampling = FrameSampling(video.num_frames, video.fps, video.max_frames)
    return SampleMaker(encoder, data.row_length, data.images_per_pack, sampling, video.timestamps, video.incomplete)


def _check(data: DataConfig) -> None:
    if data.loss_weighting not in WEIGHTINGS:
        expected = f"expected {' or '.join(WEIGHTINGS)}"
        raise UserError(f"config.data.loss_weighting: {expected}, found {data.loss_weighting!r}")
    needed = len(tiles_of(data.image_grid))
    if data.image_grid > 1 and data.images_per_pack < needed:
        raise UserError(
            f"config.data.images_per_pack: expected at least {needed}, for all of a picture and its {needed - 1} tiles "
            f"(config.data.image_grid = {data.image_grid}); found {data.images_per_pack}"
        )
    if not data.video.num_frames and not data.video.fps:
        raise UserError("config.data.video: expected num_frames or fps above 0, found neither")


def _make_plan(
    data: DataConfig,
    seed: int,
    indices: Sequence[Index],
    weights: Sequence[float],
    longest: int,
    compress_length: int,
    log: Callable[[str], None],
) -> Plan:
    """The plan of the training set. Rows of a pack are chosen here where the config leaves them open; `log` gets lines
    about how full the packs are."""
    shape = PackShape(data.rows_per_pack, data.row_length or longest, data.images_per_pack)
    options: dict[str, Any] = dict(
        seed=seed, layout=data.layout, batch_size=data.batch_size,
        conversations_per_record=data.conversations_per_record, share_images=data.share_images,
    )  # fmt: skip
    if not data.rows_per_pack:
        rows, _ = cheapest_rows(indices, weights, shape, compress_length, **options)
        shape = dataclasses.replace(shape, rows=rows)
        log(f"data: {count_of(rows, 'row')} a pack, which costs least (config.data.rows_per_pack)")
    plan = Plan(indices, weights, shape, **options)
    use = plan.use()
    log(
        f"data: {count_of(use.packs, 'pack')}, {count_of(math.ceil(use.packs / data.batch_size), 'batch')} an epoch; "
        f"{use.tokens:.1%} of the tokens and {use.images:.1%} of the image slots used"
    )
    if data.rows_per_pack and use.tokens < MOSTLY_PADDING:
        rows, times = cheapest_rows(indices, weights, shape, compress_length, **options)
        if times > 1:
            log(
                f"data: most of that is padding; config.data.rows_per_pack={rows} would need {times:.1f} times fewer "
                f"tokens an epoch than {data.rows_per_pack}"
            )
    return plan


def open_test_data(config: ConfigDict, training: Batches, log: Callable[[str], None] = print) -> Batches:
    """The test set of a config as batches of the shape of training's, for evaluation during training.

    Each conversation comes once (as the weights say), then no more, in an order that follows from the data alone.
    Pictures and frames are not augmented, and threads of this process load them. Conversations are cut to the length of
    training's rows. UserError: no test data, or none that can be used.
    """
    data = typed(config).data
    if not data.test:
        raise UserError("config.eval.every: expected sources in config.data.test to evaluate with, found none")
    sources, weights = open_sources(data, "test")
    loader, shape = training.loader, training.loader.plan.shape
    maker = dataclasses.replace(loader.maker, row_length=shape.row_length)
    indices = make_indices(data, "test", sources, maker, log)
    if max(weight * len(index) for weight, index in zip(weights, indices, strict=True)) < 1:
        raise UserError("config.data.test: no usable conversation")
    threads = max(4, data.num_threads)
    loading = Loading(0, threads, max(threads, data.prefetch), data.max_skipped_fraction)
    plan = Plan(
        indices, weights, shape, seed=0, layout=data.layout, batch_size=data.batch_size,
        share_images=data.share_images, epochs=1,
    )  # fmt: skip
    num_batches = min(config.eval.num_batches, math.ceil(plan.use().packs / data.batch_size))
    loader = PackLoader(sources, maker, plan, loader.processor, data.loss_weighting)
    return Batches(loader, loading, data.batch_size, training.shard, num_batches)


def make_indices(
    data: DataConfig, key: str, sources: Sequence[Source], maker: SampleMaker, log: Callable[[str], None]
) -> list[Index]:
    """Indices of the sources of `config.data.<key>`; UserError where too many records are skipped."""
    indices, report = [], Report()
    for name, source in zip(sorted(getattr(data, key)), sources, strict=True):
        index = make_index(source, maker, data.cache_dir, data.num_workers, name)
        head, *kinds = index.report.lines("conversation")
        log(f"data: {'test: ' * (key == 'test')}{name}: {head}, {count_of(len(index), 'record')}")
        for line in kinds:
            log(line)
        report.merge(index.report)
        indices.append(index)
    report.check(data.max_skipped_fraction, report.seen)
    return indices


def make_tokenizer(config: ConfigDict, sources: Sequence[Source], run: Path | None):
    """The run's tokenizer, or the config's, or one trained on the conversations of the sources."""
    if run is not None:
        return load_run_tokenizer(run)
    if config.init_from:
        return load_run_tokenizer(config.init_from)
    if config.tokenizer.source != "train":
        return load_tokenizer(config.tokenizer.source)
    texts = {text for source in sources for i in range(len(source)) for text in _texts(source, i)}
    template = template_of(config)
    prompts = (template.exchange(text, text) for text in sorted(texts))
    return train_tokenizer(prompts, config.tokenizer.vocab_size, template.control_tokens)


def _texts(source: Source, i: int) -> list[str]:
    try:
        turns = [turn for conversation in source[i].conversations for turn in conversation]
    except BadRecord:
        return []  # the index will count it
    values = [turn.get("value") if isinstance(turn, dict) else None for turn in turns]
    return [value.encode(errors="ignore").decode() for value in values if isinstance(value, str)]
