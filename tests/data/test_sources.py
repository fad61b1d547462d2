"""Data sources: what each makes of its files, in this process and in another; and what is wrong with them."""

from concurrent.futures import ProcessPoolExecutor
import inspect
import io
import json
import multiprocessing
import os
from pathlib import Path
import random
import shutil

import msgpack
import numpy as np
from PIL import Image
import pytest

from voco_jax.config import SOURCE_KEYS, default_config, source, sources
from voco_jax.data.records import BadRecord, Clip, Frames, Picture, Record
from voco_jax.data.sources import SOURCES, open_sources
from voco_jax.data.sources.array_records import ArrayRecordSource, pack_record, unpack_record
from voco_jax.data.sources.easyvqa import EasyVqaSource
from voco_jax.data.sources.json_rows import JsonRows
from voco_jax.data.sources.llava import LlavaSource, VideoQuestionSource
from voco_jax.data.sources.tfds import TfdsSource
from voco_jax.errors import UserError


def turns(*values: str) -> list[dict]:
    return [{"from": "gpt" if i % 2 else "human", "value": value} for i, value in enumerate(values)]


def row(*values: str, **keys) -> dict:
    return keys | {"conversations": turns(*(values or ("<image>\nwhat?", "a cat")))}


def write_lines(file: Path, rows) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def kind_of(source, i: int) -> str:
    with pytest.raises(BadRecord) as error:
        source[i]
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000
    return error.value.kind


# ---- JSON rows -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        b'{"a": 1}\n{"a": "\xc3\xa9"}\n',
        b'{"a": 1}\n{"a": "\xc3\xa9"}',
        b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \n{"a": "\xc3\xa9"}\r\n\n',
        b'[{"a": 1}, {"a": "\xc3\xa9"}]',
        b'\xef\xbb\xbf \n[\r\n{"a": 1}\r\n,\t{"a": "\\u00e9"} ]\n\n',
    ],
    ids=["lines", "no newline at the end", "BOM, CRLF and empty lines", "array", "array with BOM and spaces"],
)
def test_rows_of_any_layout(content, tmp_path):
    file = tmp_path / "rows.json"
    file.write_bytes(content)
    rows = JsonRows(file)
    assert len(rows) == 2 and list(rows) == [{"a": 1}, {"a": "é"}]


@pytest.mark.parametrize("content", ['[{"a": [1, "]"]}]', '{"a": [1, "]"]}'])
def test_a_single_row(content, tmp_path):
    file = tmp_path / "rows.json"
    file.write_text(content)
    assert list(JsonRows(file)) == [{"a": [1, "]"]}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "rows.json: expected rows, as a JSON array or one a line; found none"),
        (b"\xef\xbb\xbf\n \r\n", "rows.json: expected rows, as a JSON array or one a line; found none"),
        (b" [ ]", "rows.json: expected rows, as a JSON array or one a line; found none"),
        (b'[{"a": 1}, {"a": ', "Expecting value, at byte 11, after 1 rows"),
        (b'[{"a": 1} {"a": 2}]', "expected , or ], at byte 10, after 1 rows"),
        (b'["\xc3\xa9\xc3\xa9", oops]', "Expecting value, at byte 9, after 1 rows"),
        (b'[{"a": 1}', "expected , or ], at byte 9, after 1 rows"),
        (b'[{"a": 1},]', "Expecting value, at byte 10, after 1 rows"),
        (b'[{"a": 1}] {', "expected nothing after the array, at byte 11, after 1 rows"),
        (b"[1, " + b"[" * 100_000, "maximum recursion depth exceeded while decoding a JSON array"),
    ],
)
def test_a_file_that_is_no_rows(content, message, tmp_path):
    file = tmp_path / "rows.json"
    file.write_bytes(content)
    with pytest.raises(UserError) as error:
        JsonRows(file)
    assert message in str(error.value) and "rows.json" in str(error.value) and "\n" not in str(error.value)
    assert not isinstance(error.value, BadRecord)


