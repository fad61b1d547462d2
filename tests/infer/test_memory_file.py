"""Memory files: what comes back is what went there, or one clear line."""

import dataclasses
import json
import os
from pathlib import Path
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from tests.fuzz.memory import Parts, forged
from tests.helpers.commands import run_main
from voco_jax import memory as memory_command
from voco_jax.data.records import tiles_of
from voco_jax.errors import UserError
from voco_jax.infer.memory import Item, MemoryBank, join, pictures_of, with_tiles
from voco_jax.infer.memory_file import MemoryFile, load_memory, save_memory
from voco_jax.infer.memory_format import Layout, header

FIXTURES = Path(__file__).parents[1] / "fixtures"
SHAPE = (5, 3, 2, 2, 4)  # pictures, tokens, layers, heads, head size
EMBEDDINGS = (5, 3, 8)  # pictures, tokens, hidden size


def make_bank(seed=0, dtype=np.float32, model="m1", shape=SHAPE, name="p") -> MemoryBank:
    rng = np.random.default_rng(seed)
    names = ("keys", "values") if len(shape) == 5 else ("embeddings",)
    arrays = {name: rng.normal(size=shape).astype(dtype) for name in names}
    items = [Item(f"{name}{i}.png", f"{i:064x}", 0.5 * i if i % 2 else None) for i in range(shape[0])]
    return MemoryBank(arrays, tuple(items), model)


def same(a: MemoryBank, b: MemoryBank) -> bool:
    return (
        a.items == b.items and a.model == b.model and a.dtype == b.dtype and a.kind == b.kind
        and all((array == b.arrays[name]).all() for name, array in a.arrays.items())
        and (a.scales is b.scales or all((scales == b.scales[name]).all() for name, scales in a.scales.items()))
    )  # fmt: skip


@pytest.mark.parametrize("shape", [SHAPE, EMBEDDINGS])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.int8])
def test_what_comes_back(tmp_path, dtype, shape):
    bank = make_bank(dtype=np.float32 if dtype == np.int8 else dtype, shape=shape)
    bank = bank.to_int8() if dtype == np.int8 else bank
    file = tmp_path / "a.voco"
    save_memory(file, bank)
    assert same(load_memory(file, "m1"), bank)
    assert same(MemoryFile(file).read([3, 0], 2), bank[[3, 0]].first_tokens(2))
    opened = MemoryFile(file)
    assert (len(opened), opened.num_tokens, opened.shape, opened.dtype) == (5, 3, shape, bank.dtype)
    assert opened.version == "3" and opened.kind == ("keys and values" if shape == SHAPE else "embeddings")
    assert [path.name for path in tmp_path.iterdir()] == ["a.voco"]


def test_it_is_safetensors_and_holds_nothing_else(tmp_path):
    bank = make_bank()
    save_memory(tmp_path / "a.voco", bank)
    tensors = safetensors.numpy.load_file(tmp_path / "a.voco")
    assert sorted(tensors) == ["checksums", "items", "keys", "values"]
    np.testing.assert_array_equal(tensors["keys"], bank.keys)
    items = [json.loads(line) for line in tensors["items"].tobytes().splitlines()]
    assert [Item(**fields) for fields in items] == list(bank.items)
    data = sum(tensor.nbytes for tensor in tensors.values())
    assert (tmp_path / "a.voco").stat().st_size - data < 700
    save_memory(tmp_path / "b.voco", make_bank(shape=EMBEDDINGS).to_int8())
    tensors = safetensors.numpy.load_file(tmp_path / "b.voco")
    assert sorted(tensors) == ["checksums", "embeddings", "embeddings_scales", "items"]


