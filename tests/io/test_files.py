"""What is opened for reading, and how text from files reaches a terminal."""

import errno
import os
from pathlib import Path
import socket

import numpy as np
import pytest

from voco_jax.data.records import MISSING, BadRecord
from voco_jax.data.sources.json_rows import JsonRows
from voco_jax.errors import TryAgain, UserError
from voco_jax.infer.memory import Item, MemoryBank
from voco_jax.infer.memory_file import MemoryFile, save_memory
from voco_jax.io.files import SourceFile, open_regular, read_bytes, read_text
from voco_jax.io.json_files import read_object
from voco_jax.terminal import printable


def test_regular_files_alone_are_opened(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"content")
    (tmp_path / "link").symlink_to(file)
    before = len(os.listdir("/proc/self/fd"))
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "linked_pipe").symlink_to(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        for name in ("file", "link"):
            with open_regular(tmp_path / name) as stream:
                assert stream.read() == b"content" and os.get_blocking(stream.fileno())
        for name, found in (("pipe", "a pipe"), ("linked_pipe", "a pipe"), (".", "a directory")):
            with pytest.raises(UserError, match=f"expected a file, found {found}"):
                open_regular(tmp_path / name)
        with pytest.raises(UserError, match="/dev/zero: expected a file, found a device"):
            read_object("/dev/zero")
        with pytest.raises(OSError, match="No such device or address"):
            open_regular(tmp_path / "socket")
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "none")
    assert len(os.listdir("/proc/self/fd")) == before


def test_more_than_is_meant_is_not_read(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"x" * 10)
    assert read_bytes(file, most=10) == read_bytes(file) == b"x" * 10 and read_text(file) == "x" * 10
    with pytest.raises(UserError, match="file: expected 9 bytes at most, found 10"):
        read_bytes(file, most=9)
    with file.open("wb") as stream:
        stream.truncate(1 << 40)  # takes no place
    with pytest.raises(UserError, match=f"expected 8388608 bytes at most, found {1 << 40}"):
        read_object(file)


def test_messages_are_one_line_that_no_terminal_obeys():
    title, colour, half = "\x1b]0;owned\x07", "\x9b31m", os.fsdecode(b"\xff")
    name = f"a\nb\r{title}{colour}{half}\u2028\u202e\x7f"
    expected = r"a\nb\r\x1b]0;owned\x07\x9b31m\udcff\u2028\u202e\x7f: not found"
    assert str(UserError(f"{name}: not found")) == expected
    assert str(BadRecord(MISSING, f"{name}: not found")) == expected
    assert str(UserError(f"{Path('grün') / '图片 👩‍🌾.png'}: not found")) == "grün/图片 👩‍🌾.png: not found"
    marks, turns = "\u200e\u200f\u061c\u200d", "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
    assert printable(marks) == marks and printable(turns) == ascii(turns)[1:-1]
    assert printable("a\tb\nc\x1b", keep="\n\t") == "a\tb\nc\\x1b"


def test_a_disk_that_does_not_answer(tmp_path, monkeypatch):
    """The same command may succeed the next time: rows of data, weights and memory files say so by their status."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "Which?"}\n')
    opened = JsonRows(rows), SourceFile(rows)

    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    for name in ("pread", "preadv", "fsync"):
        monkeypatch.setattr(os, name, fail)
    bank = MemoryBank(
        dict.fromkeys(("keys", "values"), np.zeros((1, 1, 1, 1, 2), np.float32)), (Item("a.png"),), "model"
    )
    for call in (
        lambda: opened[0][0], lambda: opened[1].read(0, 2), lambda: save_memory(tmp_path / "a.voco", bank),
        lambda: MemoryFile(rows),
    ):  # fmt: skip
        with pytest.raises(TryAgain, match="cannot be (read|written): Input/output error"):
            call()
