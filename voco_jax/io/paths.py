"""Directories of a file system, and of a bucket (`gs://bucket/run`): runs may lie in either."""

from collections.abc import Iterator
import contextlib
import functools
import glob
import importlib.util
import logging
import os
from pathlib import Path
import re
import shutil
import socket
import stat
import tempfile
from typing import NamedTuple, TypeAlias
from urllib.request import getproxies

from etils import epath

from voco_jax.errors import TryAgain, UserError, cannot
from voco_jax.outages import may_be_of_another

HOST = "storage.googleapis.com"

# Both have `/`, exists, is_dir, iterdir, mkdir, open, read_text, write_text, unlink, rename and rmtree
AnyPath: TypeAlias = Path | epath.Path

# What no library takes for anything but a name; epath takes `/s3/…` for a bucket.
_PLAIN = re.compile("(?!//?(gs|s3|az|hf)/)[A-Za-z0-9._+=,@~ /-]*")

# It warns of every bucket that it may not ask what kind it is, and tells failures, which are errors anyway, with their
# stacks. Here, because worker processes read buckets too.
logging.getLogger("gcsfs").setLevel(logging.CRITICAL)


def as_path(address: str | AnyPath) -> AnyPath:
    """A path of the file system, or of a bucket; UserError for an address of another kind."""
    text = str(address)
    if "://" not in text:
        try:
            text.encode()  # which Rust's libraries ask for
            return Path(text).expanduser()
        except UnicodeEncodeError:
            raise UserError(f"{ascii(text)}: expected a name in UTF-8") from None
        except RuntimeError as error:
            raise UserError(f"{text}: {error}") from None  # there is no home, or no such user's
    if not text.startswith("gs://") or not text.removeprefix("gs://").strip("/"):
        raise UserError(f"{text}: neither a local path nor gs://BUCKET/PATH")
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{text}: buckets need gcsfs, which is not installed: pip install -e '.[gcs]'")
    _check_online(text)
    from fsspec.config import conf

    conf.setdefault("gs", {})["use_listings_cache"] = False  # others write and delete there too
    return epath.Path(text)


def _check_online(address: str) -> None:
    """TryAgain where the name of the bucket server cannot be resolved; gcsfs would try for a minute."""
    if os.environ.get("STORAGE_EMULATOR_HOST") or getproxies():  # then it is not asked, or not by this machine
        return
    try:
        socket.getaddrinfo(HOST, 443)
    except socket.gaierror as error:
        raise TryAgain(f"{address}: {HOST} is not found ({error.strerror}); is this machine online?") from None


def in_bucket(path: AnyPath) -> bool:
    return "://" in str(path)


def exists(path: AnyPath) -> bool:
    """Whether a path exists. OSError where that cannot be known (no permission, a server that is away), where
    libraries would say no."""
    if in_bucket(path):
        return path.exists()
    return _status(path) is not None


def is_directory(path: AnyPath) -> bool:
    """Whether a path is a directory; OSError as `exists`."""
    if in_bucket(path):
        return path.is_dir()
    status = _status(path)
    return status is not None and stat.S_ISDIR(status.st_mode)


def check_link(path: AnyPath) -> None:
    """UserError for a link whose target is missing: an archive may not be mounted."""
    if is_dangling(path):
        raise UserError(f"{path}: a link to {os.readlink(path)}, which is not there; is it mounted?")


def is_dangling(path: AnyPath) -> bool:
    """Whether a path is a link whose target is missing."""
    return not in_bucket(path) and os.path.islink(path) and not exists(path)


def _status(path: Path) -> os.stat_result | None:
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def same_place(a: str | AnyPath, b: str | AnyPath) -> bool:
    """Whether two addresses are one directory's, there or not: `runs/base`, `runs/base/`, `./runs/base`, a link."""

    def whole(address):
        path = as_path(address)
        return str(path).rstrip("/") if in_bucket(path) else str(path.resolve())

    return str(a) == str(b) or bool(str(a) and str(b)) and whole(a) == whole(b)


def plain_path(directory: AnyPath) -> AnyPath:
    """The same directory under a name that any library takes literally: its own, or a symbolic link's.

    Orbax looks for the files that it merges by a pattern that begins with the directory's name, in which `[`, `*` and
    `?` stand for others; TensorStore reads `\\` as `/`. The link is there until the process ends.
    """
    if in_bucket(directory) or _PLAIN.fullmatch(str(directory)):
        return directory
    return _link(directory.absolute())


@functools.cache
def _link(directory: Path) -> Path:
    links = _directory_of_links()
    if not _PLAIN.fullmatch(links.name):
        raise UserError(f"{directory}: checkpoints under this name need a TMPDIR of a plain name, found {links.name}")
    link = Path(links.name) / str(_link.cache_info().misses)
    link.symlink_to(directory)
    return link


@functools.cache
def _directory_of_links() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="voco_jax_")


def matching(pattern: Path) -> list[Path]:
    """What a pattern (`*`, `**`, `?`, `[…]`) stands for, sorted; as far as its directories are there, they are meant
    literally."""
    root = next(parent for parent in pattern.parents if parent.is_dir())
    return [root / name for name in sorted(glob.glob(str(pattern.relative_to(root)), root_dir=root, recursive=True))]


def absolute(path: AnyPath) -> AnyPath:
    """The absolute path; a bucket's is that already."""
    return path if in_bucket(path) else path.absolute()


