"""python -m voco_jax.aot --config=FILE --topology=CHIP:SHAPE [--config.KEY=VALUE …]

Does this run fit that TPU slice, and how fast should it be? Asked of the TPU compiler, on a machine without a TPU.

    python -m voco_jax.aot --config=configs/voco_7b.py --topology=v5e:8x8
    python -m voco_jax.aot --config=… --config.data.batch_size=256 --topology=v5p:2x2x4 --step=compress --json

The whole step is compiled as it would be for the real slice; nothing is run. HBM is what the compiler assigns. Times
are estimates from its cycles; `voco_jax/aot/hlo_cost.py` says how they come about. What does not fit ends with
status 1 and says by how much.
"""

from collections.abc import Iterator
import contextlib
from dataclasses import asdict
import importlib.metadata
import json
import math
import re
import sys
from threading import Event, Thread
import time

from absl import flags
import jax
from ml_collections import ConfigDict

from voco_jax.aot.hlo import HLOError
from voco_jax.aot.hlo_cost import estimate
from voco_jax.aot.programs import STEPS, find_tokenizer, make_program
from voco_jax.checkpoint.init_from import begin_with_run
from voco_jax.command_line import config_file, parse_flags
from voco_jax.data.from_config import make_model_config
from voco_jax.data.training_data import open_training_data
from voco_jax.errors import UserError, one_line_errors
from voco_jax.io.paths import as_path
from voco_jax.parallel.chips import Chip, topology_devices
from voco_jax.parallel.mesh import make_mesh

GIB = 2**30


class DoesNotFit(Exception):
    """HBM is too small, by the compiler's word or by the sum of what it assigned."""

    def __init__(self, needed: float, available: float):
        super().__init__(needed, available)
        self.needed, self.available = needed, available  # bytes a device


def compile_step(program, mesh, chip: Chip, compiler_options: dict[str, str] | None = None):
    """(compiled, seconds) of a Program on a mesh of a topology's devices.

    DoesNotFit where HBM is too small; UserError for what the model, its attention or the compiler cannot do.
    """
    start = time.monotonic()
    with jax.set_mesh(mesh):
        try:
            lowered = program.function.lower(*program.arguments)
        except ValueError as error:  # an attention adapter, or a compressor without what the step asks of it
            raise UserError(f"config.model: {str(error).splitlines()[0]}") from error
        try:
            compiled = lowered.compile(compiler_options=compiler_options)
        except jax.errors.JaxRuntimeError as error:
            if (misfit := too_large(str(error))) is not None:
                raise misfit from error
            raise UserError(f"the TPU compiler: {str(error).strip().splitlines()[0]}") from error
    # libtpu compares temporaries alone with HBM where they are the most: what it compiles may still be too large.
    if (total := sum(hbm_bytes(compiled).values())) > chip.hbm_bytes:
        raise DoesNotFit(total, chip.hbm_bytes)
    return compiled, time.monotonic() - start


def hbm_bytes(compiled) -> dict[str, int]:
    """What a compiled step takes of each device's HBM, by kind."""
    memory = compiled.memory_analysis()
    return {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,  # not written over arguments
        "temporaries": memory.temp_size_in_bytes,
        "program": memory.generated_code_size_in_bytes,
    }


def too_large(message: str) -> DoesNotFit | None:
    """What libtpu says of HBM in an error, if that is the error. Its two ways; the second leaves the arguments out."""
    match = re.search(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm", message) or re.search(
        r"\(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)", message
    )
    if match is None:
        return None
    numbers, units = match.groups()[::2], match.groups()[1::2]
    return DoesNotFit(*(float(n) * 2 ** (10 * (1 + "KMGT".index(u))) for n, u in zip(numbers, units, strict=True)))


def make_report(program, compiled, chip: Chip, num_chips: int) -> dict:
    """What `--json` prints of a step that fits: bytes and seconds; ranges are [lower, upper]."""
    hbm = hbm_bytes(compiled)
    hbm["total"] = sum(hbm.values())
    try:
        cost = estimate(compiled.as_text(), chip)
    except HLOError as error:
        raise UserError(f"the compiled program: {error}") from error
    seconds = [cost.seconds_b, cost.seconds_a]
    if not cost.seconds_b:
        raise UserError("the compiled program holds no estimated cycles: this libtpu is not one the estimate can read")
    return {
        "fits": True,
        "hbm": hbm | {"chip": chip.hbm_bytes, "share": hbm["total"] / chip.hbm_bytes},
        "tokens": program.tokens,
        "compress_tokens": program.compress_tokens,
        "images": program.images,
        "model_flops": program.model_flops,
        "program_flops": (cost.matmul_flops + cost.attention_flops) * num_chips,
        "step_seconds": seconds,
        "tokens_per_second": [(program.tokens + program.compress_tokens) / s for s in reversed(seconds)],
        "mfu": [program.model_flops / (s * num_chips * chip.peak_flops) for s in reversed(seconds)],
        "classes": {kind: [cost.classes_b[kind], cost.classes_a[kind]] for kind in cost.classes_a},
        "attention_share": [cost.attention_seconds / s for s in reversed(seconds)],
        "dearest": [asdict(dear) for dear in cost.dearest[:10]],
        "collectives": [asdict(collective) for collective in cost.collectives],
        "collective_seconds": cost.collective_seconds,
        "copies": {"bytes": cost.copied_bytes, "seconds": cost.copied_seconds},
        "left_out": cost.left_out,
    }