@pytest.mark.parametrize("name", ["none.json", ".", ""])
def test_no_file(name, tmp_path):
    with pytest.raises(UserError, match="expected a .json or .jsonl file|expected a file, found a directory"):
        JsonRows(str(tmp_path / name) if name else "")


ROW = b'{"question": "what?", "answer": "this"}'
HOSTILE = {
    "expected rows of questions, found 10000 rows of 2.0 bytes": b"[" + b"1," * 200_000 + b"1]",
    "expected rows of questions, found 10000 rows of 3.0 bytes": b"[" + (ROW + b",") * 10_000 + b"{}," * 20_000 + b"1]",
    "expected rows of questions, found 100000 rows of ": b"1\n" * 100_000,
    "expected rows, as a JSON array or one a line; found none": b"\n" * 10**6 + b" \r\n" * 1000,
    "maximum recursion depth": b"[" * 10**6,
}


@pytest.mark.parametrize("told", HOSTILE)
def test_files_of_next_to_nothing(told, tmp_path):
    """Which would be many times larger in memory."""
    (tmp_path / "rows.json").write_bytes(HOSTILE[told])
    with pytest.raises(UserError, match=told) as error:
        JsonRows(tmp_path / "rows.json")
    assert str(tmp_path / "rows.json") in str(error.value)


