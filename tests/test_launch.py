"""The scripts in `launch/`: real processes on this machine; of a cloud, stand-ins that note what they are asked."""

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

from voco_jax.command_line import parse_command_line

ROOT = Path(__file__).parents[1]
SCRIPTS = ("local_pod.sh", "gpu_host.sh", "tpu_pod.sh", "tpu_worker.sh", "gke_xpk.sh")
TRAINER = ["--config=configs/easyvqa.py", "--config.train.steps=9"]
CLOUD = {"VOCO_PROJECT": "my-project", "VOCO_ZONE": "us-west4-a", "VOCO_CLUSTER": "my-cluster"}
IMAGE = "us-docker.pkg.dev/my-project/my-repository/voco_jax:1"
WORKDIR = "gs://my-bucket/runs/voco"

# In place of Python. As the trainer it does what its plan says, a line for each time it is started; it has a child, as
# the trainer has loaders of data, and notes what it was called with and which signals came.
PYTHON = """#!/usr/bin/env bash
case "$*" in
  *"-m venv "*) mkdir -p "${!#}/bin"; ln -sf "$(realpath "$0")" "${!#}/bin/python"; exit ;;
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

# In place of gcloud: a queued resource whose workers are directories, into which scp copies and where ssh runs.
GCLOUD = """#!/usr/bin/env bash
printf '%s\\0' "$@" >>"$CLOUD/asked"; printf '\\n' >>"$CLOUD/asked"
[[ "$1 $2" == "compute tpus" ]] || exit 9
for argument; do case $argument in --command=*) command=${argument#*=} ;; esac; done
case "$3 $4" in
  *" create") if [[ -e $CLOUD/no_quota ]]; then echo "ERROR: no quota" >&2; exit 1; fi
    mkdir -p "$CLOUD/workers/0" "$CLOUD/workers/1"; echo ACTIVE >"$CLOUD/state" ;;
  *" delete") rm -r "$CLOUD/workers" "$CLOUD/state" ;;
  *" describe") cat "$CLOUD/state" 2>/dev/null || { echo "ERROR: NOT_FOUND: no such resource" >&2; exit 1; } ;;
  *" scp") for worker in "$CLOUD"/workers/*; do cp "$5" "$worker/${6#*:}"; done ;;
  *" ssh") for worker in "$CLOUD"/workers/*; do
    (cd "$worker" && HOME=$worker PLANS=$CLOUD/plans/${worker##*/} bash -c "$command") || exit; done ;;
esac
"""

RECORDER = """#!/usr/bin/env bash
printf '%s\\0' "$(basename "$0")" "$@" >>"$CLOUD/asked"; printf '\\n' >>"$CLOUD/asked"
if [[ $1 == build ]]; then cat >"$CLOUD/context"; fi
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
    """A repository of its own with what the scripts touch: what goes to other machines is what is committed."""
    root = tmp_path_factory.mktemp("project")
    shutil.copytree(ROOT / "launch", root / "launch")
    (root / "configs").mkdir()
    shutil.copy(ROOT / "configs" / "easyvqa.py", root / "configs")
    git = ["git", "-C", root, "-c", "user.name=test", "-c", "user.email=test@example.com"]
    for command in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "--message=all"]):
        subprocess.run([*git, *command], check=True)
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
    assert len(cases) >= 4
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


