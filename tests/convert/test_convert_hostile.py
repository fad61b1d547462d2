"""Files of weights that are hostile, damaged or odd: one line each, and values that are those that were written."""

import dataclasses
import io
import json
import os
import pickle
import struct
import zipfile

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.fuzz import gguf_files
from tests.fuzz.gguf_files import GGUF
from voco_jax.convert.gguf_files import gguf_tokenizer, read_gguf
from voco_jax.convert.sources import open_source
from voco_jax.convert.torch_files import read_torch
from voco_jax.data.template_reader import read_chat_template
from voco_jax.data.tokenizer import train_tokenizer
from voco_jax.errors import UserError
from voco_jax.io.safetensors import read_index, read_safetensors

# ---- PyTorch's .bin ------------------------------------------------------------------------------------------------


@pytest.mark.peer
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_state_dicts_of_all_protocols(protocol, tmp_path):
    """A module's, which has attributes (`_metadata`), its parameters, and one beside an optimizer's state."""
    import torch

    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = module.state_dict()
    whole = {"state_dict": state, "optimizer": optimizer.state_dict(), "epoch": 3, "rate": 0.1}
    for saved in (state, dict(module.named_parameters()), whole):
        torch.save(saved, tmp_path / "x.bin", pickle_protocol=protocol)
        read = read_torch(tmp_path / "x.bin")
        assert read.keys() == state.keys()
        for name, tensor in read.items():
            np.testing.assert_array_equal(tensor.read(), state[name].numpy())


@pytest.mark.peer
def test_the_format_before_1_6(tmp_path):
    import torch

    torch.save({"a": torch.ones(2)}, tmp_path / "x.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(
        UserError, match=r"x.bin: .*the format of PyTorch before 1.6; load and save it with a later one"
    ):
        read_torch(tmp_path / "x.bin")


@pytest.mark.peer
@pytest.mark.parametrize("view", [False, True])
def test_checksums_of_storages(view, tmp_path):
    """A bit of a value is another: told when the tensor is read, or any that shares its storage; unless no checksums
    were written."""
    import torch

    whole = torch.arange(60, dtype=torch.float32).reshape(5, 12)
    saved = {"x": whole[1:3, ::2] if view else whole}
    for with_sums in (True, False):
        torch.serialization.set_crc32_options(with_sums)
        try:
            torch.save(saved, tmp_path / "x.bin")
        finally:
            torch.serialization.set_crc32_options(True)
        np.testing.assert_array_equal(read_torch(tmp_path / "x.bin")["x"].read(), saved["x"].numpy())
        content = bytearray((tmp_path / "x.bin").read_bytes())
        content[content.index(struct.pack("<f", 59.0))] ^= 1  # the last value, which the view does not show
        (tmp_path / "x.bin").write_bytes(content)
        tensor = read_torch(tmp_path / "x.bin")["x"]
        if with_sums:
            with pytest.raises(UserError, match="x.bin: storage 0: damaged: another checksum than was written"):
                tensor.read()
        else:
            assert tensor.read().shape == tuple(saved["x"].shape)


def archive(pickled: bytes, storage: bytes = bytes(16), **changes) -> bytes:
    """PyTorch's archive of a pickle and one storage; `changes`: members that are others, or more."""
    written = io.BytesIO()
    members = {"data.pkl": pickled, "byteorder": b"little", "data/0": storage} | changes
    with zipfile.ZipFile(written, "w") as file:
        for name, content in members.items():
            file.writestr(f"archive/{name}", content)
    return written.getvalue()


def pickled_tensor(
    size=b"K\x04", offset=b"K\x00", shape=b"K\x02K\x02\x86", strides=b"K\x02K\x01\x86", kind=b"FloatStorage", more=b""
) -> bytes:
    """Protocol 2: {"x": a tensor of [2, 2] in four values}, with operations in the places of its numbers."""
    storage = b"(X\x07\0\0\0storagectorch\n" + kind + b"\nX\x01\0\0\x000X\x03\0\0\0cpu" + size + b"tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + offset + shape + strides + b"\x89}tR"
    return b"\x80\x02}X\x01\0\0\0x" + tensor + b"s" + more + b"."


