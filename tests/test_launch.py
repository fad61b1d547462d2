"""The scripts in `launch/`: real processes on this machine; of a cloud, what it would be given, literally."""

from collections.abc import Callable
import contextlib
import fcntl
import os
from pathlib import Path
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import termios
import time

import pytest
import yaml

from tests.helpers import tiny
from voco_jax.command_line import parse_arguments

ROOT = Path(__file__).parents[1]
SCRIPTS = ("local_pod.sh", "gpu_host.sh", "tpu_pod.sh", "worker.sh")
TRAINER = ["--config=configs/easyvqa.py", "--config.train.steps=9"]
CLOUD = {"VOCO_PROJECT": "my-project", "VOCO_ZONE": "us-west4-a"}
IMAGE = "us-docker.pkg.dev/my-project/my-repository/voco_jax:1"
WORKDIR = "gs://my-bucket/runs/voco"

# In place of Python. As the trainer it does what its plan says, a line for each time it is started; it has a child, as
# the trainer has loaders of data, and notes what it was called with and which signals came.
PYTHON = """#!/usr/bin/env bash
case "$*" in
  *voco_jax.train*) ;;
  *) exit 0 ;;
esac
id=0
for argument; do case $argument in --process_id=*) id=${argument#*=} ;; esac; done
echo "$id" >>"$PLANS/started"
printf '%s\\n' "$CUDA_VISIBLE_DEVICES/$JAX_PLATFORMS/$XLA_FLAGS" >>"$PLANS/environment.$id"
printf '%s\\n' "$@" >"$PLANS/arguments.$id"
echo "hello from $id"
plan=$(sed -n "$(grep -cx "$id" "$PLANS/started")p" "$PLANS/$id")
sleep 1000 &
trap 'echo TERM >>"$PLANS/signals.$id"; exit 75' TERM
trap 'echo INT >>"$PLANS/signals.$id"; exit 130' INT
# then-…: when the other one is there
if [[ $plan == then-* ]]; then until [[ -e $PLANS/ready ]]; do sleep 0.05; done; fi
case ${plan#then-} in
  killed) touch "$PLANS/ready"; kill -KILL $$ ;;
  stubborn) trap '' TERM ;;&
  stubborn | wait) echo "$$ $!" >>"$PLANS/ready"; while :; do sleep 0.05; done ;;
  *) exit "${plan#then-}" ;;
esac
"""

