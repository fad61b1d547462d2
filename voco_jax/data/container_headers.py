"""Reading single headers of a file, a limited number of them: the checks of video containers use it."""

import io
from typing import BinaryIO

MOST_BEHIND = 1024  # bytes that may follow the end of a container without being part of it: a line of text, say


class Enough(Exception):
    """The limit on the number of headers was reached."""


class Headers:
    """Reads a few bytes at a time, at most `most` times (`Enough` after that); fewer bytes at the end of the file."""

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
        """An error for a file that ends before byte `end`; '' for any other."""
        return f"expected {end} bytes or more, found {self.size}" if end > self.size else ""


def none(what: str, at: int) -> str:
    return f"expected {what} at byte {at}, found none"
