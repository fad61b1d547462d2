#!/usr/bin/env bash
# Train on a TPU pod, again after every preemption: as a managed job of SkyPilot, or as a JobSet on GKE through xpk.
#
#   launch/tpu_pod.sh NAME [options] -- ARGUMENTS OF voco train
#
# With SkyPilot (pip install 'skypilot[gcp]') this writes the job's YAML and gives it to `sky jobs launch`. SkyPilot gets
# a TPU VM or pod, copies this directory to all hosts, runs launch/worker.sh there, and starts the job again when the pod
# is preempted or the trainer ends with status 75. `sky jobs queue`, `sky jobs logs -n NAME` and `sky jobs cancel -n NAME`
# look at it and end it.
#
#   launch/tpu_pod.sh voco-7b --type v5litepod-64 --zone us-west4-a --spot --workdir gs://my-bucket/runs/voco_7b \
#     -- --config=configs/voco_7b.py --config.init_from=gs://my-bucket/llava
#   launch/tpu_pod.sh voco-7b --type v5litepod-64 --dry-run -- --config=voco_7b --config.workdir=gs://my-bucket/runs/voco_7b
#
# On a GKE cluster that xpk has made (pip install xpk; docs/launching.md), and on several slices:
#
#   launch/tpu_pod.sh voco-7b --gke my-cluster --image us-docker.pkg.dev/my-project/my-repository/voco_jax:1 \
#     --type v6e-64 --slices 2 --workdir gs://my-bucket/runs/voco_7b -- --config=configs/voco_7b.py
#
# Options:
#   --type T            v5litepod-64, v5p-16, v6e-64, v4-8 …; with --gke also tpu7x-8 (4 chips); or VOCO_TPU_TYPE
#   --workdir gs://B/P  the run directory; or VOCO_WORKDIR; or --config.workdir among the arguments
#   --project P, --zone Z   or VOCO_PROJECT, VOCO_ZONE. SkyPilot takes the project of gcloud, and any zone where none is given
#   --max-restarts K    new starts after other errors than status 75 (SkyPilot: 0, for it counts errors that you must fix
#                       too; xpk, which starts again on 75 and after a death by signal: 100)
#   --dry-run           print the YAML and the command, and run nothing
# SkyPilot:
#   --spot              a preemptible pod
#   --extras E          of setup.py (tpu,gcs)
# GKE:
#   --gke C, --image I  the cluster, and the image of launch/Dockerfile (or VOCO_IMAGE)
#   --slices M          slices that are one run (1)
#
# Exit status: 2 an error to be fixed; else that of sky or xpk.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=command_line.sh
source "$(dirname "${BASH_SOURCE[0]}")/command_line.sh"

project=${VOCO_PROJECT:-} zone=${VOCO_ZONE:-} type=${VOCO_TPU_TYPE:-} image=${VOCO_IMAGE:-} workdir=${VOCO_WORKDIR:-}
name='' cluster='' slices=1 spot=false extras=tpu,gcs max_restarts=''