def test_a_row_that_no_model_reads(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(ROW + b"\n" + b'{"question": "' + b"x" * 5 * 2**20 + b'"}\n' + ROW + b"\n")
    rows = JsonRows(file)
    assert rows[0] == rows[2] == json.loads(ROW)
    with pytest.raises(BadRecord, match="expected a row of 1048576 bytes at most, found 5242896: shorten the row"):
        rows[1]


def test_the_limit_of_a_row_is_a_key(tmp_path):
    row = {"image": "1.jpg", "video": "a.mp4", "question": "?", "answer": "this", "conversations": []}
    (tmp_path / "set.jsonl").write_text(json.dumps(row | {"video": ""}) + "\n" + json.dumps(row | {"image": "x" * 900}))
    config = default_config()
    by_name = sources(
        a=source("llava", file=str(tmp_path / "set.jsonl"), images=str(tmp_path)),
        b=source("video_qa", file=str(tmp_path / "set.jsonl"), videos=str(tmp_path)),
    )
    with config.unlocked():
        config.data.train = by_name
    config.data.limits.row_bytes = 900
    for rows in open_sources(config.data, "train")[0]:
        with pytest.raises(BadRecord, match=r"900 bytes at most, found 9\d+: set config.data.limits.row_bytes, or"):
            rows[1]
    index = open_sources(config.data, "train")[0][0].fingerprint()
    config.data.limits.row_bytes = 2**21
    assert open_sources(config.data, "train")[0][0].fingerprint() != index
    assert open_sources(config.data, "train")[0][1][1].video is not None


def test_the_configs_keys_are_the_sources_parameters():
    """The config, which cannot import the sources, has the same kinds and keys."""
    taken = {kind: [*inspect.signature(made).parameters] for kind, made in SOURCES.items()}
    rest = {"llava": ["row_bytes"], "video_qa": ["row_bytes"]}
    assert taken == {kind: [*keys, *rest.get(kind, [])] for kind, keys in SOURCE_KEYS.items()}


def test_a_pipe_is_no_source(tmp_path):
    os.mkfifo(tmp_path / "rows.jsonl")
    for file, found in ((tmp_path / "rows.jsonl", "a pipe"), (Path("/dev/zero"), "a device")):
        with pytest.raises(UserError, match=f"expected a file, found {found}"):
            JsonRows(file)


def test_a_file_that_is_replaced_while_it_is_read(tmp_path):
    """By the time that a worker opens it: no row is cut in two."""
    file = tmp_path / "rows.jsonl"
    file.write_bytes((ROW + b"\n") * 3)
    rows = JsonRows(file)
    (tmp_path / "new.jsonl").write_bytes(b'{"question": "longer than that", "answer": "x"}\n' * 3)
    (tmp_path / "new.jsonl").replace(file)
    with pytest.raises(UserError, match="rows.jsonl: was replaced while it was read; start again"):
        rows[1]


def test_bad_rows_are_bad_alone(tmp_path):
    """In a .jsonl file the first row may be the broken one, also where it looks like an array."""
    file = tmp_path / "rows.jsonl"
    lines = [b"[oops", b'{"a": "\xff"}', b"[" * 100_000, b'{"a": 1', b"1" * 5000, b'{"a": 1}\0', b'{"a": 1}']
    file.write_bytes(b"\n".join(lines))
    rows = JsonRows(file)
    kinds = [kind_of(rows, i) for i in range(6)]
    assert kinds == ["broken JSON", "not UTF-8", *["broken JSON"] * 4]
    assert len(rows) == 7 and rows[6] == {"a": 1}


def test_bad_rows_of_an_array(tmp_path):
    file = tmp_path / "rows.json"
    file.write_bytes(b'[{"a": "\xff\xfe"}, ' + b"1" * 5000 + b', {"a": "\n"}, {"a": 1}]')
    rows = JsonRows(file)
    assert [kind_of(rows, i) for i in range(3)] == ["not UTF-8", "broken JSON", "broken JSON"]
    assert len(rows) == 4 and rows[3] == {"a": 1}


# ---- LLaVA -----------------------------------------------------------------------------------------------------


@pytest.fixture
def llava(tmp_path) -> LlavaSource:
    rows = [
        row(id="1", image="coco/1.jpg"),
        row("who?", "me", "why?", "so", id="2", image="", video=""),
        row("<image><image>\nboth?", "yes", image=["a.png", "b/ü.png"]),
        row("<video>\nwhat?", "rain 雨", video="clips/a.mp4"),
        row("who?", "me", image=None, video=None),
        row(image=str(tmp_path / "pictures" / "x.png")),
    ]
    for name in ("pictures", "videos"):
        (tmp_path / name).mkdir()
    file = write_lines(tmp_path / "set.jsonl", rows)
    return LlavaSource(str(file), str(tmp_path / "pictures"), str(tmp_path / "videos"))


def test_llava(llava, tmp_path):
    pictures, videos = tmp_path / "pictures", tmp_path / "videos"
    assert [r.images for r in llava] == [
        [Picture(pictures / "coco/1.jpg")], [], [Picture(pictures / "a.png"), Picture(pictures / "b/ü.png")], [], [],
        [Picture(pictures / "x.png")],
    ]  # fmt: skip
    assert [r.video for r in llava] == [None, None, None, Clip(videos / "clips/a.mp4"), None, None]
    assert llava[1].conversations == [turns("who?", "me", "why?", "so")]
    assert llava[3].conversations == [turns("<video>\nwhat?", "rain 雨")]
    assert len(llava) == 6 and llava.where(3) == "set.jsonl[3]"


def test_one_directory_for_both(tmp_path):
    file = write_lines(tmp_path / "set.jsonl", [row(image="1.jpg"), row("<video> a?", "b", video="a.mp4")])
    for keys in ({"images": str(tmp_path)}, {"videos": str(tmp_path)}):
        llava = LlavaSource(str(file), **keys)
        assert llava[0].images == [Picture(tmp_path / "1.jpg")] and llava[1].video == Clip(tmp_path / "a.mp4")
    with pytest.raises(UserError, match="has images: expected their directory .--images, or the source's key"):
        LlavaSource(str(file))[0]
    with pytest.raises(UserError, match="has videos: expected their directory .--videos, or the source's key"):
        LlavaSource(str(file))[1]
    with pytest.raises(UserError, match="/none: expected a directory .--videos, or the source's key"):
        LlavaSource(str(file), str(tmp_path), str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (3, "not a conversation"),
        (None, "not a conversation"),
        ([], "not a conversation"),
        ({}, "not a conversation"),
        ({"conversations": "text"}, "not a conversation"),
        ({"conversations": {"from": "human"}}, "not a conversation"),
        (row(image="a.png", video="a.mp4"), "not a conversation"),
        (row(image="../a.png"), "path outside the root"),
        (row(image="b/../../a.png"), "path outside the root"),
        (row(image="/etc/passwd"), "path outside the root"),
        (row(image="//etc/passwd"), "path outside the root"),
        (row(image=["a.png", "/dev/zero"]), "path outside the root"),
        (row(image=7), "path outside the root"),
        (row(image=[["a.png"]]), "path outside the root"),
        (row(image={"a": 1}), "path outside the root"),
        (row(image="a\0.png"), "path outside the root"),
        (row("<video> a?", "b", video="../a.mp4"), "path outside the root"),
        (row("<video> a?", "b", video=["a.mp4"]), "path outside the root"),
    ],
)
def test_rows_that_are_bad(content, kind, tmp_path):
    file = write_lines(tmp_path / "set.jsonl", [content])
    assert kind_of(LlavaSource(str(file), str(tmp_path)), 0) == kind