def render(report: dict, headline: str) -> str:
    """The report for a person, about 40 lines."""
    hbm, chips = report["hbm"], report["chips"]
    lines = [
        headline,
        f"compiled in {report['compile_seconds']:.0f} s by jax {report['jax']}, libtpu {report['libtpu']}; "
        "nothing was run, times are estimates",
        "",
        "HBM a device",
        *(f"  {name:<22}{hbm[name] / GIB:9.2f} GiB" for name in ("arguments", "outputs", "temporaries", "program")),
        f"  {'total':<22}{hbm['total'] / GIB:9.2f} GiB   {hbm['share']:.0%} of {hbm['chip'] / GIB:g}",
        "",
        f"A step on all {chips} chips",
        f"  {'tokens':<22}{report['tokens']:>9,}"
        + (f" to read, {report['compress_tokens']:,} to compress" if report["compress_tokens"] else "")
        + (f"   ({report['images']:,} images)" if report["images"] else ""),
        f"  {'FLOPs by the model':<22}{_range([report['model_flops']] * 2, 1e-12)} T",
        f"  {'FLOPs in the program':<22}{_range([report['program_flops']] * 2, 1e-12)} T   with padding"
        + (" and what remat repeats" if report["step"] == "train" else ""),
        f"  {'time, B to A':<22}{_range(report['step_seconds'], 1e3)} ms",
        f"  {'tokens/s':<22}{_range(report['tokens_per_second'], 1, ',.0f')}",
        f"  {'tokens/s a chip':<22}{_range(report['tokens_per_second'], 1 / chips, ',.0f')}",
        f"  {'MFU':<22}{_range(report['mfu'], 100, '.1f')} %",
        "",
        "Time by class of ops, B to A",
    ]
    for kind, seconds in report["classes"].items():
        share = _range(report["attention_share"], 100, ".0f").strip()
        note = f"   splash at the matrix units' minimum, {share} % of the step" if kind == "attention" else ""
        if any(seconds):
            lines.append(f"  {kind:<22}{_range(seconds, 1e3)} ms{note}")
    lines += ["", "Largest costs above ideal (A) over ms   of ms"]
    for dear in report["dearest"][:6]:
        where = f"{dear['label']}  {dear['source']}".strip()
        lines.append(f"  {dear['kind']:<22}{dear['excess_seconds'] * 1e3:13.1f}{dear['seconds'] * 1e3:8.1f}   {where}")
    lines += ["", "Not in the estimate (exposed: synchronous, nothing runs beside it)"]
    for sent in report["collectives"]:
        lines.append(
            f"  {sent['kind']:<22}{sent['bytes'] / GIB:9.2f} GiB sent a device in {sent['count']:,.0f}, "
            f"{sent['seconds'] * 1e3:.1f} ms at the links' speed, {sent['exposed_seconds'] * 1e3:.1f} exposed"
        )
    copies = report["copies"]
    lines.append(
        f"  {'copies HBM–VMEM':<22}{copies['bytes'] / GIB:9.2f} GiB, {copies['seconds'] * 1e3:.1f} ms at HBM's speed"
    )
    if report["left_out"]:
        what = ", ".join(f"{name} × {count:,.0f}" for name, count in sorted(report["left_out"].items())[:5])
        lines.append(f"  without cycles: {what}" + (" …" if len(report["left_out"]) > 5 else ""))
    return "\n".join(lines)


def _range(values: list[float], factor: float, form: str = "") -> str:
    """'749.6 – 814.9'. Without a form: a digit after the point, three where the numbers are small."""
    form = form or (",.1f" if values[1] * factor >= 10 else ".3f")
    low, high = (format(value * factor, form) for value in values)
    return f"{low:>9}" if low == high else f"{low:>9} – {high}"


