"""Options that several commands share: the model and its devices, how answers are chosen, images and videos."""

import argparse
import dataclasses
import math
import sys

import jax
from jax.sharding import Mesh

from voco_jax.api import Model
from voco_jax.attention import ADAPTERS
from voco_jax.checkpoint.run import load_run
from voco_jax.data.video import FrameSampling
from voco_jax.errors import UserError
from voco_jax.infer.auto_tokens import AUTO, CONFIDENCE, AutoTokens
from voco_jax.infer.generate import Sampling
from voco_jax.io.paths import as_path
from voco_jax.options import at_least_1
from voco_jax.parallel.mesh import AXES, find_devices, make_mesh


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The run, its checkpoint, the attention kernel and the devices."""
    parser.add_argument("--run", type=as_path, required=True, help="run directory (training's workdir), or gs://…")
    parser.add_argument(
        "--step", type=_step, help="checkpoint: a step, or 'best' (lowest evaluation loss); default: newest"
    )
    parser.add_argument("--attention", choices=ADAPTERS, help="attention kernel (default: the one of the training)")
    parser.add_argument(
        "--mesh", help="devices as data=N,fsdp=N,frame=N,tensor=N (default: all devices of this host along data)"
    )


def _step(text: str) -> int | str:
    if text != "best" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a step or 'best', found {text!r}")
    return text if text == "best" else int(text)


def load_model(args: argparse.Namespace) -> Model:
    """The model that the arguments name, over the devices that they name."""
    return Model(load_run(args.run, step=args.step, attention=args.attention, mesh=mesh_of(args.mesh)))


def mesh_of(text: str | None) -> Mesh | None:
    """The mesh of 'data=2,tensor=4'; None for a single device. UserError for axes and sizes that cannot be."""
    find_devices()
    devices = jax.local_devices()
    sizes = dict.fromkeys(AXES, 1) | ({"data": len(devices)} if text is None else {})
    for part in text.split(",") if text else ():
        axis, _, size = part.partition("=")
        if axis not in AXES or not size.isdecimal() or int(size) < 1:
            raise UserError(f"--mesh: expected {', '.join(f'{axis}=N' for axis in AXES)}; found {part!r}")
        sizes[axis] = int(size)
    try:
        mesh = make_mesh(sizes, devices)
    except UserError as error:
        raise UserError(f"--mesh: {str(error).removeprefix('config.mesh: ')}") from None
    return None if len(devices) == 1 else mesh


def add_answer_arguments(parser: argparse.ArgumentParser, max_new_tokens: int = 64) -> None:
    """How long answers may be, and how their tokens are chosen."""
    parser.add_argument(
        "--max-new-tokens", type=at_least_1, default=max_new_tokens, metavar="N",
        help=f"longest answer, in tokens (default {max_new_tokens})",
    )  # fmt: skip
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0: take the most likely token (default); above 0: sample"
    )
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="sample from the most likely tokens whose probabilities sum to P"
    )
    parser.add_argument("--top-k", type=int, default=0, help="sample from the k most likely tokens (0 = all)")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the sampling")


def sampling_of(args: argparse.Namespace) -> Sampling:
    """UserError for values that cannot be."""
    try:
        return Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    except UserError as error:
        name, rest = str(error).split(":", 1)
        raise UserError(f"--{name.replace('_', '-')}:{rest}") from None


def add_image_arguments(parser: argparse.ArgumentParser) -> None:
    """What a question is about."""
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="image file; repeat for several")
    parser.add_argument("--video", metavar="FILE", help="video file")
    parser.add_argument("--memory", metavar="FILE", help="memory file, made by `voco compress`")
    add_token_arguments(parser)
    add_frame_arguments(parser)


def add_token_arguments(parser: argparse.ArgumentParser) -> None:
    """How many tokens of each memory are read."""
    parser.add_argument(
        "--tokens", type=_tokens, metavar="K",
        help=f"read only the first K tokens of each image; '{AUTO}': as many as each answer needs to be sure",
    )  # fmt: skip
    parser.add_argument(
        "--confidence", type=float, metavar="P",
        help=f"with --tokens {AUTO}: more tokens are read while a word of the answer is less probable (default "
        f"{CONFIDENCE})",
    )  # fmt: skip


def _tokens(text: str) -> int | str:
    try:
        return text if text == AUTO else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number or '{AUTO}', found {text!r}") from None


def check_confidence(args: argparse.Namespace) -> None:
    """UserError for a --confidence that cannot be, or without --tokens auto."""
    if args.confidence is not None:
        if args.tokens != AUTO:
            raise UserError(f"--confidence: expected --tokens {AUTO} with it")
        if not 0 <= args.confidence <= 1:
            raise UserError(f"--confidence: expected 0 … 1, found {args.confidence}")


def untrained_note(model: Model) -> str:
    """Of a run without train.elastic_k."""
    there = model.run.encoder.num_visual_tokens
    return f"{model.run.directory} was trained with all {there} tokens alone (train.elastic_k): fewer may mislead it"


def auto_of(args: argparse.Namespace, model: Model) -> AutoTokens | None:
    """The rule that --tokens auto asks for; None where it is not given. UserError for a model that cannot have it."""
    if args.tokens != AUTO:
        return None
    found = model.auto_tokens(AUTO, "--tokens")
    if not found.ladder:
        print(f"note: {untrained_note(model)}", file=sys.stderr)
    return found if args.confidence is None else dataclasses.replace(found, confidence=args.confidence)


def add_frame_arguments(parser: argparse.ArgumentParser) -> None:
    """Which frames of a video are taken."""
    parser.add_argument(
        "--frames", type=int, metavar="N", help="number of frames of a video, evenly spread (default: as in training)"
    )
    parser.add_argument("--fps", type=float, metavar="F", help="frames per second of a video")
    parser.add_argument(
        "--max-frames", type=int, metavar="N",
        help="at most so many frames with --fps; 0 = no limit (default: as in training)",
    )  # fmt: skip
    parser.add_argument(
        "--incomplete", action="store_true", help="of a video that is cut off, use the frames that are there"
    )


def frame_sampling(args: argparse.Namespace, model: Model) -> FrameSampling:
    """Which frames of a video to take: as the arguments say, else as the run's config says."""
    return change_sampling(model.image_encoder.sampling, args.frames, args.fps, args.max_frames)


def change_sampling(
    own: FrameSampling, frames: int | None, fps: float | None, max_frames: int | None, prefix: str = "--"
) -> FrameSampling:
    """A run's `own` sampling, changed by what was asked for (None: not given). UserError names the wrong option.

    `fps` replaces a number of frames, and keeps the run's `max_frames` unless another is given.
    """
    if frames is not None and fps is not None:
        raise UserError(f"{prefix}frames, {prefix}fps: expected one of them, found both")
    for name, value in (("frames", frames), ("fps", fps)):
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{prefix}{name}: expected more than 0, found {value}")
    most = f"{prefix}max-frames" if prefix else "max_frames"
    if max_frames is not None and max_frames < 0:
        raise UserError(f"{most}: expected 0 (any number) or more, found {max_frames}")
    if max_frames is not None and fps is None and (frames is not None or own.num_frames):
        raise UserError(f"{most}: expected {prefix}fps with it: {frames or own.num_frames} frames are taken of a video")
    if frames is not None:
        return FrameSampling(num_frames=frames)
    if fps is not None:
        own = dataclasses.replace(own, num_frames=0, fps=fps)
    return own if max_frames is None else dataclasses.replace(own, max_frames=max_frames)
