"""Files and directories that are whole or not there, and locks that go with their process."""

import errno
import multiprocessing
import os
import signal
import threading

import pytest

from tests.helpers.bucket_server import bucket_server
from voco_jax.errors import UserError
from voco_jax.io.atomic import new_directory, open_for_writing, replacing, write_text
from voco_jax.io.locks import holding, lock
from voco_jax.io.paths import as_path


def names(directory):
    return sorted(os.listdir(directory))


@pytest.mark.parametrize("shared", [False, True])
def test_a_block_that_raises_leaves_the_file_as_it_was(tmp_path, shared):
    file = tmp_path / "a.json"
    write_text(file, "old", shared=shared)
    with pytest.raises(ZeroDivisionError), open_for_writing(file, shared=shared) as stream:
        stream.write(b"half of the ne")
        stream.flush()
        assert file.read_text() == "old"
        raise ZeroDivisionError
    assert names(tmp_path) == ["a.json"] and file.read_text() == "old"
    write_text(file, "new: ä", shared=shared)
    assert names(tmp_path) == ["a.json"] and file.read_bytes() == "new: ä".encode()


def killed_while_writing(file):
    with open_for_writing(file) as stream:
        stream.write(b"half of the ne")
        stream.flush()
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed_while_it_writes(tmp_path):
    file = tmp_path / "a.json"
    write_text(file, "old")
    process = multiprocessing.get_context("spawn").Process(target=killed_while_writing, args=(file,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert file.read_text() == "old" and names(tmp_path) == [".a.json.new", "a.json"]
    write_text(file, "new")  # takes what it left away
    assert file.read_text() == "new" and names(tmp_path) == ["a.json"]


def test_two_at_once_with_names_of_their_own(tmp_path):
    file = tmp_path / "a.npz"
    with replacing(file, shared=True) as one, replacing(file, shared=True) as other:
        one.write_text("one")
        other.write_text("other")
    assert file.read_text() == "one" and names(tmp_path) == ["a.npz"]


def test_links_lie_in_wait_in_vain(tmp_path):
    """Not what a link at the temporary name points to is written, nor at the file's own."""
    (tmp_path / ".a.new").symlink_to(tmp_path / "victim")
    (tmp_path / "b").symlink_to(tmp_path / "archive")
    (tmp_path / "archive").write_text("kept")
    write_text(tmp_path / "a", "x")
    write_text(tmp_path / "b", "x")
    assert not (tmp_path / "victim").exists() and (tmp_path / "archive").read_text() == "kept"
    assert (tmp_path / "b").read_text() == "x" and not (tmp_path / "b").is_symlink()


def test_errors_name_a_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere/\.a\.new"):
        write_text(tmp_path / "nowhere" / "a", "x")
    (tmp_path / ".a.new").mkdir()
    with pytest.raises(UserError, match=r"\.a\.new: expected a file, found a directory"):
        write_text(tmp_path / "a", "x")
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/b'"), replacing(tmp_path / "b"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_file_of_a_bucket_appears_in_one_piece():
    with bucket_server() as server:
        file = as_path("gs://bucket/run/a.json")
        write_text(file, "one")
        assert server.objects["run/a.json"][0] == b"one"
        with pytest.raises(ZeroDivisionError), open_for_writing(file) as stream:
            stream.write(b"half")
            raise ZeroDivisionError
        assert server.objects["run/a.json"][0] == b"one"
        with replacing(file) as temporary:
            temporary.write_bytes(b"two")
        assert server.objects.keys() == {"run/a.json"} and server.objects["run/a.json"][0] == b"two"


def test_a_new_directory(tmp_path):
    with pytest.raises(ZeroDivisionError), new_directory(tmp_path / "a") as directory:
        (directory / "b").write_text("half")
        raise ZeroDivisionError
    assert names(tmp_path) == []
    with new_directory(tmp_path / "a") as directory:
        (directory / "b").write_text("whole")
        assert not (tmp_path / "a").exists()
    assert names(tmp_path) == ["a"] and names(tmp_path / "a") == ["b"]
    with pytest.raises(UserError, match="a: exists already; nothing was changed"), new_directory(tmp_path / "a"):
        pass


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_a_file_or_directory_is_held_by_one(tmp_path, kind):
    path = tmp_path / kind
    if kind == "directory":
        path.mkdir()
    with holding(path, "somebody has it") as descriptor:
        assert os.fstat(descriptor).st_ino == path.stat().st_ino
        with pytest.raises(UserError, match="^somebody has it$"), holding(path, "somebody has it"):
            pass
        other = os.open(path, os.O_RDONLY)
        assert not lock(other, path)
    assert lock(other, path)  # the block's end has released it
    os.close(other)
    with holding(path, "somebody has it"):
        pass


def test_a_pipe_is_not_held(tmp_path):
    os.mkfifo(tmp_path / ".lock")
    with pytest.raises(UserError, match="lock: expected a file, found a pipe"), holding(tmp_path / ".lock", ""):
        pass


def test_a_thread_that_writes_on_leaves_nothing(tmp_path):
    """As TensorStore's do for a moment after the block has raised."""
    writers: list[threading.Timer] = []
    with pytest.raises(KeyboardInterrupt), new_directory(tmp_path / "run") as directory:
        writers.append(threading.Timer(0.15, lambda: (directory / "late").mkdir(parents=True)))
        writers[0].start()
        raise KeyboardInterrupt
    writers[0].join()
    assert not list(tmp_path.iterdir())