@contextlib.contextmanager
def bucket_errors(path: AnyPath, but: type[Exception] = UserError) -> Iterator[None]:
    """A block in which errors of a bucket become a UserError of one line, except those of the type `but`: each library
    has error types of its own."""
    try:
        yield
    except (UserError, but):
        raise
    except Exception as error:
        if not in_bucket(path) or may_be_of_another(error):
            raise
        raise cannot(str(path), error) from error


@contextlib.contextmanager
def local_copy(directory: AnyPath) -> Iterator[Path]:
    """A directory that programs can read which know files only: itself, or a copy for the time of the block."""
    if not in_bucket(directory):
        yield Path(directory)
        return
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / Path(str(directory)).name
        with bucket_errors(directory):
            download(directory, copy)
        yield copy


def entries(directory: AnyPath) -> list[AnyPath]:
    """What stands in a directory, unsorted; nothing where there is no directory. OSError as `exists`."""
    return list(directory.iterdir()) if is_directory(directory) else []


def list_files(directory: AnyPath) -> list[tuple[str, int, str]]:
    """The files in a directory, sorted: name, bytes, and a text that differs once the file has been changed."""
    if not in_bucket(directory):
        found = ((path.name, path.stat()) for path in directory.iterdir() if path.is_file())
        return sorted((name, status.st_size, str(status.st_mtime_ns)) for name, status in found)
    in_it = _entries(directory, recursive=False)
    return sorted((e["name"].rpartition("/")[2], e["size"], str(e.get("generation"))) for e in in_it)


def file_state(file: AnyPath) -> tuple:
    """Values that differ once the file at a path has been replaced or written into."""
    if not in_bucket(file):
        return state_of(os.stat(file))
    import fsspec

    system, path = fsspec.url_to_fs(str(file))
    entry = system.info(path)
    return entry["size"], str(entry.get("generation"))


def state_of(status: os.stat_result) -> tuple[int, ...]:
    """`file_state` of a file of this machine, from its status."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def files_below(directory: AnyPath) -> list[AnyPath]:
    """All files in a directory and in those that stand in it, by their path."""
    if not in_bucket(directory):
        return sorted(path for path in directory.rglob("*") if path.is_file())
    return sorted(as_path(f"gs://{entry['name']}") for entry in _entries(directory, recursive=True))


class Listed(NamedTuple):
    """A file below a directory: its path from there (with `/`), bytes, and in nanoseconds since 1970 the times when it
    was changed (`made`) and last read (`used`, which is `made` in a bucket)."""

    path: str
    size: int
    made: int
    used: int


def listed_below(directory: AnyPath, ending: str = "") -> Iterator[Listed]:
    """All files below a directory whose names end so, one directory after the other; none where it is not there. Others
    may change it meanwhile. Links are left out, and not followed. OSError, or a UserError of a bucket, where it cannot
    be listed."""
    if in_bucket(directory):
        start = len(str(directory).removeprefix("gs://")) + 1
        for fields in _entries(directory, recursive=True):
            if fields["name"].endswith(ending):
                made = round(fields["ctime"].timestamp() * 1000) * 10**6
                yield Listed(fields["name"][start:], fields["size"], made, made)
        return
    waiting = [""]
    while waiting:
        below = waiting.pop()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(directory / below) as found:
            for entry in found:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(f"{below}{entry.name}/")
                elif entry.name.endswith(ending) and entry.is_file(follow_symlinks=False):
                    try:
                        status = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue
                    yield Listed(below + entry.name, status.st_size, status.st_mtime_ns, status.st_atime_ns)


def _entries(directory: AnyPath, recursive: bool) -> list[dict]:
    """fsspec's entries of the files in a bucket's directory, with one request per thousand files."""
    import fsspec

    with bucket_errors(directory):
        system, path = fsspec.url_to_fs(str(directory))
        found = system.find(path, detail=True).values() if recursive else system.ls(path, detail=True)
    return [entry for entry in found if entry["type"] == "file"]


def download(source: AnyPath, destination: Path) -> None:
    """Copy a directory's files from a bucket; nothing where it is not there."""
    destination.mkdir(parents=True, exist_ok=True)
    for entry in source.iterdir() if source.exists() else ():
        if entry.is_dir():
            download(entry, destination / entry.name)
        else:
            (destination / entry.name).write_bytes(entry.read_bytes())


def upload(source: Path, destination: AnyPath, known: dict[Path, tuple[int, int]] | None = None) -> None:
    """Copy a directory's files to a bucket: all, or those that are new or changed since the last call with `known`."""
    known = {} if known is None else known
    for entry in sorted(source.rglob("*")):
        if not entry.is_file():
            continue
        state = entry.stat()
        seen = state.st_mtime_ns, state.st_size
        if known.get(entry) != seen:
            target = destination / entry.relative_to(source).as_posix()
            target.write_bytes(entry.read_bytes())
            known[entry] = seen


@contextlib.contextmanager
def files_for(directory: AnyPath) -> Iterator[Path]:
    """A directory to write files into: itself; or of a bucket a temporary one, that goes there after the block."""
    if not in_bucket(directory):
        yield Path(directory)
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(temporary)
        with bucket_errors(directory):
            upload(Path(temporary), directory)


def remove(path: AnyPath) -> None:
    """A file or a directory with all that is in it, if it is there."""
    if path.is_dir():
        epath.Path(path).rmtree() if in_bucket(path) else shutil.rmtree(path)
    elif path.exists():
        path.unlink()
