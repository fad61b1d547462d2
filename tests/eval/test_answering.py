"""Every question of a test set is answered about its own picture, however the pictures are batched."""

import dataclasses

from flax import nnx
import jax
import numpy as np

from voco_jax.api import Model
from voco_jax.checkpoint.run import load_run
from voco_jax.data.images import load_image
from voco_jax.data.sources import easyvqa
from voco_jax.data.sources.easyvqa import EasyVqaSource
from voco_jax.eval.by_kind import THIS_RUN, score_by_kind
from voco_jax.infer.engine import Engine


def with_random_parameters(run):
    """A model that says much, and something else about every picture."""
    graphdef, state = nnx.split(run.model)
    rng = np.random.default_rng(1)
    draw = lambda p: rng.normal(size=p.shape).astype(p.dtype)  # noqa: E731
    return dataclasses.replace(run, model=nnx.merge(graphdef, jax.tree.map(draw, state)))


def test_batches_change_nothing(tiny_run):
    run = with_random_parameters(load_run(tiny_run))
    records = easyvqa.load("test")[:3]
    run.config.eval.update(batch_size=16, max_new_tokens=6)  # one and a half batches
    results, found, report = score_by_kind(Model(run), EasyVqaSource("test"), max_about=3)
    answers = found.answers[THIS_RUN]
    assert len(answers) == 27 and results["pictures"] == 3 and not report.skipped
    engine = Engine(run.model, run.encoder)

    def ask(picture, record):
        visual = engine.encode_images(run.processor(load_image(picture.images[0]))[None, None])
        for turns in record.conversations:
            question = turns[0]["value"].removeprefix("<image>\n")
            (text,) = engine.generate([engine.encoder.encode_question(question)], visual, [[0]], 6)
            yield str(picture.images[0]), question, turns[1]["value"], text

    expected = [answer for record in records for answer in ask(record, record)]
    assert [dataclasses.astuple(answer) for answer in answers] == expected
    given, given_of_another = ([answer[-1] for answer in ask(picture, records[0])] for picture in records[:2])
    assert given != given_of_another, "the model does not look at the picture: the comparison would say nothing"
