"""`voco aot` as a person or a program reads it, on programs small enough to compile in seconds."""

from dataclasses import dataclass, replace
import json
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from tests.helpers import tiny
from tests.helpers.commands import run_main
from voco_jax.aot import __main__ as aot
from voco_jax.aot.compile import DoesNotFit, argument_bytes, compile_step, hbm_bytes, too_large
from voco_jax.aot.report import advice, make_report, render
from voco_jax.config import default_config, source, sources
from voco_jax.data.training_data import open_training_data
from voco_jax.errors import UserError
from voco_jax.parallel.chips import CHIPS, topology_devices
from voco_jax.parallel.mesh import AXES

CONFIG = Path(__file__).parents[2] / "configs" / "easyvqa.py"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--topology=CHIP:SHAPE is missing, for example --topology=v5e:8x8"),
        (["--topology=v5e:8"], "--topology: expected a chip of v5e, v5p, v6e, tpu7x and a shape, for example v5e:2x2,"),
        (["--topology=v5e:2x2", "--step=fly"], "train, compress, read, decode|train|compress|read|decode"),
        (["--topology=v5e:2x2", "--fast"], "fast"),
        (["--topology=v5e:2x2", "more"], "'more' is not an option; options: --help, --config,"),
        (["--topology=v5e:2x2", "--xla=vmem"], "--xla: expected NAME=VALUE, found 'vmem'"),
        pytest.param(["--topology=v6e:3x5"], "--topology=v6e:3x5: ", marks=pytest.mark.tpu_compile),
    ],
)
def test_what_cannot_be_asked(monkeypatch, capsys, arguments, message):
    status, output, error = run_main(aot, monkeypatch, capsys, f"--config={CONFIG}", *arguments)
    assert (status, output) == (2, "")
    assert error.startswith("error: ") and len(error.splitlines()) == 1
    assert any(part in error for part in message.split("|")), error


@dataclass(frozen=True)
class Small:
    """A program of one matmul and an all-gather."""

    function: object
    arguments: tuple
    model_flops: float = 2 * 4096.0 * 1024 * 1024
    tokens: int = 4096
    images: int = 3
    compress_tokens: int = 30


FSDP = P("fsdp")


def small_program(mesh, rows: int, weights: P = FSDP) -> Small:
    def step(x, w):
        return jnp.tanh(x @ w)

    def array(shape, spec):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=jax.sharding.NamedSharding(mesh, spec))

    return Small(jax.jit(step), (array((rows, 1024), FSDP), array((1024, 1024), weights)))


ABOUT = {"step": "train", "chips": 4, "compile_seconds": 1.0, "jax": "0", "libtpu": "0"}


@pytest.mark.tpu_compile
def test_report(tpu_mesh):
    program = small_program(tpu_mesh, 4096)
    compiled, seconds = compile_step(program, tpu_mesh, CHIPS["v5e"])
    assert seconds > 0
    report = json.loads(json.dumps(make_report(program, compiled, CHIPS["v5e"], 4)))
    assert report["program_flops"] == report["model_flops"]
    assert report["hbm"]["arguments"] == argument_bytes(program) == (4096 + 1024) * 1024 * 2 / 4
    assert report["hbm"]["total"] == sum(report["hbm"][k] for k in ("arguments", "outputs", "temporaries", "program"))
    (low, high), tokens, mfu = (report[key] for key in ("step_seconds", "tokens_per_second", "mfu"))
    assert 0 < low <= high
    assert tokens == [(4096 + 30) / high, (4096 + 30) / low]
    assert mfu == [report["model_flops"] / (4 * 197e12 * s) for s in (high, low)] and mfu[1] < 1
    text = render(ABOUT | report, "headline")
    assert len(text.splitlines()) <= 42 and max(map(len, text.splitlines())) <= 120
    for part in ("arguments", "of 15.75", "4,096 to read, 30 to compress   (3 images)", "all-gather", "MFU", "matmul"):
        assert part in text


