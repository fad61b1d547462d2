#!/usr/bin/env bash
# Train on TPU slices of a GKE cluster, as a JobSet, with xpk (pip install xpk).
#
#   launch/gke_xpk.sh cluster  [options]                                    make one with node pools of TPUs
#   launch/gke_xpk.sh image    [options]                                    build and push launch/Dockerfile
#   launch/gke_xpk.sh start    NAME [options] -- ARGUMENTS OF voco_jax.train
#   launch/gke_xpk.sh logs | stop NAME [options]
#   launch/gke_xpk.sh status | delete-cluster [options]
#
# Kubernetes restarts the whole run, at most --max-restarts times, when a process ends with 75 (preempted after a save, or
# another one was lost) or is killed by a signal, and when a node is lost; any other status ends it.
#
#   export VOCO_PROJECT=my-project VOCO_ZONE=us-east5-b VOCO_CLUSTER=voco
#   export VOCO_IMAGE=us-docker.pkg.dev/my-project/my-repository/voco_jax:1
#   launch/gke_xpk.sh cluster --type v6e-64 --slices 2 --spot
#   launch/gke_xpk.sh image
#   launch/gke_xpk.sh start voco-7b --type v6e-64 --slices 2 --workdir gs://my-bucket/runs/voco_7b \
#     -- --config=configs/voco_7b.py --config.init_from=gs://my-bucket/llava
#
# Which:
#   --project P, --zone Z, --cluster C   or VOCO_PROJECT, VOCO_ZONE, VOCO_CLUSTER
# cluster, start:
#   --type T            v5litepod-64, v5p-16, v6e-64, v4-8 …; or VOCO_TPU_TYPE
#   --slices M          of that type (1)
# cluster:
#   --on-demand | --spot | --flex | --reservation R   (--on-demand)
# image, start:
#   --image I           or VOCO_IMAGE
#   --extras E          of setup.py, for image (tpu,gcs)
# start:
#   --workdir gs://B/PATH   the run directory; or VOCO_WORKDIR; or --config.workdir among the arguments
#   --max-restarts K    (100)
#   --grace S           seconds to save after SIGTERM, as far as the node has them (300)
#   --priority P        very-low, low, medium, high or very-high (medium)
# cluster, start:
#   --xpk-flag FLAG     for xpk as it is, such as --xpk-flag=--enable-gcsfuse-csi-driver; any number
# all:
#   --dry-run           print the commands and run nothing
#
# logs follows process 0 with kubectl, in the cluster that it is set to; xpk sets it. Exit status: 0; 2 an error to be
# mended; else that of the command that failed.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=command_line.sh
source "$(dirname "${BASH_SOURCE[0]}")/command_line.sh"

project=${VOCO_PROJECT:-} zone=${VOCO_ZONE:-} cluster=${VOCO_CLUSTER:-} type=${VOCO_TPU_TYPE:-} image=${VOCO_IMAGE:-}
workdir=${VOCO_WORKDIR:-}
action='' name='' slices=1 capacity=() reservation='' extras=tpu,gcs max_restarts=100 grace=300 priority=medium xpk_flags=()

