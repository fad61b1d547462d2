"""Several processes, usually one a host, that work as one: how they find each other, before any device is used.

    voco train --config=… --coordinator=HOST:PORT --num_processes=N --process_id=I

or the same in JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID (jax itself reads the first of them alone),
or nothing at all where jax finds out by itself: TPU pods, SLURM, Kubernetes, Open MPI. Elsewhere a process is alone.
"""

import argparse
from collections.abc import Iterator, Sequence
import contextlib
import hashlib
import os
import socket
import sys
import threading
from typing import Any, TypeVar

import jax
from jax.experimental import multihost_utils
import numpy as np

from voco_jax.errors import TryAgain, UserError, exit_status
from voco_jax.terminal import count_of

_FLAGS = ("--coordinator", "--num_processes", "--process_id")
_HINT = "--coordinator, --num_processes and --process_id set it by hand"
E = TypeVar("E", bound=Exception)
_LONGEST = 1024  # bytes of an error that other processes are told
_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that `start` takes."""
    parser.add_argument("--coordinator", default="", help="HOST:PORT of process 0, to all processes the same")
    parser.add_argument("--num_processes", type=int, default=0, metavar="N", help="how many there are")
    parser.add_argument("--process_id", type=int, default=-1, metavar="I", help="which of them this is, from 0")
    parser.add_argument(
        "--initialization_timeout", type=int, default=300, metavar="SECONDS",
        help="how long to wait for the others (default 300)",
    )  # fmt: skip


def start(
    coordinator: str = "", num_processes: int = 0, process_id: int = -1, initialization_timeout: int = 300
) -> None:
    """Join the other processes, if there are any. Call it once, before jax is asked for a device.

    coordinator, num_processes and process_id are given all three or not at all; then the environment is asked, and
    then jax. With the first two, each process sees all devices of its machine, or those of JAX_LOCAL_DEVICE_IDS.
    UserError for what cannot be; where the others do not come in time, one line and exit status 75.
    """
    if initialization_timeout < 1:
        raise UserError(f"--initialization_timeout: expected at least 1 second, found {initialization_timeout}")
    names = _FLAGS
    given: list[str | int | None] = [
        coordinator or None, num_processes or None, None if process_id == -1 else process_id
    ]  # fmt: skip
    if not any(value is not None for value in given):
        names, given = _VARIABLES, [os.environ.get(name) or None for name in _VARIABLES]
    arguments: dict[str, Any] = {}
    if any(value is not None for value in given):
        address, count, index = _checked(names, given)
        if index == 0:
            _check_port(names[0], address)
        who, hint = f"process {index} of {count}, coordinator {address}", ""
        # Nothing is asked of a cluster that somebody may be in: what was said holds
        arguments = dict(
            coordinator_address=address, num_processes=count, process_id=index, cluster_detection_method="deactivate"
        )
    elif _in_a_cluster():
        who, hint = "as the cluster says", f"; {_HINT}"
    else:
        return
    with _deadline(who, initialization_timeout):
        try:
            # jax would end the process with a stack trace of C++ when its time is up: ours comes first
            jax.distributed.initialize(**arguments, initialization_timeout=initialization_timeout + 60)
        except Exception as error:  # each kind of cluster has its own
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise TryAgain(f"distributed: {who}: {reason}{hint}") from error
    if jax.process_index() == 0:
        devices, local = count_of(jax.device_count(), "device"), jax.local_device_count()
        print(f"distributed: process 0 of {jax.process_count()}, {devices}, {local} local", flush=True)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A block that all processes leave at the same time: if one raises, the others raise a UserError or TryAgain.

    Without it they would wait in the next collective for a process that is gone, and end minutes later with a stack
    trace.
    """
    error, text = None, ""
    try:
        yield
    except Exception as caught:
        error = caught
        line = (str(caught) if isinstance(caught, UserError | OSError) else "") or repr(caught)
        text = f"{exit_status(caught)} {line}"
    for process, line in enumerate(texts_of_all(text)):
        if line and error is None:
            status, _, line = line.partition(" ")
            error = (TryAgain if int(status) == TryAgain.status else UserError)(f"process {process}: {line}")
    if error is not None:
        raise _known_to_all(error)


def texts_of_all(text: str) -> list[str]:
    """Each process's text, by process, at most 1,024 bytes of each. All processes call it together."""
    if jax.process_count() == 1:
        return [text]
    own = np.frombuffer(text.encode()[:_LONGEST].ljust(_LONGEST, b"\0"), np.uint8)
    return [line.tobytes().rstrip(b"\0").decode(errors="replace") for line in multihost_utils.process_allgather(own)]


def check_same(values: dict[str, object]) -> None:
    """UserError where the processes do not agree: it names what differs, and the first process that differs from 0.

    Values are compared by their repr. All processes call this, with the same names.
    """
    if jax.process_count() == 1:
        return
    digests = [np.frombuffer(hashlib.sha256(repr(value).encode()).digest(), np.uint8) for value in values.values()]
    found = multihost_utils.process_allgather(np.stack(digests))
    for name, *by_process in zip(values, *found, strict=True):
        for process, digest in enumerate(by_process):
            if (digest != by_process[0]).any():
                raise _known_to_all(UserError(f"process {process}: expected the {name} of process 0, found another"))


def _known_to_all(error: E) -> E:
    """The error, marked: `watchdog.py` need not tell the other processes."""
    error.known_to_all = True  # type: ignore[attr-defined]  # errors of any kind
    return error


def _checked(names: tuple[str, ...], given: Sequence[str | int | None]) -> tuple[str, int, int]:
    """(address, number of processes, this one's); UserError names the flag or variable."""
    missing = [name for name, value in zip(names, given, strict=True) if value is None]
    if missing:
        raise UserError(f"{', '.join(names)}: expected all three or none; {' and '.join(missing)} missing")
    address, numbers = str(given[0]), [str(value) for value in given[1:]]
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isdecimal() and 0 < int(port) < 2**16):
        raise UserError(f"{names[0]}: expected HOST:PORT, found {address!r}")
    for name, number in zip(names[1:], numbers, strict=True):
        try:
            int(number)
        except ValueError:
            raise UserError(f"{name}: expected a whole number, found {number!r}") from None
    count, index = map(int, numbers)
    if count < 1:
        raise UserError(f"{names[1]}: expected at least 1, found {count}")
    if not 0 <= index < count:
        raise UserError(f"{names[2]}: expected 0 to {count - 1}, one less than {names[1]}; found {index}")
    return address, count, index


def _check_port(name: str, address: str) -> None:
    """UserError where the coordinator's port is taken, of which jax may die without a word."""
    port = int(address.rpartition(":")[2])
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        raise UserError(f"{name}: port {port} of process 0's machine: {error.strerror}") from None


def _in_a_cluster() -> bool:
    """Whether jax would find the other processes by itself. Only a machine with TPUs asks a metadata server."""
    from jax._src.clusters import ClusterEnv  # there is no public way to ask; the same in jax 0.10 to 0.12

    try:
        return any(kind.is_env_present() for kind in ClusterEnv._cluster_types if not kind.opt_in_only_method)
    except Exception as error:  # no metadata server, no permission to ask Kubernetes …
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"distributed: as the cluster says: {reason}; {_HINT}") from error


@contextlib.contextmanager
def _deadline(who: str, seconds: int) -> Iterator[None]:
    """End the process with one line if the block takes longer: it waits inside of jax, where nothing can interrupt."""

    def give_up():
        print(f"error: distributed: {who}: the others did not come within {seconds} s", file=sys.stderr, flush=True)
        os._exit(TryAgain.status)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