def test_bytes_of_a_token_of_7b(tmp_path, monkeypatch, capsys):
    """Half a mebibyte of keys and values, and an embedding of 8 KiB: of banks, of files, and as the command says."""
    for shape, size, scales, said in (
        ((2, 1, 32, 32, 128), 2**19, 2 * 32 * 32 * 4, "keys and values, 32 layers × 32 × 128, 512.0 KiB a token"),
        ((2, 1, 4096), 2**13, 4, "embeddings, 4096 numbers, 8.0 KiB a token"),
    ):
        bank, file = make_bank(shape=shape, dtype=ml_dtypes.bfloat16), tmp_path / "a.voco"
        assert bank.nbytes == 2 * size and bank.to_int8().nbytes == size + 2 * scales
        save_memory(file, bank)
        assert 2 * size < file.stat().st_size < 2 * size + 1000
        assert (
            f"2 pictures, 1 token each, bfloat16 {said}, "
            in run_main(memory_command, monkeypatch, capsys, "list", file)[1]
        )


@pytest.mark.parametrize(
    ("dtype", "shape"), [("float32", (2, 2, 1, 1, 2)), ("int8", (2, 2, 1, 1, 2)), ("int8", (2, 2, 2))]
)
def test_every_flipped_byte_is_found(tmp_path, dtype, shape):
    """Each byte of a file in turn, by one bit: an error that names the file, never other numbers or another path."""
    bank = make_bank(shape=shape)
    file = tmp_path / "a.voco"
    save_memory(file, bank.to_int8() if dtype == "int8" else bank)
    content = bytearray(file.read_bytes())
    for place in range(len(content)):
        damaged = content.copy()
        damaged[place] ^= 1 << place % 8
        file.write_bytes(damaged)
        with pytest.raises(UserError, match="a.voco") as error:
            load_memory(file, bank.model)
        assert "\n" not in str(error.value)


def test_every_length_but_its_own_is_found(tmp_path):
    file = tmp_path / "a.voco"
    save_memory(file, make_bank(shape=(2, 2, 1, 1, 2)))
    content = file.read_bytes()
    for length in range(len(content)):
        file.write_bytes(content[:length])
        with pytest.raises(UserError, match="a.voco"):
            load_memory(file)
    file.write_bytes(content + b"\0")
    with pytest.raises(UserError, match=f"damaged: expected {len(content)} bytes, found {len(content) + 1}"):
        load_memory(file)


def old_items() -> tuple[Item, ...]:
    return (
        Item("album/plain.png", "0" * 63 + "1"), Item('odd "name", {\\}, {"source": "x"}.png', "0" * 63 + "2"),
        Item("Zürich \U0001f600.jpg"), Item("not\udcff utf-8\n.png", "0" * 63 + "3"),
        Item("clip.mp4", "0" * 63 + "4", 0.25), Item(""), Item("clip.mp4", "0" * 63 + "4", 2.0),
    )  # fmt: skip