read_options() {
  while (($#)); do
    if [[ $1 == --*=* ]]; then set -- "${1%%=*}" "${1#*=}" "${@:2}"; fi
    case $1 in
      --help) usage ;;
      --dry-run) dry_run=true ;;
      --) break ;;
      --project) need_value "$@" && project=$2 && shift ;;
      --zone) need_value "$@" && zone=$2 && shift ;;
      --cluster) need_value "$@" && cluster=$2 && shift ;;
      --type) need_value "$@" && type=$2 && shift ;;
      --slices) need_value "$@" && slices=$2 && shift ;;
      --on-demand | --spot | --flex) capacity+=("$1") ;;
      --reservation) need_value "$@" && reservation=$2 && capacity+=("--reservation=$2") && shift ;;
      --image) need_value "$@" && image=$2 && shift ;;
      --extras) need_value "$@" && extras=$2 && shift ;;
      --workdir) need_value "$@" && workdir=$2 && shift ;;
      --max-restarts) need_value "$@" && max_restarts=$2 && shift ;;
      --grace) need_value "$@" && grace=$2 && shift ;;
      --priority) need_value "$@" && priority=$2 && shift ;;
      --xpk-flag)
        if [[ ${2:-} != --?* ]]; then fail "--xpk-flag: expected a flag of xpk such as --enable-gcsfuse-csi-driver"; fi
        xpk_flags+=("$2") && shift
        ;;
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
    cluster | image | status | delete-cluster)
      if [[ -n $name ]]; then fail "'$name': $action takes no name; the cluster is --cluster"; fi
      ;;
    start | logs | stop) check_name "NAME of the run" "$name" ;;
    '') fail "cluster, image, start, logs, status, stop or delete-cluster is missing; see $program --help" ;;
    *) fail "'$action': expected cluster, image, start, logs, status, stop or delete-cluster" ;;
  esac
  if [[ $action != image && $action != logs ]]; then
    check_project "$project"
    check_zone "$zone"
    check_name "--cluster (or VOCO_CLUSTER)" "$cluster"
  fi
  if [[ $action == cluster || $action == start ]]; then
    if [[ $type == v5e-* ]]; then fail "--type: $type: Google calls it v5litepod-${type#v5e-}"; fi
    check_form "--type (or VOCO_TPU_TYPE)" "$type" '(v4|v5litepod|v5p|v6e|tpu7x)-[1-9][0-9]{0,4}' v5litepod-64
  fi
  if [[ $action == image || $action == start ]]; then
    check_form "--image (or VOCO_IMAGE)" "$image" '[a-z0-9.-]+(:[0-9]+)?(/[a-z0-9._-]+)+:[A-Za-z0-9_][A-Za-z0-9._-]*' \
      us-docker.pkg.dev/my-project/my-repository/voco_jax:1
  fi
  check_number --slices "$slices" 1 256
  check_number --max-restarts "$max_restarts" 0 1000000
  check_number --grace "$grace" 0 86400
  check_extras "$extras"
  check_form --priority "$priority" 'very-low|low|medium|high|very-high' medium
  if [[ -n $reservation ]]; then check_form --reservation "$reservation" '[a-z0-9][a-z0-9./-]*' my-reservation; fi
  if ((${#capacity[@]} > 1)); then
    fail "${capacity[*]}: expected one of --on-demand, --spot, --flex and --reservation"
  fi
  case $action in
    start) remote_trainer_arguments "$workdir" "${trainer[@]}" ;;
    *) if ((${#trainer[@]})); then fail "$action takes no arguments of voco_jax.train"; fi ;;
  esac
  case $action in
    image) need_program docker "install Docker: https://docs.docker.com/get-docker" ;;
    logs) need_program kubectl "gcloud components install kubectl" ;;
    *) need_program xpk "pip install xpk" ;;
  esac
}

in_cluster() {
  run xpk "$@" --project="$project" --zone="$zone" --cluster="$cluster"
}

make_cluster() {
  in_cluster cluster create --tpu-type="$type" --num-slices="$slices" "${capacity[@]:---on-demand}" "${xpk_flags[@]}"
}

build_image() {
  local archive build
  warn_of_uncommitted
  archive=(git -C "$root" archive HEAD)
  build=(docker build --platform=linux/amd64 --build-arg="EXTRAS=$extras" --file=launch/Dockerfile --tag="$image" -)
  if [[ $dry_run == true ]]; then
    printf '%s | %s\n' "$(quoted "${archive[@]}")" "$(quoted "${build[@]}")"
  else
    "${archive[@]}" | "${build[@]}"
  fi
  run docker push "$image"
}

start() {
  # xpk starts this from a shell and sends SIGTERM to the process that it has started: exec makes that the trainer. By
  # itself it restarts on 42 and on 127 to 255, which deaths by signal are among.
  in_cluster workload create --workload="$name" --tpu-type="$type" --num-slices="$slices" --docker-image="$image" \
    --command="exec $(quoted python -m voco_jax.train "${trainer[@]}")" \
    --max-restarts="$max_restarts" --restart-on-exit-codes=75 --termination-grace-period-seconds="$grace" \
    --priority="$priority" "${xpk_flags[@]}"
}

logs() {
  local of=jobset.sigs.k8s.io
  run kubectl logs --follow --tail=100 \
    --selector="$of/jobset-name=$name,$of/job-index=0,batch.kubernetes.io/job-completion-index=0"
}

read_options "$@"
check_options
case $action in
  cluster) make_cluster ;;
  image) build_image ;;
  status) in_cluster workload list ;;
  stop) in_cluster workload delete --workload="$name" ;;
  delete-cluster) in_cluster cluster delete ;;
  *) "$action" ;;
esac
