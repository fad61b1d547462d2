# shellcheck shell=bash disable=SC2034,SC2154 # what is set here is used by those that source it, and the other way round
# What the commands of this directory share: errors, --dry-run, and checks of what the user gave. To be sourced.
#
# An error that the user can fix is one line and status 2, as in voco_jax itself.

program=${0##*/}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
trainer=() # arguments of `voco train`
dry_run=false

say() {
  printf '%s: %s\n' "$program" "$*" >&2
}

fail() {
  say "error: $*"
  exit 2
}

# The words of a command, so that a shell reads them back as they were.
quoted() {
  local word apostrophe="'\\''" between=''
  for word; do
    printf %s "$between"
    between=' '
    case $word in
      '' | *[!A-Za-z0-9_@%+=:,./-]*) printf "'%s'" "${word//\'/"$apostrophe"}" ;;
      *) printf %s "$word" ;;
    esac
  done
}

# Run a command, or print it with --dry-run.
run() {
  if [[ $dry_run == true ]]; then
    printf '%s\n' "$(quoted "$@")"
  else
    "$@"
  fi
}

need_program() {
  if [[ $dry_run == false ]] && ! type -P "$1" >/dev/null; then fail "$1: not found; $2"; fi
}

# The help text is the comment at the top of the script: from its second line to the first line without #.
usage() {
  sed -n '2,/^[^#]/ { s/^# \{0,1\}//p }' "$0"
  exit 0
}

# need_value "$@": that an option has something after it.
need_value() {
  if (($# < 2)) || [[ -z $2 || $2 == -* ]]; then fail "$1: expected a value"; fi
}

check_number() {
  local name=$1 value=$2 least=$3 most=$4
  if [[ ! $value =~ ^(0|[1-9][0-9]{0,8})$ ]] || ((value < least || value > most)); then
    fail "$name: expected a whole number from $least to $most, found '$value'"
  fi
}

# check_form NAME VALUE PATTERN EXAMPLE
check_form() {
  if [[ -z $2 ]]; then fail "$1: missing; expected something like $4"; fi
  if [[ ! $2 =~ ^($3)$ ]]; then fail "$1: expected something like $4, found '$2'"; fi
}

check_project() {
  check_form "--project (or VOCO_PROJECT)" "$1" '([a-z0-9.-]+:)?[a-z][a-z0-9-]{4,28}[a-z0-9]' my-project
}

check_zone() {
  check_form "--zone (or VOCO_ZONE)" "$1" '[a-z]+-[a-z]+[0-9]+-(ai[0-9]+)?[a-z]' us-central2-b
}

# Names of jobs, clusters and workloads: as far as DNS goes.
check_name() {
  check_form "$1" "$2" '[a-z]([a-z0-9-]{0,38}[a-z0-9])?' voco-7b
}

check_extras() {
  check_form --extras "$1" '[a-z0-9]+(,[a-z0-9]+)*' tpu,gcs
}

check_workdir() {
  check_form "$1" "$2" 'gs://[a-z0-9][a-z0-9._-]{1,61}[a-z0-9](/[A-Za-z0-9._=+-]+)+/?|(/[A-Za-z0-9._=+-]+)+/?' \
    gs://my-bucket/runs/voco_7b
}

# The value of --KEY=VALUE among arguments of the trainer, the last where there are several; nothing where there is none.
trainer_argument() {
  local key=$1 argument value=''
  shift
  for argument; do
    if [[ $argument == "$key="* ]]; then value=${argument#*=}; fi
  done
  printf %s "$value"
}

# The file that --config= names, without a parameter behind a colon, with which ml_collections can call it.
config_file() {
  local file
  file=$(trainer_argument --config "$@")
  printf %s "${file%%.py:*}"
  if [[ $file == *.py:* ]]; then printf .py; fi
}

# What `voco train` would say minutes later, and on every host at once.
check_trainer_arguments() {
  local argument
  if [[ -z $(config_file "$@") ]]; then
    fail "--config=FILE is missing; arguments of voco train come after --, such as -- --config=easyvqa"
  fi
  for argument; do
    case $argument in
      *$'\n'*) fail "${argument%%[=$'\n']*}: expected one line" ;;
      --coordinator* | --num_processes* | --process_id*) fail "${argument%%=*}: is set by $program" ;;
      --*) ;;
      *) fail "'$argument': expected --config.KEY=VALUE after --" ;;
    esac
  done
}

# A file, or the name of one in configs/.
check_config_file() {
  local file name
  file=$(config_file "$@")
  name=${file#configs/}
  if [[ ! -f $file && ! -f $root/configs/${name%.py}.py ]]; then fail "--config: $file: not found"; fi
}

# A pod's hosts share no disk: `trainer` gets --config.workdir, which must be a bucket's or a mounted file system's.
add_workdir() {
  local given
  given=$(trainer_argument --config.workdir "${trainer[@]}")
  if [[ -n $given ]]; then
    check_workdir --config.workdir "$given"
  else
    check_workdir "--workdir (or VOCO_WORKDIR)" "$workdir"
    trainer+=("--config.workdir=$workdir")
  fi
}
