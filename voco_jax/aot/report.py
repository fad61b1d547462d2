"""The report on a step, for people and as JSON: memory, time and costs; or why it does not fit, and what helps."""

from dataclasses import asdict
from typing import Any

from jax.stages import Compiled
from ml_collections import ConfigDict

from voco_jax.aot.compile import hbm_bytes
from voco_jax.aot.hlo import HLOError
from voco_jax.aot.hlo_cost import estimate
from voco_jax.aot.programs import Program
from voco_jax.errors import UserError
from voco_jax.parallel.chips import Chip

GIB = 2**30


def make_report(program: Program, compiled: Compiled, chip: Chip, num_devices: int) -> dict[str, Any]:
    """What `--json` prints of a step that fits: bytes and seconds; ranges are [lower, upper].

    UserError where the HLO cannot be read.
    """
    hbm = hbm_bytes(compiled)
    hbm["total"] = sum(hbm.values())
    try:
        cost = estimate(compiled.as_text() or "", chip)
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
        "program_flops": (cost.matmul_flops + cost.attention_flops) * num_devices,
        "step_seconds": seconds,
        "tokens_per_second": [(program.tokens + program.compress_tokens) / s for s in reversed(seconds)],
        "mfu": [program.model_flops / (s * num_devices * chip.peak_flops) for s in reversed(seconds)],
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


def render_misfit(report: dict) -> str:
    """The report of a step that does not fit, for a person."""
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
