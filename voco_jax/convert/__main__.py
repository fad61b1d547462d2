"""Weights in and out, streamed: PyTorch and Hugging Face checkpoints to runs of voco_jax, and back.

    voco convert inspect SRC
    voco convert to-jax SRC DST
    voco convert to-jax DST --llm DIR --vision-tower DIR --projector mm_projector.bin
    voco convert to-hf RUN DST --format voco
    voco convert merge RUN DST
    voco convert verify A B

SRC: a released LLaVA-1.5 or VoCo-LLaMA directory, a Hugging Face LLaVA, LLaVA-NeXT or LLaVA-OneVision directory,
a Llama directory, a Llama GGUF file, or a LoRA adapter (with --base). Nothing in it is ever run, and nothing is
written until all of it is understood.
"""

import argparse
import dataclasses
from pathlib import Path
import shlex
import sys
from typing import Any

from voco_jax.chat_templates import CHAT_TEMPLATES, TOKENIZER
from voco_jax.convert.inspect import describe, describe_run
from voco_jax.convert.merge import merge
from voco_jax.convert.sources import Source, open_parts, open_source
from voco_jax.convert.to_hf import WRITTEN, parse_size, to_hf
from voco_jax.convert.to_jax import Options, to_jax
from voco_jax.convert.verify import open_side, verify
from voco_jax.data.sources.roots import path_here
from voco_jax.errors import UserError, one_line_errors
from voco_jax.interrupts import exit_on_sigterm
from voco_jax.io.tensors import DTYPES
from voco_jax.models import presets
from voco_jax.models.compressors import COMPRESSORS
from voco_jax.options import Parser, at_least_1
from voco_jax.terminal import printable


def add_path(parser: argparse.ArgumentParser, name: str, metavar: str, help: str, **more: Any) -> None:
    parser.add_argument(name, type=path_here, metavar=metavar, help=help, **more)


def add_source_options(parser: argparse.ArgumentParser) -> None:
    add_path(parser, "--vision-tower", "DIR", "CLIP directory, needed if SRC names its vision tower but lacks it")
    add_path(parser, "--base", "DIR", "the checkpoint that SRC, a LoRA adapter or a projector, was trained on")
    parser.add_argument(
        "--ignore-key", action="append", default=[], metavar="KEY",
        help="accept this unknown config key as harmless; repeat for several",
    )  # fmt: skip


def add_parts(parser: argparse.ArgumentParser) -> None:
    add_source_options(parser)
    add_path(parser, "--llm", "PATH", "Llama directory or GGUF file, in place of SRC")
    add_path(parser, "--projector", "FILE", "the projector (mm_projector.bin), with --llm")


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="voco convert", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("inspect", help="format, configuration, tensors, and what is missing or unknown")
    add_path(command, "paths", "SRC", "checkpoint to look at", nargs="*")
    add_parts(command)

    command = commands.add_parser("to-jax", help="a run directory from a PyTorch or Hugging Face checkpoint")
    described = "checkpoint to convert (none with --llm), and the run directory to make"
    add_path(command, "paths", "[SRC] DST", described, nargs="+")
    add_parts(command)
    dtype: dict[str, Any] = dict(choices=DTYPES, help="dtype of the weights (default: as stored)")
    option = command.add_argument
    option("--dtype", **dtype)
    option("--voco-init", choices=("normal", "mean"), default="mean", help="how new <voco> rows begin (default mean)")
    option(
        "--num-voco-tokens", type=int, metavar="K",
        help="VoCo tokens an image (default 1; the released code has 2; 0 with --compressor none)",
    )  # fmt: skip
    option("--compressor", choices=("voco", "none"), default="voco", help="'none' makes plain LLaVA")
    option(
        "--template", choices=(*CHAT_TEMPLATES, TOKENIZER),
        help="chat template; 'tokenizer': the checkpoint's own (default: see docs/converting.md)",
    )  # fmt: skip
    add_path(command, "--tokenizer", "DIR", "tokenizer (default: the one in SRC)")
    option("--init-missing", action="store_true", help="draw a missing projector or vision tower at random")
    option(
        "--vision", choices=tuple(presets.VIT), metavar="NAME",
        help=f"with --init-missing, the vision tower that is drawn: {', '.join(presets.VIT)} (default: the 336 one)",
    )  # fmt: skip
    option("--seed", type=int, default=0, help="random seed of what is drawn")
    option(
        "--vocab-multiple", type=at_least_1, default=128, metavar="N",
        help="pad the vocabulary to a multiple of N (default 128; 1: no padding)",
    )  # fmt: skip

    command = commands.add_parser("to-hf", help="a PyTorch checkpoint from a run directory")
    add_path(command, "run", "RUN", "run directory to convert")
    add_path(command, "destination", "DST", "directory to make")
    option = command.add_argument
    option(
        "--format", choices=WRITTEN, required=True,
        help="llava-hf: for transformers' LlavaForConditionalGeneration; llava-next, llava-onevision: for the class "
        "that the run was converted from, with its image_newline; voco: for the released code",
    )  # fmt: skip
    option("--dtype", **dtype)
    option("--max-shard-size", default="5GB", metavar="SIZE", help="largest size of a file (default 5GB)")

    command = commands.add_parser("merge", help="a plain run from a run that was trained with LoRA")
    add_path(command, "run", "RUN", "run that was trained with LoRA")
    add_path(command, "destination", "DST", "run directory to make")

    command = commands.add_parser("verify", help="compare two checkpoints of any formats tensor by tensor")
    add_path(command, "a", "A", "run or checkpoint")
    add_path(command, "b", "B", "run or checkpoint to compare it with")
    add_source_options(command)  # each for the one of the two that needs it
    command.add_argument(
        "--allow-more-rows", action="store_true", help="one may have rows for added tokens that the other lacks"
    )
    return parser