NOT_A_NUMBER = b"G" + struct.pack(">d", float("nan"))
PICKLES = {
    "a size that is no number": (
        pickled_tensor(size=NOT_A_NUMBER),
        "a persistent id of another form than a storage has",
    ),
    "a size of true": (pickled_tensor(size=b"\x88"), "a persistent id of another form than a storage has"),
    "another size": (pickled_tensor(size=b"K\x03"), "storage 0: expected 3 values of float32, found 16 bytes"),
    "another type": (pickled_tensor(kind=b"HalfStorage"), "storage 0: expected 4 values of float16, found 16 bytes"),
    "a fractional offset": (pickled_tensor(offset=b"G" + struct.pack(">d", 0.0)), "offset, shape or strides"),
    "negative dimensions": (pickled_tensor(shape=b"J\xff\xff\xff\xffJ\xff\xff\xff\xff\x86"), "expected a shape, found"),
    "dimensions that are true": (pickled_tensor(shape=b"\x88\x88\x86"), "expected a shape, found (True, True)"),
    "more than there is": (pickled_tensor(shape=b"K\x02K\x03\x86"), "reaches beyond its storage"),
    "one dimension more": (pickled_tensor(shape=b"K\x02K\x02K\x01\x87"), "a tensor of shape (2, 2, 1) and strides"),
    "attributes of a tensor": (
        pickled_tensor(more=b"X\x01\0\0\0xh\0b")[:-1].replace(b"tRs", b"tR}X\x05\0\0\0shapeK\x05sbs") + b".",
        "expected dict, found Tensor",
    ),
    "a call of a text": (b"\x80\x02X\x01\0\0\0a)R.", "expected Global, found str"),
    "a call of a list": (b"\x80\x02](X\x01\0\0\0atR.", "expected Global, found list"),
    "items of a text": (b"\x80\x02X\x01\0\0\0a(X\x01\0\0\0bK\1u.", "expected dict, found str"),
    "a name twice": (b"\x80\x02}(X\x01\0\0\0bK\1X\x01\0\0\0bK\1u.", "b doubled"),
    "a value that is nowhere": (b"\x80\x02h\x05.", "there is no value 5"),
    "no mark": (b"\x80\x02}u.", "an operation without its MARK"),
    "nothing": (b"\x80\x02.", "the description ends too early"),
    "something behind the end": (pickle.dumps({}, 2) + b"x", "the description ends too early"),
    "an old kind of id": (b"\x80\x02Pstorage\n.", "operation PERSID is not among those that make a state dict"),
    "an object": (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "operation NEWOBJ is not among those"),
    "a class by its module's name": (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "os.system is not among the things"),
    "an OrderedDict of items": (
        b"\x80\x02ccollections\nOrderedDict\n]\x85R.",
        "collections.OrderedDict of other things",
    ),
    "an endless name": (b"\x80\x02}X\x10\x27\0\0" + b"a" * 10_000 + b"K\1s.", "expected a name of at most 1000"),
    "texts without an end": (b"\x80\x02X\xff\xff\xff\x7fabc.", "expected 2147483647 bytes in a unicode"),
}


@pytest.mark.parametrize("kind", PICKLES)
def test_hostile_pickles(kind, tmp_path):
    pickled, message = PICKLES[kind]
    (tmp_path / "x.bin").write_bytes(archive(pickled))
    with pytest.raises(UserError) as error:
        read_torch(tmp_path / "x.bin")
    assert message in str(error.value) and "x.bin: not a PyTorch checkpoint that can be read safely: " in str(
        error.value
    )