def test_dry_run_of_a_pod(bench):
    root, where = bench.project, "--project=my-project --zone=us-west4-a"
    bench.environment |= CLOUD
    resource, vm = "gcloud compute tpus queued-resources", "gcloud compute tpus tpu-vm"
    archive, worker = f"{root}/build/voco_jax.tar.gz", "voco_jax/launch/tpu_worker.sh"
    create = [
        f"{resource} create my-run --accelerator-type=v5litepod-64 --runtime-version=v2-alpha-tpuv5-lite"
        f" --node-id=my-run --spot --network=my-network {where}"
    ]
    describe = [f"{resource} describe my-run '--format=value(state.state)' {where}"]
    install = [
        f"mkdir -p {root}/build",
        f"git -C {root} archive --format=tar.gz --output={archive} HEAD",
        f"{vm} scp {archive} my-run:voco_jax.tar.gz --worker=all {where}",
        f"{vm} ssh my-run '--command=mkdir -p voco_jax && tar -xzf voco_jax.tar.gz -C voco_jax --recursive-unlink && "
        f"{worker} install --extras tpu,gcs' --worker=all {where}",
    ]
    start = [
        f"{vm} ssh my-run '--command={worker} start --max-restarts 10 --restart-delay 120 -- {' '.join(TRAINER)} "
        f"--config.workdir={WORKDIR}' --worker=all {where}"
    ]
    status = [
        f"{vm} ssh my-run '--command=if [ -x {worker} ]; then {worker} status; else echo '\\''voco_jax worker: not "
        f"installed'\\''; fi' --worker=all {where}"
    ]
    delete = [f"{resource} delete my-run --force --quiet {where}"]

    def dry(action, *arguments, train=False):
        return bench.dry("tpu_pod.sh", action, "my-run", *arguments, train=train)

    made = ("--type=v5litepod-64", "--spot", "--create-flag=--network=my-network")
    assert dry("create", *made) == create
    assert dry("install") == install
    assert dry("start", "--workdir", WORKDIR, train=True) == start
    assert dry("status") == describe + status
    assert dry("stop") == [f"{vm} ssh my-run '--command={worker} stop' --worker=all {where}"]
    assert dry("logs", "--worker", 3) == [
        f"{vm} ssh my-run '--command=tail -n 100 -F voco_jax_state/train.log' --worker=3 {where}"
    ]
    assert dry("delete") == delete
    everything = dry("run", *made, "--workdir", WORKDIR, "--delete-at-end", train=True)
    assert [line for line in everything if not line.startswith("# ")] == [
        *create, *describe, *install, *start, *describe, *status, *delete,
    ]  # fmt: skip
    assert dry("create", "--direct", "--type=v4-8") == [
        f"{vm} create my-run --accelerator-type=v4-8 --version=tpu-ubuntu2204-base {where}"
    ]
    assert dry("delete", "--direct") == [f"{vm} delete my-run --quiet {where}"]
    assert dry("status", "--direct") == [f"{vm} describe my-run '--format=value(state)' {where}", *status]


def test_dry_run_of_several_slices(bench):
    bench.environment |= CLOUD
    resource, where = "gcloud compute tpus queued-resources", "--project=my-project --zone=us-west4-a"
    assert bench.dry("tpu_pod.sh", "create", "my-run", "--type=v6e-64", "--slices=2", "--reserved", train=False) == [
        f"{resource} create my-run --accelerator-type=v6e-64 --runtime-version=v2-alpha-tpuv6e --node-count=2 "
        f"--node-prefix=my-run --reserved {where}"
    ]
    assert bench.dry("tpu_pod.sh", "stop", "my-run", "--slices=2", train=False) == [
        f"{resource} ssh my-run '--command=voco_jax/launch/tpu_worker.sh stop' --node=all --worker=all {where}"
    ]
    assert bench.dry("tpu_pod.sh", "logs", "my-run", "--slices=2", "--slice=1", train=False) == [
        f"{resource} ssh my-run '--command=tail -n 100 -F voco_jax_state/train.log' --node=1 --worker=0 {where}"
    ]


def test_dry_run_of_a_worker(bench):
    """With a Python that is new enough, and on Ubuntu 22.04, which has none."""
    venv, start = f"{bench.project}/.venv", ["start", "--", *TRAINER]
    package = [".venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[tpu,gcs]'"]
    assert bench.dry("tpu_worker.sh", "install", train=False) == [f"python3.12 -m venv {venv}", *package]
    few = bench.tmp / "few"
    few.mkdir()
    for name in ("bash", "dirname", "env", "sed"):
        (few / name).symlink_to(shutil.which(name))
    bench.environment |= {"PATH": str(few), "HOME": "/me"}
    assert bench.dry("tpu_worker.sh", "install", train=False) == [
        "python3 -m pip install --quiet --user uv",
        f"python3 -m uv venv --quiet --seed --python 3.12 {venv}",
        *package,
    ]
    assert bench.run("tpu_worker.sh", "--dry-run", *start).stdout.splitlines() == [
        f"setsid flock --close --timeout 5 /me/voco_jax_state/lock {bench.project}/launch/tpu_worker.sh supervise "
        f"--max-restarts 10 --restart-delay 1 -- {' '.join(TRAINER)} >>/me/voco_jax_state/train.log 2>&1 </dev/null &"
    ]


