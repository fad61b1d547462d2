"""Writers of a run's metrics: `metrics.jsonl`, TensorBoard's event files, and Weights & Biases."""

from collections.abc import Iterator, Mapping
import contextlib
import importlib.util
import json
import os
from pathlib import Path
import secrets
import socket
import struct
import sys
import time
from typing import Any, Protocol

from voco_jax.errors import UserError
from voco_jax.io.atomic import write_text
from voco_jax.io.files import read_bytes, read_text
from voco_jax.io.paths import exists
from voco_jax.terminal import log

Values = Mapping[str, float | None]  # by the names that `metrics.jsonl` has; None is not known


class Writer(Protocol):
    def scalars(self, step: int, values: Values) -> None: ...

    def picture(self, step: int, file: Path) -> None:
        """A sheet of answers, as PNG."""

    def close(self) -> None: ...


@contextlib.contextmanager
def open_writers(
    directory: Path, start: int, *, tensorboard: bool = True, wandb: str = "", run: str = "", config: Any = None
) -> Iterator[list[Writer]]:
    """Writers of a run that goes on after step `start`; what they have of later steps is dropped or ignored.

    wandb: project of Weights & Biases, '' for none, which shows the run's name and its config (a nested dict).
    """
    with contextlib.ExitStack() as opened:

        def add(writer: Writer) -> None:
            opened.callback(writer.close)
            writers.append(writer)

        writers: list[Writer] = []
        add(JsonLines(directory / "metrics.jsonl", start))
        if tensorboard:
            add(TensorBoard(directory / "tensorboard", start + 1))
        if wandb:
            add(WandB(wandb, directory, run, config))
        yield writers


def tag(name: str) -> str:
    """A name as TensorBoard and Weights & Biases show it, in groups.

    >>> [tag(name) for name in ("loss", "mfu", "goodput", "eval_loss", "accuracy")]
    ['train/loss', 'speed/mfu', 'time/goodput', 'eval/loss', 'eval/accuracy']
    """
    if name.startswith("eval_") or name == "accuracy":
        return f"eval/{name.removeprefix('eval_')}"
    if name.endswith("_per_second") or name in ("tokens_per_second_per_device", "mfu"):
        return f"speed/{name}"
    return f"time/{name}" if name in ("seconds", "goodput") else f"train/{name}"


class JsonLines:
    """One JSON object per line. A killed run leaves at most its last line unfinished."""

    def __init__(self, path: Path, start: int):
        drop_after(path, start)
        self._file = path.open("ab", buffering=0)

    def scalars(self, step: int, values: Values) -> None:
        _write_all(self._file, (json.dumps({"step": step} | dict(values)) + "\n").encode())

    def picture(self, step: int, file: Path) -> None:
        """Nothing: the sheets are files beside it."""

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """A file of events, which TensorBoard shows together with those of earlier starts in the same directory.

    Events are written at once, so that a killed run leaves all up to the last. TensorBoard ignores what earlier files
    have of `first_step` and later steps.
    """

    def __init__(self, directory: Path, first_step: int):
        directory.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        self._proto, self._checksum = _tensorboardx()
        self._file = (directory / name).open("ab", buffering=0)  # nothing is left to write, and to fail, at its close
        self._write(file_version="brain.Event:2")
        start = self._proto.SessionLog(status=self._proto.SessionLog.START)
        self._write(step=first_step, session_log=start)

    def scalars(self, step: int, values: Values) -> None:
        known = [dict(tag=tag(name), simple_value=value) for name, value in values.items() if value is not None]
        self._write(step=step, summary=dict(value=known))

    def picture(self, step: int, file: Path) -> None:
        png = file.read_bytes()
        width, height = struct.unpack(">II", png[16:24])
        image = dict(width=width, height=height, colorspace=4, encoded_image_string=png)
        self._write(step=step, summary=dict(value=[dict(tag="eval/answers", image=image)]))

    def close(self) -> None:
        self._file.close()

    def _write(self, **fields) -> None:
        data = self._proto.Event(wall_time=time.time(), **fields).SerializeToString()
        length = struct.pack("<Q", len(data))
        record = (length, struct.pack("<I", self._checksum(length)), data, struct.pack("<I", self._checksum(data)))
        _write_all(self._file, b"".join(record))


def _tensorboardx() -> tuple[Any, Any]:
    """tensorboardX's protocol buffers and checksum.

    Importing it imports torch where that is installed, which takes seconds and brings CUDA libraries of its own into
    the process; nothing of what is used here needs it.
    """
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # type: ignore[assignment]  # documented: an import of it then fails
    try:
        from tensorboardX.proto import event_pb2
        from tensorboardX.record_writer import masked_crc32c
    finally:
        if hidden:
            del sys.modules["torch"]
    return event_pb2, masked_crc32c


WANDB_ID = "wandb/id"  # in a run directory


class WandB:
    """A run of Weights & Biases, the same one each time that a run directory goes on.

    The package's own environment variables hold: WANDB_MODE=offline writes into the run directory, and
    `wandb sync` uploads it later.
    """

    def __init__(self, project: str, directory: Path, run: str, config: Any):
        import wandb

        kept = directory / WANDB_ID
        if not kept.exists():  # a random one: other people have runs of this name too
            kept.parent.mkdir(exist_ok=True)
            write_text(kept, secrets.token_hex(8))
        identity = read_text(kept, most=64)
        try:
            self._run = wandb.init(
                project=project, dir=directory, name=Path(run).name, id=identity, resume="allow", config=config
            )
        except wandb.Error as error:  # no account, no network
            raise UserError(f"config.train.wandb: {' '.join(str(error).split())} (WANDB_MODE=offline?)") from None
        self._image = wandb.Image

    def scalars(self, step: int, values: Values) -> None:
        self._run.log({tag(name): value for name, value in values.items() if value is not None}, step=step)

    def picture(self, step: int, file: Path) -> None:
        self._run.log({"eval/answers": self._image(str(file))}, step=step)

    def close(self) -> None:
        self._run.finish()


def check_wandb(project: str) -> None:
    """UserError where the package is wanted and missing, before a training has begun."""
    if project and importlib.util.find_spec("wandb") is None:
        raise UserError(f"config.train.wandb: found {project!r}, but wandb is not installed: pip install wandb")


def read_metrics(path: Path) -> list[tuple[str, dict]]:
    """(line, its values) of the lines of `metrics.jsonl`; without values where a line is not an object with a step."""

    def parse(line: str) -> dict:
        with contextlib.suppress(ValueError, RecursionError):
            values = json.loads(line)
            if isinstance(values, dict) and isinstance(values.get("step"), int):
                return values
        return {}

    # What stands after the last newline was being written when the run was killed
    return [(line, parse(line)) for line in read_bytes(path).decode(errors="replace").split("\n")[:-1]]


def drop_after(path: Path, step: int) -> None:
    """Keep the lines of `metrics.jsonl` of steps up to `step`."""
    if not exists(path):
        return
    lines = read_metrics(path)
    if damaged := [number for number, (_, values) in enumerate(lines, start=1) if not values]:
        log(f"{path}: {len(damaged)} lines are not metrics, the first is line {damaged[0]}; left out")
    write_text(path, "".join(f"{line}\n" for line, values in lines if values and values["step"] <= step))


def _write_all(file, data: bytes) -> None:
    """Write all of the data to an unbuffered file; an OSError names the file."""
    try:
        while data:
            data = data[file.write(data) :]
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file.name)) from None