@pytest.mark.parametrize("version", ["1", "2", "3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_earlier_versions(tmp_path, dtype, version):
    """Files that were written before there was another: read, found damaged, and joined to one of version 3. What has
    no tiles is written as before there were any, byte for byte."""
    content = (FIXTURES / f"memory_v{version}" / f"{dtype}.voco").read_bytes()
    tensors = safetensors.numpy.load_file(FIXTURES / "memory_v1" / "float32.voco")
    arrays = {name: tensors[name] for name in ("keys", "values")}
    expected = MemoryBank(arrays, old_items(), 'a model\'s "fingerprint"')
    expected = expected.astype(np.dtype(getattr(ml_dtypes, dtype, dtype)))
    file = tmp_path / "a.voco"
    file.write_bytes(content)
    assert MemoryFile(file).version == version and same(load_memory(file), expected)
    assert same(MemoryFile(file).read([5, 2], 1), expected[[5, 2]].first_tokens(1))
    for place in range(0, len(content), 5):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        file.write_bytes(damaged)
        with pytest.raises(UserError, match="a.voco"):
            load_memory(file)
    file.write_bytes(content)
    save_memory(file, (MemoryFile(file), range(7)), expected[:2])
    assert MemoryFile(file).version == "3" and same(load_memory(file), expected + expected[:2])
    save_memory(file, expected)
    assert file.read_bytes() == (FIXTURES / "memory_v3" / f"{dtype}.voco").read_bytes()


def tiles_bank(name="p", pictures=2, seed=0) -> MemoryBank:
    """Pictures in 2 × 2 tiles, and a frame of a clip between the first two."""
    of_picture = lambda i: [Item(f"{name}{i}.png", f"{i:064x}", tile=tile) for tile in tiles_of(2)]  # noqa: E731
    items = [
        *of_picture(0),
        Item("clip.mp4", "1" * 64, 0.5),
        *(item for i in range(1, pictures) for item in of_picture(i)),
    ]
    return dataclasses.replace(make_bank(seed, shape=(len(items), 2, 1, 1, 2)), items=tuple(items))


def test_tiles(tmp_path):
    """A file of version 4, which earlier programs refuse: each memory says which tile it is, and is bound to it."""
    bank, file = tiles_bank(), tmp_path / "a.voco"
    save_memory(file, bank)
    assert MemoryFile(file).version == "4" and same(load_memory(file, "m1"), bank)
    assert [len(one) for one in bank.pictures()] == [5, 1, 5] and same(join(bank.pictures()), bank)
    assert f"{file}: 3 pictures as 11 images, 2 tokens each, " in MemoryFile(file).summary()
    assert "3 pictures as 11 images: p0.png, clip.mp4, p1.png, 2 tokens each" in repr(bank)
    assert len({item.identity for item in bank.items}) == 11
    save_memory(file, (MemoryFile(file), [5]))
    assert MemoryFile(file).version == "3" and same(load_memory(file), bank[5])
    save_memory(file, bank)
    parts = Parts(file.read_bytes())
    parts.items = [item | {"tile": [1, 0, 2]} if item.get("tile") == [0, 1, 2] else item for item in parts.items]
    file.write_bytes(parts.together())
    with pytest.raises(UserError, match="damaged: p0.png: keys and values are not as they were written"):
        load_memory(file)


def test_which_tiles_are_of_one_picture():
    """Without hashes and names too; the same picture twice is two."""
    bank = tiles_bank()
    nameless = dataclasses.replace(bank, items=tuple(dataclasses.replace(i, source="", sha256="") for i in bank.items))
    for one in bank, nameless:
        again = join([one[:5], one[:5], one[6:], one[[8, 7]]])
        assert [len(picture) for picture in again.pictures()] == [5, 5, 5, 1, 1]
    # What an earlier version kept says nothing of tiles
    of_before = (Item("a.png"),) * 5 + (Item("a.png"), Item("b.png", time=1.0)) + (Item(""),) * 12
    found = with_tiles(of_before, tiles_of(2))
    assert [len(one.items) for one in pictures_of(found)] == [5, 1, 1, 5, 5, 1, 1]
    assert with_tiles(bank.items, tiles_of(2)) == bank.items


def test_a_picture_is_merged_with_all_its_tiles(tmp_path, monkeypatch, capsys):
    """Once, in order, with or without a hash; and with fewer tiles it is another."""
    for sha256 in ("x", ""):
        a, b = (
            dataclasses.replace(bank, items=tuple(dataclasses.replace(i, sha256=sha256) for i in bank.items))
            for bank in (tiles_bank("a"), tiles_bank("b", 3, seed=1))
        )
        for name, bank in (("a", a), ("b", b), ("fewer", a[1:4]), ("both", b[6:11] + a[:5])):
            save_memory(tmp_path / f"{name}.voco", bank)
        files = [tmp_path / f"{name}.voco" for name in ("fewer", "a", "both", "b")]
        status, out, err = run_main(memory_command, monkeypatch, capsys, "merge", *files, "--out", tmp_path / "c.voco")
        assert status == 0, err
        frame = b[5:6] if not sha256 else b[:0]  # of another memory, where there is no hash
        assert same(load_memory(tmp_path / "c.voco"), join([a[1:4], a, b[6:11], b[:5], frame, b[11:]]))
        listed = run_main(memory_command, monkeypatch, capsys, "list", tmp_path / "c.voco")[1].splitlines()[1:]
        assert [line.split()[:3] for line in listed[:3]] == [
            ["a0.png", "3", "tiles"], ["a0.png", "5", "tiles"], ["clip.mp4", "00:00.5", *(["x"] if sha256 else [])]
        ]  # fmt: skip


def test_a_memory_of_the_other_kind_is_refused(tmp_path):
    """Read, added to and joined: one line, whatever else is the same."""
    pairs = make_bank(), make_bank(shape=EMBEDDINGS)
    for bank, other in (pairs, pairs[::-1]):
        save_memory(tmp_path / "a.voco", bank)
        expected = (
            f"^{tmp_path}/a.voco: expected memories of {other.kind}, which this model reads; found {bank.kind}; comp"
        )
        with pytest.raises(UserError, match=expected):
            load_memory(tmp_path / "a.voco", "m1", kind=other.kind)
        assert same(load_memory(tmp_path / "a.voco", "m1", kind=bank.kind), bank)
        with pytest.raises(UserError, match=f"^memory: expected kind {bank.kind} as in .*a.voco, found {other.kind}$"):
            save_memory(tmp_path / "a.voco", (MemoryFile(tmp_path / "a.voco"), range(5)), other)
        with pytest.raises(UserError, match=f"^memories: expected the same kind, found {bank.kind} and {other.kind}$"):
            join([bank, other])
        assert same(load_memory(tmp_path / "a.voco"), bank)


def test_the_kind_is_in_the_header(tmp_path):
    """Another word there is damage, also where all checksums are right again."""
    for shape, wrong in (SHAPE, "embeddings"), (EMBEDDINGS, "keys and values"), (EMBEDDINGS, "pixels"):
        save_memory(tmp_path / "a.voco", make_bank(shape=shape))
        parts = Parts((tmp_path / "a.voco").read_bytes())
        assert parts.together() == (tmp_path / "a.voco").read_bytes()
        parts.header["__metadata__"]["kind"] = wrong
        (tmp_path / "a.voco").write_bytes(parts.together())
        with pytest.raises(UserError, match="the memory file is damaged: its header is not as it was written"):
            MemoryFile(tmp_path / "a.voco")


def test_of_each_place_the_memory_that_was_written_there(tmp_path):
    """Pictures' tensors and names exchanged with their checksums, or another model's, or read as of another shape, in a
    file whose own checksums are right again: nothing that stands there is taken for what it is not."""
    bank = make_bank(shape=(3, 2, 2, 2, 4))
    file = tmp_path / "a.voco"
    save_memory(file, bank)

    def rewritten(change) -> None:
        parts = Parts((tmp_path / "a.voco").read_bytes())
        change(parts)
        (tmp_path / "b.voco").write_bytes(parts.together())
        with pytest.raises(UserError, match="b.voco: the memory file is damaged: .*: keys and values are not as they"):
            load_memory(tmp_path / "b.voco")

    def of_another_shape(parts):
        for name in ("keys", "values"):
            parts.header[name]["shape"] = [3, 2, 2, 1, 8]

    def first_two_tokens(parts):
        for tensor in (parts.tensors[name] for name in ("keys", "values", "checksums")):
            size = len(tensor) // 6
            tensor[: 2 * size] = tensor[size : 2 * size] + tensor[:size]

    rewritten(lambda parts: [parts.swap(name, 0, 1) for name in ("keys", "values", "checksums")])
    rewritten(lambda parts: setattr(parts, "lines", [parts.lines[i] for i in (1, 0, 2)]))
    rewritten(lambda parts: setattr(parts, "items", [*parts.items[:2], parts.items[2] | {"time": 9.5}]))
    rewritten(lambda parts: parts.header["__metadata__"].update(model="m2"))
    rewritten(of_another_shape)
    rewritten(first_two_tokens)
    assert Parts(file.read_bytes()).together() == file.read_bytes()  # what was rewritten was right but for that


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"source": 5}', "source: expected text, found int"),
        (b'{"source": "a", "sha256": null}', "sha256: expected text, found NoneType"),
        (b'{"source": "a", "time": NaN}', "time: expected seconds, found nan"),
        (b'{"source": "a", "time": 1' + b"0" * 400 + b"}", "time: expected seconds"),
        (b'{"source": "a", "time": true}', "time: expected seconds, found True"),
        *(
            (b'{"source": "a", "tile": %s}' % tile, "tile: expected .row, column, n. of n × n, found ")
            for tile in (
                b"1",
                b"[0, 1]",
                b"[0, 2, 2]",
                b"[-1, 0, 2]",
                b"[0, 0, 0]",
                b"[0.0, 0, 1]",
                b"[true, 0, 2]",
                b"[0, 0, 1" + b"0" * 400 + b"]",
                b'"001"',
                b"{}",
            )
        ),
        (b'{"source": "a", "time": 1.5, "tile": [0, 0, 1]}', "tile: expected none of a frame, which has a time"),
        (b'{"source": "a", "more": 1}', "expected source, sha256, time and tile, found other fields"),
        (b'["a"]', "expected source, sha256, time and tile, found other fields"),
        (b'{"source": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "not readable as JSON"),
        (b'{"source": "a"', "not readable as JSON"),
    ],
)
def test_items_of_other_kinds(tmp_path, line, message):
    """With all checksums right, as a hostile file has them."""
    file = tmp_path / "a.voco"
    file.write_bytes(forged(make_bank(shape=(1, 1, 1, 1, 2)), [line + b"\n"]))
    with pytest.raises(UserError, match=f"a.voco: item 0: {message}"):
        load_memory(file)


