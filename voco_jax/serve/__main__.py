"""`voco serve --run DIR`: an OpenAI-compatible server whose pictures are compressed once.

    voco serve --run runs/easyvqa
    curl http://127.0.0.1:8000/v1/models

Ask it with any OpenAI client (base URL http://127.0.0.1:8000/v1), or on its page, http://127.0.0.1:8000. Memories of
pictures and clips are kept in --store, by content, and found there after a restart. Keys, one a line, in --api-keys or
$VOCO_API_KEYS.
"""

import argparse
import ipaddress
import logging
import math
import os
from pathlib import Path
import re
import signal
import sys
from types import FrameType

from voco_jax import interrupts
from voco_jax.api import Model
from voco_jax.arguments import add_model_arguments, load_model
from voco_jax.errors import UserError, cannot, one_line_errors
from voco_jax.infer.generate import Sampling
from voco_jax.io.files import read_text
from voco_jax.options import Parser, at_least_1

MISSING = "pip install 'voco_jax[serve]'"


def byte_size(text: str) -> int:
    """
    >>> byte_size("2GiB"), byte_size("500 MB"), byte_size("1000")
    (2147483648, 500000000, 1000)
    """
    units = (
        {"": 1}
        | {f"{p}iB": 1024**i for i, p in enumerate("KMGT", 1)}
        | {f"{p}B": 1000**i for i, p in enumerate("kMGT", 1)}
    )
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kKMGT]i?B)?", text.strip())
    unit = (found[2] or "") if found else None
    if found is None or unit not in units:
        raise argparse.ArgumentTypeError(f"expected a size such as 20GiB, found {text}")
    return int(float(found[1]) * units[unit])


