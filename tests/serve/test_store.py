"""The store of memories: what is acknowledged is there, for its owner alone, and no level outgrows its limit."""

import hashlib
import os
from pathlib import Path
import resource
import signal
import subprocess
import sys
import threading
import time

import jax
import ml_dtypes
import numpy as np
import pytest

from tests.helpers.bucket_server import bucket_server
from tests.infer.test_memory_file import make_bank, same
from voco_jax.data.video import FrameSampling
from voco_jax.errors import UserError
from voco_jax.infer.memory import MemoryBank
from voco_jax.infer.memory_file import load_memory, save_memory
from voco_jax.models.compressors import KEYS_AND_VALUES
from voco_jax.serve import ids, store_directory
from voco_jax.serve.store import Entry, MemoryStore

SHAPE = (1, 2, 2, 1, 8)
BYTES = 256  # of a bank


def bank_of(number: int) -> MemoryBank:
    return make_bank(number, shape=SHAPE)


def id_of(number: int) -> str:
    return hashlib.sha256(b"%d" % number).hexdigest()


def make_store(directory=None, model="m1", **options) -> MemoryStore:
    return MemoryStore(model, KEYS_AND_VALUES, directory=directory, **options)


def files(directory: Path, suffix: str = ".voco") -> list[Path]:
    return sorted(directory.rglob(f"*{suffix}"))


def listed(store: MemoryStore, owner: str = "") -> list[str]:
    return [entry.id for entry in store.entries(owner, limit=1000)[0]]


# ---- Ids -----------------------------------------------------------------------------------------------------------


def test_ids_are_of_content_and_of_how_it_is_looked_at():
    squares = np.random.default_rng(0).integers(0, 255, (2, 4, 4, 3), np.uint8)
    assert ids.picture_id(squares[0]) == hashlib.sha256(squares[0].tobytes()).hexdigest()  # as the cache of pictures
    assert ids.picture_id(squares[0].swapaxes(0, 1)) != ids.picture_id(squares[0]) == ids.picture_id(squares[0].copy())
    sha = id_of(0)
    others = [
        ids.picture_id(*squares),
        ids.picture_id(*squares[::-1]),
        ids.video_id(sha, FrameSampling(8)),
        ids.video_id(sha, FrameSampling(9)),
        ids.video_id(sha, FrameSampling(0, fps=1)),
        ids.video_id(sha, FrameSampling(0, fps=2)),
        ids.video_id(sha, FrameSampling(0, fps=2, max_frames=8)),
        ids.video_id(sha, FrameSampling(8), [0, 1]),
        ids.video_id(sha, FrameSampling(8), [0, 1.5]),
        ids.video_id(id_of(1), FrameSampling(8)),
        ids.album_id([id_of(0), id_of(1)]),
        ids.album_id([id_of(1), id_of(0)]),
        ids.album_id([sha]),
        ids.upload_id(sha),
        sha,
    ]
    assert len(set(others)) == len(others) and all(map(ids.is_id, others))
    assert ids.video_id(sha, FrameSampling(8, fps=5)) == ids.video_id(sha, FrameSampling(8))  # which is not looked at


# ---- Levels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.int8])
def test_what_was_put_comes_back_from_every_level(tmp_path, dtype):
    bank = make_bank(1, shape=SHAPE).astype(dtype)
    events = []
    store = make_store(tmp_path, on_event=lambda *event: events.append(event))
    assert store.get(id_of(1)) is store.on_device(id_of(1)) is store.find(id_of(1)) is None
    entry = store.put(id_of(1), bank, name="cat.png")
    assert entry == Entry(id_of(1), "cat.png", "picture", entry.created, bank.nbytes, 1, 2)
    assert abs(entry.created - time.time()) < 60
    assert store.get(id_of(1)) is bank and store.close(20)
    again = make_store(tmp_path, on_event=lambda *event: events.append(event))
    assert again.find("cat.png") == again.find(id_of(1).upper()) == id_of(1) and again.entries() == ([entry], False)
    events.clear()
    jax.tree.map(np.testing.assert_array_equal, again.on_device(id_of(1)), bank.memory())
    assert events == [("device", "miss"), ("host", "miss"), ("disk", "hit")]
    assert same(again.get(id_of(1)), bank) and again.on_device(id_of(1)) is again.on_device(id_of(1))
    assert events[3:] == [("host", "hit"), ("device", "hit"), ("device", "hit")]
    assert again.flush(20) and again.usage()["disk"] == (1, files(tmp_path)[0].stat().st_size)
    assert again.usage()["host"] == (1, bank.nbytes) and again.usage()["waiting"] == (0, 0)