@pytest.mark.parametrize("depth", [5, *range(880, 1000, 4)])
def test_deep_rows(depth, tmp_path):
    """Just readable, yet too deep for what shows them: a bad record all the same, never another error."""
    deep = "[" * depth + "]" * depth
    lines = [f'{{"conversations": {deep.replace("[", "{x:", 1)}}}', deep, f'{{"image": {deep}, "conversations": []}}']
    file = tmp_path / "set.jsonl"
    file.write_text("\n".join(lines).replace("x", '"x"').replace("]}\n", "}}\n", 1))
    llava = LlavaSource(str(file), str(tmp_path))
    expected = [("not a conversation",), ("not a conversation",), ("path outside the root",)]
    for i in range(3):
        assert kind_of(llava, i) in (*expected[i], "broken JSON")


def test_a_directory_with_an_absolute_name_is_its_own(tmp_path):
    """An absolute path may go into the root, but not out again."""
    file = write_lines(tmp_path / "set.jsonl", [row(image=f"{tmp_path}/p/../../x.png"), row(image=f"{tmp_path}x.png")])
    (tmp_path / "p").mkdir()
    llava = LlavaSource(str(file), str(tmp_path / "p"))
    assert [kind_of(llava, i) for i in range(2)] == ["path outside the root"] * 2


# ---- Video questions -------------------------------------------------------------------------------------------


@pytest.fixture
def video_questions(tmp_path) -> VideoQuestionSource:
    videos = tmp_path / "videos"
    (videos / "sub").mkdir(parents=True)
    for name in ("v_1.mp4", "v_1.webm", "v.2.mkv", "v_3.MP4", "notes.txt", "sub/deep.mp4"):
        (videos / name).touch()
    rows = [
        {"q": "who?", "a": "me", "video_id": "v_1"},
        {"Q": "who?", "A": "me", "video_name": "v.2"},
        {"question": "who?", "answer": "me", "video": "sub/deep.mp4"},
        {"question": "who?", "answer": "me", "video": "v_3"},
        {"question": "who?", "answer": "me", "video": "gone.mp4"},
        {"question": "who?", "answer": "me", "video": "gone"},
        {"question": "who?", "answer": "me", "video": "notes"},
        {"question": "who?", "answer": "me", "video": "../v_1"},
        {"question": "who?", "answer": ["me"], "video": "v_1"},
        {"question": "who?", "video": "v_1"},
        {"question": 5, "answer": "me", "video": "v_1"},
        ["who?", "me"],
    ]
    return VideoQuestionSource(str(write_lines(tmp_path / "qa.jsonl", rows)), str(videos))


def test_video_questions(video_questions, tmp_path):
    videos = tmp_path / "videos"
    found = [video_questions[i] for i in range(5)]
    names = ["v_1.mp4", "v.2.mkv", "sub/deep.mp4", "v_3.MP4", "gone.mp4"]  # whether it is there, opening it tells
    assert [record.video for record in found] == [Clip(videos / name) for name in names]
    assert all(record.conversations == [turns("<video>\nwho?", "me")] for record in found)
    kinds = [kind_of(video_questions, i) for i in range(5, 12)]
    assert kinds == ["missing file"] * 2 + ["path outside the root"] + ["not a conversation"] * 4
    assert len(video_questions) == 12


