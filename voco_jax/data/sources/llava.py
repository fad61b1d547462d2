"""Question sets in JSON or JSONL: LLaVA's conversations about pictures or videos, and video questions with answers.

LLaVA (mix665k as published), a row; text-only rows have no `image` (or an empty one), `image` may be a list, `video`
may stand for it:

    {"id": "000000033471", "image": "coco/train2017/000000033471.jpg", "conversations": [
        {"from": "human", "value": "<image>\\nWhat are the colors of the bus in the image?"},
        {"from": "gpt", "value": "The bus in the image is white and red."}, …]}

Video questions: `{"video": "clips/a.mp4", "question": "…", "answer": "…"}`, or Video-ChatGPT's `video_id` (without an
ending), `q` and `a`.

A row of either may have a `kind` of question ("order", "count"), which `voco evaluate` splits its table by.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from voco_jax.data.endings import VIDEOS, has_ending
from voco_jax.data.records import MISSING, WRONG_FORM, BadRecord, Clip, Picture, Record
from voco_jax.data.sources.json_rows import JsonRows
from voco_jax.data.sources.roots import inside
from voco_jax.errors import UserError
from voco_jax.io.paths import AnyPath, absolute, as_path, bucket_errors, list_files
from voco_jax.terminal import shortened

VIDEO = "<video>"


class LlavaSource:
    """Rows of a LLaVA file as records; `images` and `videos` are the directories its paths start from."""

    def __init__(self, file: str, images: str = "", videos: str = "", row_bytes: int | None = None):
        self._rows = _rows(file, row_bytes)
        self._images, self._videos = _root(images, "images"), _root(videos, "videos")

    def __len__(self):
        return len(self._rows)

    def __getitem__(self, i: int) -> Record:
        row = _object(self._rows[i])
        if not isinstance(row.get("conversations"), list):
            raise BadRecord(WRONG_FORM, f"expected 'conversations', a list of turns; found {_shown(row)}")
        images, video = row.get("image"), row.get("video")
        images = [name for name in (images if isinstance(images, list) else [images]) if name not in (None, "")]
        video = None if video == "" else video
        if images and video is not None:
            raise BadRecord(WRONG_FORM, "expected 'image' or 'video', found both")
        root = self._images or self._videos
        if images and root is None:
            raise UserError(_no_root(self._rows.file, "images"))
        if video is not None and (self._videos or self._images) is None:
            raise UserError(_no_root(self._rows.file, "videos"))
        return Record(
            images=[Picture(inside(root, name)) for name in images],
            video=None if video is None else Clip(inside(self._videos or self._images, video)),
            conversations=[row["conversations"]],
            kinds=_kinds(row),
        )

    def where(self, i: int) -> str:
        return f"{self._rows.file.name}[{i}]"

    def fingerprint(self) -> str:
        return f"llava {self._rows.fingerprint()} {self._images} {self._videos}"


class VideoQuestionSource:
    """Rows of video, question and answer as records; `videos` is the directory their files are in."""

    def __init__(self, file: str, videos: str, row_bytes: int | None = None):
        self._rows = _rows(file, row_bytes)
        root = _root(videos, "videos")
        if root is None:
            raise UserError(_no_root(file, "videos"))
        self._videos: AnyPath = root
        # By name without ending, because Video-ChatGPT's rows have none. One listing, not a look for each ending.
        found = [Path(name) for name, *_ in list_files(root) if has_ending(Path(name), VIDEOS)]
        self._by_stem = {p.stem: p.name for p in sorted(found, key=lambda p: (p.suffix == ".gif", p), reverse=True)}

    def __len__(self):
        return len(self._rows)

    def __getitem__(self, i: int) -> Record:
        row = _object(self._rows[i])
        name = _first(row, "video", "video_id", "video_name")
        question, answer = _first(row, "question", "q", "Q"), _first(row, "answer", "a", "A")
        file = inside(self._videos, name)
        if not has_ending(file, VIDEOS):
            if file.parent == self._videos and file.name in self._by_stem:
                file = self._videos / self._by_stem[file.name]
            elif not file.is_file():
                raise BadRecord(MISSING, f"{file}: expected a video of this name, ending in {', '.join(VIDEOS)}")
        return Record(video=Clip(file), conversations=[question_turns(question, answer, VIDEO)], kinds=_kinds(row))

    def where(self, i: int) -> str:
        return f"{self._rows.file.name}[{i}]"

    def fingerprint(self) -> str:
        return f"video_qa {self._rows.fingerprint()} {self._videos} {list_files(self._videos)}"


def question_turns(question: str, answer: str, marker: str) -> list[dict]:
    """A question and its answer as LLaVA's turns, the picture or video (`marker`) before the question.

    >>> question_turns("What is it?", "A bus.", "<image>")
    [{'from': 'human', 'value': '<image>\\nWhat is it?'}, {'from': 'gpt', 'value': 'A bus.'}]
    """
    return [{"from": "human", "value": f"{marker}\n{question}"}, {"from": "gpt", "value": answer}]


def _rows(file: str, row_bytes: int | None) -> JsonRows:
    """`row_bytes` is a config's limit; None where there is no config."""
    return JsonRows(file) if row_bytes is None else JsonRows(file, row_bytes, "config.data.limits.row_bytes")


def _no_root(file: str | AnyPath, key: str) -> str:
    return f"{file}: has {key}: expected their directory (--{key}, or the source's key {key!r}), found none"


def _root(directory: str, key: str) -> AnyPath | None:
    if not directory:
        return None
    path = absolute(as_path(directory))
    with bucket_errors(path):
        if not path.is_dir():
            raise UserError(f"{directory}: expected a directory (--{key}, or the source's key {key!r}), found none")
    return path


def _object(row) -> Mapping[str, Any]:
    if not isinstance(row, Mapping):
        raise BadRecord(WRONG_FORM, f"expected an object, found {_shown(row)}")
    return row


def _kinds(row: Mapping) -> list:
    return [row["kind"]] if row.get("kind") is not None else []


def _first(row: Mapping, *keys: str) -> str:
    for key in keys:
        if key in row:
            if not isinstance(row[key], str):
                raise BadRecord(WRONG_FORM, f"{key}: expected text, found {shortened(row[key])}")
            return row[key]
    raise BadRecord(WRONG_FORM, f"expected a key {' or '.join(keys)}, found {_shown(row)}")


def _shown(value) -> str:
    return f"keys {', '.join(map(str, value))}"[:100] if isinstance(value, Mapping) else shortened(value)
