"""TensorBoard's event files, written at once: what a kill leaves is whole up to its last record."""

import os
from pathlib import Path
import socket
import struct
import sys
import time


class EventFile:
    """One file of events in a directory, which TensorBoard shows together with those of earlier starts.

    Steps from `first_step` on in earlier files are forgotten: they are about to come again.
    """

    def __init__(self, directory: Path, first_step: int):
        directory.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        self._path = directory / name
        self._proto, self._checksum = _tensorboardx()
        self._file = self._path.open("ab", buffering=0)  # nothing is left to be written, and to fail, at the end
        self._write(file_version="brain.Event:2")
        start = self._proto.SessionLog(status=self._proto.SessionLog.START)
        self._write(step=first_step, session_log=start)

    def scalars(self, step: int, values: dict[str, float | None]) -> None:
        """Numbers by tag ('train/loss'); None is left out."""
        with_value = {tag: value for tag, value in values.items() if value is not None}
        self._summary(step, [dict(tag=tag, simple_value=value) for tag, value in with_value.items()])

    def picture(self, step: int, tag: str, file: Path) -> None:
        """A PNG file."""
        png = file.read_bytes()
        width, height = struct.unpack(">II", png[16:24])
        image = dict(width=width, height=height, colorspace=4, encoded_image_string=png)
        self._summary(step, [dict(tag=tag, image=image)])

    def close(self) -> None:
        self._file.close()

    def _summary(self, step: int, values: list[dict]) -> None:
        self._write(step=step, summary=dict(value=values))

    def _write(self, **fields) -> None:
        data = self._proto.Event(wall_time=time.time(), **fields).SerializeToString()
        length = struct.pack("<Q", len(data))
        record = (length, struct.pack("<I", self._checksum(length)), data, struct.pack("<I", self._checksum(data)))
        write_all(self._file, b"".join(record))


def write_all(file, data: bytes) -> None:
    """All of it to an unbuffered file; OSError names the file."""
    try:
        while data:
            data = data[file.write(data) :]
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file.name)) from None


def _tensorboardx():
    """tensorboardX's protocol buffers and checksum.

    Importing it imports torch where that is installed, which takes seconds and brings CUDA libraries of its own into
    the process; nothing of what is used here needs it.
    """
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None
    try:
        from tensorboardX.proto import event_pb2
        from tensorboardX.record_writer import masked_crc32c
    finally:
        if hidden:
            del sys.modules["torch"]
    return event_pb2, masked_crc32c
