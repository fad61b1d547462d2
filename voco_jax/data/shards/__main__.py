#!/usr/bin/env python
"""Question sets with their pictures or videos into ArrayRecord shards, which are read in any order; and check shards.

    voco build-records llava mix665k.json --images DIR [--videos DIR] OUT
    voco build-records video questions.json --videos DIR OUT
    voco build-records check OUT

Every picture is decoded once, to know that it can be; records that cannot be used are skipped, counted, and named in
OUT/report.json. A build that was stopped goes on where it was when it is run again with the same arguments.
`check` (or --check) reads all shards back: exit status 1, and a line for each problem, unless all is well.
"""

import argparse
from collections.abc import Callable
import contextlib
import math
import os
import sys
from typing import Any

from tqdm import tqdm

from voco_jax.data.records import Source
from voco_jax.data.shards.build import build, file_digest, split_records
from voco_jax.data.shards.check import check
from voco_jax.data.shards.files import read_manifest
from voco_jax.data.shards.record_packer import RecordPacker
from voco_jax.data.sources.llava import LlavaSource, VideoQuestionSource
from voco_jax.data.sources.roots import path_here
from voco_jax.data.video import FrameSampling
from voco_jax.errors import UserError, one_line_errors
from voco_jax.interrupts import exit_on_sigterm
from voco_jax.io.paths import absolute, as_path
from voco_jax.options import Parser
from voco_jax.terminal import count_of, printable


def add_build_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=path_here, metavar="OUT", help="new or empty directory, or one to go on with")
    shards = parser.add_mutually_exclusive_group()
    shards.add_argument(
        "--records-per-shard", type=whole, default=2000, metavar="N", help="records of input (default 2000)"
    )
    shards.add_argument("--shards", type=whole, metavar="N", help="so many shards instead")
    parser.add_argument("--max-side", type=whole, metavar="PIXELS", help="scale longer pictures down, as JPEG")
    parser.add_argument("--video", choices=("clip", "frames"), default="clip", help="keep clips, or frames of them")
    frames = parser.add_mutually_exclusive_group()
    frames.add_argument("--num-frames", type=whole, metavar="N", help="of each video (default 8)")
    frames.add_argument("--fps", type=rate, metavar="F", help="frames a second instead")
    parser.add_argument("--max-frames", type=whole, metavar="N", help="with --fps: at most")
    parser.add_argument("--incomplete", action="store_true", help="of a video that is cut off: take what is there")
    skipped: dict[str, Any] = dict(dest="max_skipped_fraction", type=share, metavar="SHARE")
    parser.add_argument(
        "--max-skipped-fraction",
        default=0.01,
        help="largest share of records that may be skipped (default 0.01)",
        **skipped,
    )
    parser.add_argument("--max-bad-share", default=argparse.SUPPRESS, help=argparse.SUPPRESS, **skipped)  # its old name
    add_workers(parser)


def add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=whole, default=os.cpu_count(), metavar="N", help="processes (default: CPUs)")


def number_in(kind: type, low: float, most: float, expected: str) -> Callable[[str], Any]:
    """A type for argparse: a number from `low` to `most`."""

    def parse(text: str):
        with contextlib.suppress(ValueError):
            if low <= (number := kind(text)) <= most:
                return number
        raise argparse.ArgumentTypeError(f"expected {expected}, found {text!r}")

    return parse


whole = number_in(int, 1, math.inf, "a whole number above 0")
rate = number_in(float, sys.float_info.min, sys.float_info.max, "a number above 0")
share = number_in(float, 0, 1, "a number from 0 to 1")


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("llava", help="LLaVA's conversations about pictures or videos")
    command.add_argument("file", type=as_path, metavar="FILE", help=".json or .jsonl; or gs://…")
    command.add_argument("--images", type=as_path, metavar="DIR", help="where the pictures' paths start")
    command.add_argument("--videos", type=as_path, metavar="DIR", help="where the videos' start (default: --images)")
    add_build_options(command)
    command = commands.add_parser("video", help="rows of video, question, answer")
    command.add_argument("file", type=as_path, metavar="FILE", help=".json or .jsonl; or gs://…")
    command.add_argument("--videos", type=as_path, metavar="DIR", required=True, help="where the videos are")
    add_build_options(command)
    command = commands.add_parser("check", help="read all shards back")
    command.add_argument("out", type=path_here, metavar="OUT")
    add_workers(command)
    return parser


def sampling_of(args) -> FrameSampling | None:
    """What to take of videos; None for all, as it is encoded."""
    given = [o for o in ("num_frames", "fps", "max_frames") if getattr(args, o) is not None]
    if args.video == "clip":
        if given:
            raise UserError(f"--{given[0].replace('_', '-')}: expected --video frames, found --video clip")
        return None
    if args.max_frames and not args.fps:
        raise UserError("--max-frames: expected --fps, found none")
    return FrameSampling(0 if args.fps else args.num_frames or 8, args.fps or 1.0, args.max_frames or 0)


def run_build(args) -> None:
    sampling = sampling_of(args)
    images = getattr(args, "images", None)
    source: Source
    if args.command == "llava":
        source = LlavaSource(str(args.file), str(images or ""), str(args.videos or ""))
    else:
        source = VideoQuestionSource(str(args.file), str(args.videos))
    image_root, video_root = (path and absolute(path) for path in (images, args.videos))
    packer = RecordPacker(
        source, image_root or video_root, video_root or image_root, args.max_side or 0, sampling, args.incomplete
    )
    if args.shards and args.shards > len(source):
        raise UserError(f"--shards: expected at most {len(source)}, the number of records; found {args.shards}")
    ranges = split_records(len(source), args.records_per_shard, args.shards or 0)
    arguments = {
        "command": args.command,
        "file": {"name": args.file.name, **file_digest(args.file)},
        "images": image_root and str(image_root),
        "videos": video_root and str(video_root),
        "records_per_shard": 0 if args.shards else args.records_per_shard,
        "num_shards": len(ranges),
        "max_side": packer.max_side,
        "frames": sampling and vars(sampling),
    } | ({"incomplete": True} if args.incomplete else {})  # builds begun before there was this go on
    with tqdm(total=len(source), unit=" records", desc=args.out.name, delay=0.5, file=sys.stderr) as bar:
        report = build(packer, args.out, arguments, ranges, args.workers, args.max_skipped_fraction, bar.update)
    print("\n".join(report.lines()))
    print(f"written: {args.out} ({count_of(len(ranges), 'shard')})")


def run_check(args) -> None:
    manifest = read_manifest(args.out)
    with tqdm(total=manifest.get("records"), unit=" records", desc=args.out.name, delay=0.5, file=sys.stderr) as bar:
        problems = check(args.out, args.workers, bar.update)
    if problems:
        print("\n".join(map(printable, problems)))
        sys.exit(1)
    records, shards = count_of(manifest["records"], "record"), count_of(manifest["num_shards"], "shard")
    print(f"{args.out}: {records} in {shards}, all well")


@one_line_errors
def main() -> None:
    arguments = sys.argv[1:]
    if arguments[:1] == ["--check"]:
        arguments[0] = "check"
    args = make_parser().parse_args(arguments)
    exit_on_sigterm()
    if args.command == "check":
        run_check(args)
    else:
        run_build(args)


if __name__ == "__main__":
    main()
