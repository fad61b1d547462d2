# shellcheck shell=bash
# The trainer on this machine, as one process or several that are one run, started again where that can help.
# To be sourced; set what is below, then call `supervise ARGUMENTS OF voco train`.
#
#   0               trained to the end
#   2               an error that the user must fix: all processes are ended, nothing is started again
#   75              preempted after a save, or another process was lost: again
#   128 + n         killed by signal n (137: often out of memory): again
#   anything else   as 2
#
# SIGTERM, SIGINT and SIGHUP are passed on (SIGHUP as SIGTERM); nothing is started again then.

# shellcheck source-path=SCRIPTDIR source=command_line.sh
source "$(dirname "${BASH_SOURCE[0]}")/command_line.sh"

processes=0         # 0: one, which is told nothing of others
port=               # of process 0, for the others; none: a free one for every attempt
environment=()      # NAME=VALUE for all processes
each_name=          # a variable that each process has another value of …
each_values=()      # … these
max_restarts=10
restart_delay=1     # seconds
grace=60            # seconds from SIGTERM to SIGKILL, where another process ended with an error
stop_grace=300      # the same, where the user asked for the end: there is something to save

# Processes that lost one of them mostly find out by themselves, and what they say then is worth reading.
settle=2
# Status 75 after at least so many seconds is no failure but a preemption: it does not count.
progress=600

running=()          # process ids by number; each leads a process group of its own
groups=()
readers=()
asked=              # the signal that came
insisted=false

supervise() {
  local restarts=0 status began
  find_python
  if [[ $dry_run == true ]]; then
    print_commands "$@"
    return 0
  fi
  exec {never}<> <(:) # a pipe in which nothing ever comes: reading from it is a sleep that starts no process
  trap 'ask TERM' TERM HUP
  trap 'ask INT' INT
  trap kill_all EXIT
  while true; do
    began=$SECONDS status=0
    attempt "$@" || status=$?
    if [[ -n $asked ]]; then break; fi
    if ((status != 75 && status < 128)); then return "$status"; fi
    if ((status == 75 && SECONDS - began >= progress)); then
      say "starting again in $restart_delay s"
    elif ((restarts < max_restarts)); then
      restarts=$((restarts + 1))
      say "starting again in $restart_delay s, restart $restarts of $max_restarts"
    else
      if ((max_restarts)); then say "started again $max_restarts times, which is enough (--max-restarts)"; fi
      return "$status"
    fi
    began=$SECONDS
    while ((SECONDS - began < restart_delay)) && [[ -z $asked ]]; do pause; done
    if [[ -n $asked ]]; then break; fi
  done
  # Ended because it was asked to; what was found wrong on the way, or that all was done, is said all the same.
  if ((status != 75 && status < 128)); then return "$status"; fi
  if [[ $asked == INT ]]; then return 130; else return 75; fi
}

find_python() {
  python=${PYTHON:-python}
  if [[ $dry_run == false ]] && ! type -P "$python" >/dev/null; then
    fail "$python: not found; activate the environment that voco_jax is installed in, or set PYTHON"
  fi
}

# Sets `command` to that of one process.
command_of() {
  local number=$1 address=$2
  shift 2
  command=(env PYTHONUNBUFFERED=1 "${environment[@]}")
  if [[ -n $each_name ]]; then command+=("$each_name=${each_values[number]}"); fi
  command+=("$python" -m voco_jax.train "$@")
  if ((processes)); then
    command+=("--coordinator=$address" "--num_processes=$processes" "--process_id=$number")
  fi
}

print_commands() {
  local number address command
  if ((!processes)); then
    command_of 0 '' "$@"
    run "${command[@]}"
    return
  fi
  address=localhost:$(chosen_port)
  for ((number = 0; number < processes; number++)); do
    command_of "$number" "$address" "$@"
    printf '%s &\n' "$(quoted "${command[@]}")"
  done
  echo wait
}