def test_the_host_drops_what_was_used_last_the_longest_time_ago():
    evicted = []
    store = make_store(host_bytes=3 * BYTES, on_event=lambda level, what: what == "evicted" and evicted.append(level))
    for number in range(3):
        store.put(id_of(number), bank_of(number), name=f"{number}.png")
    assert store.get(id_of(0)) is not None
    store.put(id_of(3), bank_of(3))
    assert [store.get(id_of(number)) is not None for number in range(4)] == [True, False, True, True]
    assert evicted == ["host"] and store.usage()["host"] == (3, 3 * BYTES)
    assert store.find("1.png") is None and store.find("2.png") == id_of(2) and len(listed(store)) == 3
    with pytest.raises(UserError, match="expected at most 0.8 KiB, which the host keeps; found 1.0 KiB"):
        store.put(id_of(4), make_bank(4, shape=(4, *SHAPE[1:])))
    batch = make_bank(5, shape=(64, *SHAPE[1:]))
    store.put(id_of(5), batch[5])  # keeps no batch alive that it was cut out of
    assert all(array.base is None or array.base.nbytes == BYTES // 2 for array in store.get(id_of(5)).arrays.values())


def test_devices_have_a_limit_of_their_own():
    events = []
    store = make_store(device_bytes=2 * BYTES, on_event=lambda *event: events.append(event))
    for number in range(3):
        store.put(id_of(number), bank_of(number))
    first = store.on_device(id_of(0))
    store.on_device(id_of(1))
    assert store.on_device(id_of(0)) is first
    store.on_device(id_of(2))
    assert events.count(("device", "evicted")) == 1 and store.usage()["device"] == (2, 2 * BYTES)
    assert store.on_device(id_of(0)) is first
    events.clear()
    assert store.on_device(id_of(1)) is not None and events[:2] == [("device", "miss"), ("host", "hit")]
    store.put(id_of(3), make_bank(3, shape=(4, *SHAPE[1:])))
    assert store.on_device(id_of(3)) is not None and store.usage()["device"] == (2, 2 * BYTES)  # not for it alone


def test_a_writer_that_is_behind(tmp_path):
    """What waits is never dropped; where too much waits, who puts writes."""
    go_on, stuck = threading.Event(), threading.Event()

    def on_event(level, what):
        if what == "written" and threading.current_thread().name == "store":
            stuck.set()
            go_on.wait(20)

    store = make_store(tmp_path, host_bytes=BYTES, waiting_bytes=3 * BYTES, on_event=on_event)
    store.put(id_of(0), bank_of(0))
    assert stuck.wait(20)  # after the first
    for number in range(1, 6):
        store.put(id_of(number), bank_of(number), name=str(number), sha256=id_of(99))
        assert len(files(tmp_path)) == 1 + max(0, number - 3)
        assert store.usage()["waiting"].memories == min(number, 3)
    assert listed(store) == [id_of(number) for number in (5, 4, 3, 2, 1, 0)] and store.find("2") == id_of(2)
    for number in (1, 2, 3):
        store.get(id_of(0))
        assert same(store.get(id_of(number)), bank_of(number))
    assert store.delete(id_of(2)) and store.find("2") is None and not store.flush(0.01)
    go_on.set()
    assert store.close(20) and len(files(tmp_path)) == 5
    assert store.usage()["host"] == (1, BYTES) and store.get(id_of(2)) is None and store.get(id_of(3)) is not None
    store.put(id_of(7), bank_of(7))  # closed
    assert len(files(tmp_path)) == 6
    again = make_store(tmp_path)  # in the order in which they were put, not written
    assert listed(again) == [id_of(number) for number in (7, 5, 4, 3, 1, 0)] and again.find(id_of(99)) == id_of(5)


def test_deleted_while_it_is_written_or_read(tmp_path, monkeypatch):
    writes, go_on, write_parts = threading.Event(), threading.Event(), store_directory.write_parts

    def slow(*arguments):
        writes.set()
        go_on.wait(20)
        write_parts(*arguments)

    monkeypatch.setattr(store_directory, "write_parts", slow)
    store = make_store(tmp_path)
    store.put(id_of(1), bank_of(1), name="x")
    assert writes.wait(20)
    deletes = threading.Thread(target=store.delete, args=(id_of(1),))
    deletes.start()
    deletes.join(0.05)
    go_on.set()
    deletes.join(20)
    assert store.get(id_of(1)) is store.find("x") is None and files(tmp_path) == files(tmp_path, ".json") == []
    assert store.flush(20) and store.usage()["waiting"] == store.usage()["host"] == (0, 0)

    store = make_store(on_event=lambda *event: event == ("host", "hit") and store.delete(id_of(1)))
    store.put(id_of(1), bank_of(1))
    assert store.on_device(id_of(1)) is not None and store.on_device(id_of(1)) is None


# ---- Names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_name_is_the_newest_memorys(tmp_path, on_disk):
    store = make_store(tmp_path if on_disk else None)

    def put(number, name, **options):
        return store.put(id_of(number), bank_of(number), name=name, durable=number == 2, **options)

    for number in (1, 2, 3):
        put(number, "a")
        assert store.find("a") == id_of(number)
    put(1, "a")
    assert store.find("a") == id_of(1) and store.flush(20) and store.find("a") == id_of(1)
    assert store.delete(id_of(1)) and store.find("a") == id_of(3)
    put(3, "ä/../b\n")
    assert store.find("a") == store.find("ä/../b\n") == id_of(3)
    assert {entry.id: entry.name for entry in store.entries()[0]} == {id_of(3): "ä/../b\n", id_of(2): "a"}
    assert store.delete(id_of(3)) and store.find("ä/../b\n") is None and store.find("a") == id_of(2)
    assert not store.delete(id_of(3))
    put(4, "", sha256=id_of(99), kind="video")
    put(5, "", sha256=id_of(98))
    assert store.find(id_of(99)) == store.find(id_of(99).upper()) == id_of(4) and store.find(id_of(98)) == id_of(5)
    names = [f"{'😀' * 990}{number}.png" for number in range(20)]
    for number, name in enumerate(names):  # no more than a few for each
        put(6, name)
        put(7 + number, "all")
    assert store.flush(20) and store.find(names[19]) == id_of(6) and store.find(names[0]) is None
    assert names[19] in {entry.name for entry in store.entries(limit=100)[0]}
    assert store.find("all") == id_of(26)
    for number in range(26, 19, -1):
        store.delete(id_of(number))
        assert store.find("all") == id_of(number - 1)
    for id in listed(store):
        assert store.delete(id)
    assert [path for path in tmp_path.rglob("*") if path.is_file() or len(path.name) == 64] == []


def test_names_that_nobody_can_have():
    store = make_store()
    for name in (id_of(1), id_of(1).upper()):  # who asks for this picture must not be given another
        with pytest.raises(UserError, match="name: expected another name than 64 hex digits"):
            store.put(id_of(0), bank_of(0), name=name)
    with pytest.raises(UserError, match="name: expected at most 1000 characters, found 1001"):
        store.put(id_of(0), bank_of(0), name="a" * 1001)
    with pytest.raises(UserError, match="memory: expected model m1, found m2"):
        store.put(id_of(0), make_bank(0, model="m2", shape=SHAPE))
    with pytest.raises(UserError, match="memory: expected kind keys and values, found embeddings"):
        store.put(id_of(0), make_bank(0, shape=(1, 2, 8)))
    for bad in ("../" * 21 + "a", "", id_of(0).upper()):
        with pytest.raises(ValueError):
            store.put(bad, bank_of(0))
        assert store.get(bad) is None and not store.delete(bad) and store.on_device(bad) is None
    assert listed(store) == []


# ---- Owners and models ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("on_disk", [False, True])
def test_nobody_has_anothers(tmp_path, on_disk, durable):
    store = make_store(tmp_path if on_disk else None)
    for owner in ("", "a/../..", "b"):
        store.put(id_of(1), bank_of(1), name="x", sha256=id_of(9), owner=owner, durable=durable)
        store.on_device(id_of(1), owner)
        for other in {"", "a/../..", "b"} - {owner}:
            assert store.get(id_of(1), other) is store.on_device(id_of(1), other) is None
            assert store.find(id_of(1), other) is store.find("x", other) is store.find(id_of(9), other) is None
            assert not store.delete(id_of(1), other) and store.entries(other) == ([], False)
            with pytest.raises(UserError, match="after: expected the id of a memory"):
                store.entries(other, after=id_of(1))
        assert store.get(id_of(1), owner) is not None and store.find("x", owner) == store.find(id_of(9), owner)
        assert listed(store, owner) == [id_of(1)] and store.flush(20) and listed(store, owner) == [id_of(1)]
        assert store.delete(id_of(1), owner) and listed(store, owner) == []
    if on_disk:
        spaces = {"shared", *(hashlib.sha256(owner).hexdigest() for owner in (b"a/../..", b"b"))}
        assert {path.name for path in (tmp_path / "m1").iterdir()} == spaces


def test_models_share_a_directory(tmp_path):
    one, other = make_store(tmp_path), make_store(tmp_path, model="m2")
    one.put(id_of(1), bank_of(1), name="x", durable=True)
    assert other.get(id_of(1)) is other.find("x") is None and listed(other) == []
    other.put(id_of(1), make_bank(2, model="m2", shape=SHAPE), durable=True)
    assert same(make_store(tmp_path).get(id_of(1)), bank_of(1))
    with pytest.raises(ValueError, match="model: expected a fingerprint, found '../m'"):
        make_store(tmp_path, model="../m")


# ---- Lists ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_disk", [False, True])
def test_pages_while_memories_come_and_go(tmp_path, on_disk):
    store = make_store(tmp_path if on_disk else None)
    for number in range(10):
        store.put(id_of(number), bank_of(number), durable=number % 2 == 0)
    page, more = store.entries(limit=4)
    assert [entry.id for entry in page] == [id_of(number) for number in (9, 8, 7, 6)] and more
    store.put(id_of(10), bank_of(10))
    for number in (6, 5, 0):  # the last of the page too
        store.delete(id_of(number))
    page, more = store.entries(after=id_of(6), limit=3)
    assert [entry.id for entry in page] == [id_of(number) for number in (4, 3, 2)] and more
    page, more = store.entries(after=id_of(2), limit=3)
    assert [entry.id for entry in page] == [id_of(1)] and not more
    page, more = make_store(tmp_path).entries(after=id_of(2), limit=3) if on_disk and store.flush(20) else (page, more)
    assert [entry.id for entry in page] == [id_of(1)] and not more
    assert listed(store) == [id_of(number) for number in (10, 9, 8, 7, 4, 3, 2, 1)]
    with pytest.raises(UserError, match="after: expected the id of a memory, found 'nothing'"):
        store.entries(after="nothing")


# ---- The directory -------------------------------------------------------------------------------------------------


def test_the_directory_drops_what_was_used_last_the_longest_time_ago(tmp_path):
    events = []
    make_store(tmp_path, model="old").put(id_of(0), make_bank(0, model="old", shape=SHAPE), durable=True)
    size = files(tmp_path)[0].stat().st_size
    store = make_store(
        tmp_path, disk_bytes=5 * size + size // 2, host_bytes=0, on_event=lambda *event: events.append(event)
    )
    for number in range(4):
        store.put(id_of(number), bank_of(number), name=f"{number}.png")
        assert store.flush(20)
    other = make_store(tmp_path)
    assert other.get(id_of(0)) is not None  # another server read it
    for number in (4, 5):  # the other model's goes first, then 1
        store.put(id_of(number), bank_of(number), durable=True)
        assert store.flush(20)
    assert events.count(("disk", "evicted")) == 2 and store.usage()["disk"] == (5, 5 * size)
    assert {id_of(number) for number in (0, 2, 3, 4, 5)} == {file.stem for file in files(tmp_path)}
    assert store.find("1.png") is store.get(id_of(1)) is None and store.find("0.png") == id_of(0)
    assert len(files(tmp_path, ".json")) == 5
    for number in range(6, 40):
        store.put(id_of(number), bank_of(number))
    assert store.flush(20) and len(files(tmp_path)) == 5 and store.usage()["disk"] == (5, 5 * size)
    assert store.get(id_of(39)) is not None


def test_what_was_read_since_it_was_looked_through_stays(tmp_path):
    reader, read = make_store(tmp_path), []

    def on_event(level, what):
        if what == "evicted" and not read:  # the first has gone, and the second would be next
            read.append(reader.get(id_of(1)))

    for number in range(5):
        reader.put(id_of(number), bank_of(number), durable=True)
    size = files(tmp_path)[0].stat().st_size
    assert make_store(tmp_path, disk_bytes=3 * size + size // 2, on_event=on_event).flush(20)
    assert {file.stem for file in files(tmp_path)} == {id_of(number) for number in (1, 3, 4)} and read != [None]


def test_the_disk_is_waited_for_where_it_is_durable(tmp_path, monkeypatch):
    store, synced, fsync = make_store(tmp_path), [], os.fsync
    assert store.flush(20)
    for number in range(2):
        store.put(id_of(0), bank_of(0), owner=str(number), durable=True)  # its directories
    assert store.delete(id_of(0), "1")
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")) or fsync(fd))
    store.put(id_of(0), bank_of(0), owner="1")
    assert store.flush(20) and synced == []
    (file,) = [file for file in files(tmp_path) if hashlib.sha256(b"1").hexdigest() in str(file)]
    store.put(id_of(0), bank_of(0), owner="1", durable=True)  # that is there already
    assert {str(file), str(file.parent)} <= set(synced)
    store.delete(id_of(0), "1")
    synced.clear()
    store.put(id_of(0), bank_of(0), owner="1", durable=True)
    assert {file.name[1:65] if path.endswith(".new") else path for path in synced} >= {
        file.name[1:65],
        str(file.parent),
    }


def test_another_servers_deletion_is_seen(tmp_path):
    one, other = make_store(tmp_path), make_store(tmp_path)
    one.put(id_of(1), bank_of(1), name="x", durable=True)
    assert other.on_device(id_of(1)) is not None and other.get(id_of(1)) is not None
    assert one.delete(id_of(1))
    assert other.on_device(id_of(1)) is other.get(id_of(1)) is other.find("x") is other.find(id_of(1)) is None
    assert other.usage()["host"].memories == other.usage()["device"].memories == 0 and not other.delete(id_of(1))


@pytest.mark.parametrize("damage", ["flipped", "cut", "emptied", "noise"])
def test_a_damaged_file_is_no_memory(tmp_path, capsys, damage):
    make_store(tmp_path).put(id_of(1), bank_of(1), name="x", durable=True)
    (file,) = files(tmp_path)
    content = bytearray(file.read_bytes())
    content[-400] ^= 1
    file.write_bytes({"flipped": content, "cut": content[:-10], "emptied": b"", "noise": b"noise" * 99}[damage])
    store = make_store(tmp_path)
    assert store.get(id_of(1)) is store.get(id_of(1)) is store.on_device(id_of(1)) is None
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"store: {file}: ") and lines[0].endswith("goes aside as .damaged")
    assert files(tmp_path) == [] and listed(store) == [] and store.find("x") is None
    store.put(id_of(1), bank_of(1), durable=True)
    assert same(make_store(tmp_path).get(id_of(1)), bank_of(1)) and store.find("x") == id_of(1)


def test_a_durable_put_checks_what_is_there(tmp_path, capsys):
    make_store(tmp_path).put(id_of(1), bank_of(1), durable=True)
    (file,) = files(tmp_path)
    file.write_bytes(file.read_bytes()[:-1])
    make_store(tmp_path).put(id_of(1), bank_of(1), durable=True)
    assert same(load_memory(file), bank_of(1)) and "cut off" in capsys.readouterr().err


def test_records_that_cannot_be_read(tmp_path):
    store = make_store(tmp_path)
    store.put(id_of(1), bank_of(1), name="x", durable=True)
    (entry,), _ = store.entries()
    for content in ("", "[]", "{}", '{"labels": 3}', files(tmp_path, ".json")[0].read_text().replace("256", '"256"')):
        files(tmp_path, ".json")[0].write_text(content)
        assert store.entries() == ([entry._replace(name="")], False)
    store.put(id_of(2), make_bank(2, shape=(2, *SHAPE[1:])), kind="video", durable=True)
    files(tmp_path, ".json")[0].unlink()
    files(tmp_path, ".json")[0].unlink()
    assert {entry.kind for entry in store.entries()[0]} == {"picture", "album"} and store.delete(id_of(1))


def test_files_that_are_none_of_the_stores_memories(tmp_path, capsys):
    """Of another model, a link, a directory: one line, and they stay."""
    directory = tmp_path / "store"
    store = make_store(directory)
    for number in (1, 2, 3):
        store.put(id_of(number), bank_of(number), durable=True)
    store = make_store(directory)
    by_id = {file.stem: file for file in files(directory)}
    save_memory(by_id[id_of(1)], make_bank(1, model="m2", shape=SHAPE))
    secret = tmp_path / "secret.voco"
    by_id[id_of(2)].rename(secret)
    by_id[id_of(2)].symlink_to(secret)
    by_id[id_of(3)].unlink()
    by_id[id_of(3)].mkdir()
    for number in (1, 2, 3):
        assert store.get(id_of(number)) is None
    assert len(capsys.readouterr().err.splitlines()) == 2  # a link is as if it were not there
    assert not store.delete(id_of(2)) and secret.exists()
    outside = tmp_path / "outside"
    outside.mkdir()
    id = next(id_of(number) for number in range(9, 99) if id_of(number)[:2] not in {i[:2] for i in by_id})
    (by_id[id_of(1)].parent.parent / id[:2]).symlink_to(outside)
    with pytest.raises(UserError, match="expected a directory, found a link"):
        store.put(id, bank_of(9), durable=True)
    assert list(outside.iterdir()) == []


def test_what_killed_writers_leave(tmp_path):
    store = make_store(tmp_path)
    store.put(id_of(1), bank_of(1), name="x", durable=True)
    (file,), (name,) = files(tmp_path), [path for path in (tmp_path / "m1/shared/names").rglob("*") if path.is_file()]
    old, new = (file.with_name(f".{id_of(number)}.voco.0123abcd.new") for number in (1, 2))
    foreign = file.with_name(".notes.new")
    orphan = file.with_name(f"{id_of(5)}.json")
    orphan.write_text(file.with_suffix(".json").read_text().replace(id_of(1), id_of(5)))
    label = name.with_name(id_of(5))
    for path in (old, new, foreign, label):
        path.write_bytes(b"half")
    for path in (old, foreign, orphan, file, name, label):
        os.utime(path, (time.time() - 4000,) * 2)
    assert make_store(tmp_path).flush(20)
    assert [path.exists() for path in (old, new, foreign, orphan, label)] == [False, True, True, False, False]
    assert store.find("x") == id_of(1) and make_store(tmp_path).get(id_of(1)) is not None


def test_a_full_disk(tmp_path, capsys):
    """By a limit of the operating system on the size of a file."""
    store = make_store(tmp_path)
    store.put(id_of(0), bank_of(0), durable=True)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, limits[1]))
    try:
        with pytest.raises(UserError, match=rf"{id_of(1)}.voco: cannot be written: File too large$"):
            store.put(id_of(1), bank_of(1), name="x", durable=True)
        for number in range(2, 5):
            store.put(id_of(number), bank_of(number), name=str(number))
        assert not store.flush(20) and store.errors >= 4
        assert store.get(id_of(2)) is not None and store.find("3") == id_of(3) and len(listed(store)) == 5
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.stem for path in tmp_path.rglob("*") if path.is_file()] == [id_of(0)] * 2  # memory and record
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "File too large; the memory stays on the host" in lines[0]
    assert store.flush(20) and len(files(tmp_path)) == 5
    assert make_store(tmp_path).find("x") == id_of(1)