def source_of(args: argparse.Namespace, paths: list[Path]) -> Source:
    """SRC, or the parts that take its place."""
    if args.llm is None:
        if len(paths) != 1:
            raise UserError(f"{args.command}: expected one SRC, or --llm; found {len(paths)}")
        if args.projector is not None:
            raise UserError("--projector: expected with --llm only")
        return open_source(paths[0], args.vision_tower, args.base, args.ignore_key)
    if paths:
        raise UserError(f"{args.command}: expected SRC or --llm, found both")
    if args.base is not None:
        raise UserError("--base: expected with SRC, a LoRA adapter; found it with --llm")
    return open_parts(args.llm, args.vision_tower, args.projector, args.ignore_key)


@one_line_errors
def main() -> None:
    args = make_parser().parse_args()
    exit_on_sigterm()
    if args.command == "inspect" and len(args.paths) == 1 and (args.paths[0] / "checkpoints").is_dir():
        print(describe_run(args.paths[0]))
    elif args.command == "inspect":
        report, understood = describe(source_of(args, args.paths))
        print(report)
        sys.exit(0 if understood else 2)
    elif args.command == "to-jax":
        *sources, destination = args.paths
        source = source_of(args, sources)
        least = 0 if COMPRESSORS[args.compressor].keeps_text(0) else 1
        if args.num_voco_tokens is not None and args.num_voco_tokens < least:
            raise UserError(f"--num-voco-tokens: expected at least {least}, found {args.num_voco_tokens}")
        options = Options(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Options)})
        warn(to_jax(source, destination, args.tokenizer, options))
        run = shlex.quote(str(destination))
        print(f"written: {destination} (ask it: voco ask --run {run} --image FILE QUESTION)")
    elif args.command == "to-hf":
        warn(to_hf(args.run, args.destination, args.format, args.dtype, parse_size(args.max_shard_size)))
        print(f"written: {args.destination}")
    elif args.command == "merge":
        merge(args.run, args.destination)
        print(f"written: {args.destination}")
    else:
        compare(args)


def compare(args: argparse.Namespace) -> None:
    a, b = (open_side(path, args.vision_tower, args.base, args.ignore_key) for path in (args.a, args.b))
    result = verify(a, b, allow_more_rows=args.allow_more_rows)
    for line in result.notes + result.problems:
        print(printable(line))
    print(f"{result.identical} of {result.tensors} tensors are identical")
    if result.where:
        print(f"worst difference: {result.worst:.3g} in {printable(result.where)}")
    sys.exit(0 if result.equal else 1)


def warn(warnings: list[str]) -> None:
    for warning in warnings:
        print(f"warning: {printable(warning)}", file=sys.stderr)


if __name__ == "__main__":
    main()