# All processes once, from start to end. Returns the status that says most.
attempt() {
  local number status worst=0 command failed_at='' deadline='' sent='' address=''
  if ((processes)); then address=localhost:$(chosen_port); fi
  groups=() readers=()
  for ((number = 0; number < (processes ? processes : 1); number++)); do
    command_of "$number" "$address" "$@"
    start "$number"
  done
  while ((${#running[@]})); do
    pause
    for number in "${!running[@]}"; do
      if kill -0 "${running[number]}" 2>/dev/null; then continue; fi
      status=0
      wait "${running[number]}" 2>/dev/null || status=$?
      unset "running[$number]"
      tell "$number" "$status"
      # A process that was told to end may do it by the signal; that is no crash.
      if [[ -n $sent ]] && ((status >= 128)); then status=75; fi
      if (($(gravity "$status") > $(gravity "$worst"))); then worst=$status; fi
      if ((status)) && [[ -z $failed_at ]]; then failed_at=$SECONDS; fi
    done
    if ((!${#running[@]})); then break; fi
    if [[ -n $asked && $sent != "$asked" ]]; then
      sent=$asked deadline=$((SECONDS + stop_grace))
      kill "-$sent" "${running[@]}" 2>/dev/null || true
    elif [[ -z $sent && -n $failed_at ]] && ((SECONDS - failed_at >= settle)); then
      sent=TERM deadline=$((SECONDS + grace))
      say "ending the other processes"
      kill -TERM "${running[@]}" 2>/dev/null || true
    fi
    if [[ -n $deadline ]] && { [[ $insisted == true ]] || ((SECONDS >= deadline)); }; then
      deadline=
      say "killing what is left"
      kill_all
    fi
  done
  kill_all
  groups=()
  finish_output
  return "$worst"
}

# Start `command` as a process group of its own: a terminal's Ctrl-C comes here alone, and is passed on once.
start() {
  local number=$1 output
  set -m
  if ((number == 0)); then
    "${command[@]}" </dev/null {never}<&- &
    running[number]=$!
  else
    # Process 0 speaks for all. What others say has their number in front, and goes to standard error.
    set +m
    exec {output}> >(trap '' INT TERM HUP; exec sed -u "s/^/[process $number] /" >&2)
    readers+=("$!")
    set -m
    "${command[@]}" </dev/null >&"$output" 2>&1 {never}<&- {output}>&- &
    running[number]=$!
    exec {output}>&-
  fi
  set +m
  groups+=("${running[number]}")
}

ask() {
  # A second Ctrl-C is for those who will not wait
  if [[ $1 == INT && $asked == INT ]]; then insisted=true; fi
  asked=$1
}

pause() {
  read -rt 0.2 -u "$never" || true
}

tell() {
  local number=$1 status=$2
  if ((status > 128)); then
    say "process $number was killed by signal $((status - 128))"
  elif ((status)); then
    say "process $number ended with status $status"
  fi
}

# Of several statuses, which says most: what must be fixed, a crash, an exception (1; where another process crashed, that
# is what this one ran into), a preemption, nothing.
gravity() {
  case $1 in
    0) echo 0 ;;
    75) echo 1 ;;
    1) echo 2 ;;
    2) echo 5 ;;
    *) if (($1 < 128)); then echo 4; else echo 3; fi ;;
  esac
}

# Every process that was started and whatever these have started: loaders of data outlive a trainer that is killed.
kill_all() {
  local group
  for group in "${groups[@]}"; do
    kill -KILL -- "-$group" 2>/dev/null || true
  done
}

# Wait for the last lines, but not for a process that has left its group and holds the pipe.
finish_output() {
  local reader began=$SECONDS
  for reader in "${readers[@]}"; do
    while kill -0 "$reader" 2>/dev/null && ((SECONDS - began < 5)); do pause; done
    kill -KILL "$reader" 2>/dev/null || true
  done
}

chosen_port() {
  local candidate=$port
  # Below the ports that Linux gives to those who ask for any. That nothing answers there is known in no time.
  while [[ -z $candidate ]]; do
    candidate=$((20000 + RANDOM % 12000))
    if (exec 3<>"/dev/tcp/localhost/$candidate") 2>/dev/null; then candidate=; fi
  done
  echo "$candidate"
}
