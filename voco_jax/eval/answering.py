"""Every question of an image test set, put to a run."""

from collections.abc import Sequence
import functools

from tqdm import tqdm

from voco_jax.data.records import Record
from voco_jax.data.turns import text_of
from voco_jax.eval.runner import Question, Runner
from voco_jax.eval.scoring import Answer, longest_answer
from voco_jax.infer.image_cache import ImageCache
from voco_jax.infer.image_encoder import ImageEncoder
from voco_jax.infer.prompts import Prompt


def answer_all(
    images: ImageEncoder, records: Sequence[Record], *, batch_size: int, max_new_tokens: int
) -> list[Answer]:  # fmt: skip
    """Greedy answers to the first question of every conversation, in the records' order: about `batch_size` records
    together. `max_new_tokens` 0: room for the longest expected answer. UserError for what cannot be asked."""
    engine = images.engine
    asked = [(record, turns) for record in records for turns in record.conversations]
    truths = {turns[1]["value"] for _, turns in asked}
    limit = longest_answer(max_new_tokens, truths, engine.encoder.tokenizer)

    def question(record: Record, turns: list[dict]) -> Question[tuple]:
        sample = engine.encoder.encode(turns[:1], len(record.images))
        return Question((record, turns), record.images, str(record.images[0]), functools.partial(Prompt, sample))

    size = batch_size * max(1, round(len(asked) / max(1, len(records))))
    runner = Runner(engine, ImageCache(images, batch_size=batch_size), size, limit, must_ask=True)
    answers = []
    with tqdm(total=len(asked), unit="question", desc="evaluating", mininterval=0.5) as bar:
        for answered in runner.run((question(*of) for of in asked), bar):
            record, turns = answered.id
            answers.append(Answer(str(record.images[0]), text_of(turns[0]["value"]), turns[1]["value"], answered.text))
    return answers
