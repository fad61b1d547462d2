#!/usr/bin/env bash
# Several processes on this machine as one run, as the hosts of a pod are: to try that path without one.
#
#   launch/local_pod.sh N [options] -- ARGUMENTS OF voco train
#
#   launch/local_pod.sh 2 -- --config=configs/easyvqa.py --config.workdir=runs/pod --config.train.steps=100
#   launch/local_pod.sh 2 --devices 4 --max-restarts 3 -- --config=configs/easyvqa.py --config.mesh.tensor=2 \
#     --config.model.llama.vocab_multiple=2 --config.workdir=runs/mesh
#
# Options:
#   --devices D        simulated CPU devices of each process (1, or what XLA_FLAGS says)
#   --max-restarts K   start all processes again, at most K times, after status 75 (preempted after a save, or one of
#                      them lost) and after a death by signal (0)
#   --port P           of process 0, for the others (a free one)
#   --grace S          seconds from SIGTERM to SIGKILL for the others, when one ended with an error (60)
#   --dry-run          print the commands and run nothing
#
# JAX_PLATFORMS is cpu unless you set it. PYTHON is the interpreter (python). The lines of processes 1, 2, … begin with
# [process 1], those of process 0 are as they are. When one process ends with an error, the others are ended. SIGTERM and
# Ctrl-C are passed on: on SIGTERM the trainers save and end with 75, and so does this; Ctrl-C twice kills.
# Exit status: 0 trained to the end; 2 an error to be fixed; 75 start it again and it goes on; 128 + n killed by signal n;
# 130 after Ctrl-C.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=supervised.sh
source "$(dirname "${BASH_SOURCE[0]}")/supervised.sh"

count='' devices='' max_restarts=0
while (($#)); do
  if [[ $1 == --*=* ]]; then set -- "${1%%=*}" "${1#*=}" "${@:2}"; fi
  case $1 in
    --help) usage ;;
    --dry-run) dry_run=true ;;
    --) break ;;
    --devices) need_value "$@" && devices=$2 && shift ;;
    --max-restarts) need_value "$@" && max_restarts=$2 && shift ;;
    --port) need_value "$@" && port=$2 && shift ;;
    --grace) need_value "$@" && grace=$2 && shift ;;
    -*) fail "$1: unknown option; see $program --help" ;;
    *)
      if [[ -n $count ]]; then fail "'$1': arguments of voco train come after --"; fi
      count=$1
      ;;
  esac
  shift
done
if [[ -z $count ]]; then fail "the number of processes is missing; see $program --help"; fi
check_number "the number of processes" "$count" 1 64
check_number --max-restarts "$max_restarts" 0 1000000
check_number --grace "$grace" 0 86400
if [[ -n $port ]]; then check_number --port "$port" 1 65535; fi
if [[ -n $devices ]]; then check_number --devices "$devices" 1 64; fi
if (($#)); then shift; fi
check_trainer_arguments "$@"
check_config_file "$@"

processes=$count
if [[ -z ${JAX_PLATFORMS:-} ]]; then environment+=(JAX_PLATFORMS=cpu); fi
# The last of two equal flags holds
if [[ -n $devices ]]; then
  environment+=("XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$devices")
fi
supervise "$@"