@pytest.mark.parametrize(
    "shape",
    [
        (0, 10**18, 1, 1, 2), (0, 0, 1, 1, 2), (1, 1, 1, 1), (1, 1, 1, 1, 1, 2), (1, -1, 1, -1, 2), (2**62, 0, 1, 1, 1),
        (1, 1.0, 1, 1, 2), (float("inf"), 1, 1, 1, 2), (True, 1, 1, 1, 2), 5, None, "11112",
    ],
)  # fmt: skip
def test_shapes_that_none_has(tmp_path, shape):
    save_memory(tmp_path / "a.voco", make_bank(shape=(1, 1, 1, 1, 2)))
    parts = Parts((tmp_path / "a.voco").read_bytes())
    for name in ("keys", "values"):
        parts.header[name]["shape"] = shape
    (tmp_path / "a.voco").write_bytes(parts.together())
    with pytest.raises(UserError, match="a.voco: the memory file is damaged: its header is not as it was written"):
        MemoryFile(tmp_path / "a.voco")


def test_a_file_of_holes_is_refused_at_its_first_bytes(tmp_path):
    """A tebibyte of nothing, that takes no room on disk: neither held in memory nor read to its end."""
    head = header(Layout((2**20, 1, 32, 32, 128), np.dtype(np.float32), 2**20), "m", b"\n" * 2**20)
    with open(tmp_path / "a.voco", "wb") as stream:
        stream.write(head)
        stream.truncate(len(head) + 2**20 * (2**20 + 4))
        stream.seek(0, 2)
        stream.write(b"\n" * 2**20)
    for which in (None, [5]):
        with pytest.raises(UserError, match="are more than memory holds|not as they were written|not readable as JSON"):
            MemoryFile(tmp_path / "a.voco").read(which)
    with open(tmp_path / "b.voco", "wb") as stream:
        stream.write(header(Layout((1, 1, 1, 1, 1), np.dtype(np.float32), 2**40), "m", b""))
        stream.truncate(stream.tell() + 12 + 2**40)
    with pytest.raises(UserError, match="damaged: what its items are is not as it was written"):
        MemoryFile(tmp_path / "b.voco")


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.voco")
    (tmp_path / "loop.voco").symlink_to(tmp_path / "loop.voco")
    for path, found in ((tmp_path / "pipe.voco", "a pipe"), ("/dev/zero", "a device"), (tmp_path, "a directory")):
        for use in (MemoryFile, lambda path: save_memory(path, make_bank())):
            with pytest.raises(UserError, match=f"{path}: expected a file, found {found}"):
                use(path)
    for path in (tmp_path / "loop.voco", "a\0.voco", "a\ud800.voco", tmp_path / ("x" * 300)):
        for use in (MemoryFile, lambda path: save_memory(path, make_bank())):
            with pytest.raises(UserError):
                use(path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loop.voco", "pipe.voco"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(items=(Item(5),)), "source: expected text, found int"),
        (dict(items=(Item("a", time=np.inf),)), "time: expected seconds, found inf"),
        (dict(items=(Item("a", tile=(0, 2, 2)),)), r"tile: expected \[row, column, n\] of n × n, found \(0, 2, 2\)"),
        (dict(items=(Item("x" * 2**20),)), "expected a name of less than"),
        (dict(model=None), "memory: expected the fingerprint of a model, found NoneType"),
        (dict(model="x" * 2**16), "model: expected a fingerprint, found text of 65536 characters"),
        (dict(arrays=dict.fromkeys(("keys", "values"), np.zeros((1, 1, 1, 1, 2)))), r"und \[1, 1, 1, 2\] in float64"),
        (dict(arrays=dict.fromkeys(("keys", "values"), np.zeros((1, 0, 1, 1, 2)))), r"und \[0, 1, 1, 2\] in float64"),
        (dict(arrays={"embeddings": np.zeros((1, 1, 2))}), r"embeddings of images \[K, D\] .* \[1, 2\] in float64"),
    ],
)
def test_what_cannot_be_written(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        save_memory(tmp_path / "a.voco", dataclasses.replace(make_bank(shape=(1, 1, 1, 1, 2)), **change))
    assert not list(tmp_path.iterdir())


def test_arrays_of_other_dtypes_are_no_bank():
    bank, small = make_bank(), make_bank().to_int8()
    for change in (
        lambda: dataclasses.replace(bank, arrays=bank.arrays | {"values": bank.values.astype(np.float16)}),
        lambda: dataclasses.replace(bank, arrays=bank.arrays | {"values": bank.values.astype(">f4")}),
        lambda: dataclasses.replace(small, arrays=small.arrays | {"values": bank.values}),
        lambda: dataclasses.replace(small, scales={name: x.astype(np.float64) for name, x in small.scales.items()}),
        lambda: dataclasses.replace(small, scales=None),
    ):
        with pytest.raises(ValueError, match=r"^(keys in .*, values in|scales .* of keys)"):
            change()
    for change in (
        lambda: dataclasses.replace(bank, arrays={"keys": bank.keys}),
        lambda: dataclasses.replace(bank, arrays=bank.arrays | {"embeddings": bank.keys}),
        lambda: dataclasses.replace(bank, arrays={"embeddings": bank.keys}),
        lambda: dataclasses.replace(bank, arrays=bank.arrays | {"values": bank.values[:, :2]}),
    ):
        with pytest.raises(ValueError, match="^expected arrays "):
            change()


def test_none_at_all(tmp_path):
    save_memory(tmp_path / "a.voco", make_bank()[[]])
    assert same(load_memory(tmp_path / "a.voco"), make_bank()[[]])
    for none in (lambda: join([]), lambda: save_memory(tmp_path / "b.voco")):
        with pytest.raises(UserError, match="expected (memories|at least one), found none"):
            none()


def test_another_model_is_refused(tmp_path):
    save_memory(tmp_path / "a.voco", make_bank())
    with pytest.raises(UserError, match="a.voco: a memory can only be read by the model that made it: .*m2, found m1"):
        load_memory(tmp_path / "a.voco", "m2")


@pytest.mark.parametrize("tokens", [0, 4])
def test_more_tokens_than_there_are(tmp_path, tokens):
    save_memory(tmp_path / "a.voco", make_bank())
    with pytest.raises(UserError, match=f"tokens {tokens}: there are 3 tokens per image"):
        load_memory(tmp_path / "a.voco", tokens=tokens)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a memory file, or cut off: 0 bytes"),
        (b"GIF89a.........", "not a memory file, or cut off"),
        (struct.pack("<Q", 2) + b"{}", "not a memory file, or damaged in its header"),
        (struct.pack("<Q", 2**62) + b"{}", "not a memory file, or cut off: 10 bytes"),
        (struct.pack("<Q", 20_000) + b"[" * 20_000, "not a memory file, or damaged in its header"),
    ],
)
def test_other_files(tmp_path, content, message):
    (tmp_path / "b.voco").write_bytes(content)
    with pytest.raises(UserError, match=f"b.voco: {message}"):
        MemoryFile(tmp_path / "b.voco")
    with pytest.raises(UserError, match="nowhere.voco: the memory file cannot be read: not found"):
        MemoryFile(tmp_path / "nowhere.voco")