def test_dry_run_of_xpk(bench):
    bench.environment |= CLOUD | {"VOCO_IMAGE": IMAGE}
    where = "--project=my-project --zone=us-west4-a --cluster=my-cluster"
    assert bench.dry("gke_xpk.sh", "cluster", "--type=v6e-64", "--slices=2", "--spot", train=False) == [
        f"xpk cluster create --tpu-type=v6e-64 --num-slices=2 --spot {where}"
    ]
    assert bench.dry("gke_xpk.sh", "image", train=False) == [
        f"git -C {bench.project} archive HEAD | docker build --platform=linux/amd64 --build-arg=EXTRAS=tpu,gcs "
        f"--file=launch/Dockerfile --tag={IMAGE} -",
        f"docker push {IMAGE}",
    ]
    assert bench.dry("gke_xpk.sh", "start", "my-run", "--type=v6e-64", "--slices=2", f"--workdir={WORKDIR}") == [
        f"xpk workload create --workload=my-run --tpu-type=v6e-64 --num-slices=2 --docker-image={IMAGE} "
        f"'--command=exec python -m voco_jax.train {' '.join(TRAINER)} --config.workdir={WORKDIR}' --max-restarts=100 "
        f"--restart-on-exit-codes=75 --termination-grace-period-seconds=300 --priority=medium {where}"
    ]
    assert bench.dry("gke_xpk.sh", "logs", "my-run", train=False) == [
        "kubectl logs --follow --tail=100 --selector=jobset.sigs.k8s.io/jobset-name=my-run,"
        "jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
    ]
    assert bench.dry("gke_xpk.sh", "stop", "my-run", train=False) == [f"xpk workload delete --workload=my-run {where}"]
    assert bench.dry("gke_xpk.sh", "status", train=False) == [f"xpk workload list {where}"]
    assert bench.dry("gke_xpk.sh", "delete-cluster", train=False) == [f"xpk cluster delete {where}"]


def test_what_runs_is_what_a_dry_run_prints(bench):
    for name in ("xpk", "docker", "kubectl"):
        program(bench.bin / name, RECORDER)
    bench.environment |= CLOUD | {"VOCO_IMAGE": IMAGE}
    commands = [
        ("cluster", "--type=v6e-64"), ("start", "my-run", "--type=v6e-64", "--workdir", WORKDIR, "--", *TRAINER),
        ("logs", "my-run"), ("status",), ("stop", "my-run"), ("delete-cluster",), ("image",),
    ]  # fmt: skip
    printed = []
    for action, *rest in commands:
        assert bench.run("gke_xpk.sh", action, *rest).returncode == 0
        printed += bench.run("gke_xpk.sh", action, "--dry-run", *rest).stdout.splitlines()
    assert bench.asked() == [shlex.split(line.rpartition(" | ")[2]) for line in printed]
    listed = subprocess.run(["tar", "-t"], input=(bench.tmp / "context").read_bytes(), capture_output=True, check=True)
    assert b"launch/Dockerfile\n" in listed.stdout and b".git/" not in listed.stdout


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
    pod = bench.run("tpu_pod.sh", "start", "my-run", "--dry-run", "--", *arguments).stdout
    (command,) = (word for word in shlex.split(pod) if word.startswith("--command="))
    assert shlex.split(command)[7:] == [*arguments, f"--config.workdir={WORKDIR}"]
    gke = bench.run("gke_xpk.sh", "start", "my-run", "--type=v4-8", "--dry-run", "--", *arguments).stdout
    (command,) = (word for word in shlex.split(gke) if word.startswith("--command="))
    assert shlex.split(command)[4:] == [*arguments, f"--config.workdir={WORKDIR}"]