# In place of sky and xpk
RECORDER = """#!/usr/bin/env bash
printf '%s\\0' "$(basename "$0")" "$@" >>"$CLOUD/asked"; printf '\\n' >>"$CLOUD/asked"
"""


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A directory with what the scripts touch."""
    root = tmp_path_factory.mktemp("project")
    shutil.copytree(ROOT / "launch", root / "launch")
    (root / "configs").mkdir()
    shutil.copy(ROOT / "configs" / "easyvqa.py", root / "configs")
    return root


class Bench:
    """Runs scripts with programs of ours before all others, and knows what these were asked for."""

    def __init__(self, project: Path, tmp: Path):
        self.project, self.tmp, self.bin = project, tmp, tmp / "bin"
        self.python = program(self.bin / "python3.12", PYTHON)
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "CUDA_", "XLA_", "VOCO_", "GIT_"))}
        path = f"{self.bin}:{os.environ['PATH']}"
        self.environment = kept | {"PATH": path, "PYTHON": str(self.python), "PLANS": str(tmp), "CLOUD": str(tmp)}

    def plan(self, *by_process: str, under: str = "") -> None:
        for number, plan in enumerate(by_process):
            file = self.tmp / under / str(number)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("\n".join(plan.split()) + "\n")

    def start(self, script: str, *arguments, **options) -> subprocess.Popen:
        options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=self.project) | options
        return subprocess.Popen([f"launch/{script}", *map(str, arguments)], env=self.environment, **options)

    def run(self, script: str, *arguments, **variables) -> subprocess.CompletedProcess:
        self.environment |= variables
        process = self.start(script, *arguments)
        output = process.communicate(timeout=100)
        return subprocess.CompletedProcess([], process.returncode, *output)

    def dry(self, script: str, *arguments, train: bool = True) -> list[str]:
        done = self.run(script, *arguments, "--dry-run", *(["--", *TRAINER] if train else []))
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.splitlines()

    def asked(self) -> list[list[str]]:
        return [line.split("\0")[:-1] for line in (self.tmp / "asked").read_text().split("\n")[:-1]]

    def nothing_is_left(self) -> bool:
        """On a busy machine a process that SIGKILL was sent to takes its time to be gone."""
        started = [int(process) for line in lines(self.tmp / "ready") for process in line.split()]
        deadline = time.monotonic() + 20
        while any(map(alive, started)) and time.monotonic() < deadline:
            time.sleep(0.02)
        return bool(started) and not any(map(alive, started))


@pytest.fixture
def bench(project, tmp_path) -> Bench:
    return Bench(project, tmp_path)


def test_shellcheck():
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, *sorted((ROOT / "launch").glob("*.sh"))], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(bench, script):
    done = bench.run(script, "--help")
    assert done.returncode == 0 and done.stderr == ""
    assert f"  launch/{script} " in done.stdout and "--dry-run" in done.stdout and "#!" not in done.stdout
    text = (ROOT / "launch" / script).read_text()
    cases = re.findall(r"^ +(--[a-z-]+(?: [|] --?[a-z-]+)*)\)", text, re.MULTILINE)
    assert len(cases) >= 3
    for option in set(" | ".join(cases).split(" | ")) - {"--help"}:
        assert option in done.stdout


# What would be run, literally


def test_dry_run_of_local_pod(bench):
    bench.environment["PYTHON"] = "python"
    start = "env PYTHONUNBUFFERED=1 JAX_PLATFORMS=cpu python -m voco_jax.train " + " ".join(TRAINER)
    assert bench.dry("local_pod.sh", 2, "--port=1234") == [
        f"{start} --coordinator=localhost:1234 --num_processes=2 --process_id=0 &",
        f"{start} --coordinator=localhost:1234 --num_processes=2 --process_id=1 &",
        "wait",
    ]
    bench.environment |= {"XLA_FLAGS": "--xla_a=1 --xla_b=2", "JAX_PLATFORMS": "cpu,tpu"}
    flags = "'XLA_FLAGS=--xla_a=1 --xla_b=2 --xla_force_host_platform_device_count=4'"
    first, _ = bench.dry("local_pod.sh", 1, "--port=1234", "--devices", 4)
    assert first.startswith(f"env PYTHONUNBUFFERED=1 {flags} python -m voco_jax.train ")


def test_dry_run_of_gpu_host(bench):
    bench.environment["PYTHON"] = "python"
    start, train = "env PYTHONUNBUFFERED=1 JAX_PLATFORMS=cuda,cpu", "python -m voco_jax.train " + " ".join(TRAINER)
    assert bench.dry("gpu_host.sh") == [f"{start} {train}"]
    assert bench.dry("gpu_host.sh", "--gpus", "1,3") == [f"{start} CUDA_VISIBLE_DEVICES=1,3 {train}"]
    others = "--coordinator=localhost:99 --num_processes=2 --process_id"
    assert bench.dry("gpu_host.sh", "--gpus=1,3", "--process-per-gpu", "--port=99") == [
        f"{start} CUDA_VISIBLE_DEVICES=1 {train} {others}=0 &",
        f"{start} CUDA_VISIBLE_DEVICES=3 {train} {others}=1 &",
        "wait",
    ]


JOB = """\
name: my-run
workdir: '{root}'  # to ~/sky_workdir of every host, but for what .gitignore names
resources:
  infra: gcp/us-west4/us-west4-a
  accelerators: tpu-v5litepod-64
  accelerator_args:
    runtime_version: v2-alpha-tpuv5-lite
  use_spot: true
  job_recovery:
    strategy: FAILOVER  # in the same region first, where the bucket is
    recover_on_exit_codes: [75]  # the trainer was preempted or lost another process, and saved what it could
    max_restarts_on_errors: 0  # also counts 2, an error that must be fixed
envs:
  JAX_PLATFORMS: tpu,cpu  # without a TPU jax would go on with the CPU
