"""What the checks of containers read of a file: headers here and there, a bounded number of them."""

import io
from typing import BinaryIO

MOST_BEHIND = 1024  # bytes that are not of a container, behind its end: a line of text, say


class Enough(Exception):
    """As many headers were read as may be."""


class Headers:
    """A file's bytes, a few at a time and no more than `most` times; shorter where it ends."""

    def __init__(self, file: BinaryIO, most: int):
        self.file, self.left = file, most
        self.size = file.seek(0, io.SEEK_END)

    def read(self, at: int, length: int) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise Enough
        if at >= self.size:
            return b""
        self.file.seek(at)
        return self.file.read(length)

    def beyond(self, end: int) -> str:
        """'' where the file reaches to `end`."""
        return f"expected {end} bytes or more, found {self.size}" if end > self.size else ""


def none(what: str, at: int) -> str:
    return f"expected {what} at byte {at}, found none"