def test_video_questions_in_an_array(tmp_path):
    """Video-ChatGPT's files are arrays."""
    (tmp_path / "v_1.avi").touch()
    file = tmp_path / "qa.json"
    file.write_text(json.dumps([{"q": "who?", "a": "me", "video_id": "v_1"}]))
    assert VideoQuestionSource(str(file), str(tmp_path))[0].video == Clip(tmp_path / "v_1.avi")
    with pytest.raises(UserError, match="has videos: expected their directory .--videos, or the source's key"):
        VideoQuestionSource(str(file), "")


# ---- ArrayRecord -----------------------------------------------------------------------------------------------

RECORDS = [
    Record([Picture(data=b"p", name="p.png"), Picture(data=b"q", name="q.png")], None, [turns("<image><image>", "b")]),
    Record(video=Clip(data=b"v", name="v.mp4"), conversations=[turns("<video>", "b"), turns("<video> é", "c")]),
    Record(conversations=[turns("a", "b")], name="text[1]"),
]


def same_record(a: Record, b: Record) -> bool:
    def plain(record):
        video = record.video
        frames = (list(video.pictures), list(video.times)) if isinstance(video, Frames) else video
        return list(record.images), frames, list(record.conversations), record.name

    return plain(a) == plain(b)


def test_records_come_back():
    frames = Frames([Picture(data=b"f", name="v frame 0"), Picture(data=b"g", name="v frame 1")], [0.0, 0.5], "v")
    for record in (*RECORDS, Record(video=frames, conversations=[turns("<video>", "b")])):
        assert same_record(unpack_record(pack_record(record)), record)


def wrong(**changes) -> bytes:
    values = msgpack.unpackb(pack_record(RECORDS[0])) | changes
    return msgpack.packb({key: value for key, value in values.items() if value is not KeyError})


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xc1",
        b"\x93\x01",
        b"\x91" * 5000,
        msgpack.packb(None),
        msgpack.packb([1]),
        msgpack.packb({1: 2}),
        msgpack.packb({"name": "x"}),
        wrong(name=5),
        wrong(name=b"bytes"),
        wrong(images=["text", b"q"]),
        wrong(images=[b"p"]),
        wrong(image_names=["p.png", 5]),
        wrong(conversations=[]),
        wrong(conversations=[5]),
        wrong(conversations=["text"]),
        wrong(video=5),
        wrong(video=b"v"),
        wrong(frames=[b"f"]),
        wrong(frames=[b"f"], times=[0.0]),
        wrong(images=[], image_names=[], frames=[b"f"], times=["soon"]),
        wrong(images=[], image_names=[], frames=[b"f"], times=[None]),
        wrong(images=[], image_names=[], frames=["f"], times=[0.0]),
        wrong(video_name=None),
        *(wrong(**{key: KeyError}) for key in ("name", "conversations", "images", "image_names", "frames", "times")),
        pack_record(RECORDS[0]) + b"x",
    ],
)
def test_what_is_no_record(content):
    with pytest.raises(BadRecord) as error:
        unpack_record(content)
    assert error.value.kind == "not a conversation" and "\n" not in str(error.value)


def test_random_bytes_are_no_records():
    """Damaged in one place, or noise: a record with plain values, or a BadRecord."""
    rng, bad = random.Random(0), 0
    whole = pack_record(RECORDS[1])
    for i in range(2000):
        content = bytearray(whole if i % 2 else rng.randbytes(rng.randrange(100)))
        if i % 2:
            content[rng.randrange(len(content))] = rng.randrange(256)
        try:
            record = unpack_record(bytes(content))
        except BadRecord:
            bad += 1
            continue
        assert all(isinstance(conversation, list) for conversation in record.conversations)
        assert isinstance(str(record.video), str)
    assert 1000 < bad < 2000


def write_shard(file: Path, records) -> Path:
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(file), "group_size:1")
    for record in records:
        writer.write(record if isinstance(record, bytes) else pack_record(record))
    writer.close()
    return file