def test_a_later_version(tmp_path):
    save_memory(tmp_path / "a.voco", make_bank())
    content = (tmp_path / "a.voco").read_bytes()
    (tmp_path / "a.voco").write_bytes(content.replace(b'"version": "3"', b'"version": "5"'))
    with pytest.raises(UserError, match="expected a memory file of version 1 to 4, found '5'"):
        MemoryFile(tmp_path / "a.voco")


def test_files_are_joined(tmp_path):
    first, second = make_bank(0, name="p"), make_bank(1, name="q")
    for name, bank in (("a", first), ("b", second)):
        save_memory(tmp_path / f"{name}.voco", bank)
    a, b = (MemoryFile(tmp_path / f"{name}.voco") for name in "ab")
    save_memory(tmp_path / "c.voco", (b, [4, 0]), first, (a, [2]))
    assert same(load_memory(tmp_path / "c.voco"), join([second[[4, 0]], first, first[2]]))
    save_memory(tmp_path / "a.voco", (a, [0]), (b, [0]))  # into itself
    assert same(load_memory(tmp_path / "a.voco"), first[0] + second[0])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (dict(model="m2"), "expected model m1 as in memory, found m2"),
        (dict(shape=(1, 2, 2, 2, 4)), r"expected shape of a memory \(3, 2, 2, 4\)"),
        (dict(dtype=np.float16), "expected dtype float32 as in memory, found float16"),
    ],
)
def test_what_does_not_go_together(tmp_path, other, message):
    with pytest.raises(UserError, match=message):
        save_memory(tmp_path / "c.voco", make_bank(), make_bank(**other))
    with pytest.raises(UserError, match="memories: expected the same"):
        join([make_bank(), make_bank(**other)])
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_file(tmp_path):
    save_memory(tmp_path / "a.voco", make_bank())
    with pytest.raises(UserError, match="/nowhere/a.voco: cannot be written: not found"):
        save_memory("/nowhere/a.voco", make_bank())
    (tmp_path / "a.voco").rename(tmp_path / "b.voco")
    assert same(load_memory(tmp_path / "b.voco"), make_bank())


