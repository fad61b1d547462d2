"""`python -m voco_jax.memory list FILE`: what memory files hold; `check` reads all of it, `merge` joins several."""

import argparse
from pathlib import Path

from voco_jax.data.sources.roots import path_here
from voco_jax.data.video import format_time
from voco_jax.errors import UserError, one_line_errors
from voco_jax.infer.memory_file import MemoryFile, join_files


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
    files = [MemoryFile(file) for file in args.file]
    if args.command == "merge":
        merge(files, args.out)
        files = [MemoryFile(args.out)]
    for file in files:
        if args.command == "check":
            for _ in file.pieces(range(len(file))):
                pass
        print(summary(file) + (": every byte as it was written" if args.command == "check" else ""))
        if args.command == "list":
            for item in file.items:
                time = f"  {format_time(item.time)}" if item.is_frame else ""
                print(f"  {item.source}{time}  {item.sha256[:12]}")


def summary(file: MemoryFile) -> str:
    """In a line."""
    _, tokens, layers, heads, size = file.shape
    return (
        f"{file.file}: {len(file)} pictures, {tokens} tokens each, {file.dtype.name}, {layers} layers × {heads} × "
        f"{size}, {file.file.stat().st_size / 2**20:.1f} MiB, model {file.model}"
    )


def merge(files: list[MemoryFile], out: Path) -> None:
    """Write one file of several, in their order. UserError where they are not of one model and kind."""
    seen, parts = set(), []
    for file in files:
        # What was no file when it was compressed (an array, a frame of a camera) has no hash: its memory tells it apart
        known = [item if item.sha256 else (item, sums) for item, sums in zip(file.items, file.checksums(), strict=True)]
        which = [i for i, one in enumerate(known) if one not in seen]
        seen |= set(known)
        parts.append((file, which))
    if not seen:
        raise UserError(f"{files[0].file}: expected pictures, found none")
    join_files(out, parts)


if __name__ == "__main__":
    main()