def argument_bytes(program) -> float:
    """Bytes a device of a program's arguments: weights, optimizer state, batch."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(program.arguments)
    )


def advice(config: ConfigDict, step: str, mesh_shape: dict[str, int], arguments: float, available: float) -> list[str]:
    """Settings that would make a step that does not fit smaller, the most promising first."""
    num_rows = mesh_shape["data"] * mesh_shape["fsdp"]
    weights = []
    if mesh_shape["data"] > 1:
        weights.append(
            f"config.mesh.fsdp: weights and optimizer state lie on {mesh_shape['fsdp'] * mesh_shape['frame']} × "
            f"{mesh_shape['tensor']} devices, {mesh_shape['data']} times over (config.mesh.data)"
        )
    weights.append(f"a larger slice, or config.mesh.tensor (now {mesh_shape['tensor']}): fewer weights a device")
    activations = []
    batch = config.data.batch_size
    if batch > num_rows:
        activations.append(f"config.data.batch_size (now {batch}, {batch / num_rows:g} a device): fewer rows a device")
    if step == "train" and config.model.remat != "full":
        activations.append(f"config.model.remat (now '{config.model.remat}'): 'full' keeps least")
    if step in ("train", "compress") and config.data.images_per_pack > 1:
        activations.append(f"config.mesh.frame (now {mesh_shape['frame']}): images spread over more devices")
    return weights + activations if arguments > available / 2 else activations + weights


def _assumed(config: ConfigDict) -> str:
    """A line about a model whose tokenizer is not on this machine."""
    model = make_model_config(config, None)
    around, source = len(model.prefix_ids) + len(model.suffix_ids), config.tokenizer.source
    why = "tokenizer.source is 'train'" if source == "train" else f"{source} is not on this machine"
    if config.init_from:
        why = f"init_from: {config.init_from} is not on this machine"
    return f"assumed: a tokenizer with {around} tokens around an image, as Llama's ({why})"


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("topology", None, "chip and shape of the slice, v5e:8x8", flag_values=values)
    flags.DEFINE_enum("step", "train", STEPS, "what to compile", flag_values=values)
    flags.DEFINE_bool("json", False, "one JSON object instead of a report", flag_values=values)
    flags.DEFINE_multi_string("xla", [], "a compiler option, name=value; again for more than one", flag_values=values)


@one_line_errors
def main() -> None:
    config, values = parse_flags(sys.argv, define_flags, __doc__)
    topology, step = values["topology"].value, values["step"].value
    if topology is None:
        raise UserError("command line: --topology=CHIP:SHAPE is missing, for example --topology=v5e:8x8")
    options = dict(option.split("=", 1) for option in values["xla"].value if "=" in option)
    if wrong := [option for option in values["xla"].value if "=" not in option]:
        raise UserError(f"--xla: expected NAME=VALUE, found {wrong[0]!r}")
    chip, devices = topology_devices(topology)
    mesh = make_mesh(config.mesh, devices)
    if config.init_from and (as_path(config.init_from) / "config.json").exists():
        config = begin_with_run(config)
    config = with_shape(config)
    tokenizer = find_tokenizer(config)
    assumed = None if tokenizer is not None else _assumed(config)
    if assumed:
        print(assumed, file=sys.stderr)
    program = make_program(config, step, mesh, tokenizer)
    about = {
        "config": config_file(sys.argv),
        "step": step,
        "topology": topology,
        "chips": len(devices),
        "mesh": dict(mesh.shape),
        "assumed": assumed,
        "jax": jax.__version__,
        "libtpu": importlib.metadata.version("libtpu"),
    }
    try:
        with telling_time(f"compiling for {len(devices)} × {chip.name} …"):
            compiled, seconds = compile_step(program, mesh, chip, options)
    except DoesNotFit as error:
        arguments = argument_bytes(program)
        report = about | {
            "fits": False,
            "hbm": {"needed": error.needed, "available": error.available, "arguments": arguments},
            "advice": advice(config, step, about["mesh"], arguments, error.available),
        }
        print(json.dumps(report) if values["json"].value else render_misfit(report))
        sys.exit(1)
    report = about | {"compile_seconds": seconds} | make_report(program, compiled, chip, len(devices))
    axes = ", ".join(f"{axis} {size}" for axis, size in about["mesh"].items() if size > 1) or "one device"
    headline = f"{about['config']}: {step} on {topology}, {len(devices)} chips (mesh: {axes})"
    print(json.dumps(report) if values["json"].value else render(report, headline))


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


def render_misfit(report: dict) -> str:
    hbm = report["hbm"]
    over = hbm["needed"] - hbm["available"]
    return "\n".join(
        [
            f"{report['config']}: {report['step']} does not fit {report['topology']}: at least "
            f"{hbm['needed'] / GIB:.2f} GiB of {hbm['available'] / GIB:.2f} GiB a device, "
            f"{over / GIB:.2f} GiB ({over / hbm['available']:.0%}) too much; "
            f"arguments alone are {hbm['arguments'] / GIB:.2f} GiB",
            "What would help:",
            *(f"  {line}" for line in report["advice"]),
        ]
    )


if __name__ == "__main__":
    main()
