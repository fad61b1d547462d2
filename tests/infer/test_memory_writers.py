"""Memory files that are replaced while they are read, and that several want to write at once: with real processes.

`python -m tests.infer.test_memory_writers` replaces one 2,000 times.
"""

import errno
import fcntl
import os
from pathlib import Path
import signal
import subprocess
import sys
import tempfile
import threading

import numpy as np
import pytest

from tests.helpers.commands import run_main
from tests.infer.test_memory_file import make_bank, same
from voco_jax import memory as memory_command
from voco_jax.errors import TryAgain, UserError
from voco_jax.infer.memory import Item, MemoryBank
from voco_jax.infer.memory_file import MemoryFile, load_memory, save_memory, writing
from voco_jax.io.locks import locked

SHAPE = (2, 2, 2, 4)


def numbered(number: int, pictures: int = 3) -> MemoryBank:
    """Whose names say what is in it, and whose model is another each time."""
    keys = np.full((pictures, *SHAPE), number, np.float32)
    items = tuple(Item(f"{number}/{i}.png", f"{number:064x}", float(i)) for i in range(pictures))
    return MemoryBank({"keys": keys, "values": keys + 0.5}, items, f"model {number % 2}")


def check_numbered(bank: MemoryBank) -> int:
    """The number of all of it: names, model, keys and values."""
    (number,) = {int(item.source.split("/")[0]) for item in bank.items}
    assert bank.model == f"model {number % 2}" and {item.sha256 for item in bank.items} == {f"{number:064x}"}
    assert (bank.keys == number).all() and (bank.values == number + 0.5).all()
    return number


# Replaces a file as often as is said, by files of other lengths: made whole, joined, and merged by the command
WRITER = """
import sys
from pathlib import Path
from tests.infer.test_memory_writers import numbered
from voco_jax import memory
from voco_jax.infer.memory_file import MemoryFile, save_memory
file, count = Path(sys.argv[1]), int(sys.argv[2])
spare = file.with_name(f"spare.{sys.argv[3]}.voco")
print("ready", flush=True)
for number in range(1, count + 1):
    bank = numbered(number, 1 + number % 4)
    if number % 3 == 0:
        save_memory(file, bank)
        continue
    save_memory(spare, bank)
    if number % 3 == 1:
        save_memory(file, (MemoryFile(spare), range(len(bank))))
    else:
        memory.merge([spare, spare], file)
"""

# Joins files of its own to one that others join theirs to
MERGER = """
import sys
from pathlib import Path
from voco_jax import memory
file, own = Path(sys.argv[1]), sys.argv[2:]
print("ready", flush=True)
sys.stdin.readline()
for one in own:
    memory.merge([file, Path(one)], file)
"""

# Says when it has the lock, and keeps it
HOLDER = """
import sys
from voco_jax.infer.memory_file import writing
with writing(sys.argv[1]) as real:
    real.with_name(f".{real.name}.new").write_bytes(b"half of a fi")
    print("ready", flush=True)
    sys.stdin.readline()
"""


def started(script: str, *arguments) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_readers_see_the_old_or_the_new(tmp_path):
    assert read_while_replaced(tmp_path, 60)["different files"] > 3