def seconds(text: str) -> float:
    """The type of an option that is a time."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected seconds, more than 0, found {text}")
    return value


def check_temperature(value: float) -> None:
    """UserError for one that cannot be."""
    try:
        Sampling(value)
    except UserError as error:
        raise UserError(f"--{error}") from None


@one_line_errors
def main() -> None:
    args = _parser().parse_args()
    try:
        import fastapi  # noqa: F401
        import httpx  # noqa: F401
        import prometheus_client  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(f"voco serve needs {error.name}, which is not installed: {MISSING}") from None
    check_temperature(args.temperature)
    keys = _keys(args.api_keys)
    if args.isolate and not keys:
        raise UserError("--isolate: expected --api-keys, by which memories are told apart")
    if not keys and not _is_loopback(args.host):
        print(f"note: whoever reaches {args.host}:{args.port} may ask: no --api-keys are given", file=sys.stderr)
    _serve(args, load_model(args), keys)


def _parser() -> Parser:
    parser = Parser(prog="voco serve", description=__doc__)
    add_model_arguments(parser)
    parser.add_argument("--name", help="the model's name for clients (default: the run directory's)")
    network = parser.add_argument_group("network")
    network.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    network.add_argument("--port", type=int, default=8000, help="(default 8000; 0: any that is free)")
    network.add_argument("--api-keys", type=Path, metavar="FILE", help="keys that clients must have, one a line")
    network.add_argument("--isolate", action="store_true", help="each API key has memories of its own")
    network.add_argument(
        "--allowed-media-domains", nargs="+", default=[], metavar="HOST",
        help="hosts that pictures and clips may be fetched from: example.com, *.example.com (default: none)",
    )  # fmt: skip
    network.add_argument(
        "--cors-origins", nargs="+", default=[], metavar="ORIGIN",
        help="web pages that may ask, such as https://example.com (default: none)",
    )  # fmt: skip
    network.add_argument("--no-page", action="store_true", help="the API alone, without the page at /")
    network.add_argument("--log-prompts", action="store_true", help="write questions into the log")
    store = parser.add_argument_group("memories")
    store.add_argument(
        "--store", metavar="DIR", help="directory or gs://… for memories; servers may share it; 'none': kept on the "
        "host alone (default: in the user's cache directory)",
    )  # fmt: skip
    store.add_argument("--store-size", type=byte_size, default=byte_size("20GiB"), help="of --store (default 20GiB)")
    store.add_argument("--host-size", type=byte_size, default=byte_size("4GiB"), help="on the host (default 4GiB)")
    store.add_argument("--device-size", type=byte_size, default=byte_size("1GiB"), help="on the devices (default 1GiB)")
    store.add_argument(
        "--most-frames", type=at_least_1, default=256, metavar="N", help="frames taken of a clip at most (default 256)"
    )  # fmt: skip
    answers = parser.add_argument_group("answers")
    answers.add_argument(
        "--rows", type=at_least_1, default=16, help="requests that are answered at once (default 16)"
    )  # fmt: skip
    answers.add_argument(
        "--context", type=at_least_1, default=4096, metavar="N",
        help="most tokens of a prompt and its answer (default 4096, or the positions of the model)",
    )  # fmt: skip
    answers.add_argument(
        "--max-waiting", type=at_least_1, default=256, metavar="N", help="requests that wait at most (default 256)"
    )  # fmt: skip
    answers.add_argument(
        "--max-new-tokens", type=at_least_1, default=256, metavar="N", help="where a request names none (default 256)"
    )  # fmt: skip
    answers.add_argument(
        "--temperature", type=float, default=0.0, help="where a request names none (default 0: the likeliest token)"
    )  # fmt: skip
    answers.add_argument("--deadline", type=seconds, default=300.0, help="seconds for an answer (default 300)")
    answers.add_argument("--grace", type=seconds, default=30.0, help="seconds for the rest after SIGTERM (default 30)")
    return parser


def _keys(file: Path | None) -> tuple[str, ...]:
    if file is None:
        text = os.environ.get("VOCO_API_KEYS", "")
    else:
        try:
            text = read_text(file)
        except (OSError, UnicodeDecodeError) as error:
            raise cannot(f"--api-keys: {file} cannot be read", error) from None
    keys = tuple(line.strip() for line in text.splitlines() if line.strip())
    if file is not None and not keys:
        raise UserError(f"--api-keys: {file}: expected a key a line, found none")
    if short := [key for key in keys if len(key) < 16]:
        raise UserError(f"--api-keys: expected keys of 16 characters or more, found one of {len(short[0])}")
    return keys


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _store_directory(text: str | None) -> str | None:
    if text == "none":
        return None
    if text is not None:
        return text
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(cache, "voco_jax", "memories")


def _serve(args: argparse.Namespace, model: Model, keys: tuple[str, ...]) -> None:
    import uvicorn

    from voco_jax.serve.build import Options, make_server
    from voco_jax.serve.limits import MediaLimits
    from voco_jax.serve.service import Defaults

    has_store = model.config.has_compress_stream or args.store not in (None, "none")
    options = Options(
        name=args.name or "",
        keys=keys,
        isolate=args.isolate,
        limits=MediaLimits(tuple(args.allowed_media_domains), max_frames=args.most_frames),
        defaults=Defaults(args.max_new_tokens, args.temperature, args.deadline),
        store=_store_directory(args.store) if has_store else None,
        store_bytes=args.store_size,
        host_bytes=args.host_size,
        device_bytes=args.device_size,
        rows=args.rows,
        context=args.context,
        max_waiting=args.max_waiting,
        cors_origins=tuple(args.cors_origins),
        log_prompts=args.log_prompts,
        grace=args.grace,
        page=not args.no_page,
    )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs URLs
    app = make_server(model, options)

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            app.state.server.is_closing = True  # at once: /ready says so, and pages that are open hold nothing up
            super().handle_exit(sig, frame)

    config = uvicorn.Config(
        app, host=args.host, port=args.port, access_log=False, log_config=None,
        server_header=False, timeout_graceful_shutdown=max(1, math.ceil(args.grace)), timeout_keep_alive=75,
    )  # fmt: skip
    with interrupts.at_once(False, signal.SIGINT, signal.SIGTERM):
        Server(config).run()


if __name__ == "__main__":
    main()
