"""Put every question of a test set to a run: each picture is compressed once, then read for all of its questions."""

from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from voco_jax.checkpoint.run import Run
from voco_jax.data.conversations import Encoder
from voco_jax.data.pipeline import stack_images
from voco_jax.data.records import Record
from voco_jax.data.turns import text_of
from voco_jax.eval.scoring import Answer, longest_answer
from voco_jax.infer.engine import Engine


def answer_all(run: Run, records: Sequence[Record]) -> list[Answer]:
    """Greedy answers to the first question of every conversation of the records, in their order."""
    engine = Engine(run.model, run.encoder)
    batch_size = run.config.eval.batch_size
    truths = {turns[1]["value"] for record in records for turns in record.conversations}
    max_new_tokens = longest_answer(run.config.eval.max_new_tokens, truths, run.encoder.tokenizer)
    answers = []
    total = sum(len(record.conversations) for record in records)
    with tqdm(total=total, unit="question", desc="evaluating", mininterval=0.5) as bar:
        for start in range(0, len(records), batch_size):
            batch = records[start : start + batch_size]
            pixels = [
                stack_images([run.processor.load(p) for p in r.images], run.config.data.images_per_pack, run.processor)
                for r in batch
            ]
            pixels += [np.zeros_like(pixels[0])] * (batch_size - len(batch))  # one shape, one compilation
            asked = [(row, turns) for row, record in enumerate(batch) for turns in record.conversations]
            prompts = [encode_first_question(run.encoder, turns, len(batch[row].images)) for row, turns in asked]
            visual = engine.encode_images(np.stack(pixels))
            first = run.config.data.images_per_pack  # of the next record
            pictures = [range(row * first, row * first + len(batch[row].images)) for row, _ in asked]
            given = engine.generate(prompts, visual, pictures, max_new_tokens)
            for (row, turns), text in zip(asked, given, strict=True):
                answers.append(Answer(str(batch[row].images[0]), question_of(turns), turns[1]["value"], text))
            bar.update(len(asked))
    return answers


def question_of(turns: Sequence[dict]) -> str:
    """The text of a conversation's first turn, without image markers."""
    return text_of(turns[0]["value"])


def encode_first_question(encoder: Encoder, turns: Sequence[dict], num_images: int):
    """The prompt of a conversation's first turn."""
    return encoder.encode(turns[:1], num_images)