setup: launch/worker.sh install --extras tpu,gcs
run: 'launch/worker.sh run -- {arguments}'
"""


def test_dry_run_of_a_pod(bench):
    bench.environment |= CLOUD
    made = ("--type=v5litepod-64", "--spot", "--workdir", WORKDIR)
    arguments = " ".join([*TRAINER, f"--config.workdir={WORKDIR}"])
    printed = bench.dry("tpu_pod.sh", "my-run", *made)
    job = JOB.format(root=bench.project, arguments=arguments).splitlines()
    assert printed == [*job, f"sky jobs launch --name my-run --yes {bench.project}/build/my-run.yaml"]

    del bench.environment["VOCO_ZONE"]
    anywhere = yaml.safe_load("\n".join(bench.dry("tpu_pod.sh", "my-run", *made, "--type=v6e-64")[:-1]))
    assert anywhere["resources"]["infra"] == "gcp" and anywhere["resources"]["accelerators"] == "tpu-v6e-64"
    assert anywhere["resources"]["accelerator_args"]["runtime_version"] == "v2-alpha-tpuv6e"


def test_dry_run_on_gke(bench):
    bench.environment |= CLOUD | {"VOCO_IMAGE": IMAGE}
    made = ("--gke=my-cluster", "--type=v6e-64", "--slices=2", f"--workdir={WORKDIR}")
    assert bench.dry("tpu_pod.sh", "my-run", *made) == [
        f"xpk workload create --workload=my-run --tpu-type=v6e-64 --num-slices=2 --docker-image={IMAGE} "
        f"'--command=exec python -m voco_jax.train {' '.join(TRAINER)} --config.workdir={WORKDIR}' --max-restarts=100 "
        "--restart-on-exit-codes=75 --termination-grace-period-seconds=300 "
        "--project=my-project --zone=us-west4-a --cluster=my-cluster"
    ]
    (ironwood,) = bench.dry("tpu_pod.sh", "my-run", *made, "--type=tpu7x-8", "--slices=1")
    assert "--tpu-type=tpu7x-8 --num-slices=1" in ironwood


def test_what_runs_is_what_a_dry_run_prints(bench):
    """The command, and the file that SkyPilot is given."""
    for name in ("sky", "xpk"):
        program(bench.bin / name, RECORDER)
    bench.environment |= CLOUD | {"VOCO_IMAGE": IMAGE, "VOCO_WORKDIR": WORKDIR}
    job = ("my-run", "--type=v6e-64", "--", *TRAINER)
    printed = []
    for arguments in (job, ("--gke=my-cluster", *job)):
        assert bench.run("tpu_pod.sh", *arguments).returncode == 0
        printed.append(bench.run("tpu_pod.sh", "--dry-run", *arguments).stdout.splitlines())
    assert bench.asked() == [shlex.split(lines[-1]) for lines in printed]
    assert lines(bench.project / "build" / "my-run.yaml") == printed[0][:-1]


# The fields of https://docs.skypilot.co/en/latest/reference/yaml-spec.html that the files of this directory use
FIELDS = {
    "": {"name": str, "workdir": str, "num_nodes": int, "resources": dict, "envs": dict, "setup": str, "run": str},
    "resources": {
        "infra": str, "accelerators": str, "accelerator_args": dict, "use_spot": bool, "job_recovery": dict,
    },
    "accelerator_args": {"runtime_version": str},
    "job_recovery": {"strategy": str, "recover_on_exit_codes": list, "max_restarts_on_errors": int},
}  # fmt: skip


def check_fields(fields: dict, of: str = "") -> None:
    for name, value in fields.items():
        assert type(value) is FIELDS[of][name], name
        if isinstance(value, dict) and name != "envs":
            check_fields(value, name)


def test_jobs_of_skypilot(bench):
    """Fields of SkyPilot alone, of their types; 75 starts a job again and nothing else does."""
    pod = bench.dry("tpu_pod.sh", "my-run", "--type=v4-8", f"--workdir={WORKDIR}")[:-1]
    for text in ("\n".join(pod), (ROOT / "launch" / "gpus.yaml").read_text()):
        job = yaml.safe_load(text)
        check_fields(job)
        recovery = job["resources"]["job_recovery"]
        assert recovery == {"strategy": "FAILOVER", "recover_on_exit_codes": [75], "max_restarts_on_errors": 0}
        assert all(isinstance(value, str) for value in job["envs"].values())


def test_dry_run_of_a_worker(bench):
    """With a Python that is new enough, and on Ubuntu 22.04, which has none."""
    package = [".venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[tpu,gcs]'"]
    assert bench.dry("worker.sh", "install", train=False) == ["python3.12 -m venv .venv", *package]
    few = bench.tmp / "few"
    few.mkdir()
    for name in ("bash", "dirname", "env", "sed"):
        (few / name).symlink_to(shutil.which(name))
    assert bench.run("worker.sh", "install", "--dry-run", PATH=str(few)).stdout.splitlines() == [
        "python3 -m pip install --quiet --user uv",
        "python3 -m uv venv --quiet --seed --python 3.12 .venv",
        *package,
    ]


def test_a_worker_runs_the_trainer(bench):
    """With its arguments and status. On several hosts with GPUs it says who the others are; on TPUs jax finds them."""
    program(bench.python, '#!/bin/sh\nprintf "%s\\n" "$@" >"$PLANS/arguments"\nexit 75\n')
    hosts = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
    run, told = ("worker.sh", "run", "--", *TRAINER), ["-m", "voco_jax.train", *TRAINER]
    assert bench.run(*run).returncode == 75
    assert lines(bench.tmp / "arguments") == told
    bench.run(*run, JAX_PLATFORMS="tpu,cpu", **hosts)
    assert lines(bench.tmp / "arguments") == told
    bench.run(*run, JAX_PLATFORMS="cuda,cpu")
    others = ["--coordinator=10.0.0.1:8476", "--num_processes=2", "--process_id=1"]
    assert lines(bench.tmp / "arguments") == [*told, *others]


@pytest.mark.multiprocess
def test_two_workers_train(tmp_path):
    """Two hosts of a cluster, here on this machine, and the trainer itself."""
    environment = os.environ | {
        "PYTHON": sys.executable, "JAX_PLATFORMS": "cpu", "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.1",
    }  # fmt: skip
    command = ["launch/worker.sh", "run", "--", *tiny.arguments(tmp_path / "run", train__steps=4)]
    workers = [
        subprocess.Popen(
            command, cwd=ROOT, env=environment | {"SKYPILOT_NODE_RANK": str(rank)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    said = [worker.communicate(timeout=300)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], said
    assert "distributed: process 0 of 2, 2 devices, 1 local\n" in said[0] and "trained: " in said[0]


NASTY = ["it's", 'a "b" $HOME `id` \\ *', "$(touch gone)", "; rm -r x &", "", "ä→ß", "a\tb", "!#~{a,b}"]


def test_nasty_values_arrive_as_they_are(bench):
    arguments = [TRAINER[0], *(f"--config.name={value}" for value in NASTY)]
    bench.plan("0")
    assert bench.run("local_pod.sh", 1, "--port=99", "--", *arguments).returncode == 0
    found = lines(bench.tmp / "arguments.0")
    assert found[:-3] == ["-m", "voco_jax.train", *arguments]

    printed = bench.run("local_pod.sh", 1, "--port=99", "--dry-run", "--", *arguments).stdout.splitlines()
    assert shlex.split(printed[0])[3:-1] == [str(bench.python), *found]

    bench.environment |= CLOUD | {"VOCO_WORKDIR": WORKDIR, "VOCO_IMAGE": IMAGE}
    pod = ("tpu_pod.sh", "my-run", "--type=v4-8", "--dry-run")
    job = yaml.safe_load(bench.run(*pod, "--", *arguments).stdout.rpartition("sky jobs launch")[0])
    assert shlex.split(job["run"])[3:] == [*arguments, f"--config.workdir={WORKDIR}"]
    (command,) = (
        word for word in shlex.split(bench.run(*pod, "--gke=my-cluster", "--", *arguments).stdout)
        if word.startswith("--command=")
    )  # fmt: skip
    assert shlex.split(command)[4:] == [*arguments, f"--config.workdir={WORKDIR}"]


# What cannot be: one line, status 2, before anything runs

POD = ["my-run", "--type=v4-8", f"--workdir={WORKDIR}"]
GKE = [*POD, f"--image={IMAGE}", "--gke=my-cluster"]


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("local_pod.sh", [], "the number of processes is missing; see local_pod.sh --help"),
        ("local_pod.sh", ["two", "--", *TRAINER], "the number of processes: expected a whole number from 1 to 64"),
        ("local_pod.sh", [0, "--", *TRAINER], "the number of processes: expected a whole number from 1 to 64, found '"),
        ("local_pod.sh", [2], "--config=FILE is missing; arguments of voco train come after --"),
        ("local_pod.sh", [2, *TRAINER], "--config: unknown option"),
        ("local_pod.sh", [2, 3, "--", *TRAINER], "'3': arguments of voco train come after --"),
        ("local_pod.sh", [2, "--port", "--", *TRAINER], "--port: expected a value"),
        ("local_pod.sh", [2, "--port=70000", "--", *TRAINER], "--port: expected a whole number from 1 to 65535"),
        ("local_pod.sh", [2, "--devices=0", "--", *TRAINER], "--devices: expected a whole number from 1 to 64"),
        ("local_pod.sh", [2, "--max-restarts=-1", "--", *TRAINER], "--max-restarts: expected a value"),
        ("local_pod.sh", [2, "--", "--config=nothing.py"], "--config: nothing.py: not found"),
        ("local_pod.sh", [2, "--", *TRAINER, "steps=3"], "'steps=3': expected --config.KEY=VALUE after --"),
        ("local_pod.sh", [2, "--", *TRAINER, "--config.a=b\nc"], "--config.a: expected one line"),
        ("local_pod.sh", [2, "--", *TRAINER, "--process_id=3"], "--process_id: is set by local_pod.sh"),
        ("gpu_host.sh", ["--gpus=a", "--", *TRAINER], "--gpus (or CUDA_VISIBLE_DEVICES): expected something like 0,1,"),
        ("gpu_host.sh", ["--process-per-gpu", "--dry-run", "--", *TRAINER], "give --gpus with --process-per-gpu"),
        ("tpu_pod.sh", [], "NAME of the run: missing; expected something like voco-7b"),
        ("tpu_pod.sh", ["My_Run"], "NAME of the run: expected something like voco-7b, found 'My_Run'"),
        ("tpu_pod.sh", ["stop", "my-run"], "'stop' is gone: sky jobs queue, logs and cancel, or xpk workload list an"),
        ("tpu_pod.sh", ["my-run", "--zone=us-west4", "--type=v4-8"], "--zone (or VOCO_ZONE): expected something like"),
        ("tpu_pod.sh", ["my-run"], "--type (or VOCO_TPU_TYPE): missing; expected something like v5litepod-64"),
        ("tpu_pod.sh", ["my-run", "--type=v5e-64"], "--type: v5e-64: Google calls it v5litepod-64"),
        ("tpu_pod.sh", ["my-run", "--type=h100"], "--type (or VOCO_TPU_TYPE): expected something like v5litepod-64, f"),
        ("tpu_pod.sh", [*POD, "--slices=2", "--", *TRAINER], "--slices: expected --gke; a job of SkyPilot has one sl"),
        ("tpu_pod.sh", [*POD, "--type=tpu7x-8", "--", *TRAINER], "--type: tpu7x-8: expected --gke; SkyPilot does not"),
        ("tpu_pod.sh", [*POD[:2], "--", *TRAINER], "--workdir (or VOCO_WORKDIR): missing; expected something like gs:"),
        ("tpu_pod.sh", [*POD, "--workdir=runs/x", "--", *TRAINER], "expected something like gs://my-bucket/runs/voco_"),
        ("tpu_pod.sh", [*POD, "--", *TRAINER, "--config.workdir=gs://b"], "--config.workdir: expected something like"),
        ("tpu_pod.sh", [*POD, "--", "--config=configs/mine.py"], "--config: configs/mine.py: not found"),
        ("tpu_pod.sh", [*POD, "--extras=a b", "--", *TRAINER], "--extras: expected something like tpu,gcs, found 'a b"),
        ("tpu_pod.sh", [*GKE, "--spot", "--", *TRAINER], "--spot: not with --gke, whose cluster says what its nodes"),
        ("tpu_pod.sh", [*GKE, "--image=voco", "--", *TRAINER], "--image (or VOCO_IMAGE): expected something like us-"),
        ("tpu_pod.sh", [*GKE, "--slices=0", "--", *TRAINER], "--slices: expected a whole number from 1 to 256, found"),
        ("tpu_pod.sh", [*GKE, "--project=P;x", "--", *TRAINER], "--project (or VOCO_PROJECT): expected something lik"),
        ("worker.sh", ["fly"], "'fly': unknown; see worker.sh --help"),
        ("worker.sh", ["run", "--", "steps=3"], "--config=FILE is missing; arguments of voco train come after --"),
    ],
)  # fmt: skip
def test_what_cannot_be(bench, script, arguments, message):
    for name in ("sky", "xpk"):
        program(bench.bin / name, RECORDER)
    bench.plan("0")
    done = bench.run(script, *arguments, **CLOUD)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"{script}: error: ") and message in done.stderr and done.stderr.count("\n") == 1
    assert not (bench.tmp / "started").exists() and not (bench.tmp / "asked").exists()


def test_programs_that_are_missing(bench):
    """One line, and none of them is needed for a dry run. Here on a PATH without any of them."""
    few = bench.tmp / "few"
    few.mkdir()
    for name in ("bash", "cat", "dirname", "env", "git", "grep", "head", "paste", "sed"):
        (few / name).symlink_to(shutil.which(name))
    bench.environment |= CLOUD | {"PATH": str(few), "PYTHON": "python"}
    for script, arguments, missing in (
        ("local_pod.sh", ["2", "--", *TRAINER], "python: not found; activate the environment"),
        ("gpu_host.sh", ["--", *TRAINER], "nvidia-smi: not found; is there an NVIDIA GPU with its driver?"),
        ("tpu_pod.sh", [*POD, "--", *TRAINER], "sky: not found; pip install 'skypilot[gcp]'"),
        ("tpu_pod.sh", [*GKE, "--", *TRAINER], "xpk: not found; pip install xpk"),
    ):
        done = bench.run(script, *arguments)
        assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
        assert f"error: {missing}" in done.stderr
        assert bench.run(script, "--dry-run", *arguments).returncode == 0


# Processes of this machine, for real


def test_started_again_until_it_has_ended(bench):
    bench.plan("75 then-1 0", "75 killed 0")
    done = bench.run("local_pod.sh", 2, "--max-restarts=2", "--devices=2", "--", *TRAINER)
    assert done.returncode == 0
    assert done.stdout == "hello from 0\n" * 3 and done.stderr.count("[process 1] hello from 1\n") == 3
    assert "local_pod.sh: process 1 was killed by signal 9\n" in done.stderr
    assert "local_pod.sh: starting again in 1 s, restart 2 of 2\n" in done.stderr
    assert lines(bench.tmp / "environment.1") == ["/cpu/--xla_force_host_platform_device_count=2"] * 3
    first, second = lines(bench.tmp / "arguments.0"), lines(bench.tmp / "arguments.1")
    assert first[:-3] == ["-m", "voco_jax.train", *TRAINER] and first[-2:] == ["--num_processes=2", "--process_id=0"]
    assert second == [*first[:-1], "--process_id=1"] and first[-3].startswith("--coordinator=localhost:")


def test_a_limit_to_starting_again(bench):
    bench.plan("killed killed killed")
    done = bench.run("local_pod.sh", 1, "--max-restarts=1", "--", *TRAINER)
    assert done.returncode == 137 and lines(bench.tmp / "started") == ["0", "0"]
    assert done.stderr.endswith("local_pod.sh: started again 1 times, which is enough (--max-restarts)\n")


def test_one_that_fails_ends_the_others(bench):
    """The other is told to end, and both are gone with what they had started. What must be mended is not repeated."""
    bench.plan("wait", "then-2")
    done = bench.run("local_pod.sh", 2, "--max-restarts=5", "--", *TRAINER)
    assert done.returncode == 2 and sorted(lines(bench.tmp / "started")) == ["0", "1"]
    assert lines(bench.tmp / "signals.0") == ["TERM"]
    assert "local_pod.sh: process 0 ended with status 75\n" in done.stderr
    assert bench.nothing_is_left()


def test_one_that_does_not_end_is_killed(bench):
    bench.plan("stubborn", "then-killed")
    done = bench.run("local_pod.sh", 2, "--grace=1", "--", *TRAINER)
    assert done.returncode == 137 and "local_pod.sh: killing what is left\n" in done.stderr
    for process in (0, 1):
        assert f"local_pod.sh: process {process} was killed by signal 9\n" in done.stderr
    assert bench.nothing_is_left()


def test_a_preemption_after_a_while_does_not_count(bench):
    bench.plan("75 75 killed 0")
    script = "source launch/supervised.sh; progress=0 max_restarts=0 restart_delay=0; supervise --config=x"
    done = subprocess.run(["bash", "-c", script], env=bench.environment, capture_output=True, cwd=bench.project)
    assert done.returncode == 137 and len(lines(bench.tmp / "started")) == 3


@pytest.mark.parametrize(("name", "status"), [("TERM", 75), ("INT", 130)])
def test_signals_are_passed_on(bench, name, status):
    bench.plan("wait", "wait")
    # Where the shell that runs the tests has SIGINT ignored, so would a script
    process = bench.start(
        "local_pod.sh", 2, "--max-restarts=5", "--", *TRAINER,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    wait_for(lambda: len(lines(bench.tmp / "ready")) == 2)
    process.send_signal(signal.Signals[f"SIG{name}"])
    process.communicate(timeout=60)
    assert process.returncode == status and sorted(lines(bench.tmp / "started")) == ["0", "1"]
    assert lines(bench.tmp / "signals.0") == lines(bench.tmp / "signals.1") == [name] and bench.nothing_is_left()


def test_a_terminal(bench):
    """Ctrl-C comes to every process of a terminal's foreground; the trainers get it once. Process 0 writes to it."""
    bench.plan("wait", "wait")
    ours, theirs = pty.openpty()

    def own_terminal():
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

    process = bench.start(
        "local_pod.sh", 2, "--", *TRAINER,
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, preexec_fn=own_terminal,
    )  # fmt: skip
    wait_for(lambda: len(lines(bench.tmp / "ready")) == 2)
    os.write(ours, b"\x03")
    assert process.wait(60) == 130
    assert lines(bench.tmp / "signals.0") == lines(bench.tmp / "signals.1") == ["INT"] and bench.nothing_is_left()
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # so it is at its end
        while more := os.read(ours, 10_000):
            shown += more
    os.close(ours)
    assert b"hello from 0\r\n" in shown and b"[process 1] hello from 1\r\n" in shown


