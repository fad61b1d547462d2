"""A clip's memory is the same however its frames are compressed, and grows by its slots alone; any clip will do."""

from collections.abc import Iterator
from fractions import Fraction
import os
from pathlib import Path
import subprocess
import sys
import weakref

import av
import numpy as np
import pytest

from tests.data.test_video import REAL, sound_file
from tests.data.test_video_kinds import write_animation
from tests.helpers import tiny
from tests.helpers.commands import run_main
from voco_jax import ask, compress
from voco_jax.api import Request
from voco_jax.data.records import Clip
from voco_jax.data.video import FrameSampling, read_frames
from voco_jax.infer import compress as compressing
from voco_jax.infer import image_encoder
from voco_jax.terminal import printable

BIKES = REAL / "bikes.mp4"
SIX = FrameSampling(num_frames=6)
QUESTIONS = ["what shape is in the image?", "is there a circle?"]


@pytest.fixture(scope="module")
def six(model):
    """Bikes in six frames, all at once."""
    return model.compress_video(BIKES, sampling=SIX)


def write_clip(file, frames, rate=Fraction(25), codec="libx264", format="yuv420p", ticks=None, **options) -> Path:
    """A clip of the frames [height, width, 3], at ticks of 1 / 25 s where these are given."""
    with av.open(str(file), "w", **options) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = format
        if ticks is not None:
            stream.codec_context.time_base = Fraction(1, 25)
        for i, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels)
            if ticks is not None:
                frame.pts, frame.time_base = ticks[i], Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return Path(file)


