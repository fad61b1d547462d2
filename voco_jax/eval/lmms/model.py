"""The adapter: lmms-eval's requests to the `Runner`, in windows of a few batches, in the order of the documents.

Images are cached by their content (`image_cache.py`): each is encoded once, however many questions and tasks ask about
it. Documents about one image mostly follow each other.
"""

from collections.abc import Callable, Sequence
import dataclasses
from functools import partial
import io
import os
from pathlib import Path
import warnings

from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms
import numpy as np
from PIL import Image
from tqdm import tqdm

from voco_jax.api import Model
from voco_jax.arguments import change_sampling, mesh_of
from voco_jax.checkpoint.run import load_run
from voco_jax.data.endings import PICTURES, VIDEOS, has_ending
from voco_jax.data.media import is_video
from voco_jax.data.records import Clip, Picture
from voco_jax.data.turns import IMAGE
from voco_jax.errors import UserError
from voco_jax.eval.lmms.generation import Generation, read_generation
from voco_jax.eval.runner import Question, Runner
from voco_jax.infer.image_cache import ImageCache, Medium
from voco_jax.infer.memory import EncodedImages, pictures_of
from voco_jax.infer.prompts import Prompt, encode_prompt
from voco_jax.terminal import shortened

BATCH_SIZE = 64  # where lmms-eval's --batch_size is not given
WINDOW = 4  # batches whose pictures are looked at together, and whose questions are sorted by length
MAX_NEW_TOKENS = 1024  # where a task names none, as lmms-eval's LLaVA has it; half of the positions at most


@dataclasses.dataclass(frozen=True)
class _Asked:
    """One question of a task. `visuals` gives its pictures, which lie in the task's files until then."""

    context: str
    visuals: Callable[[], object]
    where: str  # "mme[17]", for messages