@pytest.fixture
def shards(tmp_path) -> ArrayRecordSource:
    (tmp_path / "shards").mkdir()
    write_shard(tmp_path / "shards" / "b.array_record", [RECORDS[2], b"noise"])
    write_shard(tmp_path / "shards" / "a.array_record", RECORDS[:2])
    return ArrayRecordSource(str(tmp_path / "shards"))


def test_shards(shards, tmp_path):
    assert len(shards) == 4 and all(same_record(shards[i], RECORDS[i]) for i in range(3))
    assert kind_of(shards, 3) == "not a conversation" and shards.where(3) == "shards[3]"
    some = ArrayRecordSource(str(tmp_path / "shards" / "b*.array_record"))
    assert len(some) == 2 and same_record(some[0], RECORDS[2])


def test_files_that_are_no_shards(tmp_path):
    for files in ("", str(tmp_path), str(tmp_path / "*.array_record")):
        with pytest.raises(UserError, match=r"expected a directory or pattern of \*.array_record files, found none"):
            ArrayRecordSource(files)
    (tmp_path / "x.array_record").write_bytes(b"no shard")
    with pytest.raises(UserError, match="not readable as ArrayRecord") as error:
        ArrayRecordSource(str(tmp_path))
    assert "\n" not in str(error.value)


# ---- tensorflow-datasets ---------------------------------------------------------------------------------------


def png(grey: int, size=(8, 6)) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", size, (grey,) * 3).save(content, "PNG")
    return content.getvalue()


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory) -> Path:
    """Three examples with all kinds of features, written by tensorflow-datasets without TensorFlow."""
    import tensorflow_datasets as tfds

    names = ["red_square", "circle"]
    features = {
        "image": tfds.features.Image(shape=(None, None, 3)),
        "pixels": tfds.features.Tensor(shape=(2, 3, 3), dtype=np.uint8),
        "grid": tfds.features.Tensor(shape=(2, 3), dtype=np.uint8),
        "question": tfds.features.Text(),
        "answers": tfds.features.Sequence(tfds.features.Text()),
        "label": tfds.features.ClassLabel(names=names),
        "labels": tfds.features.Sequence(tfds.features.ClassLabel(names=names)),
        "qa": {"answer": tfds.features.Text(), "count": np.int64},
    }
    examples = [
        {
            "image": io.BytesIO(png(50 * i)),
            "pixels": np.full((2, 3, 3), 9 * i, np.uint8),
            "grid": np.zeros((2, 3), np.uint8),
            "question": f"what is {i}?" if i < 2 else b"\xff\xfe",
            "answers": [["red", "blue", "blue"], ["a cat", "an ox"], []][i],
            "label": [0, 1, -1][i],
            "labels": [0, 1, 1],
            "qa": {"answer": f"nested {i}", "count": 7 + i},
        }
        for i in range(3)
    ]

    class Shapes(tfds.core.GeneratorBasedBuilder):
        __module__ = "shapes"  # of one in a package tfds looks for files, with a package that need not be installed
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            yield from enumerate(examples)

    directory = tmp_path_factory.mktemp("tfds")
    Shapes(data_dir=str(directory), file_format="array_record").download_and_prepare()
    return directory


def shapes(tfds_dir, **changes) -> TfdsSource:
    keys = dict(name="shapes", split="train", image="image", question="question", answer="answers", prompt="")
    return TfdsSource(data_dir=str(tfds_dir), **keys | changes)


def asked(source: TfdsSource, n: int) -> list[tuple[str, str]]:
    return [tuple(turn["value"] for turn in source[i].conversations[0]) for i in range(n)]