def test_parts_of_a_bank():
    bank = make_bank()
    assert [item.source for item in bank[1:3].items] == ["p1.png", "p2.png"]
    assert same(bank[-1], bank[4]) and len(bank[[]]) == 0
    with pytest.raises(IndexError):
        bank[5]
    with pytest.raises(UserError, match="tokens 4: there are 3 tokens per image"):
        bank.first_tokens(4)
    memory = bank.memory(places=6)
    assert memory.keys.shape == (2, 1, 18, 2, 4)
    np.testing.assert_array_equal(memory.keys[1, 0, 7], bank.keys[2, 1, 1])
    assert not memory.values[:, 0, 15:].any()
    bank = make_bank(shape=EMBEDDINGS)
    memory = bank[[2, 0]].first_tokens(2).memory(places=3)
    assert memory.shape == (1, 3, 2, 8) and not memory[0, 2].any()
    np.testing.assert_array_equal(memory[0, :2], bank.embeddings[[2, 0], :2])


@pytest.mark.parametrize("shape", [SHAPE, EMBEDDINGS])
def test_int8_is_near(shape):
    bank = make_bank(shape=shape)
    small = bank.to_int8()
    for exact, near in zip(bank.memory(), small.memory(), strict=True):
        largest = np.abs(exact).max(axis=-1, keepdims=True)
        assert (np.abs(exact - near) <= largest / 254 + 1e-6).all()
    assert same(small.to_int8(), small) and same(small[1] + small[2], small[1:3])


