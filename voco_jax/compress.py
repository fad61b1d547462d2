"""`voco compress --run DIR --images album/ --out album.voco`: pictures and videos into a memory file.

What --images names is a picture, a video, a directory, a pattern ("shots/*.png") or a list (a .txt with a path a line);
all into one file. The same command again adds what is new, and goes on where it was interrupted.
"""

import sys

from tqdm import tqdm

from voco_jax.arguments import add_frame_arguments, add_model_arguments, frame_sampling, load_model
from voco_jax.data.processes import usable_cores
from voco_jax.data.sources.roots import path_here
from voco_jax.errors import one_line_errors
from voco_jax.infer.compress import compress_to_file, find_entries
from voco_jax.infer.memory import check_tokens
from voco_jax.infer.memory_file import MemoryFile
from voco_jax.options import Parser, at_least_1, check_out
from voco_jax.terminal import printable


@one_line_errors
def main() -> None:
    parser = Parser(prog="voco compress", description=__doc__)
    add_model_arguments(parser)
    parser.add_argument(
        "--images", nargs="+", required=True, metavar="PATH",
        help="pictures, videos, directories, patterns or lists; see above",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=path_here, required=True, metavar="FILE", help="memory file to write, or to add to"
    )
    parser.add_argument("--tokens", type=int, metavar="K", help="keep only the first K tokens of each image")
    parser.add_argument("--int8", action="store_true", help="store in int8: half the size of bfloat16")
    parser.add_argument("--batch-size", type=at_least_1, default=32, metavar="N", help="images at once (default 32)")
    parser.add_argument(
        "--threads", type=at_least_1, default=usable_cores(), metavar="N", help="threads that decode pictures"
    )
    add_frame_arguments(parser)
    args = parser.parse_args()
    check_out(args.out)
    entries = find_entries(args.images)  # first: what is wrong with them shows itself at once
    model = load_model(args)
    check_tokens("--tokens", args.tokens, model.config.num_voco_tokens)
    outcome = compress_to_file(
        model.image_encoder, entries, args.out, tokens=args.tokens, int8=args.int8,
        sampling=frame_sampling(args, model),
        batch_size=args.batch_size, threads=args.threads, log=lambda line: tqdm.write(line, file=sys.stderr),
        incomplete=args.incomplete,
    )  # fmt: skip
    file = MemoryFile(args.out)
    counts = [f"{outcome.new} new", f"{outcome.known} known"]
    counts += [f"{n} {what}" for n, what in ((outcome.skipped, "left out"), (outcome.dropped, "replaced")) if n]
    print(f"{printable(file.summary())} ({', '.join(counts)})")


if __name__ == "__main__":
    main()
