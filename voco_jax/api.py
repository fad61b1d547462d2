"""The Python API: load a run, compress pictures once, ask about them any number of times.

    import voco_jax

    model = voco_jax.load("runs/easyvqa")
    model.ask("what shape is in the image?", "a.png")     # 'circle'

    album = model.compress(["a.png", "b.png"])            # once, to ask often; or model.compress_video("clip.mp4")
    model.ask("what shape is in the image?", album[0])    # 'circle'
    model.ask_each("is there a circle?", album)           # ['yes', 'no']

    model.save(album, "album.voco")
    album = model.open("album.voco", tokens=1)
    model.ask("is there a circle?", album, tokens="auto") # as many tokens of each memory as the answer needs

    watch = model.watch("camera")                         # frames as they come
    watch.add(frame, time=0.5)
    watch.ask("what has been shown so far?")

    chat = model.chat(album[0])
    for piece in chat.stream("what color is it?"):
        print(piece, end="", flush=True)

Everything else that a request may ask for (its own sampling, many requests in batches) is `Model.answers`.
"""

from collections.abc import Iterable, Sequence
import dataclasses
import os
from typing import Any, TypeGuard, cast, overload

from jax.sharding import Mesh

from voco_jax.checkpoint.run import Run, load_run
from voco_jax.data.images import PictureLike, is_picture
from voco_jax.data.media import is_video
from voco_jax.data.sources.roots import local_path
from voco_jax.data.video import FrameSampling
from voco_jax.errors import UserError
from voco_jax.infer.auto_tokens import AUTO, AutoTokens, Try, answer_auto
from voco_jax.infer.chat import Chat
from voco_jax.infer.engine import GREEDY, Engine, Score
from voco_jax.infer.generate import Sampling
from voco_jax.infer.image_encoder import ImageEncoder
from voco_jax.infer.live_video import LiveVideo
from voco_jax.infer.memory import EncodedImages, MemoryBank, fingerprint, join_images
from voco_jax.infer.memory_file import SUFFIX, load_memory, save_memory
from voco_jax.infer.prompts import Prompt, encode_prompt, generate, score
from voco_jax.io.paths import as_path
from voco_jax.terminal import count_of

Tokens = int | str | AutoTokens | None  # of each memory: the first so many, "auto", or all
# What a question may be about: see `Model.encode`
ImageInput = EncodedImages | PictureLike | Sequence[EncodedImages | PictureLike]


@dataclasses.dataclass(frozen=True)
class Request:
    """A question, and what it is about: pictures in their order, or a video's frames; None for text alone.

    `images` is what `Model.compress` or `encode_images` returned, or images themselves (one or several, as `compress`
    takes them), which are then encoded for each call. They stand before the question, and all of its text is text. With
    `interleaved` they stand at the question's `<image>` markers, one picture each, or one image.
    """

    question: str
    images: ImageInput | None = None
    interleaved: bool = False


def load(
    run: str | os.PathLike, *, step: int | str | None = None, attention: str | None = None, mesh: Mesh | None = None
) -> "Model":
    """The model of a run directory (training's workdir, a converted one, or `gs://…`).

    `step` is a checkpoint's, or 'best'; over a `mesh` (voco_jax/parallel/mesh.py) parameters and batches are spread as
    in training. UserError says in a line what is missing or does not fit.
    """
    return Model(load_run(run, step=step, attention=attention, mesh=mesh))


