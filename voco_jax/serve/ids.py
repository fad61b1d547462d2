"""Names of memories by what they were made of: 64 hex digits, the SHA-256 of it.

Each kind of content has ids of its own, so that nobody can make one thing that has another's id. Which model made a
memory is no part of its id: each model has a store of its own.
"""

from collections.abc import Sequence
import hashlib
import json
import re

import numpy as np

from voco_jax.data.video import FrameSampling


def is_id(text: str) -> bool:
    """
    >>> is_id("0123456789abcdef" * 4), is_id("0123456789ABCDEF" * 4), is_id("../" * 20)
    (True, False, False)
    """
    return re.fullmatch("[0-9a-f]{64}", text) is not None


def picture_id(*squares: np.ndarray) -> str:
    """Of a picture as the model is given it: its square (uint8 [S, S, 3]), or with tiles all of its squares.

    The same picture in another file format without loss has the same id.
    """
    content = hashlib.sha256()
    for square in squares:
        content.update(np.ascontiguousarray(square).data)
    return content.hexdigest()


def video_id(sha256: str, sampling: FrameSampling, times: Sequence[float] = ()) -> str:
    """Of a clip: the SHA-256 of its file and which frames are looked at, by the sampling; or by `times` (seconds, e.g.
    the begin and end of a part, or of each frame where frames are given as pictures)."""
    sampled = [sampling.num_frames] if sampling.num_frames else [0, float(sampling.fps), sampling.max_frames]
    return _described("video", sha256, sampled, [float(time) for time in times])


def album_id(ids: Sequence[str]) -> str:
    """Of several memories in an order."""
    return _described("album", *ids)


def upload_id(sha256: str) -> str:
    """Of a memory file that a client has made: nobody knows what of, so it has no picture's or clip's id. `sha256` is
    that of the file."""
    return _described("upload", sha256)


def _described(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
