"""Evaluation on the test set while training: the loss, and answers to questions, with a picture of some of them."""

from collections.abc import Callable, Iterator
from functools import partial
import hashlib
import itertools
import math
from pathlib import Path
from typing import Any, NamedTuple

from flax import nnx
import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
from PIL import Image

from voco_jax.config_keys import EvalConfig
from voco_jax.data.conversations import Sample
from voco_jax.data.pipeline import Batches
from voco_jax.data.plan import PackedExample
from voco_jax.data.records import TOO_LONG, BadRecord
from voco_jax.data.reports import Report
from voco_jax.data.turns import text_of
from voco_jax.errors import UserError
from voco_jax.eval.runner import Question, Runner
from voco_jax.eval.scoring import LONGEST_LIMIT, Answer, longest_answer
from voco_jax.infer.engine import Engine
from voco_jax.infer.prompts import Gathered, Prompt
from voco_jax.parallel.distributed import together
from voco_jax.parallel.mesh import ROWS, axis_size
from voco_jax.parallel.sharding import put_batch
from voco_jax.terminal import count_of
from voco_jax.train.loss_types import Batch, Loss, LossExtra, LossOutput
from voco_jax.train.teachers import TeacherOf, no_teacher

SHORT = 5  # words; longer answers are shown and not judged: nobody says the same in the same words
_SHOWN_SIDE = 336  # pixels of a picture on the sheet


class Evaluation(NamedTuple):
    """`eval_loss` (nats a label) and `accuracy` (share of the short answers given exactly; None where none is short),
    as far as the config asks for them; and the sheet, where one was drawn."""

    values: dict[str, float | None]
    sheet: Path | None


class EvalQuestion(NamedTuple):
    """A question that is asked again and again. pixels: uint8 [images, size, size, 3]."""

    prompt: Sample
    pixels: np.ndarray
    text: str
    truth: str
    judged: bool
    picture: Image.Image | None  # for the sheet; of a video the frame in the middle


