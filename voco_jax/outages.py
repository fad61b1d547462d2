"""What the errors of disks, network file systems and buckets mean, whichever library raises them: whether the same may
succeed the next time, or somebody has to mend something."""

from collections.abc import Iterator
import errno
import os
from pathlib import Path
import re
import sys
import traceback

# A server that is away, a connection that broke, a disk that did not answer. EIO is among them: it is what network
# file systems give when their server is away for too long.
_PASSING_NUMBERS = {
    errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.ENFILE, errno.ENOLCK, errno.ETIMEDOUT,
    errno.EPIPE, errno.ENOTCONN, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET, errno.ESHUTDOWN,
    errno.ENETDOWN, errno.ENETRESET, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH,
    errno.ENOLINK, getattr(errno, "EREMOTEIO", errno.EIO),  # which macOS does not have
    errno.ENOTEMPTY,  # a directory is deleted while somebody still writes into it
}  # fmt: skip
_PASSING_HTTP = {408, 425, 429}  # and 500 to 599
_PASSING_STATUS = {"UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "CANCELLED"}
# Of aiohttp, google.auth and requests, which are imported only where there are buckets
_PASSING_NAMES = {"ClientConnectionError", "ClientPayloadError", "TransportError", "ConnectionError", "Timeout"}


def passing(error: BaseException) -> bool:
    """Whether the same may succeed later although nobody mends anything."""
    for link in chain(error):
        if (number := error_number(link)) is not None:
            return number in _PASSING_NUMBERS
        if (code := http_code(link)) is not None:
            return code in _PASSING_HTTP or 500 <= code < 600
        names = {kind.__name__ for kind in type(link).__mro__}
        if names & _PASSING_NAMES or isinstance(link, TimeoutError) or status_of(link) in _PASSING_STATUS:
            return True
    return False


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, its cause, the cause of that, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def error_number(error: BaseException) -> int | None:
    """The system's error number (errno), which TensorStore's errors have in their text; None without one."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\bos_error_code='(\d+)'", str(error)) if status_of(error) else None
    return int(found[1]) if found else None


def http_code(error: BaseException) -> int | None:
    """The HTTP status that a bucket's server answered with; None for other errors."""
    if type(error).__module__.startswith("gcsfs"):
        code = str(getattr(error, "code", None))
        return int(code) if code.isdecimal() else None
    found = re.search(r"\bhttp_response_code='(\d+)'", str(error)) if status_of(error) else None
    return int(found[1]) if found else None


def status_of(error: BaseException) -> str:
    """The status with which the message of a C++ library's error begins (`DATA_LOSS`); '' for other errors."""
    found = re.match(r"[A-Z_]+(?=: )", str(error)) if isinstance(error, ValueError | RuntimeError) else None
    return found[0] if found else ""


def reason(error: BaseException) -> str:
    """Why, in one line, without the file."""
    for link in chain(error):
        number = error_number(link)
        if number == errno.ENOENT or isinstance(link, FileNotFoundError):  # a bucket's has no number
            return "not found"
        if number:
            return os.strerror(number)
    first = first_line(error)
    line = re.sub(r" \[[a-z_]+='.*", "", first)
    return line.rsplit(": ", 1)[-1] if line != first else line  # TensorStore tells all of the request around it


def first_line(error: BaseException) -> str:
    """The first line of the message of an error's root cause; its type where the message is empty."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def may_be_of_another(error: BaseException) -> bool:
    """Whether the end of another process may have caused an error: jax's collectives and barriers raise it then.

    Such an error is passed on unchanged: the watchdog knows which process has gone, and how to end.
    """
    jax = sys.modules.get("jax")
    # Asked in this order: counting processes starts the accelerators, which the processes that read data must not
    if jax is None or not jax.distributed.is_initialized() or jax.process_count() == 1:
        return False
    link: BaseException | None = error
    while link is not None:
        # Where a collective fails as it is started, it is a ValueError of jax's with the status of C++ in front
        raised_by = next((frame.filename for frame in reversed(traceback.extract_tb(link.__traceback__))), "")
        status = Path(str(jax.__file__)).parent in Path(raised_by).parents and re.match("[A-Z_]+: ", str(link))
        if status or isinstance(link, jax.errors.JaxRuntimeError):
            return True
        link = link.__cause__
    return False