def test_what_hostile_pickles_are_made_of(tmp_path):
    """The tensor in the tests above is one that is read."""
    values = np.arange(4, dtype=np.float32)
    (tmp_path / "x.bin").write_bytes(archive(pickled_tensor(), values.tobytes()))
    np.testing.assert_array_equal(read_torch(tmp_path / "x.bin")["x"].read(), values.reshape(2, 2))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (archive(pickled_tensor(), byteorder=b"big"), "expected the byte order 'little'"),
        (archive(pickled_tensor(), **{"../x/data.pkl": b""}), "expected one data.pkl in it, found 2"),
        (archive(b"\x80\x02" + b"}" * 2**20 + b"."), "expected at most 500000 operations"),
        (archive(bytes(2**24 + 1)), "expected at most 16777216 bytes of description, found 16777217"),
        (archive(pickled_tensor()).replace(b"archive/data/0", b"archive/data/1", 1), "archive's directory says someth"),
        (archive(pickled_tensor())[:-50], "File is not a zip file"),
    ],
)
def test_hostile_archives(content, message, tmp_path):
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(UserError) as error:
        read_torch(tmp_path / "x.bin")
    assert message in str(error.value)


def test_members_that_are_packed_or_lie_on_each_other(tmp_path):
    with zipfile.ZipFile(tmp_path / "packed.bin", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", bytes(10**6))
    with pytest.raises(UserError, match="archive/data.pkl is compressed or encrypted"):
        read_torch(tmp_path / "packed.bin")
    content = bytearray(archive(pickled_tensor()))
    at = content.rindex(b"PK\1\2")  # of data/0, said to begin within the member before
    content[at + 42 : at + 46] = (30).to_bytes(4, "little")
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(UserError, match="overlaps another member"):
        read_torch(tmp_path / "x.bin")


# ---- safetensors ---------------------------------------------------------------------------------------------------

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "size", "message"),
    [
        ({"a": ENTRY, "b": ENTRY | {"data_offsets": [12, 20]}}, 20, "b: there is a gap of 4 bytes before it"),
        ({"a": ENTRY}, 12, "the tensors end at byte"),
        ({"a": ENTRY | {"data_offsets": [0, 8.0]}}, 8, "a: data_offsets: expected begin and end, found [0, 8.0]"),
        ({"a": ENTRY | {"data_offsets": [False, 8]}}, 8, "a: data_offsets: expected begin and end, found [False, 8]"),
        ({"a": ENTRY | {"data_offsets": [-8, 0]}}, 8, "a: data_offsets: expected begin and end"),
        ({"a": ENTRY | {"shape": ["2"]}}, 8, "a: expected a shape, found ['2']"),
        (
            {"a": ENTRY | {"shape": [0, 10**18], "data_offsets": [0, 0]}},
            0,
            "a: expected a shape of at most 8 dimensions",
        ),
        ({"a": ENTRY | {"dtype": ["F32"]}}, 8, "a: expected dtype, shape and data_offsets, found"),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8, "a: expected dtype, shape and data_offsets, found"),
        ({"a": [1]}, 8, "a: expected dtype, shape and data_offsets, found [1]"),
        ({"__metadata__": {"format": 1}}, 0, "__metadata__: expected an object of texts"),
        ([1], 0, "expected an object, found list"),
        (b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}", 0, "expected at most 100 objects and lists in each other"),
        (b'{"a\xff":1}', 0, "can't decode byte 0xff"),
        (b'{"a\\u001b[2J":1}', 0, "a\\x1b[2J: expected dtype"),
        (b" " * (2**23 + 8), 0, "expected a header of at most 8388608 bytes, found 8388616"),
    ],
)
def test_hostile_safetensors(header, size, message, tmp_path):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))
    with pytest.raises(UserError) as error:
        read_safetensors(tmp_path / "x.safetensors")
    assert message in str(error.value) and "x.safetensors: " in str(error.value)


