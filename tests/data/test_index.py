"""What the index knows of records, and when it has to look at them again."""

import dataclasses
import json
import multiprocessing
import os
import pwd
import signal
from types import SimpleNamespace

import numpy as np
import pytest

from tests.data.test_video import write_clip
from tests.helpers.record_lists import ListSource, plain_picture, turns
from voco_jax.chat_templates import CHAT_TEMPLATES
from voco_jax.data import index as index_module
from voco_jax.data.conversations import Encoder
from voco_jax.data.index import make_index
from voco_jax.data.records import DAMAGED, BadRecord, Clip, Record
from voco_jax.data.samples import SampleMaker
from voco_jax.data.sources.llava import LlavaSource
from voco_jax.data.video import FrameSampling, VideoInfo
from voco_jax.errors import TryAgain, UserError
from voco_jax.io.paths import as_path


@pytest.fixture(scope="module")
def encoder(small_tokenizer):
    return Encoder(small_tokenizer, CHAT_TEMPLATES["bare"], num_voco_tokens=1, num_visual_tokens=1, compressed=True)


def maker(encoder, row_length=40, max_images=2):
    return SampleMaker(encoder, row_length, max_images, FrameSampling(4))


def test_the_names_of_caches_made_earlier():
    """A cache of an unchanged data set is found again, by the name that versions of the same arrays gave it."""
    tokenizer = SimpleNamespace(backend_tokenizer=SimpleNamespace(to_str=lambda: "a tokenizer"))
    encoder = SimpleNamespace(
        tokenizer=tokenizer, template=CHAT_TEMPLATES["voco_v1"], num_voco_tokens=2, num_visual_tokens=2,
        compressed=True, verbatim=False, system=None, image_position="front",
    )  # fmt: skip
    source = SimpleNamespace(fingerprint=lambda: "a source")
    name = index_module._cache_file(source, maker(encoder), "/d").name
    assert name == "index-1f01893f8d1566079a9ce4f8.npz"


def test_literally(encoder, tmp_path):
    one, other = plain_picture(1), plain_picture(2)
    long = "is it " + "very " * 60 + "red?"
    records = [
        Record(
            [one], conversations=[turns("what is it?", "a cat"), turns("what is it?", ""), turns("what?", "so " * 60)]
        ),
        Record([one, other, one], conversations=[turns("what is it?", "a cat")]),
        Record([other], conversations=[turns(long, "no")]),
        Record([one], conversations=[turns("what is it?", "a red cat")]),
        Record(conversations=[[{"from": "human", "value": "what is it?"}, {"from": "gpt", "value": "a cat"}]]),
    ]
    index = make_index(ListSource(records), maker(encoder), tmp_path, 0, "test")
    assert index.records.tolist() == [0, 3, 4] and index.num_images.tolist() == [1, 1, 0]
    assert index.pictures[0] == index.pictures[1] != 0 and index.pictures[2] == 0
    assert index.offsets.tolist() == [0, 2, 3, 4] and index.conversations.tolist() == [0, 2, 0, 0]
    expected = [len(encoder.encode(r.conversations[0], len(r.images))) for r in (records[0], records[3], records[4])]
    assert index.lengths.tolist() == [expected[0], 40, *expected[1:]]
    other = Encoder(encoder.tokenizer, CHAT_TEMPLATES["llava_v1"], 3, 3, compressed=True)
    another = make_index(ListSource(records), maker(other, row_length=0, max_images=9), tmp_path, 0, "test")
    kept = [0, 1, 3, 4]  # of records 0, 0, 3, 4: other prompts, no cut, and the same answers
    assert another.records.tolist() == [0, 2, 3, 4] and (another.answers[kept] == index.answers).all()
    assert len(set(index.answers.tolist())) == 3 and index.answers[0] == index.answers[3]  # "a cat" twice
    lost = len(encoder.encode(records[0].conversations[2], 1)) - 40
    assert index.report.lines("conversation") == [
        f"7 conversations: 4 good (1 cut by {lost} tokens), 3 skipped",
        "  2 skipped: does not fit; list[1]: images: expected at most config.data.images_per_pack = 2, found 3 | "
        f"list[2]: conversation of {len(encoder.encode(records[2].conversations[0], 1))} tokens: an image or every "
        "answer beyond config.data.row_length = 40 tokens",
        "  1 skipped: no answer; list[0]: turn 1 (gpt): expected text, found none",
    ]


def test_a_clip_is_looked_into_once_for_all_questions_that_follow(encoder, tmp_path, monkeypatch):
    looked = []
    monkeypatch.setattr("voco_jax.data.samples.probe", lambda clip: looked.append(str(clip)) or VideoInfo(8.0, 40))
    videos = [Clip(tmp_path / name) for name in ("a.mp4", "a.mp4", "a.mp4", "b.mp4", "a.mp4")]
    records = [Record(video=video, conversations=[turns("what is it?", "a cat")]) for video in videos]
    for record in records:
        record.conversations[0][0]["value"] = "<video>\nwhat is it?"
    index = make_index(ListSource(records), maker(encoder, max_images=4), tmp_path, 0, "test")
    assert index.num_images.tolist() == [4] * 5
    assert looked == [str(tmp_path / name) for name in ("a.mp4", "b.mp4", "a.mp4")]


@pytest.fixture
def rows(tmp_path):
    """A file of 600 text rows, some of them broken."""
    lines = []
    for i in range(600):
        conversation = [{"from": "human", "value": "what is it? " * (i % 3 + 1)}, {"from": "gpt", "value": "a cat"}]
        lines.append("{" if i % 100 == 7 else json.dumps({"conversations": conversation}))
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(lines))
    return file