def test_a_host_with_gpus(bench):
    program(bench.bin / "nvidia-smi", '#!/bin/sh\n[ "$*" = "--query-gpu=index --format=csv,noheader" ] && seq 0 3\n')
    bench.plan("0", "0")
    assert bench.run("gpu_host.sh", "--gpus=1,3", "--process-per-gpu", "--", *TRAINER).returncode == 0
    assert lines(bench.tmp / "environment.0") == ["1/cuda,cpu/"]
    assert lines(bench.tmp / "environment.1") == ["3/cuda,cpu/"]
    assert "--num_processes=2" in lines(bench.tmp / "arguments.1")
    bench.plan("0\n0")
    assert bench.run("gpu_host.sh", "--", *TRAINER).returncode == 0
    assert lines(bench.tmp / "environment.0")[1] == "0,1,2,3/cuda,cpu/"
    assert lines(bench.tmp / "arguments.0") == ["-m", "voco_jax.train", *TRAINER]
    done = bench.run("gpu_host.sh", "--gpus=1,4", "--", *TRAINER)
    assert (done.returncode, done.stderr) == (2, "gpu_host.sh: error: --gpus: 4: this machine has 0,1,2,3\n")
    program(bench.bin / "nvidia-smi", "#!/bin/sh\necho no driver; exit 9\n")
    done = bench.run("gpu_host.sh", "--", *TRAINER)
    assert (done.returncode, done.stderr) == (2, "gpu_host.sh: error: nvidia-smi: no driver\n")


def test_the_configs_of_the_help_texts_exist():
    for script in SCRIPTS:
        for word in (ROOT / "launch" / script).read_text().split():
            if word.startswith("--config=configs/"):
                parse_arguments(["train", word.rstrip(",;")])[0]