# What cannot be: one line, status 2, before anything runs

POD = ["run", "my-run", "--type=v4-8", f"--workdir={WORKDIR}"]
GKE = ["start", "my-run", "--type=v4-8", f"--image={IMAGE}", f"--workdir={WORKDIR}"]


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("local_pod.sh", [], "the number of processes is missing; see local_pod.sh --help"),
        ("local_pod.sh", ["two", "--", *TRAINER], "the number of processes: expected a whole number from 1 to 64"),
        ("local_pod.sh", [0, "--", *TRAINER], "the number of processes: expected a whole number from 1 to 64, found '"),
        ("local_pod.sh", [2], "--config=FILE is missing; arguments of voco_jax.train come after --"),
        ("local_pod.sh", [2, *TRAINER], "--config: unknown option"),
        ("local_pod.sh", [2, 3, "--", *TRAINER], "'3': arguments of voco_jax.train come after --"),
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
        ("tpu_pod.sh", [], "run, create, install, start, logs, status, stop or delete is missing"),
        ("tpu_pod.sh", ["fly", "my-run"], "'fly': expected run, create, install"),
        ("tpu_pod.sh", ["stop"], "NAME of the TPU: missing; expected something like voco-7b"),
        ("tpu_pod.sh", ["stop", "My_Run"], "NAME of the TPU: expected something like voco-7b, found 'My_Run'"),
        ("tpu_pod.sh", ["stop", "my-run", "--project=P;x"], "--project (or VOCO_PROJECT): expected something like my-"),
        ("tpu_pod.sh", ["stop", "my-run", "--zone=us-west4"], "--zone (or VOCO_ZONE): expected something like us-cent"),
        ("tpu_pod.sh", ["create", "my-run"], "--type (or VOCO_TPU_TYPE): missing; expected something like v5litepod"),
        ("tpu_pod.sh", ["create", "my-run", "--type=v5e-64"], "--type: v5e-64: Google calls it v5litepod-64"),
        ("tpu_pod.sh", ["create", "my-run", "--type=h100"], "--type (or VOCO_TPU_TYPE): expected something like v5lit"),
        ("tpu_pod.sh", ["create", "my-run", "--type=v4-8", "--spot", "--reserved"], "--spot --reserved: expected at m"),
        ("tpu_pod.sh", ["create", "my-run", "--type=v4-8", "--create-flag=x"], "--create-flag: expected a flag of gcl"),
        ("tpu_pod.sh", ["create", "my-run", "--slices=2", "--direct"], "--direct: several slices need a queued resour"),
        ("tpu_pod.sh", ["logs", "my-run", "--slice=1"], "--slice: expected a whole number from 0 to 0, found '1'"),
        ("tpu_pod.sh", ["stop", "my-run", "--", *TRAINER], "stop takes no arguments of voco_jax.train"),
        ("tpu_pod.sh", [*POD, "--direct", "--", *TRAINER], "--direct: not with run"),
        ("tpu_pod.sh", [*POD[:3], "--", *TRAINER], "--workdir (or VOCO_WORKDIR): missing; expected something like gs:"),
        ("tpu_pod.sh", [*POD, "--workdir=runs/x", "--", *TRAINER], "expected something like gs://my-bucket/runs/voco_"),
        ("tpu_pod.sh", [*POD, "--", *TRAINER, "--config.workdir=gs://b"], "--config.workdir: expected something like"),
        ("tpu_pod.sh", [*POD, "--", "--config=configs/mine.py"], "--config: configs/mine.py: not in the last commit o"),
        ("tpu_pod.sh", [*POD, "--extras=a b", "--", *TRAINER], "--extras: expected something like tpu,gcs, found 'a b"),
        ("tpu_worker.sh", ["fly"], "'fly': unknown; see tpu_worker.sh --help"),
        ("gke_xpk.sh", ["status", "my-run"], "'my-run': status takes no name; the cluster is --cluster"),
        ("gke_xpk.sh", ["status", "--cluster=-"], "--cluster: expected a value"),
        ("gke_xpk.sh", ["image", "--image=voco"], "--image (or VOCO_IMAGE): expected something like us-docker.pkg.dev"),
        ("gke_xpk.sh", [*GKE, "--priority=urgent", "--", *TRAINER], "--priority: expected something like medium, foun"),
        ("gke_xpk.sh", [*GKE, "--slices=0", "--", *TRAINER], "--slices: expected a whole number from 1 to 256, found"),
        ("gke_xpk.sh", ["cluster", "--type=v4-8", "--spot", "--flex"], "--spot --flex: expected one of --on-demand"),
    ],
)  # fmt: skip
def test_what_cannot_be(bench, script, arguments, message):
    for name in ("gcloud", "xpk", "docker"):
        program(bench.bin / name, RECORDER)
    bench.plan("0")
    done = bench.run(script, *arguments, **CLOUD)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"{script}: error: ") and message in done.stderr and done.stderr.count("\n") == 1
    assert not (bench.tmp / "started").exists() and not (bench.tmp / "asked").exists()


