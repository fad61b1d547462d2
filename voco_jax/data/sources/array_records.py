"""ArrayRecord shards: records with their encoded pictures inside, read in any order (`voco build-records`).

A record is MessagePack, plain values only (nothing in it can be code):

    {"name": text, "conversations": [[{"from": text, "value": text}, …], …],
     "images": [bytes, …], "image_names": [text, …], "kinds": [text, …],
     "video": bytes or nil, "frames": [bytes, …], "times": [seconds, …], "video_name": text}

with at most one of images, video (an encoded clip) and frames (encoded pictures and when each is shown), and `kinds`
(one a conversation) where the rows have them.
"""

from collections.abc import Sequence
from pathlib import Path

import msgpack

from voco_jax.data.records import DAMAGED, WRONG_FORM, BadRecord, Clip, Frames, Picture, Record
from voco_jax.data.shards.files import MANIFEST, check_complete
from voco_jax.data.sources.roots import local_only
from voco_jax.errors import UserError
from voco_jax.io.files import check_regular
from voco_jax.io.paths import matching
from voco_jax.terminal import shortened

_MOST_VALUES = 2**18  # of a list: pictures, frames, turns
_KEYS = {
    "name": str, "conversations": list, "images": list, "image_names": list, "frames": list, "times": list,
    "video_name": str,
}  # fmt: skip


def pack_record(record: Record) -> bytes:
    """A record whose pictures and video are `data` (bytes), for a shard."""
    frames = record.video if isinstance(record.video, Frames) else Frames((), ())
    return msgpack.packb(
        {
            "name": record.name,
            "conversations": [[{"from": t["from"], "value": t["value"]} for t in c] for c in record.conversations],
            "images": [picture.data for picture in record.images],
            "image_names": [picture.name for picture in record.images],
            "video": record.video.data if isinstance(record.video, Clip) else None,
            "frames": [picture.data for picture in frames.pictures],
            "times": [float(t) for t in frames.times],
            "video_name": record.video.name if record.video is not None else "",
        }
        | ({"kinds": list(record.kinds)} if record.kinds else {})  # shards without are as they have always been
    )


def unpack_record(content: bytes) -> Record:
    """The inverse of `pack_record`; BadRecord for anything else."""
    try:
        values = msgpack.unpackb(content, strict_map_key=True, max_array_len=_MOST_VALUES, max_map_len=_MOST_VALUES)
    except Exception as error:  # msgpack raises ValueError, and several of its own that share no base
        raise BadRecord(WRONG_FORM, f"not a record of build_records ({shortened(error)})") from None
    if not isinstance(values, dict) or any(not isinstance(values.get(key), kind) for key, kind in _KEYS.items()):
        raise BadRecord(WRONG_FORM, f"expected a record with the keys {', '.join(_KEYS)}")
    name, images, frames, times = values["name"], values["images"], values["frames"], values["times"]
    lists_match = len(images) == len(values["image_names"]) and len(frames) == len(times)
    if (
        not lists_match
        or not all(isinstance(data, bytes) for data in (*images, *frames, values.get("video") or b""))
        or not all(isinstance(text, str) for text in values["image_names"])
        or not all(isinstance(number, int | float) for number in times)
    ):
        raise BadRecord(WRONG_FORM, f"{name}: pictures do not match their names or times")
    if bool(images) + bool(frames) + bool(values.get("video")) > 1:
        raise BadRecord(WRONG_FORM, f"{name}: expected pictures, frames or a video, found several of these")
    if not values["conversations"] or not all(isinstance(turns, list) for turns in values["conversations"]):
        found = shortened(values["conversations"])
        raise BadRecord(WRONG_FORM, f"{name}: expected 'conversations', each a list of turns; found {found}")
    video: Clip | Frames | None = None
    if frames:
        pictures = [Picture(data=data, name=f"{values['video_name']} frame {i}") for i, data in enumerate(frames)]
        video = Frames(pictures, times, values["video_name"])
    elif values.get("video"):
        video = Clip(data=values["video"], name=values["video_name"])
    pictures = [Picture(data=data, name=n) for data, n in zip(images, values["image_names"], strict=True)]
    kinds = values.get("kinds", [])
    if not isinstance(kinds, list) or len(kinds) not in (0, len(values["conversations"])):
        raise BadRecord(WRONG_FORM, f"{name}: expected as many 'kinds' as conversations, found {shortened(kinds)}")
    return Record(pictures, video, values["conversations"], name, kinds)


class ArrayRecordSource:
    """All records of some shards: a directory of `*.array_record`, or a pattern."""

    def __init__(self, files: str):
        self._files = find_shards(files)
        for directory in {file.parent for file in self._files}:
            if (directory / MANIFEST).exists():
                check_complete(directory)
        self._source = None
        self._length = len(self._open())

    def __len__(self):
        return self._length

    def __getitem__(self, i: int) -> Record:
        if not 0 <= i < self._length:
            raise IndexError(i)
        try:
            content = self._open()[i]
        except (RuntimeError, ValueError) as error:  # a checksum that is not right
            raise BadRecord(DAMAGED, f"{self.where(i)}: {str(error).splitlines()[0]:.200}") from None
        return unpack_record(content)

    def _open(self):
        if self._source is None:
            from grain.sources import ArrayRecordDataSource

            try:
                self._source = ArrayRecordDataSource([str(file) for file in self._files])
                len(self._source)
            except (OSError, ValueError, RuntimeError) as error:
                reason = str(error).splitlines()[0]
                raise UserError(f"{self._files[0].parent}: not readable as ArrayRecord: {reason}") from None
        return self._source

    def __getstate__(self):
        return self.__dict__ | {"_source": None}  # each process opens the files itself

    def where(self, i: int) -> str:
        return f"{self._files[0].parent.name}[{i}]"

    def fingerprint(self) -> str:
        parts = (f"{f.resolve()} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in self._files)
        return "array_record " + " ".join(parts)


def find_shards(files: str) -> Sequence[Path]:
    """The shards of a directory or a pattern, by name; UserError where there is none."""
    local_only(files, "files", "ArrayRecord shards are read")
    path = Path(files).expanduser()
    found = [path] if path.is_file() else matching(path / "*.array_record" if path.is_dir() else path)
    for file in found:
        check_regular(file, file.stat())
    if not files or not found:
        raise UserError(f"{files or 'files'}: expected a directory or pattern of *.array_record files, found none")
    return found