read_options() {
  while (($#)); do
    if [[ $1 == --*=* ]]; then set -- "${1%%=*}" "${1#*=}" "${@:2}"; fi
    case $1 in
      --help) usage ;;
      --dry-run) dry_run=true ;;
      --) break ;;
      --type) need_value "$@" && type=$2 && shift ;;
      --workdir) need_value "$@" && workdir=$2 && shift ;;
      --project) need_value "$@" && project=$2 && shift ;;
      --zone) need_value "$@" && zone=$2 && shift ;;
      --max-restarts) need_value "$@" && max_restarts=$2 && shift ;;
      --spot) spot=true ;;
      --extras) need_value "$@" && extras=$2 && shift ;;
      --gke) need_value "$@" && cluster=$2 && shift ;;
      --image) need_value "$@" && image=$2 && shift ;;
      --slices) need_value "$@" && slices=$2 && shift ;;
      create | install | start | stop | logs | status | delete)
        fail "'$1' is gone: sky jobs queue, logs and cancel, or xpk workload list and delete; see $program --help"
        ;;
      run) ;; # which was the command that is left
      -*) fail "$1: unknown option; see $program --help" ;;
      *)
        if [[ -n $name ]]; then fail "'$1': arguments of voco train come after --"; fi
        name=$1
        ;;
    esac
    shift
  done
  if (($#)); then shift; fi
  trainer=("$@")
}

check_options() {
  check_name "NAME of the run" "$name"
  if [[ $type == v5e-* ]]; then fail "--type: $type: Google calls it v5litepod-${type#v5e-}"; fi
  check_form "--type (or VOCO_TPU_TYPE)" "$type" '(v[234]|v5litepod|v5p|v6e|tpu7x)-[1-9][0-9]{0,4}' v5litepod-64
  if [[ -n $max_restarts ]]; then check_number --max-restarts "$max_restarts" 0 1000000; fi
  if [[ -n $zone || -n $cluster ]]; then check_zone "$zone"; fi
  check_extras "$extras"
  check_number --slices "$slices" 1 256
  if [[ -n $cluster ]]; then
    check_project "$project"
    check_name --gke "$cluster"
    check_form "--image (or VOCO_IMAGE)" "$image" '[a-z0-9.-]+(:[0-9]+)?(/[a-z0-9._-]+)+:[A-Za-z0-9_][A-Za-z0-9._-]*' \
      us-docker.pkg.dev/my-project/my-repository/voco_jax:1
    if [[ $spot == true ]]; then fail "--spot: not with --gke, whose cluster says what its nodes are"; fi
    need_program xpk "pip install xpk"
  else
    if ((slices > 1)); then fail "--slices: expected --gke; a job of SkyPilot has one slice"; fi
    if [[ $type == tpu7x-* ]]; then fail "--type: $type: expected --gke; SkyPilot does not list this TPU"; fi
    need_program sky "pip install 'skypilot[gcp]'"
  fi
  check_trainer_arguments "${trainer[@]}"
  check_config_file "${trainer[@]}"
  add_workdir
}

# Google's names of the TPU VM's software. SkyPilot's own choice for v5e is that of v5p.
runtime_version() {
  case $type in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) echo tpu-ubuntu2204-base ;;
  esac
}

# https://docs.skypilot.co/en/latest/reference/yaml-spec.html
print_job() {
  cat <<YAML
name: $name
workdir: $(yaml_text "$root")  # to ~/sky_workdir of every host, but for what .gitignore names
resources:
  infra: gcp${zone:+/${zone%-*}/$zone}
  accelerators: tpu-$type
  accelerator_args:
    runtime_version: $(runtime_version)
  use_spot: $spot
  job_recovery:
    strategy: FAILOVER  # in the same region first, where the bucket is
    recover_on_exit_codes: [75]  # the trainer was preempted or lost another process, and saved what it could
    max_restarts_on_errors: ${max_restarts:-0}  # also counts 2, an error that must be fixed
envs:
  JAX_PLATFORMS: tpu,cpu  # without a TPU jax would go on with the CPU
setup: launch/worker.sh install --extras $extras
run: $(yaml_text "launch/worker.sh run -- $(quoted "${trainer[@]}")")
YAML
}

# A string in YAML's single quotes, in which only they are written otherwise.
yaml_text() {
  printf "'%s'" "${1//\'/\'\'}"
}

launch_on_skypilot() {
  local file=$root/build/$name.yaml
  if [[ $dry_run == true ]]; then
    print_job
  else
    mkdir -p "$root/build"
    print_job >"$file"
  fi
  run sky jobs launch --name "$name" --yes "$file"
}

launch_on_gke() {
  # xpk starts this from a shell and sends SIGTERM to the process that it has started: exec makes that the trainer. By
  # itself it restarts on 42 and on 127 to 255, which deaths by signal are among.
  run xpk workload create --workload="$name" --tpu-type="$type" --num-slices="$slices" --docker-image="$image" \
    --command="exec $(quoted python -m voco_jax.train "${trainer[@]}")" \
    --max-restarts="${max_restarts:-100}" --restart-on-exit-codes=75 --termination-grace-period-seconds=300 \
    --project="$project" --zone="$zone" --cluster="$cluster"
}

read_options "$@"
check_options
if [[ -n $cluster ]]; then launch_on_gke; else launch_on_skypilot; fi
