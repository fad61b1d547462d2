"""`voco memory list FILE`: what memory files contain; `check` verifies them, `merge` joins several."""

from collections.abc import Sequence
import hashlib
from pathlib import Path

import numpy as np

from voco_jax.data.sources.roots import path_here
from voco_jax.data.video import format_time
from voco_jax.errors import UserError, one_line_errors
from voco_jax.infer.memory import pictures_of
from voco_jax.infer.memory_file import MemoryFile, write_memory, writing
from voco_jax.infer.memory_format import tensors_of
from voco_jax.options import Parser, check_out
from voco_jax.terminal import count_of, printable

_HELD = 256  # files that are kept open at once: a process may have a thousand or so


@one_line_errors
def main() -> None:
    parser = Parser(prog="voco memory", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="list what files contain")
    listing.add_argument("file", nargs="+", type=path_here, help="memory file")
    checking = commands.add_parser("check", help="read files completely and compare all checksums")
    checking.add_argument("file", nargs="+", type=path_here, help="memory file")
    merging = commands.add_parser("merge", help="join files of one model into one, each image once")
    merging.add_argument("file", nargs="+", type=path_here, help="memory file to join, in this order")
    merging.add_argument("--out", type=path_here, required=True, metavar="FILE", help="memory file to write")
    args = parser.parse_args()
    if args.command == "merge":
        check_out(args.out)
        if args.out.exists():
            MemoryFile(args.out).close()  # UserError for what is not a memory: it would be lost
        merge(args.file, args.out)
    for path in [args.out] if args.command == "merge" else args.file:
        show(path, args.command)


def show(path: Path, command: str) -> None:
    """Print what a file is; for `list` also what its memories are of, for `check` that all of it could be read."""
    with MemoryFile(path) as file:
        if command == "check":
            for _ in file.pieces(range(len(file))):
                pass
        print(printable(file.summary()) + (": every byte as it was written" if command == "check" else ""))
        if command == "list":
            for picture in pictures_of(file.items):
                item = picture.items[0]
                about = "" if item.time is None else f"  {format_time(item.time)}"
                about += "" if item.tile is None else f"  {count_of(len(picture.items), 'tile')}"
                print(printable(f"  {item.source}{about}  {item.sha256[:12]}"))


def merge(files: Sequence[Path], out: Path) -> None:
    """Write one file of several, in their order. UserError where they are not of one model and kind."""
    with writing(out) as real:  # which may be one of them
        opened = []
        for path in files:
            opened.append(MemoryFile(path))
            if len(opened) > _HELD:
                opened[-1].close()
        ends = np.cumsum([len(file) for file in opened])
        identities = np.zeros(ends[-1], "S16")
        for file, into in zip(opened, np.split(identities, ends[:-1]), strict=True):
            _identify(file, into)
        _, first = np.unique(identities, return_index=True)
        taken = np.zeros(len(identities), bool)
        taken[first] = True
        if not taken.any():
            raise UserError(f"{files[0]}: expected pictures, found none")
        which = [np.flatnonzero(of_file).tolist() for of_file in np.split(taken, ends[:-1])]
        write_memory(real, list(zip(opened, which, strict=True)))


def _identify(file: MemoryFile, into: np.ndarray) -> None:
    """16 bytes of each image, S16: the same for the same one in another file, of a tile for that of the same tiles."""
    is_unnamed = np.zeros(len(file), bool)
    in_tiles: list[slice] = []
    for picture in pictures_of(file.items):
        into[picture.places] = [item.identity for item in picture.items]
        is_unnamed[picture.places] = not picture.items[0].sha256
        in_tiles += [picture.places] if len(picture.items) > 1 else []
    unnamed = np.flatnonzero(is_unnamed).tolist()
    # What was no file when it was compressed (an array, a frame of a camera) has no hash: its memory tells it apart
    done = 0
    for bank in file.pieces(unnamed):
        tensors = [np.ascontiguousarray(array).view(np.uint8) for array in tensors_of(bank).values()]
        for item, *contents in zip(bank.items, *tensors, strict=True):
            digest = hashlib.blake2b(item.identity, digest_size=16)
            for array in contents:
                digest.update(array)
            into[unnamed[done]] = digest.digest()
            done += 1
    for places in in_tiles:  # which stay together, or go
        together = hashlib.blake2b(into[places].tobytes(), digest_size=16).digest()
        into[places] = [hashlib.blake2b(together + one, digest_size=16).digest() for one in into[places].tolist()]


if __name__ == "__main__":
    main()
