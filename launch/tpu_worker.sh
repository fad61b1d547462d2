#!/usr/bin/env bash
# What launch/tpu_pod.sh runs on every worker of a TPU pod; there is no need to call it by hand.
#
#   launch/tpu_worker.sh install [--extras tpu,gcs]
#   launch/tpu_worker.sh start [--max-restarts K] [--restart-delay S] -- ARGUMENTS OF voco_jax.train
#   launch/tpu_worker.sh status | stop
#
# install makes .venv beside this directory. start leaves the trainer running, and started again where that can help, with
# its output in ~/voco_jax_state/train.log. stop tells it to save and waits until it has ended. With --dry-run, install
# and start print the commands and run nothing.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=supervised.sh
source "$(dirname "${BASH_SOURCE[0]}")/supervised.sh"

state=$HOME/voco_jax_state
self=$root/launch/$program

install() {
  local candidate
  if [[ ! -x $root/.venv/bin/python ]]; then
    for candidate in python3.12 python3.11 ''; do
      if [[ -n $candidate ]] && type -P "$candidate" >/dev/null && "$candidate" -c 'import ensurepip' 2>/dev/null; then break; fi
    done
    if [[ -n $candidate ]]; then
      run "$candidate" -m venv "$root/.venv"
    else
      # Ubuntu 22.04, which TPU VMs run, has Python 3.10; uv fetches a newer one
      run python3 -m pip install --quiet --user uv
      run python3 -m uv venv --quiet --seed --python 3.12 "$root/.venv"
    fi
  fi
  cd "$root"
  run .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$extras]"
  answer installed
}

# A line that tpu_pod.sh finds among the lines of all workers.
answer() {
  if [[ $dry_run == false ]]; then echo "voco_jax worker: $*"; fi
}

# The lock is held while the supervisor lives, whatever ends it.
is_training() {
  [[ -e $state/lock ]] && ! flock --shared --nonblock "$state/lock" true
}

start_detached() {
  local words began=$SECONDS
  words=(flock --close --timeout 5 "$state/lock" "$self" supervise)
  words+=(--max-restarts "$max_restarts" --restart-delay "$restart_delay" -- "$@")
  if [[ $dry_run == true ]]; then
    printf 'setsid %s >>%s 2>&1 </dev/null &\n' "$(quoted "${words[@]}")" "$(quoted "$state/train.log")"
    return
  fi
  find_python
  if is_training; then fail "training already; stop it first"; fi
  mkdir -p "$state"
  rm -f "$state/pid" "$state/status" "$state/stopped"
  setsid "${words[@]}" >>"$state/train.log" 2>&1 </dev/null &
  # Before that, the next command would not see it
  until [[ -e $state/pid ]]; do
    if ((SECONDS - began > 20)); then fail "did not start; see $state/train.log"; fi
    sleep 0.1
  done
  answer started
}

supervise_and_note() {
  local status=0
  echo $$ >"$state/pid.new"
  mv "$state/pid.new" "$state/pid"
  say "$(date --utc '+%F %T') UTC: start"
  supervise "$@" || status=$?
  echo "$status" >"$state/status"
  say "$(date --utc '+%F %T') UTC: ended with status $status"
  return "$status"
}

status() {
  if is_training; then
    answer training
  elif [[ -e $state/stopped ]]; then
    answer stopped
  elif [[ -e $state/status ]]; then
    answer "ended $(<"$state/status")"
  elif [[ -e $state/pid ]]; then
    answer gone # the machine was restarted, or the supervisor was killed
  else
    answer idle
  fi
}

stop() {
  if is_training; then
    touch "$state/stopped"
    kill -TERM "$(<"$state/pid")" || true
    while is_training; do sleep 0.2; done
  fi
  status
}

extras=tpu,gcs restart_delay=1 action=''
while (($#)); do
  if [[ $1 == --*=* ]]; then set -- "${1%%=*}" "${1#*=}" "${@:2}"; fi
  case $1 in
    --help) usage ;;
    --dry-run) dry_run=true ;;
    --) break ;;
    --extras) need_value "$@" && extras=$2 && shift ;;
    --max-restarts) need_value "$@" && max_restarts=$2 && shift ;;
    --restart-delay) need_value "$@" && restart_delay=$2 && shift ;;
    install | start | status | stop | supervise) action=$1 ;;
    *) fail "'$1': unknown; see $program --help" ;;
  esac
  shift
done
check_extras "$extras"
check_number --max-restarts "$max_restarts" 0 1000000
check_number --restart-delay "$restart_delay" 0 86400
if (($#)); then shift; fi
case $action in
  install) install ;;
  status) status ;;
  stop) stop ;;
  start | supervise)
    cd "$root"
    PYTHON=${PYTHON:-$root/.venv/bin/python}
    # Without a TPU jax would go on with the CPU
    if [[ -z ${JAX_PLATFORMS:-} ]]; then environment+=("JAX_PLATFORMS=tpu,cpu"); fi
    check_trainer_arguments "$@"
    check_config_file "$@"
    if [[ $action == start ]]; then start_detached "$@"; else supervise_and_note "$@"; fi
    ;;
  *) fail "install, start, status or stop is missing; see $program --help" ;;
esac