def read_while_replaced(directory: Path, count: int) -> dict[str, int]:
    """While two processes replace a file as fast as they can: names, contents and model of one writing each time, by
    a reader that opens it each time, by one that keeps it open, and by one that opens it again."""
    file = directory / "a.voco"
    save_memory(file, numbered(0))
    writers = [started(WRITER, file, count // 2, i) for i in range(2)]
    assert all(writer.stdout.readline() == "ready\n" for writer in writers)
    seen, kept = set(), MemoryFile(file)
    reads = again = 0
    while any(writer.poll() is None for writer in writers):
        number = check_numbered(load_memory(file))
        seen.add(number)
        assert check_numbered(kept.read()) == check_numbered(kept.read([0], 1)) == int(kept.items[0].source[:-6])
        if reads % 7 == 6:
            kept = MemoryFile(file)
        closed = MemoryFile(file)
        closed.close()
        try:
            assert check_numbered(closed.read()) == int(closed.items[0].source[:-6])
        except TryAgain as error:
            assert "the memory file was replaced while it was read" in str(error)
            again += 1
        reads += 1
    assert [writer.returncode for writer in writers] == [0, 0]
    assert names(directory) == ["a.voco", "spare.0.voco", "spare.1.voco"]
    return {"rounds of reads": reads, "different files": len(seen), "replaced before it was opened again": again}


def test_nothing_is_lost_of_what_several_add(tmp_path):
    """Merging into a file that is one of the files to merge reads it when nobody else writes it."""
    file, each, every = tmp_path / "all.voco", 5, 3
    save_memory(file, make_bank(name="first"))
    own = [[tmp_path / f"{i}.{n}.voco" for n in range(each)] for i in range(every)]
    for files in own:
        for one in files:
            save_memory(one, make_bank(shape=(1, 3, 2, 2, 4), name=one.stem))
    mergers = [started(MERGER, file, *files) for files in own]
    assert all(merger.stdout.readline() == "ready\n" for merger in mergers)
    for merger in mergers:  # together
        merger.stdin.write("go\n")
        merger.stdin.flush()
    assert [merger.wait(60) for merger in mergers] == [0] * every
    sources = [item.source for item in load_memory(file).items]
    assert sorted(sources) == sorted(
        [f"first{i}.png" for i in range(5)] + [f"{one.stem}0.png" for files in own for one in files]
    )


def test_a_second_writer_waits_or_is_refused(tmp_path, monkeypatch, capsys):
    """Under any name of the file; one that was killed stands in nobody's way."""
    directory, file = tmp_path / "memories", tmp_path / "memories" / "a.voco"
    directory.mkdir()
    (tmp_path / "link").symlink_to(directory)
    (tmp_path / "link.voco").symlink_to("memories/a.voco")
    save_memory(directory / "b.voco", make_bank())
    holder = started(HOLDER, file)
    assert holder.stdout.readline() == "ready\n"
    monkeypatch.chdir(directory)
    monkeypatch.setattr("voco_jax.infer.memory_file.PATIENCE", 0.1)
    for name in (file, Path("a.voco"), tmp_path / "link" / "a.voco", tmp_path / "link.voco", file.as_uri()):
        with pytest.raises(TryAgain, match="a.voco|link.voco: another process is writing it"):
            save_memory(name, make_bank())
    status, _, err = run_main(memory_command, monkeypatch, capsys, "merge", "b.voco", "--out", "../link.voco")
    assert (status, err) == (75, "error: ../link.voco: another process is writing it\n")
    monkeypatch.setattr("voco_jax.infer.memory_file.PATIENCE", 60.0)
    waiting = threading.Thread(target=save_memory, args=(tmp_path / "link.voco", make_bank()))
    waiting.start()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    waiting.join(60)
    assert same(load_memory(file), make_bank()) and (tmp_path / "link.voco").is_symlink()
    assert names(directory) == ["a.voco", "b.voco"]


def test_what_was_opened_is_what_is_read(tmp_path):
    file = tmp_path / "a.voco"
    save_memory(file, numbered(1))
    opened, closed = MemoryFile(file), MemoryFile(file)
    closed.close()
    assert same(closed.read(), numbered(1))
    save_memory(file, numbered(2))
    assert same(opened.read(), numbered(1))
    with pytest.raises(TryAgain, match="a.voco: the memory file was replaced while it was read"):
        closed.read()
    assert same(load_memory(file), numbered(2))


@pytest.mark.parametrize("in_place", [True, False])
def test_a_closed_file_of_the_same_pictures_with_other_memories(tmp_path, in_place):
    file, other, bank = tmp_path / "a.voco", tmp_path / "b.voco", numbered(1)
    save_memory(file, bank)
    save_memory(other, MemoryBank({"keys": bank.keys + 1, "values": bank.values}, bank.items, bank.model))
    closed = MemoryFile(file)
    closed.close()
    status = file.stat()
    if in_place:
        file.write_bytes(other.read_bytes())
        os.utime(file, ns=(1, 1))  # a clock may be coarser than this test is quick
    else:
        os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
        other.replace(file)
    with pytest.raises(TryAgain, match="a.voco: the memory file was replaced while it was read"):
        closed.read()


def test_a_file_that_is_written_into(tmp_path):
    """By a program that does not replace it: cut off or overwritten while it is open, one line (a mapped file would
    end the process)."""
    file = tmp_path / "a.voco"
    for change in (lambda: os.truncate(file, 500), lambda: file.write_bytes(bytes(file.stat().st_size))):
        save_memory(file, numbered(1))
        opened = MemoryFile(file)
        change()
        os.utime(file, ns=(1, 1))  # a clock may be coarser than this test is quick
        with pytest.raises(TryAgain, match="another program wrote into the memory file while it was read"):
            opened.read()


def test_locks(tmp_path):
    file = tmp_path / "a.voco"
    with locked(file, 0) as real, pytest.raises(TryAgain, match="another process"), locked(real, 0):
        pass
    with locked(file, 0):
        assert names(tmp_path) == [".a.voco.lock"]
    (tmp_path / ".a.voco.lock").touch()  # of a process that was killed
    with locked(file, 0):
        pass
    assert names(tmp_path) == []
    os.mkfifo(tmp_path / ".a.voco.lock")
    with pytest.raises(UserError, match=".a.voco.lock: expected a file, found a pipe"), locked(file, 0):
        pass
    os.unlink(tmp_path / ".a.voco.lock")
    (tmp_path / ".a.voco.lock").symlink_to(tmp_path / "victim")
    with pytest.raises(UserError, match="a.voco: cannot be written: Too many levels of symbolic links"):
        locked(file, 0).__enter__()
    assert not (tmp_path / "victim").exists()


def test_a_lock_that_its_owner_deletes(tmp_path, monkeypatch):
    """Between who opens it and locks it: another may have made a new one, and that is the one that counts."""
    lock, flock, times = tmp_path / ".a.voco.lock", fcntl.flock, []

    def late(descriptor, operation):
        if not times:
            lock.unlink()
            lock.touch()
        times.append(descriptor)
        flock(descriptor, operation)

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", late)
        with locked(tmp_path / "a.voco", 10), open(lock) as other, pytest.raises(BlockingIOError):
            flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert len(times) == 2 and names(tmp_path) == []


def test_what_lies_where_a_file_is_made_is_not_written_into(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / ".a.voco.new").symlink_to(tmp_path / "victim")
    save_memory(tmp_path / "a.voco", make_bank())
    assert (tmp_path / "victim").read_text() == "precious" and names(tmp_path) == ["a.voco", "victim"]
    (tmp_path / ".a.voco.new").mkdir()
    with pytest.raises(UserError, match=".a.voco.new: expected a file, found a directory"):
        save_memory(tmp_path / "a.voco", make_bank())


@pytest.mark.parametrize("number, kind, left", [("ENOSYS", UserError, []), ("ENOLCK", TryAgain, [".a.voco.lock"])])
def test_where_files_cannot_be_locked(tmp_path, monkeypatch, number, kind, left):
    number = getattr(errno, number)

    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match=f"the file system does not lock files: {os.strerror(number)}") as raised:
        save_memory(tmp_path / "a.voco", make_bank())
    assert type(raised.value) is kind and names(tmp_path) == left


def test_more_files_than_a_process_may_have_open(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory_command, "_HELD", 3)
    files = [tmp_path / f"{i}.voco" for i in range(6)]
    for i, file in enumerate(files):
        save_memory(file, make_bank(shape=(1, 3, 2, 2, 4), name=f"{i}."))
    before = len(os.listdir("/proc/self/fd"))
    opened = [MemoryFile(file) for file in files]
    assert len(os.listdir("/proc/self/fd")) == before + 6
    for file in opened:
        file.close()
    assert len(os.listdir("/proc/self/fd")) == before
    memory_command.merge(files, tmp_path / "all.voco")
    assert [item.source for item in load_memory(tmp_path / "all.voco").items] == [f"{i}.0.png" for i in range(6)]
    del opened
    with writing(files[0]):
        assert len(os.listdir("/proc/self/fd")) == before + 1


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        print(read_while_replaced(Path(temporary), 2000))
