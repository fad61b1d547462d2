#!/usr/bin/env bash
# What every host of a cluster runs: its environment, then the trainer. SkyPilot calls it, as launch/tpu_pod.sh says.
#
#   launch/worker.sh install [--extras tpu,gcs]
#   launch/worker.sh run -- ARGUMENTS OF voco train
#
# install makes .venv beside this directory. run starts the trainer in it. On several hosts with GPUs it tells the trainer
# who the others are, from SKYPILOT_NODE_IPS and SKYPILOT_NODE_RANK; on a TPU pod jax finds them. PYTHON is another
# interpreter for run. With --dry-run both print their commands and run nothing.
#
# Exit status of run: the trainer's. 0 trained to the end; 75 start it again and it goes on; 2 an error to be fixed.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=command_line.sh
source "$(dirname "${BASH_SOURCE[0]}")/command_line.sh"

install() {
  local candidate
  cd "$root"
  if [[ ! -x .venv/bin/python ]]; then
    for candidate in python3.12 python3.11 ''; do
      if [[ -n $candidate ]] && type -P "$candidate" >/dev/null && "$candidate" -c 'import ensurepip' 2>/dev/null; then break; fi
    done
    if [[ -n $candidate ]]; then
      run "$candidate" -m venv .venv
    else
      # Ubuntu 22.04, which TPU VMs run, has Python 3.10; uv fetches a newer one
      run python3 -m pip install --quiet --user uv
      run python3 -m uv venv --quiet --seed --python 3.12 .venv
    fi
  fi
  run .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$extras]"
}

run_trainer() {
  local others=() hosts=${SKYPILOT_NUM_NODES:-1}
  check_trainer_arguments "$@"
  cd "$root"
  if ((hosts > 1)) && [[ ${JAX_PLATFORMS:-} != tpu* ]]; then
    others=("--coordinator=$(head -n 1 <<<"$SKYPILOT_NODE_IPS"):$port")
    others+=("--num_processes=$hosts" "--process_id=$SKYPILOT_NODE_RANK")
  fi
  run exec env PYTHONUNBUFFERED=1 "${PYTHON:-.venv/bin/python}" -m voco_jax.train "$@" "${others[@]}"
}

extras=tpu,gcs port=8476 action=''
while (($#)); do
  if [[ $1 == --*=* ]]; then set -- "${1%%=*}" "${1#*=}" "${@:2}"; fi
  case $1 in
    --help) usage ;;
    --dry-run) dry_run=true ;;
    --) break ;;
    --extras) need_value "$@" && extras=$2 && shift ;;
    install | run) action=$1 ;;
    *) fail "'$1': unknown; see $program --help" ;;
  esac
  shift
done
if (($#)); then shift; fi
check_extras "$extras"
case $action in
  install) install ;;
  run) run_trainer "$@" ;;
  *) fail "install or run is missing; see $program --help" ;;
esac