@pytest.mark.parametrize(
    "content", ["[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": ""}}']
)
def test_indexes_of_odd_types(content, tmp_path):
    (tmp_path / "x.index.json").write_text(content)
    with pytest.raises(UserError, match="x.index.json: expected an object"):
        read_index(tmp_path / "x.index.json")


def test_a_file_that_is_replaced_while_it_is_read(tmp_path):
    """Tensors have the values of the file that was opened."""
    save_file({"a": np.zeros(4, "f")}, tmp_path / "x.safetensors")
    tensor = read_safetensors(tmp_path / "x.safetensors")["a"]
    save_file({"a": np.ones(4, "f")}, tmp_path / "y.safetensors")
    os.replace(tmp_path / "y.safetensors", tmp_path / "x.safetensors")
    assert not tensor.read().any()


# ---- GGUF ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound():
    return gguf_files.sound_file()


def put(file, name: str, kind: gguf.GGUFValueType, value):
    """The file with another value of a key, or with the key too."""
    key = (name.encode(), int(kind), gguf_files.payload_of(kind, value))
    kept = [key if key[0] == old[0] else old for old in file.keys]
    return dataclasses.replace(file, keys=kept if key in kept else [*kept, key])


def offset(file, number: int, place: int):
    return dataclasses.replace(file, offsets={number: place})


K = gguf.GGUFValueType
FILES = {
    "tensors that overlap": (lambda f: offset(f, 1, 0), "output_norm.weight: expected at byte"),
    "a tensor in the header": (lambda f: offset(f, 0, -64), "token_embd.weight: expected at byte"),
    "a tensor beyond the end": (lambda f: offset(f, 2, 2**40), "output.weight: expected at byte"),
    "a tensor that is not aligned": (lambda f: offset(f, 1, 1), "output_norm.weight: expected at byte"),
    "a tensor twice": (lambda f: dataclasses.replace(f, tensors=[*f.tensors, f.tensors[-1]]), "appears twice"),
    "a key twice": (
        lambda f: dataclasses.replace(f, keys=[*f.keys, f.keys[3]]),
        "'llama.context_length' appears twice",
    ),
    "another version": (lambda f: dataclasses.replace(f, version=4), "expected version 2 or 3 of GGUF"),
    "counts of nothing": (lambda f: dataclasses.replace(f, num_keys=10**18), "expected at most 65536 tensors and keys"),
    "fewer keys": (lambda f: dataclasses.replace(f, num_keys=20), "add_bos_token: expected 1 to 4 dimensions, found 7"),
    "blocks that are not there": (
        lambda f: put(f, "llama.block_count", K.UINT32, 10**9),
        "llama.num_hidden_layers: expected at most 4095, found 1000000000",
    ),
    "a number as text": (
        lambda f: put(f, "llama.block_count", K.STRING, "2"),
        "llama.block_count: expected a whole number, found '2'",
    ),
    "an infinite number": (
        lambda f: put(f, "llama.rope.freq_base", K.FLOAT32, float("inf")),
        "llama.rope.freq_base: expected a number, found inf",
    ),
    "fewer heads": (
        lambda f: put(f, "llama.attention.head_count_kv", K.UINT32, 1),
        "attn_k.weight: expected 1 heads of 8 rows, found [16, 32]",
    ),
    "no alignment": (lambda f: put(f, "general.alignment", K.UINT32, 3), "general.alignment: expected a power of two"),
    "a key with another letter": (
        lambda f: put(f, "mlama.rope.freq_base", K.FLOAT32, 1.0),
        "mlama.rope.freq_base: no such key; llama.rope.freq_base damaged?",
    ),
    "fewer tokens": (
        lambda f: put(f, "tokenizer.ggml.tokens", K.ARRAY, (K.STRING, ["a"])),
        "tokenizer.ggml.tokens: expected 398, as token_embd.weight has rows, found 1",
    ),
    "lists of lists": (
        lambda f: put(f, "general.tags", K.ARRAY, (K.ARRAY, [(K.UINT8, [1])])),
        "general.tags: unknown type 9",
    ),
}