@pytest.mark.tpu_compile
def test_what_the_compiler_lets_through_may_still_be_too_large(tpu_mesh):
    program = small_program(tpu_mesh, 4096)
    compiled, _ = compile_step(program, tpu_mesh, CHIPS["v5e"])
    small = replace(CHIPS["v5e"], hbm_bytes=sum(hbm_bytes(compiled).values()) - 1)
    with pytest.raises(DoesNotFit) as found:
        compile_step(program, tpu_mesh, small)
    assert (found.value.needed, found.value.available) == (small.hbm_bytes + 1, small.hbm_bytes)


@pytest.mark.tpu_compile
@pytest.mark.parametrize(
    ("topology", "gib"), [("v5e:2x2", 16), ("v5p:2x2x1", 96), ("v6e:2x2", 32), ("tpu7x:2x2x1", 96)]
)
def test_too_large(topology, gib):
    """A device's HBM is the compiler's own number."""
    chip, devices = topology_devices(topology)
    mesh = jax.sharding.Mesh(np.array(devices).reshape(1, -1, 1, 1), AXES)
    program = small_program(mesh, len(devices) * gib * 2**19)  # so many GiB a device come in, and as much goes out
    with pytest.raises(DoesNotFit) as found:
        compile_step(program, mesh, chip)
    assert found.value.needed > gib * 2**30 > found.value.available == chip.hbm_bytes > 0.95 * gib * 2**30
    assert argument_bytes(program) == pytest.approx(gib * 2**30, rel=1e-3)


@pytest.mark.tpu_compile
def test_a_chip_of_two_devices():
    """Four chips of tpu7x: each device does its rows at half of the chip's peak."""
    chip, devices = topology_devices("tpu7x:2x2x1")
    assert len(devices) == 4 * chip.devices_per_chip and {device.device_kind for device in devices} == {"TPU7x"}
    mesh = jax.sharding.Mesh(np.array(devices).reshape(1, -1, 1, 1), AXES)
    program = small_program(mesh, 8 * 4096, weights=P())
    compiled, _ = compile_step(program, mesh, chip)
    report = make_report(program, compiled, chip, len(devices))
    assert report["program_flops"] == 8 * program.model_flops
    low, high = report["step_seconds"]
    assert report["mfu"] == pytest.approx([program.model_flops / (4 * 2307e12 * s) for s in (high, low)])  # of 4 chips
    assert program.model_flops / (2307e12 / 2) < report["classes"]["matmul"][0] <= low
    text = render(ABOUT | report, "headline")
    assert "of 94.75" in text and f"tokens/s a chip       {(4096 + 30) / high / 4:>9,.0f}" in text


def test_advice():
    config = default_config()
    with config.unlocked():
        config.data.batch_size = 64
        config.model.remat = "dots"
    shape = {"data": 2, "fsdp": 4, "frame": 1, "tensor": 1}
    weights = advice(config, "train", shape, arguments=12e9, available=16e9)  # weights and optimizer fill it
    assert weights[0].startswith("config.mesh.fsdp") and "2 times over" in weights[0]
    activations = advice(config, "train", shape, arguments=1e9, available=16e9)
    assert activations[0] == "config.data.batch_size (now 64, 8 a device): fewer rows a device"
    assert activations[1].startswith("config.model.remat (now 'dots')")
    assert not any("remat" in line for line in advice(config, "read", shape, arguments=1e9, available=16e9))


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        ("RESOURCE_EXHAUSTED: … Used 20.5G of 15.75G hbm. Exceeded hbm capacity by 4.75G.", 20.5),
        ("the total memory required for HLO temporaries (56.00G) exceeds available HBM (15.75G).", 56),
    ],
)
def test_libtpu_says_how_much(message, needed):
    error = too_large(message)
    assert (error.needed, error.available) == (needed * 2**30, 15.75 * 2**30)
    assert too_large("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem") is None