def same(a, b):
    for name, array in a.arrays.items():
        np.testing.assert_array_equal(array, b.arrays[name], err_msg=name)
    assert a.report == b.report


def test_processes_find_the_same(rows, encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "WORTH_WORKERS", 0)
    source = LlavaSource(str(rows))
    alone = make_index(source, maker(encoder), tmp_path / "a", 0, "test")
    assert (len(alone), alone.report.skipped) == (594, {"broken JSON": 6})
    same(make_index(source, maker(encoder), tmp_path / "b", 2, "test"), alone)


def test_a_long_look_is_kept_until_something_changes(rows, encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "KEPT_FROM", 0)
    looked = []
    scan = index_module._scan
    monkeypatch.setattr(index_module, "_scan", lambda *args: looked.append(args) or scan(*args))

    def look(**changes):
        looked.clear()
        index = make_index(LlavaSource(str(rows)), maker(encoder, **changes), tmp_path / "cache", 0, "test")
        return index, bool(looked)

    first, fresh = look()
    assert fresh
    again, fresh = look()
    assert not fresh
    same(first, again)
    assert look(row_length=39)[1] and look(max_images=3)[1] and not look()[1]
    rows.write_text(rows.read_text() + "\n{}")
    changed, fresh = look()
    assert fresh and changed.report.seen == first.report.seen + 1

    (kept,) = {f for f in (tmp_path / "cache").iterdir() if f.stat().st_mtime_ns == max(
        g.stat().st_mtime_ns for g in (tmp_path / "cache").iterdir())}  # fmt: skip
    kept.write_bytes(kept.read_bytes()[:200])
    with pytest.raises(UserError, match=r"index-\w+.npz: damaged .* delete it, and the index is made anew"):
        look()


@pytest.mark.parametrize("place", ["below a file", "unreadable", "no home"])
def test_where_no_index_can_be_kept(encoder, tmp_path, monkeypatch, capfd, place):
    """A container with a user of its own, a home of another's, a full disk: one line, and no index is kept."""
    monkeypatch.setattr(index_module, "KEPT_FROM", 0)
    monkeypatch.chdir(tmp_path)
    source = ListSource([Record([plain_picture(1)], conversations=[turns("what is it?", "a cat")])])
    kept = make_index(source, maker(encoder), tmp_path / "kept", 0, "test")
    cache, before = tmp_path / "file" / "cache", os.geteuid()
    (tmp_path / "file").touch()
    if place == "no home":
        cache = "~/.cache/voco_jax"
        monkeypatch.delenv("HOME")
        monkeypatch.setattr(pwd, "getpwuid", lambda uid: {}[uid])  # a user without an entry
        with pytest.raises(UserError, match="^~/run: "):
            as_path("~/run")
    elif place == "unreadable":
        cache = tmp_path / "home" / ".cache"
        cache.mkdir(parents=True)
        cache.parent.chmod(0)
        if before == 0:  # who may read everything
            os.seteuid(65534)
    try:
        for _ in range(2):
            same(make_index(source, maker(encoder), cache, 0, "test"), kept)
    finally:
        os.seteuid(before)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "indexing" not in line]
    assert line.startswith("data: ") and line.endswith(" (config.data.cache_dir)") and "cannot be kept" in line
    assert sorted(os.listdir(tmp_path)) == sorted({"file", "kept"} | ({"home"} if place == "unreadable" else set()))


class Deadly(ListSource):
    """Ends the process that reads it, unless it is the first."""

    def __getitem__(self, i):
        if multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(i)


def test_a_process_that_is_killed(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "WORTH_WORKERS", 0)
    source = Deadly([Record(conversations=[turns("what is it?", "a cat")])])
    with pytest.raises(TryAgain, match=r"data: a worker process ended too early \(out of memory\?\); the same"):
        make_index(source, maker(encoder), tmp_path, 1, "test")


def test_a_clip_that_is_cut_off_is_taken_where_that_is_wanted(encoder, tmp_path):
    file = write_clip(tmp_path / "clip.mkv").file
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    record = Record(video=Clip(file), conversations=[turns("<video>\nwhat is it?", "a cat")])
    strict = maker(encoder, max_images=4)
    with pytest.raises(BadRecord, match="cut off or damaged; --incomplete or config.data.video.incomplete takes"):
        strict.frame_times(record)
    taking = dataclasses.replace(strict, incomplete=True)
    times = taking.frame_times(record)
    assert times[-1] < 1.3 and len(taking.load_images(record, times, None)) == 4


def test_a_source_that_was_not_read_is_looked_at_anew(rows, encoder, tmp_path, monkeypatch):
    """A shard's reader tells a disk's error as it tells damage: no record is skipped for good."""
    monkeypatch.setattr(index_module, "KEPT_FROM", 0.0)

    class Failing(LlavaSource):
        failing = True

        def __getitem__(self, i):
            if self.failing and i == 1:
                raise BadRecord(DAMAGED, "read() failed: Input/output error")
            return super().__getitem__(i)

    source = Failing(str(rows))
    first = make_index(source, maker(encoder), tmp_path / "cache", 0, "test")
    source.failing = False
    again = make_index(source, maker(encoder), tmp_path / "cache", 0, "test")
    assert len(again) == len(first) + 1 and list((tmp_path / "cache").iterdir())