def pictures(count: int, height: int = 48, width: int = 64) -> list[np.ndarray]:
    """Each another."""
    rng = np.random.default_rng(0)
    return [np.kron(rng.integers(256, size=(1, 3, 3)), np.ones((height, -(-width // 3), 1)))[:, :width].astype(np.uint8)
            for _ in range(count)]  # fmt: skip


# ---- The same memory -------------------------------------------------------------------------------------------


def watched(model, six, **options):
    watch = model.watch(str(BIKES), **options)
    times = [item.time for item in six.items]
    for time, frame in zip(times, read_frames(Clip(file=BIKES), times), strict=True):
        watch.add(frame, time)
    return watch.memory


def commanded(run, model, out, monkeypatch, capsys, *arguments):
    status, _, err = run_main(
        compress, monkeypatch, capsys, "--run", run, "--images", BIKES, "--out", out, "--frames", 6, *arguments
    )
    assert status == 0, err
    return model.open(out)


def test_one_by_one_in_batches_watched_and_by_the_command(run, model, six, tmp_path, monkeypatch, capsys):
    ways = {
        "one by one": model.compress_video(BIKES, sampling=SIX, batch_size=1),
        "in batches that do not divide": model.compress_video(BIKES, sampling=SIX, batch_size=4),
        "watched": watched(model, six, batch_size=1),
        "watched in batches": watched(model, six, batch_size=4),
        "command": commanded(run, model, tmp_path / "a.voco", monkeypatch, capsys),
        "command, in batches": commanded(run, model, tmp_path / "b.voco", monkeypatch, capsys, "--batch-size", 4),
    }
    apart = np.abs(six.keys[:, None] - six.keys[None]).max(axis=(2, 3, 4, 5)) + np.eye(6)
    assert apart.min() > 1e-3 and np.all(np.diff([item.time for item in six.items]) > 0)  # an order would show itself
    answers, (score,) = model.ask(QUESTIONS, six), model.scores([Request(QUESTIONS[0], six)], ["circle"])
    for way, bank in ways.items():
        assert [item.time for item in bank.items] == [item.time for item in six.items], way
        np.testing.assert_allclose(bank.keys, six.keys, atol=1e-5, err_msg=way)
        np.testing.assert_allclose(bank.values, six.values, atol=1e-5, err_msg=way)
        assert model.ask(QUESTIONS, bank) == answers, way
        (found,) = model.scores([Request(QUESTIONS[0], bank)], ["circle"])
        assert found.log_probability == pytest.approx(score.log_probability, abs=1e-4), way


SHARDED = """
import sys
import numpy as np
import voco_jax
from voco_jax import compress
from voco_jax.data.video import FrameSampling
from voco_jax.arguments import mesh_of
from voco_jax.terminal import printable

run, clip, expected, out, *questions = sys.argv[1:]
for mesh in ("frame=4", "data=2,frame=2", "data=4"):
    model = voco_jax.load(run, mesh=mesh_of(mesh))
    one = model.open(expected)
    sys.argv = ["compress", "--run", run, "--images", clip, "--frames", "6", "--mesh", mesh, "--out", f"{out}.{mesh}"]
    compress.main()
    for bank in (model.compress_video(clip, sampling=FrameSampling(num_frames=6)), model.open(f"{out}.{mesh}")):
        assert [item.time for item in bank.items] == [item.time for item in one.items], mesh
        np.testing.assert_allclose(bank.keys, one.keys, atol=1e-5, err_msg=mesh)
        np.testing.assert_allclose(bank.values, one.values, atol=1e-5, err_msg=mesh)
    print("\\n".join(model.ask(questions, bank)))
"""


@pytest.mark.multiprocess
def test_over_four_devices(run, model, six, tmp_path):
    """Frames spread over them: six over four, so two places are empty."""
    model.save(six, tmp_path / "one.voco")
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    done = subprocess.run(
        [sys.executable, "-c", SHARDED, run, BIKES, tmp_path / "one.voco", tmp_path / "out", *QUESTIONS],
        env=dict(os.environ, XLA_FLAGS=flags, JAX_PLATFORMS="cpu"), capture_output=True, text=True,
        cwd=tiny.CONFIG_FILE.parents[1],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if not line.startswith(str(tmp_path))]
    assert said == model.ask(QUESTIONS, six) * 3


# ---- Long clips ------------------------------------------------------------------------------------------------


@pytest.fixture
def most_alive(monkeypatch) -> Iterator[list[int]]:
    """The most decoded frames that there are at once, from now on."""
    alive, most = set(), [0]

    def counted(clip, times):
        frames = read_frames(clip, times)
        for frame in frames:
            alive.add(id(frame))
            weakref.finalize(frame, alive.discard, id(frame))
        most[0] = max(most[0], len(alive))
        return frames

    monkeypatch.setattr(image_encoder, "read_frames", counted)
    monkeypatch.setattr(compressing, "read_frames", counted)
    yield most


@pytest.mark.slow
def test_512_frames(run, model, tmp_path, monkeypatch, capsys, most_alive):
    """Asked about together; what is kept is the slots' keys and values, and frames go when they are compressed."""
    frames, config = pictures(512, 16, 16), model.config
    clip = write_clip(tmp_path / "long.mp4", frames, rate=Fraction(1))
    bank = model.compress_video(clip, sampling=FrameSampling(num_frames=0, fps=1.0))
    assert len(bank) == 512 and [round(item.time - 0.5) for item in bank.items] == list(range(512))
    llama = config.llama
    a_token = llama.num_hidden_layers * 2 * llama.num_key_value_heads * llama.head_dim * np.dtype(config.dtype).itemsize
    assert bank.nbytes == 512 * config.num_voco_tokens * a_token
    assert most_alive[0] <= 2 * 32
    answer = model.ask(QUESTIONS[0], bank, max_new_tokens=4)
    assert isinstance(answer, str)
    # Early frames are still read behind five hundred others
    scores = model.scores([Request(QUESTIONS[0], one) for one in (bank, bank[[1, 0, *range(2, 512)]])], ["circle"] * 2)
    assert scores[0].log_probability != scores[1].log_probability

    out = tmp_path / "long.voco"
    arguments = ["--run", run, "--images", clip, "--fps", 1, "--out", out, "--threads", 1]
    assert run_main(compress, monkeypatch, capsys, *arguments)[0] == 0
    np.testing.assert_allclose(model.open(out).keys, bank.keys, atol=1e-5)
    assert most_alive[0] <= 4 * 32  # some ahead of the one that is computed
    assert out.stat().st_size < bank.nbytes + 512 * 256  # names, times and checksums


# ---- Any clip --------------------------------------------------------------------------------------------------


def odd_clips(directory: Path) -> dict[str, Path]:
    return {
        "odd sides": write_clip(directory / "odd.mp4", pictures(9, 57, 33), format="yuv444p"),
        "odd sides, vp9": write_clip(directory / "odd.webm", pictures(9, 57, 33), codec="libvpx-vp9"),
        "23.976 a second": write_clip(directory / "film.mp4", pictures(30), rate=Fraction(24000, 1001)),
        "7 a second": write_clip(directory / "seven.mp4", pictures(9), rate=Fraction(7)),
        "variable": write_clip(directory / "variable.mp4", pictures(6), ticks=[0, 1, 2, 30, 31, 100]),
        "one frame": write_clip(directory / "one.mp4", pictures(1)),
        "no end": write_clip(directory / "live.webm", pictures(9), codec="libvpx-vp9", container_options={"live": "1"}),
        "in fragments": write_clip(
            directory / "parts.mp4", pictures(9), container_options={"movflags": "frag_keyframe+empty_moov"}
        ),
        "capitals": write_clip(directory / "FILM.MP4", pictures(9)),
        "animated picture": write_animation(directory / "moving.gif", [100] * 9).file,
        "no ending": write_clip(directory / "film.ts", pictures(9)).rename(directory / "film"),
    }


@pytest.mark.slow
def test_any_clip_is_compressed_and_asked_about(run, model, tmp_path, monkeypatch, capsys):
    paths, out = [*sorted(REAL.glob("*.mp4")), *odd_clips(tmp_path).values()], tmp_path / "all.voco"
    assert {"bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4"} <= {path.name for path in paths}
    status, said, err = run_main(compress, monkeypatch, capsys, "--run", run, "--images", *paths, "--out", out)
    counts = {path: 1 if path.name == "one.mp4" else 6 if path.name == "variable.mp4" else 8 for path in paths}
    assert status == 0 and f"{sum(counts.values())} pictures, 2 tokens each" in said and "left out" not in err
    bank = model.open(out)
    monkeypatch.setattr(ask, "load_model", lambda args: model)  # once
    for path, count in counts.items():
        of_clip = bank[[i for i, item in enumerate(bank.items) if item.source == str(path)]]
        assert len(of_clip) == count, path
        status, said, err = run_main(
            ask, monkeypatch, capsys, "--run", run, "--video", path, "--max-new-tokens", 4, *QUESTIONS
        )
        answers = model.ask(QUESTIONS, of_clip, max_new_tokens=4)
        assert (status, said.splitlines()[1::2]) == (0, [f"  {printable(answer)}" for answer in answers]), (path, err)


def broken_clips(directory: Path) -> dict[Path, str]:
    """And what is said of each."""
    whole, no_video = BIKES.read_bytes(), "expected a video, found: "
    directory.mkdir()
    contents = {"cut.mp4": whole[: len(whole) // 2], "text.mp4": b"a text\n" * 999, "empty.webm": b""}
    for name, content in contents.items():
        (directory / name).write_bytes(content)
    sound_file(directory / "sound.mp4", cover=False)
    expected = dict.fromkeys(contents, no_video) | {"sound.mp4": "expected a video, found sound alone"}
    return {directory / name: message for name, message in expected.items()}


def test_a_broken_clip_is_one_clear_line(run, tmp_path, monkeypatch, capsys):
    out, clips = tmp_path / "a.voco", broken_clips(tmp_path / "clips")
    for path, message in clips.items():
        for command, arguments in ((ask, ("--video", path, "what?")), (compress, ("--images", path, "--out", out))):
            status, said, err = run_main(command, monkeypatch, capsys, "--run", run, *arguments)
            assert (status, said) == (2, "") and err.startswith(f"error: {path}: {message}"), err
            assert err.count("\n") == 1 and not out.exists()
    # Found and not named, each is left out with its line
    arguments = ("--run", run, "--images", BIKES, tmp_path / "clips", "--out", out)
    status, said, err = run_main(compress, monkeypatch, capsys, *arguments)
    assert status == 0 and "8 pictures" in said and f"{len(clips)} left out" in said
    assert all(f"left out: {path}: {message}" in err for path, message in clips.items())
