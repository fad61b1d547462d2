"""voco aot --config=FILE --topology=CHIP:SHAPE [--config.KEY=VALUE …]

Does this run fit that TPU slice, and how fast should it be? Asked of the TPU compiler, on a machine without a TPU.

    voco aot --config=configs/voco_7b.py --topology=v5e:8x8
    voco aot --config=… --config.data.batch_size=256 --topology=v5p:2x2x4 --step=compress --json

The whole step is compiled as it would be for the real slice; nothing is run. HBM is what the compiler assigns. Times
are estimates from its cycles; `voco_jax/aot/hlo_cost.py` says how they come about. What does not fit ends with
status 1 and says by how much.
"""

import argparse
from collections.abc import Iterator
import contextlib
import importlib.metadata
import json
import sys
from threading import Event, Thread
import time

import jax
from ml_collections import ConfigDict

from voco_jax.aot.compile import DoesNotFit, argument_bytes, compile_step
from voco_jax.aot.programs import STEPS, find_tokenizer, make_program
from voco_jax.aot.report import advice, make_report, render, render_misfit
from voco_jax.checkpoint.init_from import begin_with_run
from voco_jax.command_line import parse_arguments
from voco_jax.data.from_config import make_model_config
from voco_jax.data.training_data import open_training_data
from voco_jax.errors import UserError, one_line_errors
from voco_jax.io.paths import as_path, exists
from voco_jax.parallel.chips import topology_devices
from voco_jax.parallel.mesh import make_mesh
from voco_jax.train.teachers import run_of


def _assumed(config: ConfigDict) -> str:
    """A line about a model whose tokenizer is not on this machine."""
    model = make_model_config(config, None)
    around, source = len(model.prefix_ids) + len(model.suffix_ids), config.tokenizer.source
    why = "tokenizer.source is 'train'" if source == "train" else f"{source} is not on this machine"
    if config.init_from:
        why = f"init_from: {config.init_from} is not on this machine"
    return f"assumed: a tokenizer with {around} tokens around an image, as Llama's ({why})"


def _assumed_teacher(config: ConfigDict, step: str) -> list[str]:
    """A line about a teacher that is not on this machine."""
    name = run_of(config)
    if step != "train" or not name or exists(as_path(name) / "config.json"):
        return []
    why = f"train.distill.teacher: {name} is not on this machine"
    return [f"assumed: a teacher of this model's dimensions and prompts, which reads its rows whole ({why})"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--topology", metavar="CHIP:SHAPE", help="chip and shape of the slice, v5e:8x8")
    parser.add_argument("--step", choices=STEPS, default="train", help="what to compile (default train)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a report")
    parser.add_argument(
        "--xla", action="append", default=[], metavar="NAME=VALUE", help="a compiler option; may be repeated"
    )


@one_line_errors
def main() -> None:
    config, args = parse_arguments(sys.argv, add_arguments, __doc__)
    topology, step = args.topology, args.step
    if topology is None:
        raise UserError("--topology=CHIP:SHAPE is missing, for example --topology=v5e:8x8")
    options: dict[str, str | bool] = dict(option.split("=", 1) for option in args.xla if "=" in option)
    if wrong := [option for option in args.xla if "=" not in option]:
        raise UserError(f"--xla: expected NAME=VALUE, found {wrong[0]!r}")
    chip, devices = topology_devices(topology)
    mesh = make_mesh(config.mesh, devices)
    if config.init_from and (as_path(config.init_from) / "config.json").exists():
        config = begin_with_run(config)
    config = with_shape(config)
    tokenizer = find_tokenizer(config.tokenizer.source)
    lines = [*([] if tokenizer is not None else [_assumed(config)]), *_assumed_teacher(config, step)]
    for line in lines:
        print(line, file=sys.stderr)
    assumed = "; ".join(lines) or None
    num_chips = len(devices) // chip.devices_per_chip
    program = make_program(config, step, mesh, tokenizer)
    about: dict[str, object] = {
        "config": args.config,
        "step": step,
        "topology": topology,
        "chips": num_chips,
        "devices": len(devices),
        "mesh": dict(mesh.shape),
        "assumed": assumed,
        "jax": jax.__version__,
        "libtpu": importlib.metadata.version("libtpu"),
    }
    try:
        with telling_time(f"compiling for {num_chips} × {chip.name} …"):
            compiled, seconds = compile_step(program, mesh, chip, options)
    except DoesNotFit as error:
        arguments = argument_bytes(program)
        report = about | {
            "fits": False,
            "hbm": {"needed": error.needed, "available": error.available, "arguments": arguments},
            "advice": advice(config, step, dict(mesh.shape), arguments, error.available),
        }
        print(json.dumps(report) if args.json else render_misfit(report))
        sys.exit(1)
    report = about | {"compile_seconds": seconds} | make_report(program, compiled, chip, len(devices))
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    slice_ = f"{num_chips} chips" + (f" of {chip.devices_per_chip} devices" if chip.devices_per_chip > 1 else "")
    headline = f"{about['config']}: {step} on {topology}, {slice_} (mesh: {axes})"
    print(json.dumps(report) if args.json else render(report, headline))


def with_shape(config: ConfigDict) -> ConfigDict:
    """The config with rows of a pack and their length, where these are 0, as the training set has them.

    UserError where the data are not on this machine.
    """
    missing = [key for key in ("row_length", "rows_per_pack") if not config.data[key]]
    if not missing:
        return config
    try:
        plan = open_training_data(begin_with_run(config), log=lambda line: None).batches.loader.plan
    except UserError as error:
        given = " ".join(f"--config.data.{key}=…" for key in missing)
        raise UserError(f"{error} (where the data are not: give {given})") from None
    config = config.copy_and_resolve_references()
    config.data.update(row_length=plan.shape.row_length, rows_per_pack=plan.shape.rows)
    chosen = ", ".join(f"{key} {config.data[key]}" for key in missing)
    print(f"from the data: {chosen}", file=sys.stderr, flush=True)
    return config


@contextlib.contextmanager
def telling_time(line: str) -> Iterator[None]:
    """A line on standard error, and the time that has gone by: on a terminal every second, else every minute."""
    start, done, terminal = time.monotonic(), Event(), sys.stderr.isatty()

    def tell() -> None:
        while not done.wait(1 if terminal else 60):
            passed = f"{line} {time.monotonic() - start:.0f} s"
            print(f"\r{passed}" if terminal else passed, end="" if terminal else "\n", file=sys.stderr, flush=True)

    print(line, end="" if terminal else "\n", file=sys.stderr, flush=True)
    teller = Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        done.set()
        teller.join()
        if terminal:
            print(file=sys.stderr)


if __name__ == "__main__":
    main()
