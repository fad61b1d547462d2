"""Starting several processes, for real: two on this machine, two simulated devices each."""

import os
import re
import socket
import subprocess
import sys
import time

import pytest

from tests.helpers import tiny
from voco_jax.errors import UserError
from voco_jax.parallel import distributed

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# A mean over the rows of all processes: 0, 1 and 2, 3, which no process has together.
SCRIPT = """
import sys
from voco_jax.parallel import distributed
distributed.start(*eval(sys.argv[1]))
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
rows = np.arange(2.0) + 2 * jax.process_index()
x = jax.make_array_from_process_local_data(NamedSharding(mesh, P("data")), rows)
total = jax.jit(jax.shard_map(lambda x: jax.lax.psum(x, "data"), mesh=mesh, in_specs=P("data"), out_specs=P()))(x)
print(jax.process_index(), jax.process_count(), float(jax.jit(lambda x: x.mean())(x)), np.asarray(total))
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def environment(**variables) -> dict[str, str]:
    """Two devices, and nothing that would be found in a cluster."""
    others = re.compile("(JAX_(?!COMPILATION|PERSISTENT)|SLURM_|OMPI_|KUBERNETES_)")
    kept = {name: value for name, value in os.environ.items() if not others.match(name)}
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    return kept | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"} | {name: str(value) for name, value in variables.items()}


def run_two(arguments, variables, script=SCRIPT) -> list[subprocess.CompletedProcess]:
    """Processes 0 and 1 of a script; both functions of the number give its arguments and the environment."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, repr(arguments(i))], env=environment(**variables(i)),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tiny.CONFIG_FILE.parents[1],
        )
        for i in (0, 1)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [
        subprocess.CompletedProcess([], process.returncode, *output)
        for process, output in zip(processes, outputs, strict=True)
    ]


@pytest.mark.multiprocess
@pytest.mark.parametrize("how", ["flags", "environment", "slurm"])
def test_two_processes(how):
    port = free_port()
    nothing, slurm = (lambda i: {}), {"SLURM_JOB_ID": 7, "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": 2}
    arguments, variables = {
        "flags": (lambda i: (f"localhost:{port}", 2, i, 60), nothing),
        "environment": (lambda i: (), lambda i: dict(zip(VARIABLES, (f"localhost:{port}", 2, i), strict=True))),
        "slurm": (
            lambda i: (),
            lambda i: slurm | {"SLURM_PROCID": i, "SLURM_LOCALID": i, "JAX_COORDINATOR_PORT": port},
        ),
    }[how]
    first, second = run_two(arguments, variables)
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    gloo = ("Gloo", "ranks")  # which writes its lines in pieces
    said = [[x for x in done.stdout.splitlines() if not any(y in x for y in gloo)] for done in (first, second)]
    assert said == [["distributed: process 0 of 2, 4 devices, 2 local", "0 2 1.5 [6.]"], ["1 2 1.5 [6.]"]]


@pytest.mark.multiprocess
def test_flags_come_before_the_environment():
    port = free_port()
    wrong = dict(zip(VARIABLES, ("localhost:1", 7, 5), strict=True))
    for done in run_two(lambda i: (f"localhost:{port}", 2, i, 60), lambda i: wrong):
        assert done.returncode == 0 and done.stdout.endswith(" 2 1.5 [6.]\n"), done.stderr


@pytest.mark.multiprocess
def test_a_process_on_its_own_says_and_waits_for_nothing():
    script = (
        "import time, jax; from voco_jax.parallel.distributed import start; t = time.time(); start(); "
        "assert time.time() - t < 1 and jax.process_count() == 1 and not jax.distributed.is_initialized()"
    )
    done = subprocess.run([sys.executable, "-c", script], env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.multiprocess
@pytest.mark.parametrize("process", [0, 1])
def test_the_others_do_not_come(process, tmp_path):
    """The coordinator's process waits for the other, which waits for the coordinator: each gives up with one line."""
    arguments = [
        *tiny.arguments(tmp_path / "run"), f"--coordinator=localhost:{free_port()}", "--num_processes=2",
        f"--process_id={process}", "--initialization_timeout=2",
    ]  # fmt: skip
    command = [sys.executable, "-m", "voco_jax.train", *arguments]
    begin = time.time()
    done = subprocess.run(
        command, env=environment(), capture_output=True, text=True, cwd=tiny.CONFIG_FILE.parents[1], timeout=60
    )
    assert time.time() - begin < 30 and done.returncode == 75 and done.stdout == ""
    assert done.stderr.startswith(f"error: distributed: process {process} of 2, coordinator localhost:")
    assert done.stderr.endswith(": the others did not come within 2 s\n") and done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_port_that_is_taken():
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            UserError, match=f"--coordinator: port {port} of process 0's machine: Address already in use"
        ):
            distributed.start(f"localhost:{port}", 2, 0)


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (("a:1",), (), r"--process_id: expected all three or none; --num_processes and --process_id missing"),
        (("", 2, 0), (), r"--coordinator, .*: expected all three or none; --coordinator missing"),
        (("a:1", 2), (), r"all three or none; --process_id missing"),
        (("a", 2, 0), (), r"--coordinator: expected HOST:PORT, found 'a'"),
        (("a:b", 2, 0), (), r"--coordinator: expected HOST:PORT, found 'a:b'"),
        ((":99", 2, 0), (), r"--coordinator: expected HOST:PORT, found ':99'"),
        (("a:99999", 2, 0), (), r"--coordinator: expected HOST:PORT, found 'a:99999'"),
        (("a:1", 2, 2), (), r"--process_id: expected 0 to 1, one less than --num_processes; found 2"),
        (("a:1", 2, -2), (), r"--process_id: expected 0 to 1, .*found -2"),
        (("a:1", -3, 0), (), r"--num_processes: expected at least 1, found -3"),
        (("a:1", 2, 0, 0), (), r"--initialization_timeout: expected at least 1 second, found 0"),
        ((), ("a:1",), r"JAX_COORDINATOR_ADDRESS, .*or none; JAX_NUM_PROCESSES and JAX_PROCESS_ID missing"),
        ((), ("a:1", "two", "0"), r"JAX_NUM_PROCESSES: expected a whole number, found 'two'"),
        ((), ("a:1", "2", "2"), r"JAX_PROCESS_ID: expected 0 to 1, one less than JAX_NUM_PROCESSES; found 2"),
        (("a:1",), ("a:1", "2", "0"), r"all three or none; --num_processes and --process_id missing"),
    ],
)
def test_what_cannot_be(arguments, variables, message, monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in zip(VARIABLES, variables, strict=False):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message) as error:
        distributed.start(*arguments)
    assert "\n" not in str(error.value)
