#!/usr/bin/env bash
# Train on a TPU pod, or on several slices, with gcloud: TPU VMs and queued resources.
#
#   launch/tpu_pod.sh run     NAME [options] -- ARGUMENTS OF voco_jax.train
#   launch/tpu_pod.sh create  NAME [options]
#   launch/tpu_pod.sh install NAME [options]       the last commit and its packages to all workers
#   launch/tpu_pod.sh start   NAME [options] -- ARGUMENTS OF voco_jax.train
#   launch/tpu_pod.sh logs | status | stop | delete NAME [options]
#
# run does all of it: creates a queued resource, waits for it, installs, starts, and watches until the training has ended.
# When the resource is preempted (SUSPENDED) or has FAILED it is deleted and created anew, and the training goes on from
# its newest checkpoint. Ctrl-C ends the watching only; the same command takes it up again.
#
#   launch/tpu_pod.sh run voco-7b --project my-project --zone us-west4-a --type v5litepod-64 --spot \
#     --workdir gs://my-bucket/runs/voco_7b -- --config=configs/voco_7b.py --config.init_from=gs://my-bucket/llava
#   launch/tpu_pod.sh run voco-2 --type v6e-64 --slices 2 --reserved -- --config=configs/voco_7b.py
#   launch/tpu_pod.sh logs voco-7b --worker 3
#   launch/tpu_pod.sh stop voco-7b                 # saves; `start` with the same arguments goes on
#
# Which:
#   --project P, --zone Z     or VOCO_PROJECT, VOCO_ZONE
#   --slices M                slices that are one run (multislice); say it to every command (1)
#   --direct                  a TPU VM at once instead of a queued resource: one slice, not with run; say it to create,
#                             status and delete
# create, run:
#   --type T                  v5litepod-64, v5p-16, v6e-64, v4-8 …; or VOCO_TPU_TYPE
#   --runtime-version V       of the TPU VM's software (what fits the type)
#   --spot | --reserved       what may be preempted; what is reserved for you
#   --create-flag FLAG        for gcloud … create as it is, such as --create-flag=--network=my-network; any number
# install, run:
#   --extras E                of setup.py (tpu,gcs)
# start, run:
#   --workdir gs://B/PATH     the run directory; or VOCO_WORKDIR; or --config.workdir among the arguments
#   --max-restarts K          of each worker's trainer, without a new machine (10)
#   --restart-delay S         seconds before that; longer than the 100 that the other workers need to miss one (120)
# run:
#   --poll S                  seconds between looks (60)
#   --max-recreations K       new resources after a preemption (100)
#   --delete-at-end           delete the resource when the training has ended
# logs, stop, status:
#   --worker W, --slice I     logs: whose (0, 0)
# all:
#   --dry-run                 print the commands and run nothing
#
# Exit status: 0; 2 an error to be mended; run: that of the training; else that of the command that failed.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=command_line.sh
source "$(dirname "${BASH_SOURCE[0]}")/command_line.sh"

project=${VOCO_PROJECT:-} zone=${VOCO_ZONE:-} type=${VOCO_TPU_TYPE:-} workdir=${VOCO_WORKDIR:-}
action='' name='' slices=1 direct=false runtime='' capacity=() create_flags=() extras=tpu,gcs
max_restarts=10 restart_delay=120 poll=60 max_recreations=100 delete_at_end=false worker=0 slice=0