def test_names_that_no_terminal_obeys(tmp_path, monkeypatch, capsys):
    """Of files whose names are not UTF-8, or are commands to a terminal."""
    file = tmp_path / "a.voco"
    items = (Item(os.fsdecode(b"caf\xe9.png")), Item("\x1b[2J\n\u202egnp.png"))
    save_memory(file, dataclasses.replace(make_bank(shape=(2, 1, 1, 1, 2)), items=items, model="\x1b[31m"))
    assert load_memory(file).items == items
    status, out, _ = run_main(memory_command, monkeypatch, capsys, "list", file)
    assert status == 0 and out.splitlines()[0].endswith(r"model \x1b[31m")
    assert [line.strip() for line in out.splitlines()[1:]] == [r"caf\udce9.png", r"\x1b[2J\n\u202egnp.png"]
    assert repr(load_memory(file)).isprintable()


def test_what_has_no_names_is_merged_by_what_it_is(tmp_path, monkeypatch, capsys):
    """Pictures that were arrays, and two recordings of one camera: other memories are other pictures."""
    for item in (Item(""), Item("camera", time=0.5)):
        a, b = (dataclasses.replace(make_bank(seed), items=(item,) * 5) for seed in range(2))
        for name, bank in (("a", a), ("b", b), ("a_again", a[2:4])):
            save_memory(tmp_path / f"{name}.voco", bank)
        files = [tmp_path / f"{name}.voco" for name in ("a", "b", "a_again")]
        assert run_main(memory_command, monkeypatch, capsys, "merge", *files, "--out", tmp_path / "c.voco")[0] == 0
        assert same(load_memory(tmp_path / "c.voco"), a + b)


