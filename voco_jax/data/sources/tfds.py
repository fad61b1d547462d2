"""Image-question sets of tensorflow-datasets, through `tfds.data_source`: read in any order, TensorFlow not needed."""

import io
from typing import Any

import numpy as np
from PIL import Image

from voco_jax.data.records import DAMAGED, NO_ANSWER, NOT_UTF8, WRONG_FORM, BadRecord, Picture, Record
from voco_jax.data.sources.llava import question_turns
from voco_jax.data.sources.roots import local_only
from voco_jax.errors import UserError
from voco_jax.terminal import shortened


class TfdsSource:
    """A prepared dataset (`tfds build` or `download_and_prepare(file_format="array_record")`).

    `image`, `question` and `answer` name its features, dots going into nested ones. A class label becomes its name; of
    a list of answers the most frequent counts, the first of several. Without a question feature (`question=""`),
    `prompt` is asked: an image classification set becomes question answering. `question_kind` names the feature that
    has the kind of a question, if there is one.
    """

    def __init__(
        self, name: str, split: str, data_dir: str, image: str, question: str, answer: str, prompt: str,
        question_kind: str = "",
    ):  # fmt: skip
        self._arguments = dict(name=name, split=split, data_dir=data_dir or None)
        self._keys, self._prompt = dict(image=image, question=question, answer=answer), prompt
        if question_kind:  # else the fingerprint is as before there were kinds
            self._keys["question_kind"] = question_kind
        self._source: Any = None
        self._features: Any = None
        local_only(data_dir, "data_dir", "prepared datasets are read")
        if bool(question) == bool(prompt):
            raise UserError(f"tfds {name}: expected a feature 'question' or a 'prompt' to ask, one of the two")
        self._length = len(self._open())
        self._check_features(name)

    def _check_features(self, name: str) -> None:
        for role, key in self._keys.items():
            if key and _find(self._features, key) is None:
                raise UserError(f"tfds {name}: {role}: expected one of {', '.join(self._features)}; found {key!r}")

    def __len__(self):
        return self._length

    def __getitem__(self, i: int) -> Record:
        if not 0 <= i < self._length:
            raise IndexError(i)
        source = self._open()
        try:
            example = source[i]
        except Exception as error:  # ArrayRecord's checksums, protocol buffers' and features' own
            raise BadRecord(DAMAGED, f"{type(error).__name__}: {str(error):.200}") from None
        picture = _find(example, self._keys["image"])
        if isinstance(picture, np.ndarray) and picture.dtype == np.uint8 and picture.shape[2:] in ((1,), (3,)):
            picture = _png(picture)
        if not isinstance(picture, bytes):
            raise BadRecord(WRONG_FORM, f"{self._keys['image']}: expected a picture, found {type(picture).__name__}")
        key = self._keys["question"]
        question = self._text(key, _find(example, key)) if key else self._prompt
        answer = self._text(self._keys["answer"], _find(example, self._keys["answer"]))
        turns = question_turns(question, answer, "<image>")
        kind = self._keys.get("question_kind")
        kinds = [self._text(kind, _find(example, kind))] if kind else []
        return Record([Picture(data=picture, name=self.where(i))], conversations=[turns], kinds=kinds)

    def _text(self, key: str, value: Any) -> str:
        names = getattr(_find(self._features, key), "names", None)
        values = [value] if isinstance(value, str | bytes) or np.ndim(value) == 0 else list(value)
        if any(isinstance(value, dict | list) or np.ndim(value) for value in values):
            raise BadRecord(WRONG_FORM, f"{key}: expected text, a number, or a list of one; found {shortened(value)}")
        if not values or values == [None]:
            raise BadRecord(NO_ANSWER, f"{key}: expected at least one value, found none")
        value = max(values, key=values.count)
        if isinstance(value, bytes):
            try:
                return value.decode()
            except UnicodeDecodeError as error:
                raise BadRecord(NOT_UTF8, f"{key}: expected UTF-8, found byte {value[error.start]:#x}") from None
        if names and not isinstance(value, str):
            if not 0 <= value < len(names):  # -1 stands for a label that is kept secret
                raise BadRecord(NO_ANSWER, f"{key}: expected a label from 0 to {len(names) - 1}, found {value}")
            return names[int(value)].replace("_", " ")
        return str(value)

    def _open(self):
        if self._source is None:
            try:
                import tensorflow_datasets as tfds
            except ImportError:
                message = "the package tensorflow-datasets is not installed; pip install -e '.[tfds]' brings it"
                raise UserError(f"tfds: {message}") from None
            try:
                builder = tfds.builder(self._arguments["name"], data_dir=self._arguments["data_dir"])
                self._features = builder.info.features
                decoders = {self._keys["image"]: tfds.decode.SkipDecoding()}
                self._directory = builder.data_path
                self._source = builder.as_data_source(split=self._arguments["split"], decoders=decoders)
            except Exception as error:  # tfds raises all kinds for what is not there
                reason = " ".join(str(error).split())
                raise UserError(f"tfds {self._arguments['name']}/{self._arguments['split']}: {reason:.300}") from None
        return self._source

    def __getstate__(self):
        return self.__dict__ | {"_source": None, "_features": None}

    def where(self, i: int) -> str:
        return f"{self._arguments['name']}/{self._arguments['split']}[{i}]"

    def fingerprint(self) -> str:
        files = [(f.name, f.stat()) for f in sorted(self._directory.iterdir())]
        parts = (f"{name} {status.length} {status.mtime}" for name, status in files)
        arguments = f"{sorted(self._arguments.items())} {sorted(self._keys.items())} {self._prompt} {self._length}"
        return f"tfds {arguments} {self._directory} {' '.join(parts)}"


def _find(tree, key: str):
    """A nested value by dotted name; None where there is none."""
    for part in key.split("."):
        try:
            tree = tree[part]
        except (KeyError, TypeError, IndexError):
            return None
    return tree


def _png(pixels: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels.squeeze() if pixels.shape[-1] == 1 else pixels).save(content, "PNG", compress_level=1)
    return content.getvalue()
