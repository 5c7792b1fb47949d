#!/usr/bin/env bash
# Trains on TPUs of Google Kubernetes Engine through xpk (pip install xpk).
#
# usage: launch/gke.sh [--dry-run] cluster|workload|list|delete|delete-cluster [FLAGS]
#   cluster         makes CLUSTER with one slice of TYPE; SPOT=1: cheap, may be taken away
#   workload        trains CONFIG in WORKDIR with FLAGS (--config.KEY=VALUE), as workload NAME
#   list            the workloads and their states
#   delete          the workload NAME; the run saves and ends. The same `workload` goes on
#   delete-cluster  CLUSTER and all that is in it
# Set PROJECT, ZONE and CLUSTER; for workload and delete NAME; for workload IMAGE, an image with
# saq_jax and this repository as its working directory, WORKDIR and DATA_DIR, and STORAGE, what xpk
# calls the storage of both. A workload that is told to stop saves, and is started again.
# --dry-run prints the command and runs none.
set -euo pipefail
PROJECT=${PROJECT:-} ZONE=${ZONE:-} CLUSTER=${CLUSTER:-} NAME=${NAME:-} SPOT=${SPOT:-0}
TYPE=${TYPE:-v5litepod-16} IMAGE=${IMAGE:-} STORAGE=${STORAGE:-} RESTARTS=${RESTARTS:-50}
CONFIG=${CONFIG:-configs/vitb16_4bit.py} WORKDIR=${WORKDIR:-} DATA_DIR=${DATA_DIR:-}
PRECISION=${PRECISION:-highest} # of float32 products; docs/scaling.md says why
GRACE=${GRACE:-300}             # seconds to save after SIGTERM
source "$(dirname "$0")/common.sh"

xpk_run() { run xpk "$@" --cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE"; }
workload() {
  # exec: xpk sends SIGTERM to the process that it has started. It starts a workload again on 75.
  xpk_run workload create --workload="$NAME" --tpu-type="$TYPE" --num-slices=1 \
    --docker-image="$IMAGE" --storage="$STORAGE" --env=JAX_DEFAULT_MATMUL_PRECISION="$PRECISION" \
    --max-restarts="$RESTARTS" --restart-on-exit-codes=75 \
    --termination-grace-period-seconds="$GRACE" \
    --command="exec $(quote launch/again.sh python -m saq_jax.main --config="$CONFIG" \
      --workdir="$WORKDIR" --config.data.data_dir="$DATA_DIR" "$@")"
}

command=${1:-} && shift $(($# > 0))
[[ $# == 0 || $command == workload ]] || die "$command takes no flags: $1"
[[ $SPOT == 0 || $SPOT == 1 ]] || die "SPOT=$SPOT must be 0 or 1"
case $command in
  cluster)
    need PROJECT ZONE CLUSTER
    [[ $SPOT == 1 ]] && capacity=--spot || capacity=--on-demand
    xpk_run cluster create --tpu-type="$TYPE" --num-slices=1 "$capacity"
    ;;
  workload)
    need PROJECT ZONE CLUSTER NAME IMAGE STORAGE WORKDIR DATA_DIR
    workload "$@"
    ;;
  list)
    need PROJECT ZONE CLUSTER
    xpk_run workload list
    ;;
  delete)
    need PROJECT ZONE CLUSTER NAME
    xpk_run workload delete --workload="$NAME"
    ;;
  delete-cluster)
    need PROJECT ZONE CLUSTER
    xpk_run cluster delete
    ;;
  *) die "${command:-no command}: see --help" ;;
esac