def test_a_directory_that_refuses(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/store: the directory of the store cannot be made: Not a directory"):
        make_store(tmp_path / "file" / "store")
    store = make_store(tmp_path / "store")
    assert store.flush(20)
    (tmp_path / "store").rmdir()  # unmounted: it is not made again on the disk below
    with pytest.raises(UserError, match="not found"):
        store.put(id_of(1), bank_of(1), durable=True)
    store.put(id_of(2), bank_of(2))
    assert not store.flush(20) and store.get(id_of(2)) is not None and not (tmp_path / "store").exists()
    (tmp_path / "store").mkdir()
    assert store.flush(20) and len(files(tmp_path)) == 2


# ---- Threads and processes -----------------------------------------------------------------------------------------


def test_many_threads(tmp_path):
    limits = dict(host_bytes=6 * BYTES, device_bytes=3 * BYTES, waiting_bytes=4 * BYTES, disk_bytes=12_000)
    store = make_store(tmp_path, **limits)
    banks = {id_of(number): bank_of(number) for number in range(16)}
    wrong: list[str] = []
    ends = time.monotonic() + 1.5

    def hammer(seed):
        rng = np.random.default_rng(seed)
        while time.monotonic() < ends and not wrong:
            id, owner = id_of(int(rng.integers(16))), "b" * int(rng.integers(2))
            try:
                match rng.integers(8):
                    case 0 | 1:
                        store.put(id, banks[id], name=id[:1], owner=owner, durable=bool(rng.integers(2)))
                    case 2:
                        store.delete(id, owner)
                    case 3:
                        store.entries(owner, limit=3)
                    case 4 if (found := store.find(id[:1], owner)) is not None and found[:1] != id[:1]:
                        wrong.append(f"{id}: {found}")
                    case 5 if (arrays := store.on_device(id, owner)) is not None:
                        expected = banks[id].keys.reshape(-1)
                        if set(np.asarray(arrays.keys).reshape(-1).tolist()) != set(expected.tolist()):
                            wrong.append(f"{id} on the devices")
                    case _:
                        if (bank := store.get(id, owner)) is not None and not same(bank, banks[id]):
                            wrong.append(id)
            except Exception as error:
                wrong.append(repr(error))

    threads = [threading.Thread(target=hammer, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and store.flush(20) and store.errors == 0
    usage = store.usage()
    assert usage["host"].bytes <= 6 * BYTES and usage["device"].bytes <= 3 * BYTES and usage["waiting"] == (0, 0)
    again = make_store(tmp_path, **limits)
    assert again.flush(20) and again.usage()["disk"].memories == len(files(tmp_path))
    assert sum(file.stat().st_size for file in files(tmp_path)) == again.usage()["disk"].bytes <= 12_000
    for owner in ("", "b"):
        for id in listed(store, owner):
            assert same(store.get(id, owner), banks[id]) and store.delete(id, owner)
            assert store.get(id, owner) is store.on_device(id, owner) is None
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


CHILD = """
import sys
from tests.serve.test_store import *
store = make_store(sys.argv[1], host_bytes=4 * BYTES)
print("ready", flush=True)
for line in sys.stdin:
    print(eval(line), flush=True)
"""


class Child:
    """Another process with a store over the same directory, which evaluates lines."""

    def __init__(self, directory):
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            cwd=Path(__file__).parents[2],
        )  # fmt: skip
        assert self.process.stdout.readline() == "ready\n"

    def ask(self, line: str) -> str:
        self.tell(line)
        return self.process.stdout.readline().strip()

    def tell(self, line: str) -> None:
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.communicate()


def put_for_ever(store: MemoryStore) -> None:
    for number in range(10**9):
        entry = store.put(id_of(number), bank_of(number), name=f"{number}.png", durable=True)
        store.put(id_of(number), bank_of(number), owner="behind")
        print(entry.id, flush=True)


def test_two_processes_and_one_that_is_killed(tmp_path):
    """Each reads what the other makes; after kill -9, all that was acknowledged is there, to the bit."""
    store = make_store(tmp_path)
    with Child(tmp_path) as child:
        assert child.ask("store.put(id_of(1), bank_of(1), name='x', durable=True).id") == id_of(1)
        assert same(store.get(id_of(1)), bank_of(1)) and store.find("x") == id_of(1) == listed(store)[0]
        store.put(id_of(2), bank_of(2), name="x", durable=True)
        assert child.ask("same(store.get(id_of(2)), bank_of(2)), store.find('x') == id_of(2)") == "(True, True)"
        assert child.ask("listed(store) == [id_of(2), id_of(1)]") == "True"
        assert (
            store.delete(id_of(1)) and child.ask("store.get(id_of(1)), listed(store) == [id_of(2)]") == "(None, True)"
        )
        assert store.delete(id_of(2))

        child.tell("put_for_ever(store)")
        acknowledged = [child.process.stdout.readline() for _ in range(20)]
        os.kill(child.process.pid, signal.SIGKILL)
        acknowledged += child.process.stdout.readlines()
        child.process.wait()
    assert acknowledged[-1].endswith("\n")
    numbers = range(len(acknowledged))
    assert [line.strip() for line in acknowledged] == [id_of(number) for number in numbers]
    again = make_store(tmp_path)
    assert all(same(again.get(id_of(number)), bank_of(number)) for number in numbers)
    assert all(again.find(f"{number}.png") == id_of(number) for number in numbers)
    assert set(listed(again)) >= {id_of(number) for number in numbers}
    for id in listed(again, "behind"):  # whole, where it is there
        assert again.get(id, "behind") is not None


# ---- Buckets -------------------------------------------------------------------------------------------------------


def test_a_store_in_a_bucket(capsys):
    with bucket_server() as server:
        address = "gs://bucket/some/store"
        store, other = make_store(address), make_store(address, device_bytes=0)
        store.put(id_of(1), bank_of(1), name="x")
        store.put(id_of(2), bank_of(2), name="x", sha256=id_of(9), owner="b", durable=True)
        assert store.flush(20) and {name.split("/")[2] for name in server.objects} == {"m1"}
        assert same(other.get(id_of(1)), bank_of(1)) and other.on_device(id_of(1)) is not None
        assert same(other.get(id_of(2), "b"), bank_of(2)) and other.get(id_of(2)) is other.get(id_of(1), "b") is None
        assert (other.find("x"), other.find("x", "b"), other.find(id_of(9), "b")) == (id_of(1), id_of(2), id_of(2))
        assert [entry.name for entry in other.entries()[0]] == ["x"] and other.find(id_of(9)) is None
        (name,) = [name for name in server.objects if name.endswith(f"{id_of(2)}.voco")]
        server.objects[name] = server.objects[name][0][:-1], 99
        assert make_store(address).get(id_of(2), "b") is None
        assert f"gs://bucket/{name}: the memory file is cut off" in capsys.readouterr().err
        assert other.find("x", "b") is None and listed(other, "b") == []
        assert store.delete(id_of(1)) and make_store(address).get(id_of(1)) is None and not store.delete(id_of(1))
        assert [name for name in server.objects if id_of(1) in name] == []

        small = make_store(address, disk_bytes=2500)
        for number in range(2, 5):
            small.put(id_of(number), bank_of(number))
        assert small.flush(20) and listed(small) in ([id_of(4), id_of(3)], [id_of(4)])
        assert len([name for name in server.objects if name.endswith(".voco")]) == len(listed(small))

        server.forbidden = True
        with pytest.raises(UserError, match="^gs://bucket/some/store/m1/shared/"):
            store.put(id_of(7), bank_of(7), durable=True)
        with pytest.raises(UserError):
            store.find("x")
        store.put(id_of(8), bank_of(8))
        assert make_store(address).get(id_of(4)) is None and not store.flush(20) and store.get(id_of(8)) is not None
        server.forbidden = False
        assert store.flush(20) and same(make_store(address).get(id_of(8)), bank_of(8))
