"""The Python API: load a run, compress pictures once, ask about them any number of times.

    import voco_jax

    model = voco_jax.load("runs/easyvqa")
    model.ask("what shape is in the image?", "a.png")     # 'circle'

    album = model.compress(["a.png", "b.png"])            # once, to ask often; or model.compress_video("clip.mp4")
    model.ask("what shape is in the image?", album[0])    # 'circle'
    model.ask_each("is there a circle?", album)           # ['yes', 'no']

    model.save(album, "album.voco")
    album = model.open("album.voco", tokens=1)

    watch = model.watch("camera")                         # frames as they come
    watch.add(frame, time=0.5)
    watch.ask("what has been shown so far?")

    chat = model.chat(album[0])
    for piece in chat.stream("what color is it?"):
        print(piece, end="", flush=True)

Everything else that a request may ask for (its own sampling, many requests in batches) is `Model.answers`.
"""

from collections.abc import Iterable, Sequence
import contextlib
import copy
import dataclasses
import functools
import os

import jax
from jax.sharding import Mesh
import numpy as np

from voco_jax.checkpoint.run import Run, load_run
from voco_jax.data.conversations import Sample
from voco_jax.data.images import PictureLike, is_picture
from voco_jax.data.media import is_video
from voco_jax.data.records import Clip, Picture
from voco_jax.data.sources.roots import local_path
from voco_jax.data.turns import VIDEO, spread_video
from voco_jax.data.video import FrameSampling, format_time, probe, read_frames, sample_times
from voco_jax.errors import UserError
from voco_jax.infer.chat import Chat
from voco_jax.infer.engine import GREEDY, Engine, Score, bucket
from voco_jax.infer.generate import Sampling
from voco_jax.infer.live_video import LiveVideo
from voco_jax.infer.memory import Embeddings, Item, MemoryBank, fingerprint, from_memory, join, of_one_dtype
from voco_jax.infer.memory_file import SUFFIX, load_memory, save_memory
from voco_jax.io.paths import as_path
from voco_jax.models.voco import Memory
from voco_jax.parallel.mesh import IMAGES, axis_size

EncodedImages = MemoryBank | Embeddings
ImageInput = (
    EncodedImages | PictureLike | Sequence[EncodedImages | PictureLike]
)  # what a question may be about: `Model.encode`