class Model:
    """A restored run, to be asked: `engine` answers, `image_encoder` encodes images.

    Everything it is given and returns lies on the host. Shapes are bucketed, so that each size compiles once.
    """

    def __init__(self, run: Run):
        self.run = run
        self.config = run.model.config
        video = run.config.data.video
        sampling = FrameSampling(video.num_frames, video.fps, video.max_frames)
        self.fingerprint = fingerprint(self.config, run.checksums, run.processor, run.vocabulary)
        engine = Engine(run.model, run.encoder, run.mesh, video.timestamps)
        self.engine = engine
        self.image_encoder = ImageEncoder(engine, run.processor, sampling, self.fingerprint, str(run.directory))

    def __repr__(self) -> str:
        kind = self.config.compressor
        tokens = f"{count_of(self.run.encoder.num_visual_tokens, 'token')} per image"
        return f"Model({str(self.run.directory)!r}, step {self.run.step}, compressor {kind!r}, {tokens})"

    # ---- Encoding images ---------------------------------------------------------------------------------------

    def compress(
        self, pictures: PictureLike | Iterable[PictureLike], *, tokens: int | None = None, batch_size: int = 32
    ) -> MemoryBank:
        """The memories of images: files, bytes, PIL images or arrays, one or several (see `data.images.load_image`). A
        run with tiles (`data.image_grid`) makes several of each, which `pictures()` of the bank keeps together.

        `tokens` keeps the first so many of the model's K. BadRecord (a UserError) names an image that cannot be read.
        """
        self.image_encoder.require_memories()
        images = self.encode_images(pictures, batch_size=batch_size)
        return cast(MemoryBank, images).first_tokens(tokens)

    def compress_video(
        self, video: str | os.PathLike, *, sampling: FrameSampling | None = None, tokens: int | None = None,
        batch_size: int = 32, incomplete: bool = False,
    ) -> MemoryBank:  # fmt: skip
        """The memories of a video's frames, with their times: as the run's config samples them, or by `sampling`.

        BadRecord for a file that is cut off, unless `incomplete`: then of the frames that are there.
        """
        self.image_encoder.require_memories()
        images = self.encode_video(video, sampling=sampling, batch_size=batch_size, incomplete=incomplete)
        return cast(MemoryBank, images).first_tokens(tokens)

    def watch(self, source: str = "video", *, tokens: Tokens = None, batch_size: int = 8) -> LiveVideo:
        """A video whose frames come one by one, to be asked about at any time. `tokens` as in `answers`: the first so
        many are kept; with "auto" all, and as many are read as each answer needs."""
        auto = self.auto_tokens(tokens) if isinstance(tokens, str | AutoTokens) else None
        return LiveVideo(
            self.image_encoder, source, tokens if isinstance(tokens, int) else None, batch_size, auto
        )  # fmt: skip

    def encode_images(self, pictures: PictureLike | Iterable[PictureLike], *, batch_size: int = 32) -> EncodedImages:
        """Memories of images, or embeddings where the model has no VoCo tokens: to ask about, not to store."""
        return self.image_encoder.encode_images(pictures, batch_size=batch_size)

    def encode_video(
        self, video: str | os.PathLike, *, sampling: FrameSampling | None = None, batch_size: int = 32,
        incomplete: bool = False,
    ) -> EncodedImages:  # fmt: skip
        """Memories of a video's frames, or embeddings where the model has no VoCo tokens."""
        return self.image_encoder.encode_video(
            video, sampling=sampling, batch_size=batch_size, incomplete=incomplete
        )  # fmt: skip

    def encode(self, about: ImageInput | None) -> EncodedImages | None:
        """Encode what a question is about: encoded images are returned as they are (several are joined), images and the
        frames of a video are encoded, a path ending in .voco is a memory file to read. None for text alone.

        UserError where there is no image, and for memories of another model.
        """
        images = self._encode(about)
        if images is not None:
            if not len(images):
                raise UserError("images: expected at least one to ask about, found none")
            images = self.image_encoder.checked(images)
        return images

    def _encode(self, about: ImageInput | None) -> EncodedImages | None:
        if about is None or isinstance(about, EncodedImages):
            return about
        if _names_several(about):
            path = local_path(os.fspath(about))
            return self.open(path) if path.endswith(SUFFIX) else self.encode_video(path)
        if isinstance(about, list | tuple) and any(isinstance(x, EncodedImages) or _names_several(x) for x in about):
            parts = [encoded for one in about if (encoded := self._encode(one)) is not None]
            return join_images([self.image_encoder.checked(part) for part in parts])
        if not is_picture(about) and not isinstance(about, Iterable):
            raise UserError(f"images: expected one or several, found {type(about).__name__}")
        return self.encode_images(cast(Sequence[PictureLike], about))

    # ---- Memory files ------------------------------------------------------------------------------------------

    def save(self, bank: MemoryBank, file: str | os.PathLike) -> None:
        """Write a memory file."""
        save_memory(file, bank)

    def open(self, file: str | os.PathLike, *, tokens: int | None = None) -> MemoryBank:
        """Read a memory file; UserError for one that is damaged, of another model, or not of the kind that it reads."""
        bank = load_memory(file, self.fingerprint, tokens, self.config.memory_kind)
        return cast(MemoryBank, self.image_encoder.checked(bank))

    # ---- Asking ------------------------------------------------------------------------------------------------

    @overload
    def ask(
        self, question: str, images: ImageInput | None = None, *, tokens: Tokens = None, max_new_tokens: int = 64,
        sampling: Sampling = GREEDY,
    ) -> str: ...  # fmt: skip

    @overload
    def ask(
        self, question: list[str] | tuple[str, ...], images: ImageInput | None = None, *, tokens: Tokens = None,
        max_new_tokens: int = 64, sampling: Sampling = GREEDY,
    ) -> list[str]: ...  # fmt: skip

    def ask(
        self, question: str | Sequence[str], images: ImageInput | None = None, *, tokens: Tokens = None,
        max_new_tokens: int = 64, sampling: Sampling = GREEDY,
    ) -> str | list[str]:  # fmt: skip
        """The answer to a question about all of `images` together (see `Request`); a list for several questions.
        `tokens` as in `answers`."""
        several = isinstance(question, Iterable) and not isinstance(question, str)
        requests = [Request(q, images) for q in cast(Iterable[str], question if several else [question])]
        given = self.answers(requests, tokens=tokens, max_new_tokens=max_new_tokens, sampling=sampling)
        return given if several else given[0]

    def ask_each(
        self, question: str, images: ImageInput, *, tokens: Tokens = None, max_new_tokens: int = 64,
        sampling: Sampling = GREEDY,
    ) -> list[str]:  # fmt: skip
        """The answers to one question, asked about each picture (all its tiles together) or frame by itself."""
        encoded = self.encode(images)
        if encoded is None:
            raise UserError("images: expected at least one to ask about, found none")
        requests = [Request(question, one) for one in encoded.pictures()]
        return self.answers(requests, tokens=tokens, max_new_tokens=max_new_tokens, sampling=sampling)

    def answers(
        self, requests: Sequence[Request], *, tokens: Tokens = None, max_new_tokens: int = 64,
        sampling: Sampling = GREEDY, until: Sequence[str] = (), batch_size: int = 64,
        streams: Sequence[int] | None = None,
    ) -> list[str]:  # fmt: skip
        """Answers to any requests, in their order. Those of like length are asked together.

        `tokens`: the first so many of each memory are read; or "auto", as many as each answer needs (`auto_answers`).
        `until`: texts that end an answer, beside the model's end-of-sequence token. `streams[i]` numbers the random
        stream of request i (default: 0, 1, …).
        """
        how: dict[str, Any] = dict(
            max_new_tokens=max_new_tokens, sampling=sampling, until=until, batch_size=batch_size, streams=streams
        )
        if isinstance(tokens, str | AutoTokens):
            return [one.text for one in self.auto_answers(requests, tokens, **how)]
        return generate(self.engine, self.prompts(requests, tokens=tokens), **how)

    def auto_answers(
        self, requests: Sequence[Request], tokens: "str | AutoTokens" = AUTO, *, max_new_tokens: int = 64,
        sampling: Sampling = GREEDY, until: Sequence[str] = (), batch_size: int = 64,
        streams: Sequence[int] | None = None,
    ) -> list[Try]:  # fmt: skip
        """Answers, each with the number of tokens of each memory that it was read with (0: text alone), and its
        confidence: with more and more tokens until it is sure enough (`infer/auto_tokens.py`).

        UserError for a model without memories, or with one token an image.
        """
        auto = self.auto_tokens(tokens)
        found = answer_auto(
            self.engine, self.prompts(requests), auto, max_new_tokens=max_new_tokens, sampling=sampling, until=until,
            batch_size=batch_size, streams=streams,
        )  # fmt: skip
        return [auto.decide(tries) for tries in found]

    def auto_tokens(self, tokens: "str | AutoTokens" = AUTO, name: str = "tokens") -> AutoTokens:
        """The rule of `tokens="auto"` for this model: the numbers of tokens are those that it was trained with, or 1,
        2, 4, … up to its K. `name` is what the user calls it."""
        if not isinstance(tokens, AutoTokens) and tokens != AUTO:
            raise UserError(f"{name}: expected a number or {AUTO!r}, found {tokens!r}")
        auto = tokens if isinstance(tokens, AutoTokens) else AutoTokens()
        self.image_encoder.require_memories()
        if (there := self.run.encoder.num_visual_tokens) < 2:
            raise UserError(f"{name} {AUTO}: {self.run.directory} has 1 token per image: there is nothing to choose")
        ladder = auto.ladder or tuple(sorted({*self.run.config.train.elastic_k}))
        if any(not 1 <= k <= there for k in ladder):
            raise UserError(f"{name} {AUTO}: expected numbers of 1 … {there} tokens, found {list(ladder)}")
        return dataclasses.replace(auto, ladder=ladder)

    def scores(self, requests: Sequence[Request], answers: Sequence[str], *, batch_size: int = 64) -> list[Score]:
        """How likely the model would give `answers[i]` to request i, in their order."""
        return score(self.engine, self.prompts(requests, answers), batch_size=batch_size)

    def prompts(
        self, requests: Sequence[Request], answers: Sequence[str] | None = None, tokens: int | None = None
    ) -> list[Prompt]:  # fmt: skip
        """The requests encoded; what several are about is encoded once, and the first `tokens` of each memory read."""
        about = {id(request.images): request.images for request in requests}
        encoded = {key: self.encode(images) for key, images in about.items()}
        if tokens is not None:
            self.image_encoder.require_memories()
            encoded = {k: one and cast(MemoryBank, one).first_tokens(tokens) for k, one in encoded.items()}
        return [
            encode_prompt(
                self.engine, request.question, encoded[id(request.images)], interleaved=request.interleaved,
                answer=None if answers is None else answers[i],
            )
            for i, request in enumerate(requests)
        ]  # fmt: skip

    def chat(
        self, images: ImageInput | None = None, *, tokens: Tokens = None, max_new_tokens: int = 256,
        sampling: Sampling = GREEDY,
    ) -> Chat:  # fmt: skip
        """A conversation of several turns about images; what has been read stays in the cache.

        `tokens` as in `answers`; with "auto" it goes on with the tokens that a turn has come to, and an answer is given
        as a whole.
        """
        encoded = self.encode(images)
        if isinstance(tokens, str | AutoTokens):
            return Chat(self.engine, encoded, max_new_tokens, sampling, self.auto_tokens(tokens))
        if tokens is not None and encoded is not None:
            self.image_encoder.require_memories()
            encoded = cast(MemoryBank, encoded).first_tokens(tokens)
        return Chat(self.engine, encoded, max_new_tokens, sampling)


def _names_several(about: object) -> TypeGuard[str | os.PathLike[str]]:
    """Whether it is the path of a memory file, or of a video."""
    if not isinstance(about, str | os.PathLike):
        return False
    path = local_path(os.fspath(about))
    return path.endswith(SUFFIX) or is_video(as_path(path))
