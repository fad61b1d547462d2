"""Files that data names: only inside the directory that the user gave."""

from pathlib import Path, PurePosixPath
import shlex
import stat
from urllib.parse import urlsplit
from urllib.request import url2pathname

from voco_jax.data.records import MISSING, OUTSIDE, BadRecord, shown


def inside(root: Path, name) -> Path:
    """The file that a row calls `name`, below `root`; BadRecord for a path that leads out of it.

    Links that stand in the root are the user's own, and followed: data cannot make them.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise BadRecord(OUTSIDE, f"expected the path of a file, found {shown(name)}")
    path = PurePosixPath(name)
    if path.is_absolute() and path.is_relative_to(root):
        path = path.relative_to(root)
    if path.is_absolute() or ".." in path.parts:
        raise BadRecord(OUTSIDE, f"expected a path inside {root}, found {shown(name)}")
    return root / path


def local_path(text: str) -> str:
    """The path of a `file://` URL, or any other text as it is. BadRecord for what lies on a web server.

    >>> local_path("file:///tmp/a%20b.png"), local_path("a:b.png")
    ('/tmp/a b.png', 'a:b.png')
    """
    scheme, separator, _ = text.partition("://")
    if not separator or scheme.lower() not in ("file", "http", "https", "ftp"):
        return text
    if scheme.lower() == "file":
        return url2pathname(urlsplit(text).path)
    raise BadRecord(MISSING, f"{text}: web addresses are not fetched; download it first: curl -LO {shlex.quote(text)}")


def check_file(file: Path) -> None:
    """BadRecord unless `file` is there and is a file: opening a pipe would wait for ever."""
    try:
        mode = file.stat().st_mode
    except FileNotFoundError:
        raise BadRecord(MISSING, f"{file}: not found") from None
    except (OSError, ValueError) as error:
        raise BadRecord(MISSING, f"{file}: {getattr(error, 'strerror', None) or error}") from None
    if not stat.S_ISREG(mode):
        raise BadRecord(MISSING, f"{file}: expected a file, found something else")