def by_grey(tfds_dir) -> dict[int, int]:
    """tfds shuffles: where the example of each number is, by its picture."""
    source = shapes(tfds_dir, question="", prompt="which?", answer="qa.answer")
    pixels = [np.asarray(Image.open(io.BytesIO(source[i].images[0].data))) for i in range(len(source))]
    assert [p.shape for p in pixels] == [(6, 8, 3)] * 3
    return {int(p.max()) // 50: i for i, p in enumerate(pixels)}


def test_tfds_answers(tfds_dir):
    places = by_grey(tfds_dir)
    assert sorted(places) == [0, 1, 2]
    tfds = shapes(tfds_dir)
    found = {i: tfds[places[i]] for i in (0, 1)}
    assert found[0].conversations == [turns("<image>\nwhat is 0?", "blue")]  # the most frequent
    assert found[1].conversations == [turns("<image>\nwhat is 1?", "a cat")]  # the first of several
    assert found[1].images == [Picture(data=png(50), name=f"shapes/train[{places[1]}]")]
    assert kind_of(tfds, places[2]) == "not UTF-8"
    assert kind_of(shapes(tfds_dir, question="", prompt="which?"), places[2]) == "no answer"
    numbers = shapes(tfds_dir, answer="qa.count")
    assert numbers[places[1]].conversations[0][1]["value"] == "8"
    assert found[0].kinds == [] and shapes(tfds_dir, question_kind="qa.count")[places[1]].kinds == ["8"]
    assert shapes(tfds_dir, question_kind="").fingerprint() == tfds.fingerprint()


def test_tfds_class_labels(tfds_dir):
    """Names, not numbers; -1 is a label that is kept secret, not the last name."""
    labels = shapes(tfds_dir, question="", prompt="which shape?", answer="label")
    places = by_grey(tfds_dir)
    assert labels[places[0]].conversations == [turns("<image>\nwhich shape?", "red square")]
    assert labels[places[1]].conversations == [turns("<image>\nwhich shape?", "circle")]
    assert kind_of(labels, places[2]) == "no answer"
    several = shapes(tfds_dir, question="", prompt="which?", answer="labels")
    assert asked(several, 3) == [("<image>\nwhich?", "circle")] * 3


def test_tfds_pixels_without_a_file(tfds_dir):
    tfds = shapes(tfds_dir, image="pixels", answer="qa.answer", question="", prompt="which?")
    greys = {i: np.asarray(Image.open(io.BytesIO(tfds[i].images[0].data))) for i in range(3)}
    assert sorted(int(p.max()) for p in greys.values()) == [0, 9, 18] and greys[0].shape == (2, 3, 3)
    for keys in (dict(image="grid"), dict(answer="qa"), dict(answer="grid")):
        odd = shapes(tfds_dir, **dict(question="", prompt="which?", answer="qa.answer") | keys)
        assert {kind_of(odd, i) for i in range(3)} == {"not a conversation"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "no_such_set"}, "tfds no_such_set/train: Dataset no_such_set not found"),
        ({"split": "final"}, r"tfds shapes/final: Unknown split 'final'. Should be one of \['train'\]"),
        ({"image": "photo"}, "tfds shapes: image: expected one of image, pixels, .*; found 'photo'"),
        ({"answer": "qa.none"}, "tfds shapes: answer: expected one of .*; found 'qa.none'"),
        ({"question": ""}, "tfds shapes: expected a feature 'question' or a 'prompt' to ask, one of the two"),
        ({"prompt": "which?"}, "tfds shapes: expected a feature 'question' or a 'prompt' to ask, one of the two"),
    ],
)
def test_tfds_keys_that_are_wrong(tfds_dir, changes, message):
    with pytest.raises(UserError, match=message) as error:
        shapes(tfds_dir, **changes)
    assert "\n" not in str(error.value)