@pytest.mark.parametrize("name", ["project", "zone"])
def test_names_in_the_cloud_come_from_the_user(bench, name):
    bench.environment |= {key: value for key, value in CLOUD.items() if key != f"VOCO_{name.upper()}"}
    for script, action in (("tpu_pod.sh", ["stop", "my-run"]), ("gke_xpk.sh", ["status"])):
        done = bench.run(script, *action, "--dry-run")
        assert done.returncode == 2 and done.stdout == ""
        assert f"error: --{name} (or VOCO_{name.upper()}): missing; expected something like " in done.stderr


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
        ("tpu_pod.sh", [*POD, "--", *TRAINER], "gcloud: not found; install the Google Cloud CLI: https://"),
        ("gke_xpk.sh", [*GKE, "--", *TRAINER], "xpk: not found; pip install xpk"),
        ("gke_xpk.sh", ["logs", "my-run"], "kubectl: not found; "),
        ("gke_xpk.sh", ["image", f"--image={IMAGE}"], "docker: not found; "),
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


# A pod that is not there: two workers, with the scripts that would run on them


class Pod(Bench):
    RUN = ("run", "my-run", "--type=v5litepod-8", "--spot", "--poll=1", "--restart-delay=0", f"--workdir={WORKDIR}")

    def __init__(self, project: Path, tmp: Path):
        super().__init__(project, tmp)
        program(self.bin / "gcloud", GCLOUD)
        del self.environment["PYTHON"]
        self.environment |= CLOUD

    def actions(self) -> list[str]:
        """What gcloud was asked to do; ssh by what runs there."""
        found = []
        for words in self.asked():
            command = next((word for word in words if word.startswith("--command=")), "")
            (on_worker,) = [x for x in ("install", "start", "stop", "status") if f"worker.sh {x}" in command] or [""]
            found.append(on_worker or words[3])
        return [action for action in found if action not in ("describe", "status", "scp")]

    def started(self) -> int:
        return sum(len(lines(self.tmp / "plans" / str(worker) / "started")) for worker in (0, 1))

    def ready(self) -> list[int]:
        files = [self.tmp / "plans" / str(worker) / "ready" for worker in (0, 1)]
        return [int(word) for file in files for line in lines(file) for word in line.split()]


@pytest.fixture
def pod(project, tmp_path):
    pod = Pod(project, tmp_path)
    yield pod
    for file in tmp_path.glob("workers/*/voco_jax_state/pid"):
        if alive(int(file.read_text())):
            os.kill(int(file.read_text()), signal.SIGTERM)