class VoCoJax(lmms):
    """`--model voco_jax`; the arguments are those of `--model_args`.

    run: a run directory. step, attention, mesh: as the commands' options (mesh="data=2,tensor=4" in quotes; default:
    all devices along data). tokens: only the first so many of each picture's. frames, fps, max_frames: of a video;
    default: as the run's config has it. incomplete: of a video that is cut off, take what is there. cache: a directory
    for memories, good for the next command too. host_gib: of memories (or embeddings) kept at hand. seed: of what is
    drawn.
    """

    is_simple = True

    def __init__(
        self, run: str, step: int | str | None = None, attention: str | None = None, mesh: str | None = None,
        tokens: int | None = None, frames: int | None = None, fps: float | None = None, max_frames: int | None = None,
        cache: str | None = None, host_gib: float = 4, seed: int = 0, batch_size: int | str = 1,
        max_batch_size: int | None = None, device: str | None = None, incomplete: bool = False,
    ):  # fmt: skip
        super().__init__()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("voco_jax: one process uses all devices: start lmms_eval without accelerate or torchrun")
        if device is not None:
            raise UserError(f"--device: expected JAX_PLATFORMS in the environment instead, found {device!r}")
        self._batch_size = _batch_size(batch_size)
        over = mesh_of(None if mesh is None else str(mesh).strip("\"'"))
        self._model = Model(load_run(str(run), step=step, attention=attention, mesh=over))
        images = self._model.image_encoder
        sampling = change_sampling(images.sampling, frames, fps, max_frames, prefix="")
        self._cache = ImageCache(
            images, tokens=tokens, sampling=sampling, host_bytes=int(host_gib * 2**30), directory=cache
        )
        self._engine = images.engine if tokens is None else images.engine.for_tokens(tokens)
        self._seed, self._incomplete = int(seed), bool(incomplete)

    # ---- What lmms-eval calls ----------------------------------------------------------------------------------

    def generate_until(self, requests) -> list[str]:
        """The answer to each request (context, generation_kwargs, doc_to_visual, doc_id, task, split)."""
        asked = [self._asked(r.args[0], r.args[2], *r.args[3:6]) for r in requests]
        return self._answers(asked, [r.args[1] for r in requests])

    def loglikelihood(self, requests) -> list:
        """(loss, whether it is the greedy answer) of each request: context, answer, doc_to_visual, doc_id …

        The loss is the mean over the answer's tokens (its end-of-sequence token too) of their negative log-probability:
        what lmms-eval's other models give, and its multiple-choice tasks take the least of.
        """
        asked = [self._asked(r.args[0], r.args[2], *r.args[3:6]) for r in requests]
        answers = []
        for r in requests:
            _, answer, _, doc_id, task, split = r.args[:6]
            # The prompt's last token and the answer's first are joined as in training, whatever the delimiter
            answers.append((answer if isinstance(answer, str) else answer(self._doc(doc_id, task, split))).strip())
        questions = (self._question(one, i, answers[i]) for i, one in enumerate(asked))
        with tqdm(total=len(asked), unit="answer", desc="voco_jax", mininterval=0.5) as bar:
            runner = Runner(self._engine, self._cache, self._batch_size, window=WINDOW, must_ask=True)
            given = [answered.score for answered in runner.run(questions, bar) if answered.score is not None]
        # In an envelope: lmms-eval 0.7 would make a text of the bare pair
        return [GenerationResult((-s.log_probability / s.num_tokens, s.is_greedy)) for s in given]

    def generate_until_multi_round(self, requests) -> list[list[str]]:
        """As `generate_until`, with a `doc_to_text` as fourth argument that makes the next round's prompt of the
        answers so far; gives the answers of all rounds."""
        kwargs = [r.args[1] for r in requests]
        asked = [self._asked(r.args[0], r.args[2], *r.args[4:7]) for r in requests]
        outputs: list[list[str]] = [[] for _ in requests]
        notes: list = [None] * len(requests)
        going, round_number = list(range(len(requests))), 0
        while going:
            texts = self._answers([asked[i] for i in going], [kwargs[i] for i in going])
            for i, text in zip(going, texts, strict=True):
                outputs[i].append(text)
            round_number += 1
            on = []
            for i in going:
                doc_to_text, doc_id, task, split = requests[i].args[3:7]
                visuals, context, is_over, said, notes[i] = doc_to_text(
                    self._doc(doc_id, task, split), previous_output=outputs[i], round_idx=round_number,
                    previous_round_info=notes[i],
                )  # fmt: skip
                outputs[i] = list(outputs[i] if said is None else said)
                if not is_over:
                    asked[i] = _Asked(context, partial(_itself, visuals), asked[i].where)
                    on.append(i)
            going = on
        return outputs

    def clean(self) -> None:
        """lmms-eval's word that all requests have been answered."""
        self._cache.close()
        super().clean()

    # ---- Asking ------------------------------------------------------------------------------------------------

    def _answers(self, asked: Sequence[_Asked], kwargs: Sequence[dict]) -> list[str]:
        default = min(MAX_NEW_TOKENS, self._model.config.llama.max_position_embeddings // 2)
        aspect_ratio = self._model.run.config.data.aspect_ratio
        groups: dict[Generation, list[int]] = {}
        for i, one in enumerate(asked):
            try:
                generation = read_generation(kwargs[i], default, self._seed, aspect_ratio)
            except UserError as error:
                raise UserError(f"{one.where}: {error}") from None
            groups.setdefault(generation, []).append(i)
        given: dict[int, str] = {}
        with tqdm(total=len(asked), unit="question", desc="voco_jax", mininterval=0.5) as bar:
            for generation, places in groups.items():
                runner = Runner(
                    self._engine, self._cache, self._batch_size, generation.max_new_tokens, generation.sampling,
                    generation.until, WINDOW, must_ask=True,
                )  # fmt: skip
                questions = (self._question(asked[i], i) for i in places)
                given |= {answered.id: answered.text for answered in runner.run(questions, bar)}
        return [given[i] for i in range(len(asked))]

    def _question(self, asked: _Asked, number: int, answer: str | None = None) -> Question[int]:
        """To be answered, or with an `answer` to be scored."""
        media = _media(asked.visuals(), asked.where, self._incomplete)
        make = partial(self._prompt, asked, answer)
        prompt, conversation = (make, None) if answer is None else (None, make)
        return Question(number, media, asked.where, prompt, conversation, stream=number)

    def _prompt(self, asked: _Asked, answer: str | None, images: EncodedImages | None) -> Prompt:
        """The question with its images at their markers, or before it where the markers are not theirs. Without images
        `<image>` is text."""
        context, count = asked.context, 0 if images is None else len([*pictures_of(images.items)])
        markers = context.count(IMAGE.value)
        interleaved = 0 < markers == count
        if markers and count and not interleaved:
            warnings.warn(
                f"{asked.where}: {markers} {IMAGE.value} markers for {count} pictures: these stand before the text",
                stacklevel=2,
            )
            context = context.replace(IMAGE.value, "")
        return encode_prompt(self._engine, context, images, interleaved=interleaved, answer=answer)

    def _asked(self, context: str, doc_to_visual: Callable | None, doc_id: int, task: str, split: str) -> _Asked:
        def visuals():
            return None if doc_to_visual is None else doc_to_visual(self._doc(doc_id, task, split))

        return _Asked(context, visuals, f"{task}[{doc_id}]")

    def _doc(self, doc_id: int, task: str, split: str):
        return self.task_dict[task][split][doc_id]


def _media(visuals, where: str, incomplete: bool) -> list[Medium]:
    """What a task's `doc_to_visual` gives, in lists of any depth, as pictures and videos (`incomplete`: see `Clip`)."""
    if visuals is None:
        return []
    if isinstance(visuals, list | tuple):
        return [medium for visual in visuals for medium in _media(visual, where, incomplete)]
    if isinstance(visuals, Image.Image | np.ndarray | Picture | Clip):
        return [visuals]
    if isinstance(visuals, dict) and visuals.get("bytes") is not None:  # a picture that datasets has not decoded
        return [Picture(data=visuals["bytes"], name=str(visuals.get("path") or where))]
    if isinstance(visuals, io.BytesIO):
        return [Picture(data=visuals.getvalue(), name=where)]
    if isinstance(visuals, dict) and not {"video_start", "video_end"} & set(visuals):
        visuals = visuals.get("path") or visuals.get("url") or visuals
    if isinstance(visuals, str | os.PathLike):
        file = Path(visuals)
        if file.is_file() or has_ending(file, PICTURES + VIDEOS):
            return [Clip(file=file, incomplete=incomplete) if is_video(file) else os.fspath(visuals)]
    raise UserError(f"{where}: expected pictures and videos, found {shortened(visuals)}")


def _batch_size(text: int | str) -> int:
    """lmms-eval gives 1 where nobody has asked for anything: that and 'auto' are ours to choose."""
    if str(text) == "1" or str(text).startswith("auto"):
        return BATCH_SIZE
    if not str(text).isdecimal() or int(text) < 1:
        raise UserError(f"--batch_size: expected auto or a number, found {text!r}")
    return int(text)


def _itself(value):
    return value
