"""Training data in a bucket, by the real client, against a server on this machine: the same batches as from a disk."""

import json
from pathlib import Path

import numpy as np
from PIL import Image
import pytest

from tests.data.test_video import write_clip
from tests.helpers.bucket_server import bucket_server
from tests.helpers.commands import run_main
from tests.helpers.record_lists import data_config, make_batches
from tools import convert_weights
from voco_jax import compress, evaluate, memory
from voco_jax.chat_templates import CHAT_TEMPLATES
from voco_jax.config import default_config, source, sources
from voco_jax.data.conversations import Encoder
from voco_jax.data.images import load_image
from voco_jax.data.media import NEITHER, PICTURE, VIDEO, kind_of
from voco_jax.data.records import MISSING, OUTSIDE, BadRecord, Clip
from voco_jax.data.shards import __main__ as build_records
from voco_jax.data.sources import open_sources
from voco_jax.data.sources.array_records import ArrayRecordSource
from voco_jax.data.sources.llava import LlavaSource, VideoQuestionSource, question_turns
from voco_jax.data.sources.roots import inside
from voco_jax.data.video import probe
from voco_jax.errors import UserError
from voco_jax.infer.compress import find_entries
from voco_jax.infer.memory_file import MemoryFile
from voco_jax.io.paths import as_path, file_state

