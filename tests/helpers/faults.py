"""System calls of a child process that fail when a test says so, as they do on a disk that dies or a server that is
away: whatever library calls, in any of its threads, gets the error from the kernel.

The child asks the kernel (seccomp) to be told of its calls before they are made; the test answers each with an error,
or lets it go on. No privilege is needed, but Linux 5.7 or newer on x86-64 or arm64.
"""

import ast
from collections.abc import Callable
import ctypes
import errno
import fcntl
import os
import platform
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from typing import NamedTuple

# What a call is called here → its variants' numbers on x86-64 and arm64, and which argument is the path (None: the
# first is a descriptor)
_CALLS = {
    "open": [(2, None, 0), (257, 56, 1)],
    "read": [(0, 63, None), (17, 67, None)],  # read, pread64
    "write": [(1, 64, None), (18, 68, None)],
    "fsync": [(74, 82, None)],
    "rename": [(82, None, 0), (264, 38, 1), (316, 276, 1)],
    "mkdir": [(83, None, 0), (258, 34, 1)],
    "list": [(217, 61, None)],  # getdents64
    "stat": [(4, None, 0), (262, 79, 1), (332, 291, 1)],
    "remove": [(84, None, 0), (87, None, 0), (263, 35, 1)],  # rmdir, unlink
}
_MACHINE = {"x86_64": 0, "aarch64": 1}[platform.machine()]
_BY_NUMBER = {
    variant[_MACHINE]: (name, variant[2])
    for name, variants in _CALLS.items()
    for variant in variants
    if variant[_MACHINE] is not None
}
_SECCOMP = (317, 277)[_MACHINE]
_RECEIVE, _SEND = 0xC0502100, 0xC0182101
_GO_ON = 1


class Call(NamedTuple):
    """name: of the system call, whichever variant (a key of `_CALLS`). path: of the file, as the child calls it."""

    name: str
    path: str


def submit(connection: socket.socket) -> None:
    """In the child: from here on all threads' calls are shown to whoever has the other end of the connection."""
    libc = ctypes.CDLL(None, use_errno=True)
    numbers = sorted(_BY_NUMBER)
    # A program for the kernel: load the call's number; if it is one of ours, ask; else let it go on
    rules = [(0x20, 0, 0, 0), *((0x15, len(numbers) - i, 0, n) for i, n in enumerate(numbers))]
    rules += [(0x06, 0, 0, 0x7FFF0000), (0x06, 0, 0, 0x7FC00000)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(rules), ctypes.addressof(code)))
    libc.prctl(38, 1, 0, 0, 0)  # no new privileges, which the kernel asks for
    all_threads, listener, both = 1, 8, 16
    descriptor = libc.syscall(_SECCOMP, 1, all_threads | listener | both, program)
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), "seccomp")
    socket.send_fds(connection, [b"."], [descriptor])


_CHILD = """
import socket, sys
from tests.helpers import faults
connection = socket.socket(fileno=int(sys.argv[1]))
scope = {}
exec(sys.argv[2], scope)
faults.submit(connection)
stream = connection.makefile("rw")
for line in stream:
    try:
        answer = eval(line, scope), "", 0
    except Exception as error:
        answer = type(error).__name__, str(error), getattr(error, "status", 0)
    stream.write(repr(answer) + "\\n")
    stream.flush()
"""


class Child:
    """A Python process whose calls can fail. `begin` is run before they can; `calls` and `failed` count, `call` by
    `call` what was asked for since the last `evaluate`."""

    def __init__(self, begin: str):
        ours, theirs = socket.socketpair()
        self._errors, self._since = tempfile.TemporaryFile(), 0  # noqa: SIM115 - until `close`
        command = [sys.executable, "-c", _CHILD, str(theirs.fileno()), begin]
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stderr=self._errors)
        theirs.close()
        _, (self._listener,), _, _ = socket.recv_fds(ours, 1, 1)
        self._stream = ours.makefile("rw")
        self._rule: Callable[[Call], int] = lambda call: 0
        self.calls: list[Call] = []
        self.failed = 0
        threading.Thread(target=self._answer, daemon=True).start()

    def evaluate(self, expression: str, rule: Callable[[Call], int] = lambda call: 0) -> tuple:
        """(value, "", 0), or of an exception its kind, text and status, of an expression that is evaluated in the
        child while `rule` says with which error number a call fails, or 0."""
        self.calls, self.failed, self._rule = [], 0, rule
        self._since = os.fstat(self._errors.fileno()).st_size
        self._stream.write(expression + "\n")
        self._stream.flush()
        answer = ast.literal_eval(self._stream.readline())
        self._rule = lambda call: 0
        return answer

    def said(self) -> str:
        """On standard error, since `evaluate` was called."""
        size = os.fstat(self._errors.fileno()).st_size
        return os.pread(self._errors.fileno(), size - self._since, self._since).decode()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._listener)
        self._errors.close()

    def _answer(self) -> None:
        while True:
            told = bytearray(80)
            try:
                fcntl.ioctl(self._listener, _RECEIVE, told)
            except OSError as error:
                if error.errno in (errno.EINTR, errno.ENOENT):  # the call is off
                    continue
                return  # the child has ended
            number, process, _, call = struct.unpack_from("QIIi", told)
            found = self._error(process, call, struct.unpack_from("6Q", told, 32))
            answer = bytearray(struct.pack("QqiI", number, 0, -found, 0 if found else _GO_ON))
            try:
                fcntl.ioctl(self._listener, _SEND, answer)
            except OSError as error:
                if error.errno != errno.ENOENT:
                    return

    def _error(self, process: int, number: int, arguments: tuple[int, ...]) -> int:
        name, place = _BY_NUMBER[number]
        try:
            if place is None:
                path = os.readlink(f"/proc/{process}/fd/{arguments[0]}")
            else:
                with open(f"/proc/{process}/mem", "rb", 0) as memory:
                    memory.seek(arguments[place])
                    path = memory.read(4096).split(b"\0")[0].decode(errors="replace")
        except OSError:  # the thread that asked has ended
            return 0
        call = Call(name, path)
        self.calls.append(call)
        found = self._rule(call)
        self.failed += bool(found)
        return found
