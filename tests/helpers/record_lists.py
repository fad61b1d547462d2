"""Records in memory as a source, and a pipeline over them."""

from collections.abc import Sequence
import dataclasses
import io

import numpy as np
from PIL import Image

from voco_jax.config import default_config
from voco_jax.data.augment import Augmentation
from voco_jax.data.best_fit import PackShape
from voco_jax.data.images import ImageProcessor
from voco_jax.data.index import make_index
from voco_jax.data.pipeline import Batches, Loading, PackLoader
from voco_jax.data.plan import Plan
from voco_jax.data.records import Picture, Record
from voco_jax.data.samples import SampleMaker
from voco_jax.data.sources.llava import question_turns
from voco_jax.data.teaching import make_teacher_rows
from voco_jax.data.video import FrameSampling


@dataclasses.dataclass
class ListSource:
    records: Sequence[Record]

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        return self.records[i]

    def where(self, i):
        return f"list[{i}]"

    def fingerprint(self):
        return repr(self.records)


def turns(question: str, answer: str) -> list[dict]:
    return question_turns(question, answer, "<image>")


def plain_picture(grey: int) -> Picture:
    """One grey level all over."""
    content = io.BytesIO()
    Image.new("RGB", (8, 8), (grey,) * 3).save(content, "PNG")
    return Picture(data=content.getvalue(), name=f"grey {grey}")


def data_config(**changes):
    config = default_config().data
    with config.unlocked():
        config.update(cache_dir="/nonexistent", **changes)
    return config


def make_batches(
    sources,
    encoder,
    data,
    cache_dir,
    *,
    size=8,
    seed=0,
    weights=None,
    shard=None,
    num_batches=2**40,
    elastic_k=(),
    teacher=None,
    log=print,
) -> Batches:
    """What `open_training_data` makes of sources, without a config's model."""
    sampling = FrameSampling(data.video.num_frames, data.video.fps, data.video.max_frames)
    maker = SampleMaker(encoder, data.row_length, data.images_per_pack, sampling, data.video.timestamps)
    indices = [make_index(source, maker, cache_dir, 0, "test") for source in sources]
    longest = max(int(index.lengths.max()) for index in indices)
    plan = Plan(
        indices,
        weights or [1.0] * len(indices),
        PackShape(data.rows_per_pack, data.row_length or longest, data.images_per_pack),
        seed=seed,
        layout=data.layout,
        batch_size=data.batch_size,
        conversations_per_record=data.conversations_per_record,
        share_images=data.share_images,
    )
    by_name = {f"source {i}": pair for i, pair in enumerate(zip(sources, indices, strict=True))}
    teaching = teacher and make_teacher_rows(teacher, maker, plan, by_name, cache_dir, 0, log)
    augmentation = Augmentation(data.random_crop, data.color_jitter, data.video.random_offset)
    loader = PackLoader(
        sources, maker, plan, ImageProcessor(size), data.loss_weighting, augmentation, elastic_k, teaching
    )
    loading = Loading(data.num_workers, data.num_threads, data.prefetch, data.max_skipped_fraction)
    return Batches(loader, loading, data.batch_size, shard, num_batches)


def greys(batch) -> list[int]:
    """The grey level of each picture of a batch of `plain_picture`s, row by row; places without one are 0."""
    pixels = batch["pixel_values"]
    assert (pixels == pixels[:, :, :1, :1, :1]).all()
    return np.asarray(pixels[:, :, 0, 0, 0]).tolist()