@pytest.mark.tpu_compile
def test_the_image_stage_on_sixteen_chips(monkeypatch, capsys):
    """The 7B config with smaller numbers: both streams, splash, remat, the frozen tower, sharded over v5e:4x4."""
    sizes = {
        "llama.num_hidden_layers": 4, "llama.hidden_size": 512, "llama.intermediate_size": 1408,
        "llama.num_attention_heads": 4, "llama.num_key_value_heads": 4, "llama.vocab_size": 1000,
        "vision.image_size": 112, "vision.num_hidden_layers": 3, "vision.hidden_size": 256,
        "vision.intermediate_size": 512, "vision.num_attention_heads": 4,
    }  # fmt: skip
    keys = [f"--config.model.{key}={value}" for key, value in sizes.items()]
    keys += ["--config.data.batch_size=32", "--config.data.row_length=512", "--config.mesh.tensor=2"]
    keys += ["--topology=v5e:4x4", "--json"]
    status, output, error = run_main(aot, monkeypatch, capsys, f"--config={CONFIG.parent / 'voco_7b.py'}", *keys)
    assert status == 0, error
    report = json.loads(output)
    assert report["mesh"] == {"data": 1, "fsdp": 8, "frame": 1, "tensor": 2}
    assert (report["tokens"], report["images"], report["compress_tokens"]) == (32 * 512, 32, 32 * (64 + 4))
    # A sixteenth of weights and two moments in float32, of the frozen tower's weights, and of the batch.
    layer = 4 * 512 * 512 + 3 * 512 * 1408 + 2 * 512
    llama = 4 * layer + 2 * 1024 * 512 + 512  # the vocabulary is padded to 1,024
    projector = 256 * 512 + 512 + 512 * 512 + 512
    batch = 32 * (6 * 512 + 112 * 112 * 3) * 4
    tower = 3 * (4 * 256**2 + 2 * 256 * 512) + 3 * 14**2 * 256 + 65 * 256
    expected = (llama + projector) * 3 * 4 + tower * 4 + 2 * batch  # rows are not spread over tensor
    assert expected < report["hbm"]["arguments"] * 16 < 1.1 * expected  # norms and biases are on every device
    # Layers are computed again in the backward pass, all but the down projection.
    assert 1.15 < report["program_flops"] / report["model_flops"] < 1.5
    assert report["classes"]["attention"][0] > 0 and 0.02 < report["attention_share"][0] < 0.5
    # A layer's kernels are gathered twice, in bfloat16; head, embeddings and tower come on top.
    sent = {collective["kind"]: collective["bytes"] for collective in report["collectives"]}
    gathered = 2 * 4 * (4 * 512 * 512 + 3 * 512 * 1408) / 2 * 2 * 7 / 8
    assert gathered < sent["all-gather"] < 1.25 * gathered


@pytest.mark.tpu_compile
@pytest.mark.slow
def test_the_command_counts_chips(monkeypatch, capsys):
    """And shares the work among their devices, two each."""
    sizes = ["--config.data.row_length=64", "--config.data.rows_per_pack=1", "--config.data.batch_size=8"]
    arguments = [f"--config={CONFIG}", *sizes, "--step=decode", "--topology=tpu7x:1x1x1"]
    status, output, error = run_main(aot, monkeypatch, capsys, *arguments)
    assert (status, output.splitlines()[0].split(": ")[1]) == (
        0,
        "decode on tpu7x:1x1x1, 1 chips of 2 devices (mesh",
    ), error
    tokens = [line.rsplit("  ", 1)[1] for line in output.splitlines() if line.startswith("  tokens/s")]
    assert len(tokens) == 2 and tokens[0] == tokens[1]  # of all chips, and of one


def test_a_shape_that_the_data_choose(tmp_path, capsys):
    """As training has it; without the data the keys are named."""
    config = tiny.config(tmp_path / "run", data__rows_per_pack=0)
    shape = open_training_data(config, log=lambda line: None).batches.loader.plan.shape
    found = aot.with_shape(config).data
    assert (found.row_length, found.rows_per_pack) == (shape.row_length, shape.rows) and config.data.row_length == 0
    assert capsys.readouterr().err == f"from the data: row_length {shape.row_length}, rows_per_pack {shape.rows}\n"
    config.data.train = sources(mine=source("llava", file=str(tmp_path / "gone.json")))
    with pytest.raises(UserError, match=r"gone.json: not found.*give --config.data.row_length=… --config.data.rows_"):
        aot.with_shape(config)


def test_the_time_that_has_gone_by(monkeypatch, capsys):
    class Event:
        told = 0

        def wait(self, seconds):
            self.told += 1
            return self.told > 2

        def set(self):
            pass

    monkeypatch.setattr(aot, "Event", Event)
    with aot.telling_time("compiling …"):
        pass
    assert capsys.readouterr().err == "compiling …\n" + "compiling … 0 s\n" * 2