def test_a_pod_that_is_preempted(pod):
    """The machines vanish; new ones are made, and the training is started on them with the same arguments."""
    for worker in ("0", "1"):
        pod.plan("wait 75 0", under=f"plans/{worker}")
    process = pod.start("tpu_pod.sh", *pod.RUN, "--delete-at-end", "--", *TRAINER)
    wait_for(lambda: len(pod.ready()) == 4)
    workers = [int(file.read_text()) for file in pod.tmp.glob("workers/*/voco_jax_state/pid")]
    vanishing = workers + pod.ready()
    (pod.tmp / "state").write_text("SUSPENDED\n")
    for process_id in vanishing:
        os.kill(process_id, signal.SIGKILL)
    _, said = process.communicate(timeout=100)
    assert process.returncode == 0, said
    assert pod.actions() == ["create", "install", "start", "delete", "create", "install", "start", "delete"]
    assert pod.started() == 6  # the second status of 75 was for each worker's own supervisor
    assert "tpu_pod.sh: my-run: SUSPENDED\n" in said and said.endswith("tpu_pod.sh: trained to the end\n")
    for worker in (0, 1):
        expected = ["-m", "voco_jax.train", *TRAINER, f"--config.workdir={WORKDIR}"]
        assert lines(pod.tmp / "plans" / str(worker) / "arguments.0") == expected
        assert lines(pod.tmp / "plans" / str(worker) / "environment.0")[0] == "/tpu,cpu/"


def test_a_pod_with_an_error_to_be_mended(pod):
    """One worker has given up: the others are told to stop, and nothing is made anew."""
    pod.plan("wait", under="plans/0")
    pod.plan("2", under="plans/1")
    done = pod.run("tpu_pod.sh", *pod.RUN, "--", *TRAINER)
    assert done.returncode == 2 and "ended with status 2; see: launch/tpu_pod.sh logs my-run\n" in done.stderr
    assert pod.actions() == ["create", "install", "start", "stop"] and not any(map(alive, pod.ready()))


def test_the_steps_of_a_pod(pod):
    """create, install, start, status, stop and start again, one by one."""
    for worker in ("0", "1"):
        pod.plan("wait wait", under=f"plans/{worker}")

    def workers() -> list[str]:
        return pod.run("tpu_pod.sh", "status", "my-run").stdout.splitlines()

    start = ("start", "my-run", f"--workdir={WORKDIR}", "--", *TRAINER)
    assert pod.run("tpu_pod.sh", "create", "my-run", "--type=v4-8").returncode == 0
    assert workers() == ["my-run: ACTIVE", *["voco_jax worker: not installed"] * 2]
    assert pod.run("tpu_pod.sh", "install", "my-run").returncode == 0
    assert workers()[1:] == ["voco_jax worker: idle"] * 2
    assert pod.run("tpu_pod.sh", *start).returncode == 0
    wait_for(lambda: len(pod.ready()) == 4)
    assert workers()[1:] == ["voco_jax worker: training"] * 2
    again = pod.run("tpu_pod.sh", *start)
    assert again.returncode == 2 and "training already; stop it first" in again.stderr
    stopped = pod.run("tpu_pod.sh", "stop", "my-run")
    assert stopped.stdout.splitlines() == ["voco_jax worker: stopped"] * 2 and not any(map(alive, pod.ready()))
    log = pod.tmp / "workers" / "1" / "voco_jax_state" / "train.log"
    assert lines(log)[1] == "hello from 0" and lines(log)[-1].endswith("UTC: ended with status 75")

    # Watching takes up what is there: it is started anew, and ended from elsewhere
    process = pod.start("tpu_pod.sh", *pod.RUN, "--", *TRAINER)
    wait_for(lambda: len(pod.ready()) == 8)
    assert pod.run("tpu_pod.sh", "stop", "my-run").returncode == 0
    assert process.communicate(timeout=60)[1].endswith("tpu_pod.sh: was told to stop\n") and process.returncode == 75
    assert pod.actions() == ["create", "install", "start", "start", "stop", "install", "start", "stop"]


def test_a_pod_that_cannot_be_created(pod):
    (pod.tmp / "no_quota").touch()
    done = pod.run("tpu_pod.sh", *pod.RUN, "--", *TRAINER)
    assert done.returncode == 2 and done.stderr.splitlines() == [
        "tpu_pod.sh: my-run: none", "ERROR: no quota", "tpu_pod.sh: error: my-run could not be created",
    ]  # fmt: skip


def test_the_configs_of_the_help_texts_exist():
    for script in SCRIPTS:
        for word in (ROOT / "launch" / script).read_text().split():
            if word.startswith("--config=configs/"):
                parse_command_line(["train", word.rstrip(",;")])