def test_the_command(tmp_path, monkeypatch, capsys):
    save_memory(tmp_path / "a.voco", make_bank(0, name="p"))
    save_memory(tmp_path / "b.voco", make_bank(1, name="q"))
    run = lambda *arguments: run_main(memory_command, monkeypatch, capsys, *arguments)  # noqa: E731
    status, out, _ = run("merge", tmp_path / "a.voco", tmp_path / "b.voco", tmp_path / "a.voco", "--out",
                         tmp_path / "c.voco")  # fmt: skip
    assert status == 0 and "c.voco: 10 pictures, 3 tokens each, float32 keys and values, 2 layers × 2 × 4" in out
    assert run("merge", tmp_path / "a.voco", "--out", tmp_path / "c.voco")[0] == 0  # a memory may be written over
    run("merge", tmp_path / "a.voco", tmp_path / "b.voco", "--out", tmp_path / "c.voco")
    (tmp_path / "notes.txt").write_text("mine")
    status, _, err = run("merge", tmp_path / "a.voco", "--out", tmp_path / "notes.txt")
    assert status == 2 and f"{tmp_path}/notes.txt: not a memory file" in err
    assert (tmp_path / "notes.txt").read_text() == "mine"
    status, out, _ = run("list", tmp_path / "c.voco")
    assert out.splitlines()[2].split() == ["p1.png", "00:00.5", "0" * 12]
    assert len(out.splitlines()) == 11
    assert "every byte as it was written" in run("check", tmp_path / "c.voco")[1]
    content = bytearray((tmp_path / "c.voco").read_bytes())
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    content[8 + length + header["values"]["data_offsets"][1] - 1] ^= 1
    (tmp_path / "c.voco").write_bytes(content)
    status, _, err = run("check", tmp_path / "c.voco")
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1 and "q4.png" in err
    assert header["__metadata__"]["model"] == "m1"