ADDRESS = "gs://bucket/data"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Rows about pictures and clips, in a directory."""
    root = tmp_path_factory.mktemp("data")
    (root / "img/odd [1]").mkdir(parents=True)
    (root / "clips").mkdir()
    names = ["a.png", "b.png", "odd [1]/c*#%20.png"]
    for i, name in enumerate(names):
        Image.new("RGB", (20, 12), (80 * i + 40, 10, 10)).save(root / "img" / name)
    rows = [{"image": name, "conversations": question_turns("what?", "red", "<image>")} for name in names]
    (root / "mix.json").write_text(json.dumps(rows))
    write_clip(root / "clips/x.mp4", b_frames=2)
    write_clip(root / "clips/y.ts", b_frames=2)
    questions = [{"video_id": name, "q": "what?", "a": "bars"} for name in ("x", "y")]
    (root / "qa.jsonl").write_text("\n".join(map(json.dumps, questions)))
    return root


@pytest.fixture(scope="module")
def server(files):
    with bucket_server() as server:
        for file in files.rglob("*"):
            if file.is_file():
                server.objects[f"data/{file.relative_to(files)}"] = file.read_bytes(), 1
        yield server


def open_both(root):
    return [LlavaSource(f"{root}/mix.json", f"{root}/img"), VideoQuestionSource(f"{root}/qa.jsonl", f"{root}/clips")]


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_the_same_batches_as_from_a_disk(server, files, small_tokenizer, tmp_path, workers):
    """Pictures and videos, loaded by threads and by worker processes."""
    encoder = Encoder(
        small_tokenizer, CHAT_TEMPLATES["voco_v1"], num_voco_tokens=2, num_visual_tokens=2, compressed=True
    )
    data = data_config(batch_size=1, images_per_pack=8, rows_per_pack=2, row_length=256, conversations_per_record=0)
    here = make_batches(open_both(files), encoder, data, tmp_path, size=16)
    data.num_workers = workers
    there = make_batches(open_both(ADDRESS), encoder, data, tmp_path, size=16)
    for _ in range(2 if workers else 4):
        expected, found = next(here), next(there)
        for key in expected:
            np.testing.assert_array_equal(found[key], expected[key])
    assert there.report.seen and not there.report.skipped
    here.close(), there.close()


def test_what_is_not_there_is_one_line(server):
    with pytest.raises(UserError, match=f"^{ADDRESS}/none.json: not found; expected a .json or .jsonl file$"):
        LlavaSource(f"{ADDRESS}/none.json", f"{ADDRESS}/img")
    with pytest.raises(UserError, match=f"^{ADDRESS}/none: expected a directory .--images, or the source's"):
        LlavaSource(f"{ADDRESS}/mix.json", f"{ADDRESS}/none")
    for read in (load_image, lambda file: probe(Clip(as_path(file)))):
        with pytest.raises(BadRecord, match=f"^{ADDRESS}/img/none.png: not found$") as error:
            read(f"{ADDRESS}/img/none.png")
        assert error.value.kind == MISSING
    with pytest.raises(BadRecord, match=f"^{ADDRESS}/clips/none: expected a video of this name, ending in .3g2, "):
        server.objects["data/none.json"] = b'[{"video_id": "none", "q": "what?", "a": "bars"}]', 1
        VideoQuestionSource(f"{ADDRESS}/none.json", f"{ADDRESS}/clips")[0]


def test_a_bucket_without_permission(server):
    source = LlavaSource(f"{ADDRESS}/mix.json", f"{ADDRESS}/img")
    clip = Clip(as_path(f"{ADDRESS}/clips/x.mp4"))
    server.forbidden = True
    try:
        with pytest.raises(UserError, match=f"^{ADDRESS}/mix.json: Forbidden: ") as error:
            LlavaSource(f"{ADDRESS}/mix.json", f"{ADDRESS}/img")
        assert "\n" not in str(error.value)
        for read in (lambda: load_image(source[0].images[0]), lambda: probe(clip)):
            with pytest.raises(BadRecord, match=f"^{ADDRESS}/.*: Forbidden: ") as error:
                read()
            assert "\n" not in str(error.value)
    finally:
        server.forbidden = False


def test_data_stays_in_its_root(server):
    root = as_path(f"{ADDRESS}/img")
    assert str(inside(root, "odd [1]/c.png")) == f"{ADDRESS}/img/odd [1]/c.png"
    assert str(inside(root, f"{ADDRESS}/img/a.png")) == f"{ADDRESS}/img/a.png"
    for name in (f"{ADDRESS}/image", "gs://other/a.png", "../mix.json", "a/../../b", "/etc/passwd", "s3://b/a", "", 7):
        with pytest.raises(BadRecord) as error:
            inside(root, name)
        assert error.value.kind == OUTSIDE
    with pytest.raises(BadRecord, match="expected a path inside /data/img, found 'gs://bucket/a.png'"):
        inside(Path("/data/img"), "gs://bucket/a.png")


def test_shards_of_a_bucket(server, files, tmp_path, monkeypatch, capsys):
    """The same as of a disk, but for the paths."""
    commands = {"llava": ("mix.json", "--images", "img"), "video": ("qa.jsonl", "--videos", "clips")}
    for command, (rows, option, directory) in commands.items():
        records = []
        for name, root in (("there", ADDRESS), ("here", files)):
            arguments = (command, f"{root}/{rows}", option, f"{root}/{directory}", "--workers", 1)
            status, _, error = run_main(build_records, monkeypatch, capsys, *arguments, tmp_path / command / name)
            assert status == 0, error
            source = ArrayRecordSource(str(tmp_path / command / name))
            records.append([source[i] for i in range(len(source))])
        assert records[0] == records[1] and len(records[0]) > 1


@pytest.mark.parametrize(
    ("key", "made"),
    [
        ("files", source("array_record", files=f"{ADDRESS}/records")),
        ("data_dir", source("tfds", name="vqa", data_dir=ADDRESS)),
    ],
)
def test_what_is_read_from_local_files_only(key, made):
    config = default_config()
    with config.unlocked():
        config.data.train = sources(a=made)
    message = f"^config.data.train.a: {key}: {ADDRESS}[^\n]* from local files only; copy them first[^\n]*$"
    with pytest.raises(UserError, match=message):
        open_sources(config.data, "train")


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (build_records, ["llava", "rows.json", ADDRESS]),
        (compress, ["--run", "run", "--images", "a.png", "--out", f"{ADDRESS}/a.voco"]),
        (convert_weights, ["to-jax", "checkpoint", ADDRESS]),
        (evaluate, ["--run", "run", "--questions", "q.jsonl", "--answers", f"{ADDRESS}/a.jsonl"]),
        (memory, ["list", f"{ADDRESS}/a.voco"]),
    ],
)
def test_commands_for_files_of_this_machine(command, arguments, tmp_path, monkeypatch, capsys):
    """`Path("gs://…")` would be a directory `gs:` here."""
    monkeypatch.chdir(tmp_path)
    status, out, error = run_main(command, monkeypatch, capsys, *arguments)
    assert status == 2 and not out and not list(tmp_path.iterdir())
    assert error.startswith(f"error: {ADDRESS}") and "expected a path of this machine" in error
    with pytest.raises(UserError, match="expected a path of this machine"):
        MemoryFile(f"{ADDRESS}/a.voco")


def test_files_to_be_asked_about(server):
    """By their content, and what a directory has."""
    assert kind_of(as_path(f"{ADDRESS}/img/a.png")) == PICTURE
    assert kind_of(as_path(f"{ADDRESS}/clips/y.ts")) == VIDEO
    assert kind_of(as_path(f"{ADDRESS}/qa.jsonl")) == kind_of(as_path(f"{ADDRESS}/none")) == NEITHER
    entries = find_entries([ADDRESS, f"{ADDRESS}/img/a.png"])
    assert [(str(e.path).removeprefix(f"{ADDRESS}/"), e.is_video) for e in entries] == [
        ("clips/x.mp4", True), ("clips/y.ts", True), ("img/a.png", False), ("img/b.png", False),
        ("img/odd [1]/c*#%20.png", False),
    ]  # fmt: skip
    file = as_path(f"{ADDRESS}/replaced.mp4")
    file.write_bytes(b"one")
    before = file_state(file)
    assert file_state(file) == before
    file.write_bytes(b"two")
    assert file_state(file) != before
    file.unlink()
    with pytest.raises(FileNotFoundError):
        file_state(file)