def test_damaged_tfds_examples(tfds_dir, tmp_path):
    shutil.copytree(tfds_dir, tmp_path / "copy")
    keys = dict(answer="qa.answer", question="", prompt="which?")
    before = shapes(tmp_path / "copy", **keys).fingerprint()
    shard = next((tmp_path / "copy").rglob("*.array_record*"))
    content = bytearray(shard.read_bytes())
    end = np.flatnonzero(np.frombuffer(content[:65536], np.uint8))[-1]  # what comes after is the index
    content[end // 2] ^= 0x55
    shard.write_bytes(content)
    os.utime(shard, (0, 0))  # tfds tells seconds only
    again = shapes(tmp_path / "copy", **keys)
    kinds = []
    for i in range(3):
        try:
            assert again[i].conversations[0][0]["value"] == "<image>\nwhich?"
        except BadRecord as error:
            kinds.append(error.kind)
    assert kinds == ["damaged shard"] and again.fingerprint() != before


# ---- All of them -----------------------------------------------------------------------------------------------


def said(source) -> list[str]:
    """All that a source gives, as text; run in another process."""
    found = [f"{len(source)} {source.fingerprint()}"]
    for i in range(len(source)):
        try:
            found.append(f"{source.where(i)} {source[i]}")
        except BadRecord as error:
            found.append(f"{source.where(i)} {error.kind}: {error}")
    return found


def test_the_same_in_another_process(llava, video_questions, shards, tfds_dir):
    every = [llava, video_questions, shards, shapes(tfds_dir), EasyVqaSource("test")]
    here = [said(each) for each in every]  # and with all files open when they are pickled
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert list(pool.map(said, every)) == here
    assert [len(lines) for lines in here] == [7, 13, 5, 4, 1001]


def test_a_fork_reads_its_own(llava):
    """Two processes that share an opened file do not disturb each other."""
    expected = said(llava)
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        assert pool.submit(said, llava).result() == expected == said(llava)


def test_fingerprints_follow_the_files(llava, video_questions, shards, tmp_path):
    for each, file in (llava, "set.jsonl"), (video_questions, "qa.jsonl"), (shards, "shards/b.array_record"):
        before = each.fingerprint()
        assert each.fingerprint() == before
        status = (tmp_path / file).stat()
        os.utime(tmp_path / file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        assert each.fingerprint() != before
    other = LlavaSource(str(tmp_path / "set.jsonl"), str(tmp_path / "videos"))
    assert other.fingerprint() != llava.fingerprint()


def of(**by_name):
    config = default_config()
    with config.unlocked():
        config.data.train = sources(**by_name)
    return open_sources(config.data, "train")


def test_a_mixture(tmp_path):
    file = str(write_lines(tmp_path / "set.jsonl", [row(image="1.jpg")]))
    found, weights = of(
        b=source("llava", file=file, images=str(tmp_path), weight=0.5),
        a=source("video_qa", file=file, videos=str(tmp_path)),
    )
    assert [type(each) for each in found] == [VideoQuestionSource, LlavaSource] and weights == [1.0, 0.5]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"kind": "llama"}, "source: expected a kind of easyvqa, llava, video_qa, array_record, tfds; found 'llama'"),
        (
            {"kind": "llava", "imges": "x"},
            "source llava: expected a key of weight, file, images, videos; found 'imges'",
        ),
        ({"kind": "llava", "file": 3}, "source llava: file: expected str, found 3"),
        ({"kind": "llava", "weight": "3"}, "source llava: weight: expected float, found '3'"),
    ],
)
def test_wrong_source_keys(keys, message):
    with pytest.raises(UserError) as error:
        source(**keys)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("keys", "change", "message"),
    [
        ({"kind": "llava"}, {}, "config.data.train.x: file: expected a .json or .jsonl file, found none"),
        ({"kind": "array_record"}, {}, "config.data.train.x: files: expected a directory or pattern of"),
        ({"kind": "easyvqa", "split": "dev"}, {}, "config.data.train.x: easyvqa: expected a split of train, test;"),
        ({"kind": "tfds"}, {"question": ""}, "config.data.train.x: tfds : expected a feature 'question' or a 'prompt'"),
        ({"kind": "llava"}, {"kind": "llama"}, "config.data.train.x.kind: expected one of easyvqa, llava, video_qa,"),
        ({"kind": "easyvqa"}, {"weight": -1.0}, "config.data.train.x.weight: expected a number of 0 or more, found -1"),
        ({"kind": "easyvqa"}, {"weight": float("nan")}, "config.data.train.x.weight: expected a number of 0 or more"),
    ],
)
def test_sources_that_cannot_be_opened(keys, change, message):
    """`change` is made later, as the command line does."""
    config = source(**keys)
    config.update(change)
    with pytest.raises(UserError) as error:
        of(x=config)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_no_sources():
    with pytest.raises(UserError, match="config.data.train: expected at least one source, found none"):
        of()