class Evaluator:
    """Made before training, so that what is wrong with the test set shows itself; then called with parameters.

    The same batches and questions every time: the first `eval.num_batches` of the test set, and the first questions of
    `eval.num_answers` conversations, about different pictures as far as there are, which are kept in memory. Nothing of
    the training is touched.

    All processes make one and call it together. The loss is computed as in training, each process loading its own
    rows; every process has all questions, and the devices share the rows of them.
    """

    def __init__(
        self,
        config: EvalConfig,
        batches: Batches,
        graphdef: nnx.GraphDef,
        params: dict,
        loss: Loss,
        mesh: Mesh,
        log: Callable[[str], None] = print,
        teacher_of: TeacherOf = no_teacher,
    ):
        """`batches` are the test set's (`open_test_data`). `params` may be shapes and dtypes.
        Sheets of answers go to the directory `sheets`, which is set later.

        UserError for a test set that cannot be used; waits for no other process.
        """
        self._config, self._mesh, self._batches = config, mesh, batches
        self.sheets = Path("answers")
        self._normalize = jax.jit(batches.loader.processor.normalize)

        def loss_of(params: dict, batch: Batch, opt_state: Any, teacher_params: Any) -> LossOutput:
            # As at the last step: looks at different times can be compared
            extra = LossExtra(np.iinfo(np.int32).max, teacher_of(params, opt_state, teacher_params))
            return loss(nnx.merge(graphdef, params), batch, extra)

        self._loss = jax.jit(loss_of, out_shardings=NamedSharding(mesh, P()))
        self._questions: list[EvalQuestion] = []
        if config.num_answers:
            encoder = self._batches.loader.maker.encoder
            model = nnx.merge(graphdef, params)
            self._engine = Engine(model, encoder, mesh)
            self._max_positions = model.config.llama.max_position_embeddings
            self._questions = self._choose_questions()
            truths = {question.truth for question in self._questions}
            self._max_new_tokens = longest_answer(config.max_new_tokens, truths, encoder.tokenizer)
            judged = sum(question.judged for question in self._questions)
            log(f"evaluation: {count_of(len(self._questions), 'question')}, {judged} with a short answer")

    def fingerprint(self) -> str:
        """Of all that is looked at: it has to be the same in all processes (`check_same`)."""
        digest = hashlib.sha256(self._batches.loader.plan.fingerprint().encode())
        for question in self._questions:
            digest.update(repr((question.text, question.truth, question.judged)).encode())
            for array in (question.prompt.tokens, question.pixels):
                digest.update(array.tobytes())
        return digest.hexdigest()[:16]

    def __call__(self, step: int, params, opt_state=None, teacher_params=None) -> Evaluation:
        """Evaluate the parameters after a step (a nested dict, sharded as in training); the last two are for a teacher
        of the loss."""
        values: dict[str, float | None] = {}
        sheet = None
        with jax.set_mesh(self._mesh):
            if self._config.num_batches:
                values |= {
                    f"eval_{name}": value for name, value in self._mean_loss(params, opt_state, teacher_params).items()
                }
            if self._questions:
                given = self._ask(params)
                answers = [Answer("", q.text, q.truth, text) for q, text in zip(self._questions, given, strict=True)]
                right = [a.correct for a, q in zip(answers, self._questions, strict=True) if q.judged]
                values["accuracy"] = float(np.mean(right)) if right else None
                sheet = self.sheets / f"step_{step:06d}.png"
                with together():  # the first draws, and a full disk is everybody's error
                    if jax.process_index() == 0:
                        self._draw(step, answers, right, sheet)
        return Evaluation(values, sheet)

    # ---- The loss ----------------------------------------------------------------------------------------------

    def _mean_loss(self, params: dict, *teacher: Any) -> dict[str, float]:
        """The loss and its metrics over all batches, which may have different weights."""
        total: dict[str, np.ndarray] = {}
        for batch in self._load():
            output = jax.device_get(self._loss(params, batch, *teacher))
            for name, pair in ({"loss": (output.sum, output.weight)} | output.metrics).items():
                total[name] = total.get(name, np.zeros(2)) + pair
        return {name: float(value / weight) if weight else math.nan for name, (value, weight) in total.items()}

    def _load(self) -> Iterator[dict]:
        """The batches, on the devices."""
        batches = self._batches
        batches.set_state(batches.state_at(0))
        batches.report = Report()  # the same records again
        try:
            for _ in range(batches.num_batches):
                with together():  # what one process cannot load, none waits for
                    batch = next(batches)
                yield self._put(batch, batches.batch_size)
        finally:
            batches.close()

    def _put(self, batch: dict, batch_size: int = 0) -> dict:
        batch = put_batch(self._mesh, batch, batch_size)
        return batch | {"pixel_values": self._normalize(batch["pixel_values"])}

    # ---- Answers -----------------------------------------------------------------------------------------------

    def _ask(self, params) -> list[str]:
        """An answer to each question: `eval.batch_size` at once, or as many more as the mesh needs to share them."""
        self._engine.params = params
        rows_together, frames_together = axis_size(*ROWS), axis_size("frame")
        most = max(len(question.pixels) for question in self._questions)
        num_images = -(-most // frames_together) * frames_together
        size = min(self._config.batch_size, len(self._questions))
        size = -(-size // rows_together) * rows_together

        def encode(pixels: list[np.ndarray]) -> Gathered:
            """A row for each question: over a mesh its images stay on the devices that answer it."""
            indices = [range(i * num_images, i * num_images + len(images)) for i, images in enumerate(pixels)]
            if not num_images:
                return None, indices
            rows = np.zeros((size, num_images, *pixels[0].shape[1:]), np.uint8)
            for row, images in zip(rows, pixels, strict=False):
                row[: len(images)] = images
            return self._engine.encode_images(self._put({"pixel_values": rows})["pixel_values"]), indices

        runner = Runner(self._engine, None, size, self._max_new_tokens, must_ask=True, gather=encode)
        questions = [Question(i, q.pixels, q.text, partial(Prompt, q.prompt)) for i, q in enumerate(self._questions)]
        return [answered.text for answered in runner.run(questions)]

    def _choose_questions(self) -> list[EvalQuestion]:
        """In the order of the plan one about each item's pictures, drawn once for all; then another of each, until all
        are there."""
        plan, wanted, rng = self._batches.loader.plan, self._config.num_answers, np.random.default_rng(0)
        items: dict[tuple[int, int], list[PackedExample]] = {}
        for i in plan.packs(0):
            for example in plan[i]:
                items.setdefault((i, example.item), []).append(example)
            if len(items) > 2 * wanted:  # some may turn out not to be readable
                break
        drawn = [[item[i] for i in rng.permutation(len(item))] for item in items.values()]
        questions: list[EvalQuestion] = []
        reason = "there is none"
        for example in itertools.chain.from_iterable(itertools.zip_longest(*drawn)):
            if len(questions) == wanted:
                break
            if example is None:  # an item with fewer
                continue
            try:
                questions.append(self._load_question(example))
            except BadRecord as error:
                reason = str(error)
        if not questions:
            raise UserError(f"config.eval.num_answers: no question of config.data.test can be asked: {reason}")
        return questions

    def _load_question(self, example: PackedExample) -> EvalQuestion:
        """BadRecord for an example that cannot be asked about."""
        loader = self._batches.loader
        record = loader.sources[example.source][example.record]
        times = loader.maker.frame_times(record)
        prompt = loader.maker.prompt(record, example.conversation, times)
        turns = record.conversations[example.conversation]
        human = next(i for i, turn in enumerate(turns) if turn["from"] == "human")
        truth = turns[human + 1]["value"]
        tokenizer, limit = loader.maker.encoder.tokenizer, self._config.max_new_tokens
        room = limit or LONGEST_LIMIT  # the longest answer is not known yet
        if len(prompt) + room > self._max_positions:
            raise BadRecord(TOO_LONG, f"a question of {len(prompt)} tokens and {room} for the answer")
        tokens = tokenizer(truth, add_special_tokens=False).input_ids
        images = loader.maker.load_images(record, times, loader.processor)
        pixels = np.zeros((len(images), loader.processor.size, loader.processor.size, 3), np.uint8)
        for i, image in enumerate(images):
            pixels[i] = loader.processor.square(image)
        picture = images[len(images) // 2].copy() if images else None
        if picture is not None:
            picture.thumbnail((_SHOWN_SIDE, _SHOWN_SIDE))
        text = text_of(turns[human]["value"])
        judged = len(truth.split()) <= SHORT and len(tokens) <= room
        return EvalQuestion(prompt, pixels, text, truth, judged, picture)

    def _draw(self, step: int, answers: list[Answer], right: list[bool], path: Path) -> None:
        """Draw the first answers. The questions are the same every time, so that sheets can be compared."""
        # Not at the top: with matplotlib, training would begin almost half a second later
        from voco_jax.eval.pictures import SHEET_COLUMNS, SHEET_ROWS, draw_sheet

        shown = SHEET_COLUMNS * SHEET_ROWS
        title = f"step {step:,}"
        if right:
            title += f": {sum(right):,} of {len(right):,} short answers right"
        path.parent.mkdir(exist_ok=True)
        draw_sheet(
            answers[:shown], [q.picture for q in self._questions[:shown]], path, title,
            judged=[q.judged for q in self._questions[:shown]],
        )  # fmt: skip