@dataclasses.dataclass(frozen=True)
class Request:
    """A question, and what it is about: pictures in their order, or a video's frames; None for text alone.

    `images` is what `Model.compress` or `encode_images` returned, or images themselves (one or several, as `compress`
    takes them), which are then encoded for each call. Pictures stand before the question, and all of its text is text.
    With `interleaved` they stand at the question's `<image>` markers, one a picture.
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
    """A restored run, to be asked. Everything it is given and gives lies on the host; shapes are bucketed, so that each
    size compiles once."""

    def __init__(self, run: Run):
        self.run = run
        self.config = run.model.config
        with self.on_mesh():
            self._engines = {run.encoder.num_visual_tokens: Engine(run.model, run.encoder, run.mesh)}
        self._normalize = jax.jit(run.processor.normalize)

    def __repr__(self) -> str:
        kind = self.config.compressor
        tokens = f"{self.run.encoder.num_visual_tokens} tokens an image"
        return f"Model({str(self.run.directory)!r}, step {self.run.step}, compressor {kind!r}, {tokens})"

    def on_mesh(self):
        """The mesh that the model is spread over, as the ambient one."""
        return contextlib.nullcontext() if self.run.mesh is None else jax.set_mesh(self.run.mesh)

    @functools.cached_property
    def fingerprint(self) -> str:
        """What tells the memories of this model from all others'."""
        return fingerprint(self.config, self.run.checksums, self.run.processor, self.run.vocabulary)

    # ---- Seeing ------------------------------------------------------------------------------------------------

    def compress(
        self, pictures: PictureLike | Iterable[PictureLike], *, tokens: int | None = None, batch_size: int = 32
    ) -> MemoryBank:
        """The memories of pictures: files, bytes, PIL images or arrays, one or several (see `data.images.load_image`).

        `tokens` keeps the first so many of the model's K. BadRecord (a UserError) names a picture that cannot be read.
        """
        self.require_voco()
        return self.encode_images(pictures, batch_size=batch_size).first_tokens(tokens)

    def compress_video(
        self, video: str | os.PathLike, *, sampling: FrameSampling | None = None, tokens: int | None = None,
        batch_size: int = 32, incomplete: bool = False,
    ) -> MemoryBank:  # fmt: skip
        """The memories of a video's frames, with their times: as the run's config samples them, or by `sampling`.

        BadRecord for a file that is cut off, unless `incomplete`: then of what is there.
        """
        self.require_voco()
        images = self.encode_video(video, sampling=sampling, batch_size=batch_size, incomplete=incomplete)
        return images.first_tokens(tokens)

    def watch(self, source: str = "video", *, tokens: int | None = None, batch_size: int = 8) -> LiveVideo:
        """A video whose frames come one by one, to be asked about at any time."""
        return LiveVideo(self, source, tokens, batch_size)

    def encode_images(self, pictures: PictureLike | Iterable[PictureLike], *, batch_size: int = 32) -> EncodedImages:
        """As `compress`, for a model of any kind: without VoCo compression embeddings, good for asking alone."""
        pictures = [pictures] if is_picture(pictures) else list(pictures)
        pictures = [local_path(p) if isinstance(p, str) else p for p in pictures]
        items = [Item(str(p)) if isinstance(p, str | os.PathLike | Picture) else Item("") for p in pictures]
        return self.encode_pixels((self.square(p) for p in pictures), items, batch_size)

    def encode(self, about: ImageInput | None) -> EncodedImages | None:
        """Encode what a question is about; None for text alone.

        Encoded images are returned as they are (several are joined), images and the frames of a video are encoded, a
        path ending in .voco is a memory file to read. UserError if there is no picture, and for memories of another
        model.
        """
        images = self._encode(about)
        if images is not None and not len(images):
            raise UserError("pictures: expected at least one to ask about, found none")
        if images is not None:
            self.check_encoded(images)
        return images

    def _encode(self, about: ImageInput | None) -> EncodedImages | None:
        if about is None or isinstance(about, MemoryBank | Embeddings):
            return about
        if _names_several(about):
            path = local_path(os.fspath(about))
            return self.open(path) if path.endswith(SUFFIX) else self.encode_video(path)
        if isinstance(about, list | tuple) and any(isinstance(x, EncodedImages) or _names_several(x) for x in about):
            parts = [self._encode(one) for one in about]
            for part in parts:
                self.check_encoded(part)
            if isinstance(parts[0], MemoryBank):
                return join(of_one_dtype(parts))
            items = tuple(item for part in parts for item in part.items)
            return Embeddings(jax.numpy.concatenate([part.features for part in parts]), items)
        if not is_picture(about) and not isinstance(about, Iterable):
            raise UserError(f"pictures: expected one or several, found {type(about).__name__}")
        return self.encode_images(about)

    def encode_video(
        self, video: str | os.PathLike, *, sampling: FrameSampling | None = None, batch_size: int = 32,
        incomplete: bool = False,
    ) -> EncodedImages:  # fmt: skip
        """As `compress_video`, for a model of any kind."""
        clip = Clip(file=as_path(local_path(os.fspath(video))), incomplete=incomplete)
        times = sample_times(probe(clip), sampling or self.frame_sampling())
        items = [Item(str(video), time=float(time)) for time in times]
        frames = (
            frame
            for start in range(0, len(times), batch_size)
            for frame in read_frames(clip, times[start : start + batch_size])
        )
        return self.encode_pixels((self.run.processor.square(frame) for frame in frames), items, batch_size)

    def encode_pixels(
        self, squares: Iterable[np.ndarray], items: Sequence[Item], batch_size: int = 32
    ) -> EncodedImages:
        """Of pictures as `square` gives them, [size, size, 3] uint8, as many as items."""
        images, batch = [], []
        for square in squares:
            batch.append(square)
            if len(batch) == batch_size:
                images.append(self._encode_batch(batch, batch_size))
                batch = []
        if batch:
            images.append(self._encode_batch(batch, min(batch_size, bucket(len(batch), 1))))
        if not images:
            raise UserError("pictures: expected at least one, found none")
        if not self.config.has_memory:
            return Embeddings(jax.numpy.concatenate(images)[: len(items)], tuple(items))
        starts = np.cumsum([0, *(len(bank) for bank in images)])
        named = [
            dataclasses.replace(bank, items=tuple(items[start : start + len(bank)]))
            for bank, start in zip(images, starts, strict=False)
        ]
        return join(named)

    def square(self, picture: PictureLike) -> np.ndarray:
        """A picture as the model takes it: squared, [size, size, 3], uint8. BadRecord for one that cannot be read."""
        return self.run.processor.square(self.run.processor.load(picture))

    def frame_sampling(self) -> FrameSampling:
        """As the run's config has it."""
        video = self.run.config.data.video
        return FrameSampling(video.num_frames, video.fps, video.max_frames)

    def _encode_batch(self, squares: list[np.ndarray], size: int):
        with self.on_mesh():
            together = axis_size(*IMAGES)
            size = -(-max(size, len(squares)) // together) * together
            pixels = np.zeros((size, *squares[0].shape), np.uint8)
            pixels[: len(squares)] = squares
            frames = axis_size("frame")  # images of a row are spread over it
            pixels = pixels.reshape(size // frames, frames, *pixels.shape[1:])
            visual = self.engine().encode_images(self._normalize(pixels))
            if not isinstance(visual, Memory):
                return visual.reshape(-1, *visual.shape[2:])[: len(squares)]
            unnamed = [Item("")] * len(squares)
            return from_memory(visual, self.config.num_voco_tokens, unnamed, self.fingerprint)

    def require_voco(self) -> None:
        """UserError for a model of another compressor."""
        if not self.config.has_memory:
            raise UserError(
                f"{self.run.directory}: a model with compressor {self.config.compressor!r} has no memories: expected "
                "'voco'"
            )

    # ---- Memory files ------------------------------------------------------------------------------------------

    def save(self, bank: MemoryBank, file: str | os.PathLike) -> None:
        """Write a memory file."""
        save_memory(file, bank)

    def open(self, file: str | os.PathLike, *, tokens: int | None = None) -> MemoryBank:
        """Read a memory file; UserError for one that is damaged, or of another model."""
        bank = load_memory(file, self.fingerprint, tokens)
        self.check_encoded(bank)
        return bank

    def check_encoded(self, bank: EncodedImages) -> None:
        """UserError unless it is what this model sees; of memories, which come from files, unless it made them."""
        kind = MemoryBank if self.config.has_memory else Embeddings
        if not isinstance(bank, kind):
            found = f"found {type(bank).__name__}"
            raise UserError(f"pictures: expected {kind.__name__} (compressor {self.config.compressor!r}), {found}")
        if isinstance(bank, Embeddings):
            return
        c, name = self.config.llama, f"memory of {bank.items[0].source}" if len(bank) else "memory"
        if bank.model != self.fingerprint:
            raise UserError(f"{name}: expected one of this model ({self.fingerprint}), found {bank.model}")
        tokens, *shape = bank.keys.shape[1:]
        expected = [c.num_hidden_layers, c.num_key_value_heads, c.head_dim]
        if shape != expected or not 1 <= tokens <= self.config.num_voco_tokens:
            raise UserError(
                f"{name}: expected 1 to {self.config.num_voco_tokens} tokens of {expected} (layers, heads, head size), "
                f"found {tokens} of {shape}"
            )

    # ---- Asking ------------------------------------------------------------------------------------------------

    def ask(
        self, question: str | Sequence[str], images: ImageInput | None = None, *, max_new_tokens: int = 64,
        sampling: Sampling = GREEDY,
    ):  # fmt: skip
        """The answer to a question about all pictures of `images` together; of several questions, a list of answers.

        `images`: see `Request`.
        """
        questions = [question] if isinstance(question, str) else list(question)
        given = self.answers(
            [Request(q, images) for q in questions], max_new_tokens=max_new_tokens, sampling=sampling
        )  # fmt: skip
        return given[0] if isinstance(question, str) else given

    def ask_each(
        self, question: str, images: ImageInput, *, max_new_tokens: int = 64, sampling: Sampling = GREEDY
    ) -> list[str]:
        """The answers to one question, asked about each picture by itself."""
        images = self.encode(images)
        if images is None:
            raise UserError("pictures: expected at least one to ask about, found none")
        requests = [Request(question, images[i]) for i in range(len(images))]
        return self.answers(requests, max_new_tokens=max_new_tokens, sampling=sampling)

    def answers(
        self, requests: Sequence[Request], *, max_new_tokens: int = 64, sampling: Sampling = GREEDY,
        until: Sequence[str] = (), batch_size: int = 64, streams: Sequence[int] | None = None,
    ) -> list[str]:  # fmt: skip
        """Answers to any requests, in their order. Those of like length are asked together.

        `until`: texts that end an answer, beside the model's end-of-sequence token. `streams` number the requests'
        random numbers (default: 0, 1, …).
        """
        streams = range(len(requests)) if streams is None else streams
        requests = self._with_encoded(requests)
        prompts = [self.prompt(request) for request in requests]
        order = sorted(range(len(requests)), key=lambda i: len(prompts[i]))
        given: dict[int, str] = {}
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            visual, pictures = self.visual([requests[i].images for i in batch])
            engine = self.engine(_tokens(*(requests[i].images for i in batch)))
            with self.on_mesh():
                texts = engine.generate(
                    [prompts[i] for i in batch], visual, pictures, max_new_tokens, sampling, until,
                    [streams[i] for i in batch],
                )  # fmt: skip
            given |= zip(batch, texts, strict=True)
        return [given[i] for i in range(len(requests))]

    def scores(self, requests: Sequence[Request], answers: Sequence[str], *, batch_size: int = 64) -> list[Score]:
        """How likely the model would give `answers[i]` to request i, in their order."""
        requests = self._with_encoded(requests)
        samples = [self.prompt(request, answer) for request, answer in zip(requests, answers, strict=True)]
        order = sorted(range(len(requests)), key=lambda i: len(samples[i]))
        found: dict[int, Score] = {}
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            visual, pictures = self.visual([requests[i].images for i in batch])
            engine = self.engine(_tokens(*(requests[i].images for i in batch)))
            with self.on_mesh():
                found |= zip(batch, engine.score([samples[i] for i in batch], visual, pictures), strict=True)
        return [found[i] for i in range(len(requests))]

    def _with_encoded(self, requests: Sequence[Request]) -> list[Request]:
        """With what the model keeps of their pictures; what several share is looked at once."""
        looked = {id(request.images): request.images for request in requests}
        looked = {key: self.encode(about) for key, about in looked.items()}
        return [dataclasses.replace(request, images=looked[id(request.images)]) for request in requests]

    def chat(self, images: ImageInput | None = None, *, max_new_tokens: int = 256, sampling: Sampling = GREEDY) -> Chat:
        """A conversation of several turns about pictures; what has been read stays in the cache."""
        return Chat(self, self.encode(images), max_new_tokens, sampling)

    def prompt(self, request: Request, answer: str | None = None) -> Sample:
        """A request's tokens, as training lays them out: pictures before the question, frames with their times where
        the run was trained so; with an answer, whose tokens are then the labels."""
        images, question = request.images, request.question
        if not question.strip():
            raise UserError("question: expected text, found none")
        encoder = self.engine(_tokens(images)).encoder
        count = 0 if images is None else len(images)
        if request.interleaved:
            turns = [{"from": "human", "value": question}]
        elif images is not None and images.is_video:
            turns = self.turns(question, images)
        else:
            turns = [{"from": "human", "value": encoder.question(question, count)}]
        if answer is not None:
            turns.append({"from": "gpt", "value": (answer,)})
        return encoder.encode(turns, count)

    def turns(self, question: str, images: EncodedImages) -> list[dict]:
        """A first turn about a video's frames."""
        stamped = self.run.config.data.video.timestamps
        texts = [f"{format_time(item.time)} " if stamped else "" for item in images.items]
        return spread_video([{"from": "human", "value": (VIDEO, f"\n{question}")}], texts)

    def engine(self, tokens: int | None = None) -> Engine:
        """For memories of so many tokens a picture (default: the model's)."""
        tokens = self.run.encoder.num_visual_tokens if tokens is None else tokens
        if tokens not in self._engines:  # another prompt; the compiled programs are the same
            engine = copy.copy(self._engines[self.run.encoder.num_visual_tokens])
            engine.encoder = dataclasses.replace(
                self.run.encoder, num_voco_tokens=tokens, num_visual_tokens=tokens
            )  # fmt: skip
            self._engines[tokens] = engine
        return self._engines[tokens]

    def visual(self, images: Sequence[EncodedImages | None]):
        """What the model reads of several requests' pictures, each held once, and which of them each is about."""
        held: dict[int, tuple[int, EncodedImages]] = {}
        count = 0
        for one in images:
            if one is not None and id(one) not in held:
                held[id(one)] = count, one
                count += len(one)
        pictures = [
            range(0) if one is None else range(held[id(one)][0], held[id(one)][0] + len(one)) for one in images
        ]  # fmt: skip
        if not count:
            return None, pictures
        banks, places = [one for _, one in held.values()], bucket(count, 1)
        with self.on_mesh():
            if isinstance(banks[0], Embeddings):
                features = jax.numpy.concatenate([bank.features for bank in banks])
                return jax.numpy.pad(features, [(0, places - count), (0, 0), (0, 0)])[None], pictures
            for bank in banks:
                self.check_encoded(bank)
            return join(of_one_dtype(banks)).memory(places), pictures


def _names_several(about) -> bool:
    """Whether it is the path of a memory file, or of a video."""
    if not isinstance(about, str | os.PathLike):
        return False
    path = local_path(os.fspath(about))
    return path.endswith(SUFFIX) or is_video(as_path(path))


def _tokens(*images: EncodedImages | None) -> int | None:
    """Of the first that is a memory."""
    return next((one.num_tokens for one in images if isinstance(one, MemoryBank)), None)