@pytest.mark.parametrize("kind", FILES)
def test_hostile_gguf(kind, sound, tmp_path):
    change, message = FILES[kind]
    (tmp_path / "x.gguf").write_bytes(change(sound).write())
    with pytest.raises(UserError) as error:
        read_gguf(tmp_path / "x.gguf")
    assert message in str(error.value) and "x.gguf: " in str(error.value)


@pytest.mark.parametrize(
    ("key", "kind", "value", "message"),
    [
        ("eos_token_id", K.UINT32, 400, "eos_token_id: expected a token's id below 398, found 400"),
        ("token_type", K.ARRAY, (K.INT32, [7] * 398), "token_type: expected one of [1, 2, 3, 4, 5, 6] for every token"),
        (
            "merges",
            K.ARRAY,
            (K.STRING, ["a b c"]),
            "merges: expected two tokens that make a third, found ('a', 'b', 'c')",
        ),
        (
            "tokens",
            K.ARRAY,
            (K.STRING, ["a"] * 398),
            "tokens: expected a different text for each token, found duplicates",
        ),
        ("model", K.STRING, "llama", "model: expected 'gpt2', found 'llama'; use --tokenizer DIR"),
    ],
)
def test_hostile_tokenizers_in_gguf(key, kind, value, message, sound, tmp_path):
    (tmp_path / "x.gguf").write_bytes(put(sound, f"tokenizer.ggml.{key}", kind, value).write())
    with pytest.raises(UserError) as error:
        gguf_tokenizer(tmp_path / "x.gguf")
    assert f"tokenizer.ggml.{message}" in str(error.value)


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), 0.0, -1.0])
def test_rotary_factors_that_are_none(odd, sound, tmp_path):
    factors = np.array([1, 1, odd, 1], np.float32).tobytes()
    tensors = [*sound.tensors, (b"rope_freqs.weight", [4], int(gguf.GGMLQuantizationType.F32), factors)]
    (tmp_path / "x.gguf").write_bytes(dataclasses.replace(sound, tensors=tensors).write())
    with pytest.raises(UserError, match=r"rope_freqs.weight: expected factors above 0, found others"):
        read_gguf(tmp_path / "x.gguf")


def test_a_gguf_file_that_is_cut_off_or_too_long(sound, tmp_path):
    content = sound.write()
    (tmp_path / "x.gguf").write_bytes(content)
    assert read_gguf(tmp_path / "x.gguf")[0].num_hidden_layers == 2
    for changed, message in (content[:-32], "truncated: "), (content + bytes(32), "the tensors end at byte"):
        (tmp_path / "x.gguf").write_bytes(changed)
        with pytest.raises(UserError, match=message):
            read_gguf(tmp_path / "x.gguf")


# ---- What is no file, and programs in files ------------------------------------------------------------------------


@pytest.mark.parametrize("read", [read_safetensors, read_torch, read_gguf], ids=lambda read: read.__name__)
def test_what_is_no_file(read, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for name, message in (
        ("pipe", "found a pipe"),
        ("", "found a directory"),
        ("loop", "cannot be read: Too many levels"),
    ):
        with pytest.raises(UserError, match=message):
            read(tmp_path / name)


def test_a_config_that_is_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(UserError, match="config.json: expected a file, found a pipe"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "it takes too long"),
        ("{{ 'a' * 10**10 }}", "it takes too much memory"),
    ],
)
def test_chat_templates_without_an_end(template, message):
    with pytest.raises(UserError, match=message):
        read_chat_template(template, train_tokenizer(["a b"], 300))


def test_the_sound_file_of_the_fuzz_suite(tmp_path):
    """It is read whole, so that what the suite refuses is refused for what was done to it."""
    target = GGUF()
    target.make(tmp_path)
    llama, tensors, _, special = target.content
    assert (llama.num_hidden_layers, len(tensors), special["eos_token"]) == (2, 21, "</s>")
