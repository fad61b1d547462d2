"""`voco ask --run DIR --image FILE "question"`: answers questions about images, a video or a memory file.

Images are encoded once for all questions. Those of a memory file are asked about one by one; those of --image, and the
frames of a video, together. --together and --each change that. With --tokens auto each answer says with how many tokens
of each image it was read, and how sure it is.
"""

import argparse
from pathlib import PurePath
import sys
from typing import Any

from voco_jax.api import Model, Request
from voco_jax.arguments import (
    add_answer_arguments,
    add_image_arguments,
    add_model_arguments,
    auto_of,
    check_confidence,
    frame_sampling,
    load_model,
    sampling_of,
)
from voco_jax.data.media import ANIMATION, VIDEO, kind_of
from voco_jax.data.records import Clip
from voco_jax.data.sources.roots import check_file, local_path
from voco_jax.data.video import probe
from voco_jax.errors import UserError, one_line_errors
from voco_jax.infer.auto_tokens import AUTO
from voco_jax.infer.memory import EncodedImages, MemoryBank, check_tokens, count_of_pictures, pictures_of
from voco_jax.infer.memory_file import MemoryFile
from voco_jax.io.paths import as_path
from voco_jax.options import Parser
from voco_jax.terminal import count_of, printable


@one_line_errors
def main() -> None:
    parser = Parser(prog="voco ask", description=__doc__)
    add_model_arguments(parser)
    add_image_arguments(parser)
    parser.add_argument(
        "--picture", action="append", default=[], metavar="NAME",
        help="only images of the memory file whose path ends with NAME; repeat for several",
    )  # fmt: skip
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--together", action="store_true", help="ask about all images together")
    how.add_argument("--each", action="store_true", help="ask about each image by itself")
    add_answer_arguments(parser)
    parser.add_argument("question", nargs="+", help="each question is asked on its own")
    args = parser.parse_args()
    if any(not question.strip() for question in args.question):
        raise UserError("question: expected text, found none")
    sampling = sampling_of(args)
    check_image_arguments(args)
    if args.picture and not args.memory:
        raise UserError("--picture: expected a --memory that holds it")
    model = load_model(args)
    auto = auto_of(args, model)
    images = encode_arguments(model, args)
    each = args.each or (args.memory is not None and not args.together and images is not None and not images.is_video)
    if each and images is None:
        raise UserError("--each: expected images, found none")
    note_images(model, images, together=not each)
    about = images.pictures() if each and images is not None else [images]
    names = [f"{describe(one)}: " if each and one is not None else "" for one in about]
    for question in args.question:
        requests = [Request(question, one) for one in about]
        chosen: dict[str, Any] = dict(max_new_tokens=args.max_new_tokens, sampling=sampling)
        if auto is None:
            answers = model.answers(requests, **chosen)
        else:
            tries = model.auto_answers(requests, auto, **chosen)
            answers = [f"{one.text}  ({count_of(one.tokens, 'token')}, {one.confidence:.2f})" for one in tries]
        print(printable(question, keep="\n\t"))
        for name, answer in zip(names, answers, strict=True):
            answer = printable(answer, keep="\n\t")
            print(f"  {printable(name)}{answer}")


def check_image_arguments(args: argparse.Namespace) -> None:
    """UserError where a file that the arguments name is missing, before a model is loaded. `file://` addresses become
    paths."""
    check_confidence(args)
    given = [name for name in ("image", "video", "memory") if getattr(args, name)]
    if len(given) > 1:
        raise UserError(f"--{given[0]}, --{given[1]}: expected one of them, found both")
    for name, value in (("frames", args.frames), ("fps", args.fps), ("max-frames", args.max_frames)):
        if value is not None and not args.video:
            raise UserError(f"--{name}: expected a --video to take frames of, found none")
    args.image, args.video = [local_path(file) for file in args.image], args.video and local_path(args.video)
    for file in map(as_path, args.image):
        check_file(file)
        kind = kind_of(file)
        if kind == VIDEO:
            raise UserError(f"--image {file}: expected a picture, found a video; --video takes its frames")
        if kind == ANIMATION:
            note = f"note: {file}: animated; only its first picture is used; --video uses more"
            print(printable(note), file=sys.stderr)
    if args.video:
        probe(Clip(as_path(args.video), incomplete=args.incomplete))
    if args.memory:
        MemoryFile(args.memory)


def encode_arguments(model: Model, args: argparse.Namespace) -> EncodedImages | None:
    """What `add_image_arguments` name; None for text alone."""
    if not (args.image or args.video or args.memory):
        return None
    if args.tokens is not None and not model.config.has_compress_stream:
        raise UserError(f"--tokens: {args.run} has no VoCo tokens (compressor {model.config.compressor!r})")
    tokens = None if args.tokens == AUTO else args.tokens
    check_tokens("--tokens", tokens, model.config.num_voco_tokens)
    if args.memory:
        file = MemoryFile(args.memory)
        chosen = _chosen(file, getattr(args, "picture", None))
        return model.encode(file.read(chosen, tokens, model.fingerprint, model.config.memory_kind))
    if args.video:
        images = model.encode_video(args.video, sampling=frame_sampling(args, model), incomplete=args.incomplete)
    else:
        images = model.encode_images(args.image)
    return images.first_tokens(tokens) if isinstance(images, MemoryBank) else images


def note_images(model: Model, images: EncodedImages | None, together: bool = True) -> None:
    """On standard error, where a model is asked without an image, or about more together than it has seen."""
    directory, trained = model.run.directory, model.run.config.data.images_per_pack
    if images is None:
        known = f", and {directory} was trained with an image in every conversation"
        print(f"note: no image is given{known if saw_single_questions(model) else ''}", file=sys.stderr)
    elif together and len(images) > trained:
        pictures = len([*pictures_of(images.items)])
        count = count_of_pictures(pictures, len(images)) if pictures < len(images) else count_of(pictures, "image")
        note = f"note: {count} together: {directory} was trained with at most {trained}"
        print(note, file=sys.stderr)


def saw_single_questions(model: Model) -> bool:
    """Whether a run has learned all it knows from sources that have a picture, and a single question, in every
    conversation."""
    config, directory = model.run.config, model.run.directory
    kinds = {keys.kind for keys in config.data.train.values()}
    trained_here = (directory / "metrics.jsonl").exists() and not config.init_from  # not converted, say
    return trained_here and kinds <= {"easyvqa", "video_qa", "tfds"}


def describe(images: EncodedImages) -> str:
    """The path of a picture in its tiles, or a frame's with its time."""
    item = images.items[0]
    return item.source if item.time is None else f"{item.source} at {item.time:.1f} s"


def _chosen(file: MemoryFile, names: list[str] | None) -> list[int] | None:
    """Places of the pictures that are named, each with all its tiles."""
    if not len(file):
        raise UserError(f"{file.file}: expected pictures, found none")
    if not names:
        return None
    chosen = []
    for name in names:
        end = PurePath(name).parts  # "1.png" is not "11.png"
        places = [i for i, item in enumerate(file.items) if end and PurePath(item.source).parts[-len(end) :] == end]
        if not places:
            raise UserError(f"--picture: {file.file} has none whose path ends in {name!r}")
        chosen += places
    return chosen


if __name__ == "__main__":
    main()