read_options() {
  while (($#)); do
    if [[ $1 == --*=* ]]; then set -- "${1%%=*}" "${1#*=}" "${@:2}"; fi
    case $1 in
      --help) usage ;;
      --dry-run) dry_run=true ;;
      --) break ;;
      --project) need_value "$@" && project=$2 && shift ;;
      --zone) need_value "$@" && zone=$2 && shift ;;
      --type) need_value "$@" && type=$2 && shift ;;
      --slices) need_value "$@" && slices=$2 && shift ;;
      --direct) direct=true ;;
      --runtime-version) need_value "$@" && runtime=$2 && shift ;;
      --spot | --reserved) capacity+=("$1") ;;
      --create-flag)
        if [[ ${2:-} != --?* ]]; then fail "--create-flag: expected a flag of gcloud such as --network=my-network"; fi
        create_flags+=("$2") && shift
        ;;
      --extras) need_value "$@" && extras=$2 && shift ;;
      --workdir) need_value "$@" && workdir=$2 && shift ;;
      --max-restarts) need_value "$@" && max_restarts=$2 && shift ;;
      --restart-delay) need_value "$@" && restart_delay=$2 && shift ;;
      --poll) need_value "$@" && poll=$2 && shift ;;
      --max-recreations) need_value "$@" && max_recreations=$2 && shift ;;
      --delete-at-end) delete_at_end=true ;;
      --worker) need_value "$@" && worker=$2 && shift ;;
      --slice) need_value "$@" && slice=$2 && shift ;;
      -*) fail "$1: unknown option; see $program --help" ;;
      *)
        if [[ -z $action ]]; then
          action=$1
        elif [[ -z $name ]]; then
          name=$1
        else
          fail "'$1': arguments of voco_jax.train come after --"
        fi
        ;;
    esac
    shift
  done
  if (($#)); then shift; fi
  trainer=("$@")
}

check_options() {
  case $action in
    create | install | start | logs | status | stop | delete | run) ;;
    '') fail "run, create, install, start, logs, status, stop or delete is missing; see $program --help" ;;
    *) fail "'$action': expected run, create, install, start, logs, status, stop or delete" ;;
  esac
  check_name "NAME of the TPU" "$name"
  check_project "$project"
  check_zone "$zone"
  check_number --slices "$slices" 1 256
  check_number --worker "$worker" 0 4095
  check_number --slice "$slice" 0 $((slices - 1))
  check_number --max-restarts "$max_restarts" 0 1000000
  check_number --restart-delay "$restart_delay" 0 86400
  check_number --poll "$poll" 1 86400
  check_number --max-recreations "$max_recreations" 0 1000000
  check_extras "$extras"
  if [[ $direct == true ]] && ((slices > 1)); then fail "--direct: several slices need a queued resource"; fi
  if [[ $action == create || $action == run ]]; then
    if [[ $type == v5e-* ]]; then fail "--type: $type: Google calls it v5litepod-${type#v5e-}"; fi
    check_form "--type (or VOCO_TPU_TYPE)" "$type" '(v[234]|v5litepod|v5p|v6e)-[1-9][0-9]{0,4}' v5litepod-64
    if [[ -n $runtime ]]; then check_form --runtime-version "$runtime" '[a-z0-9][a-z0-9.-]*' tpu-ubuntu2204-base; fi
    if ((${#capacity[@]} > 1)); then fail "${capacity[*]}: expected at most one of --spot and --reserved"; fi
  fi
  if [[ $action == run && $direct == true ]]; then fail "--direct: not with run, which waits for a queued resource"; fi
  case $action in
    start | run) remote_trainer_arguments "$workdir" "${trainer[@]}" ;;
    *) if ((${#trainer[@]})); then fail "$action takes no arguments of voco_jax.train"; fi ;;
  esac
  need_program gcloud "install the Google Cloud CLI: https://cloud.google.com/sdk/docs/install"
}

# Google's names of the software for each type, all of them Ubuntu 22.04
runtime_version() {
  if [[ -n $runtime ]]; then
    echo "$runtime"
    return
  fi
  case $type in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) echo tpu-ubuntu2204-base ;;
  esac
}

tpus() {
  run gcloud compute tpus "$@" --project="$project" --zone="$zone"
}

create() {
  local nodes=(--node-id="$name")
  if [[ $direct == true ]]; then
    tpus tpu-vm create "$name" --accelerator-type="$type" --version="$(runtime_version)" \
      "${capacity[@]}" "${create_flags[@]}"
    return
  fi
  if ((slices > 1)); then nodes=(--node-count="$slices" --node-prefix="$name"); fi
  tpus queued-resources create "$name" --accelerator-type="$type" --runtime-version="$(runtime_version)" \
    "${nodes[@]}" "${capacity[@]}" "${create_flags[@]}"
}

delete() {
  if [[ $direct == true ]]; then
    tpus tpu-vm delete "$name" --quiet
  else
    # --force: with its machines
    tpus queued-resources delete "$name" --force --quiet
  fi
}

# on_workers ssh|scp WHICH WORDS…: of one slice by its name, whichever way it was made
on_workers() {
  local how=$1 which=$2
  shift 2
  if ((slices > 1)); then
    tpus queued-resources "$how" "$@" --node="${node:-all}" --worker="$which"
  else
    tpus tpu-vm "$how" "$@" --worker="$which"
  fi
}

# Joined by && because a failure ends nothing inside of a condition, which is where tpu_watch.sh has it
install() {
  local archive=$root/build/voco_jax.tar.gz unpack
  warn_of_uncommitted
  # What is gone from a directory in git is gone there too; .venv, runs and data stay
  unpack="mkdir -p voco_jax && tar -xzf voco_jax.tar.gz -C voco_jax --recursive-unlink"
  run mkdir -p "$root/build" &&
    run git -C "$root" archive --format=tar.gz --output="$archive" HEAD &&
    on_workers scp all "$archive" "$name:voco_jax.tar.gz" &&
    on_workers ssh all "$name" --command="$unpack && voco_jax/launch/tpu_worker.sh install --extras $extras"
}

start() {
  on_workers ssh all "$name" --command="$(quoted voco_jax/launch/tpu_worker.sh start --max-restarts "$max_restarts" \
    --restart-delay "$restart_delay" -- "${trainer[@]}")"
}

workers_status() {
  local script=voco_jax/launch/tpu_worker.sh
  on_workers ssh all "$name" \
    --command="if [ -x $script ]; then $script status; else echo 'voco_jax worker: not installed'; fi"
}

stop() {
  on_workers ssh all "$name" --command="voco_jax/launch/tpu_worker.sh stop"
}

logs() {
  local node=$slice
  on_workers ssh "$worker" "$name" --command="tail -n 100 -F voco_jax_state/train.log"
}

resource_state() {
  if [[ $direct == true ]]; then
    tpus tpu-vm describe "$name" --format="value(state)"
  else
    tpus queued-resources describe "$name" --format="value(state.state)"
  fi
}

show_status() {
  local state
  if [[ $dry_run == true ]]; then
    resource_state
    workers_status
    return
  fi
  state=$(resource_state)
  echo "$name: $state"
  if [[ $state == ACTIVE || $state == READY ]]; then workers_status; fi
}

read_options "$@"
check_options
case $action in
  run)
    # shellcheck source-path=SCRIPTDIR source=tpu_watch.sh
    source "$root/launch/tpu_watch.sh"
    watch
    ;;
  status) show_status ;;
  *) "$action" ;;
esac
