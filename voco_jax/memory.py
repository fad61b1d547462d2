"""`python -m voco_jax.memory list FILE`: what memory files hold; `check` reads all of it, `merge` joins several."""

import argparse
from collections.abc import Sequence
import hashlib
from pathlib import Path

import numpy as np

from voco_jax.data.sources.roots import path_here
from voco_jax.data.video import format_time
from voco_jax.errors import UserError, one_line_errors
from voco_jax.infer.memory import MemoryBank
from voco_jax.infer.memory_file import MemoryFile, write_memory, writing
from voco_jax.infer.memory_format import tensors_of
from voco_jax.terminal import printable

_HELD = 256  # files that are kept open at once: a process may have a thousand or so


@one_line_errors
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m voco_jax.memory", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="what files hold")
    listing.add_argument("file", nargs="+", type=path_here)
    checking = commands.add_parser("check", help="that every byte of files is as it was written")
    checking.add_argument("file", nargs="+", type=path_here)
    merging = commands.add_parser("merge", help="files of one model into one; what is in several is taken once")
    merging.add_argument("file", nargs="+", type=path_here)
    merging.add_argument("--out", type=path_here, required=True, metavar="FILE")
    args = parser.parse_args()
    if args.command == "merge":
        merge(args.file, args.out)
    for path in [args.out] if args.command == "merge" else args.file:
        show(path, args.command)


def show(path: Path, command: str) -> None:
    """Print what a file is; for `list` also what each memory is of, for `check` that all of it could be read."""
    with MemoryFile(path) as file:
        if command == "check":
            for _ in file.pieces(range(len(file))):
                pass
        print(printable(summary(file)) + (": every byte as it was written" if command == "check" else ""))
        if command == "list":
            for item in file.items:
                time = f"  {format_time(item.time)}" if item.is_frame else ""
                print(printable(f"  {item.source}{time}  {item.sha256[:12]}"))


def summary(file: MemoryFile) -> str:
    """In a line."""
    _, tokens, layers, heads, size = file.shape
    return (
        f"{file.file}: {len(file)} pictures, {tokens} tokens each, {file.dtype.name}, {layers} layers × {heads} × "
        f"{size}, {file.size / 2**20:.1f} MiB, model {file.model}"
    )


def merge(files: Sequence[Path], out: Path) -> None:
    """Write one file of several, in their order. UserError where they are not of one model and kind."""
    with writing(out) as real:  # which may be one of them
        opened, identities = [], []
        for file in files:
            opened.append(MemoryFile(file))
            identities.append(_identities(opened[-1]))
            if len(opened) > _HELD:
                opened[-1].close()
        _, first = np.unique(np.concatenate(identities), return_index=True)
        taken = np.zeros(sum(map(len, opened)), bool)
        taken[first] = True
        if not taken.any():
            raise UserError(f"{files[0]}: expected pictures, found none")
        parts = np.split(taken, np.cumsum([len(file) for file in opened])[:-1])
        write_memory(real, [(file, np.flatnonzero(part)) for file, part in zip(opened, parts, strict=True)])


def _identities(file: MemoryFile) -> np.ndarray:
    """16 bytes of each picture, S16: the same for the same one in another file."""
    found = np.zeros(len(file), "S16")
    unnamed = []
    for i, item in enumerate(file.items):
        found[i] = item.identity
        if not item.sha256:
            unnamed.append(i)
    # What was no file when it was compressed (an array, a frame of a camera) has no hash: its memory tells it apart
    done = 0
    for bank in file.pieces(unnamed):
        for one in range(len(bank)):
            found[unnamed[done]] = _with_contents(bank[one])
            done += 1
    return found


def _with_contents(one: MemoryBank) -> bytes:
    digest = hashlib.blake2b(one.items[0].identity, digest_size=16)
    for array in tensors_of(one).values():
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return digest.digest()


if __name__ == "__main__":
    main()
