# shellcheck shell=bash disable=SC2154 # what is not set here is set by tpu_pod.sh, which sources it
# `tpu_pod.sh run`: from whatever there is to a training that has ended, over as many preemptions as it takes.
#
# It only ever looks at what is there and does the next thing, so it can be ended and started at any time.

failures=0     # in a row
recreations=0  # new resources, and new starts on an old one
child=         # process group of the command that is running

watch() {
  local state told='' known=false begun=false workers found
  if [[ $dry_run == true ]]; then
    print_path
    return
  fi
  trap end_watching INT TERM HUP
  while true; do
    if ! state=$(state_or_none); then
      another_failure "gcloud does not say how $name is"
      continue
    fi
    if [[ $state != "$told" ]]; then say "$name: $state"; fi
    told=$state
    case $state in
      none)
        if [[ $known == true ]]; then
          say "$name was deleted"
          return 75
        fi
        begun=false
        if ! create; then
          if ((!recreations)); then fail "$name could not be created"; fi
          another_failure "$name could not be created"
          continue
        fi
        known=true
        ;;
      SUSPENDED | FAILED)
        once_more || return 75
        if ! delete; then
          another_failure "$name could not be deleted"
          continue
        fi
        known=false
        continue
        ;;
      ACTIVE)
        known=true
        # No answer: as it is right after ACTIVE, and while machines are being taken away
        if ! workers=$(patiently 300 workers_status); then
          another_failure "the workers do not answer"
          continue
        fi
        found=$(verdict "$workers")
        if [[ $found == training ]]; then begun=true; fi
        if [[ $begun == true && $found != training && $found != again ]]; then
          finish "$found"
          return
        fi
        if [[ $found != training ]]; then
          if [[ $begun == true ]]; then once_more || return 75; fi
          begun=false
          say "installing and starting"
          if ! start_anew; then
            another_failure "could not install and start"
            continue
          fi
          begun=true
        fi
        failures=0
        ;;
      *) known=true failures=0 ;;
    esac
    sleep "$poll"
  done
}

end_watching() {
  if [[ -n $child ]]; then kill -TERM -- "-$child" 2>/dev/null || true; fi
  say "no longer watching; what runs there goes on (look: status, logs; end it: stop, delete)"
  exit 130
}

once_more() {
  if ((recreations >= max_recreations)); then
    say "done anew $recreations times, which is enough (--max-recreations)"
    return 1
  fi
  recreations=$((recreations + 1))
  say "once more, $recreations of at most $max_recreations"
}

# Where one worker has lost its trainer, with its machine, the others wait for it in vain.
start_anew() {
  if [[ $workers == *'voco_jax worker: training'* ]]; then patiently 600 stop || return; fi
  patiently 3600 install && patiently 300 start
}

# What would be done if all went well.
print_path() {
  create
  note "until it is ACTIVE, every $poll s:"
  resource_state
  note "then:"
  install
  start
  note "until all workers have ended, every $poll s; where it is SUSPENDED or FAILED: delete and all of this again:"
  resource_state
  workers_status
  if [[ $delete_at_end == true ]]; then delete; fi
}

# The state of the queued resource, or none. Status 1 where gcloud could not say: nothing is created on a guess.
state_or_none() {
  local answer
  if answer=$(patiently 300 resource_state 2>&1); then
    tail -n 1 <<<"$answer"
  elif grep -q NOT_FOUND <<<"$answer"; then
    echo none
  else
    printf '%s\n' "$answer" >&2
    return 1
  fi
}

# A connection to a machine that was taken away may hang for good: an end to it, with all that it has started.
patiently() {
  local seconds=$1 guard status=0
  shift
  set -m
  "$@" </dev/null &
  child=$!
  { sleep "$seconds" && kill -TERM -- "-$child"; } >/dev/null 2>&1 &
  guard=$!
  set +m
  wait "$child" 2>/dev/null || status=$?
  child=
  kill -TERM -- "-$guard" 2>/dev/null || true
  wait "$guard" 2>/dev/null || true
  return "$status"
}

another_failure() {
  failures=$((failures + 1))
  if ((failures >= 10)); then fail "$1, tried $failures times"; fi
  say "$1; trying again in $poll s"
  sleep "$poll"
}

# Of what the workers say, one word: training, again (something does not run that a start would mend), stopped, or the
# status with which the training has ended.
verdict() {
  local line status worst=0 training=false preempted=false any=false
  if [[ $1 == *'voco_jax worker: stopped'* ]]; then
    echo stopped
    return
  fi
  while read -r line; do
    case $line in
      *'voco_jax worker: training') training=true any=true ;;
      *'voco_jax worker: ended '*)
        any=true
        status=${line##* }
        if ((status == 75)); then
          preempted=true
        elif ((status && (worst == 0 || status < 128 && worst >= 128))); then
          worst=$status # what must be mended before a crash whose restarts are used up
        fi
        ;;
      *'voco_jax worker: '*) # idle, gone, not installed
        echo again
        return
        ;;
    esac
  done <<<"$1"
  if ((worst && worst < 128)); then
    echo "$worst"
  elif [[ $training == true ]]; then
    echo training
  elif ((worst)); then
    echo "$worst"
  elif [[ $preempted == true || $any == false ]]; then
    echo again
  else
    echo 0
  fi
}

finish() {
  case $1 in
    0) say "trained to the end" ;;
    stopped) say "was told to stop" ;;
    *)
      say "ended with status $1; see: launch/tpu_pod.sh logs $name"
      # One worker that has given up leaves the others waiting for it
      stop || true
      ;;
  esac
  if [[ $delete_at_end == true ]]; then delete; fi
  if [[ $1 == stopped ]]; then return 75; fi
  return "$1"
}
