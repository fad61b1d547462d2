#!/usr/bin/env bash
# Train on the NVIDIA GPUs of this machine, and start again after a preemption or a crash.
#
#   launch/gpu_host.sh [options] -- ARGUMENTS OF voco train
#
#   launch/gpu_host.sh -- --config=configs/voco_7b.py --config.model.attention=cudnn --config.workdir=runs/voco_7b
#   launch/gpu_host.sh --gpus 0,1 --process-per-gpu -- --config=configs/easyvqa.py --config.workdir=runs/two_gpus
#
# Options:
#   --gpus LIST         such as 0,1,3 (all of them, or CUDA_VISIBLE_DEVICES)
#   --process-per-gpu   one process a GPU instead of one for all
#   --max-restarts K    restarts after a death by signal, or a preemption within ten minutes of the start (10)
#   --port P            with --process-per-gpu: of process 0, for the others (a free one)
#   --grace S           seconds from SIGTERM to SIGKILL for the others, when one ended with an error (60)
#   --dry-run           print the commands and run nothing
#
# JAX_PLATFORMS is cuda,cpu unless you set it, so that a driver that does not work is an error and no slow run.
# Signals, output and exit status are those of launch/local_pod.sh.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=supervised.sh
source "$(dirname "${BASH_SOURCE[0]}")/supervised.sh"

gpus=${CUDA_VISIBLE_DEVICES:-} process_per_gpu=false
while (($#)); do
  if [[ $1 == --*=* ]]; then set -- "${1%%=*}" "${1#*=}" "${@:2}"; fi
  case $1 in
    --help) usage ;;
    --dry-run) dry_run=true ;;
    --) break ;;
    --gpus) need_value "$@" && gpus=$2 && shift ;;
    --process-per-gpu) process_per_gpu=true ;;
    --max-restarts) need_value "$@" && max_restarts=$2 && shift ;;
    --port) need_value "$@" && port=$2 && shift ;;
    --grace) need_value "$@" && grace=$2 && shift ;;
    -*) fail "$1: unknown option; see $program --help" ;;
    *) fail "'$1': arguments of voco train come after --" ;;
  esac
  shift
done
check_number --max-restarts "$max_restarts" 0 1000000
check_number --grace "$grace" 0 86400
if [[ -n $port ]]; then check_number --port "$port" 1 65535; fi
if [[ -n $gpus ]]; then check_form "--gpus (or CUDA_VISIBLE_DEVICES)" "$gpus" '[0-9]+(,[0-9]+)*' 0,1,3; fi
if (($#)); then shift; fi
check_trainer_arguments "$@"
check_config_file "$@"

if [[ $dry_run == false ]]; then
  need_program nvidia-smi "is there an NVIDIA GPU with its driver?"
  if ! present=$(nvidia-smi --query-gpu=index --format=csv,noheader 2>&1); then
    fail "nvidia-smi: $(head -n 1 <<<"$present")"
  fi
  if [[ -z $gpus ]]; then gpus=$(paste -sd , <<<"$present"); fi
  for gpu in ${gpus//,/ }; do
    if ! grep -qx "$gpu" <<<"$present"; then
      fail "--gpus: $gpu: this machine has $(paste -sd , <<<"$present")"
    fi
  done
elif [[ $process_per_gpu == true && -z $gpus ]]; then
  fail "--dry-run: runs nothing, so not nvidia-smi either; give --gpus with --process-per-gpu"
fi

if [[ -z ${JAX_PLATFORMS:-} ]]; then environment+=("JAX_PLATFORMS=cuda,cpu"); fi
if [[ $process_per_gpu == true ]]; then
  each_name=CUDA_VISIBLE_DEVICES
  IFS=, read -ra each_values <<<"$gpus"
  processes=${#each_values[@]}
elif [[ -n $gpus ]]; then
  environment+=("CUDA_VISIBLE_DEVICES=$gpus")
fi
supervise "$@"
