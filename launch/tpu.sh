#!/usr/bin/env bash
# Trains on a Cloud TPU pod. Each host runs the same command; main.py finds the other hosts.
#
# usage: launch/tpu.sh [--dry-run] create|queue|setup|run|resume|status|stop|delete [FLAGS]
#   create, queue  a TPU of TYPE: at once, or when there is one; SPOT=1: cheap, may be taken away
#   setup          waits for it, mounts SHARE (NFS, HOST:/PATH) at MOUNT, installs REF of REPO
#   run            trains CONFIG in WORKDIR with FLAGS (--config.KEY=VALUE); logs to ~/saq_jax.log
#   resume         after any stop, with the same FLAGS: a new TPU if it is gone, setup, run
#   stop           lets the run save and end; status shows when it has
# Set PROJECT, ZONE and NAME; for setup REPO; for run WORKDIR and DATA_DIR, which all hosts mount.
# --dry-run prints the commands and runs none. It asks for no state: resume prints all it may do.
set -euo pipefail
PROJECT=${PROJECT:-} ZONE=${ZONE:-} NAME=${NAME:-} SPOT=${SPOT:-0}
TYPE=${TYPE:-v5litepod-16} RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite} PRECISION=${PRECISION:-highest}
REPO=${REPO:-} REF=${REF:-main} SHARE=${SHARE:-} MOUNT=${MOUNT:-/mnt/share}
CONFIG=${CONFIG:-configs/vitb16_4bit.py} WORKDIR=${WORKDIR:-} DATA_DIR=${DATA_DIR:-}
source "$(dirname "$0")/common.sh"
source "$(dirname "$0")/tpu_state.sh"

on() { tpus tpu-vm ssh "$NAME" --worker="$1" --command="$(quote "${@:2}")"; }
create() { tpus tpu-vm create "$NAME" --accelerator-type="$TYPE" --version="$RUNTIME" \
  ${spot:+"$spot"}; }
queue() { tpus queued-resources create "$NAME" --node-id="$NAME" --accelerator-type="$TYPE" \
  --runtime-version="$RUNTIME" ${spot:+"$spot"}; }
setup() {
  [[ $dry ]] || await
  tpus tpu-vm scp "$(dirname "$0")/tpu_host.sh" "$NAME:" --worker=all
  on all bash tpu_host.sh setup "$REPO" "$REF" "$SHARE" "$MOUNT"
}
train() { on all bash tpu_host.sh run "$PRECISION" --config="$CONFIG" --workdir="$WORKDIR" \
  --config.data.data_dir="$DATA_DIR" "$@"; }

command=${1:-} && shift $(($# > 0))
[[ $# == 0 || $command == run || $command == resume ]] || die "$command takes no flags: $1"
case $SPOT in 0) spot='' ;; 1) spot=--spot ;; *) die "SPOT=$SPOT must be 0 or 1" ;; esac
case $command in
  create | queue | delete) need PROJECT ZONE NAME; "$command" ;;
  setup) need PROJECT ZONE NAME REPO; setup ;;
  run) need PROJECT ZONE NAME WORKDIR DATA_DIR; train "$@" ;;
  resume) need PROJECT ZONE NAME REPO WORKDIR DATA_DIR; renew; setup; train "$@" ;;
  status) need PROJECT ZONE NAME; request || true; node || true; on 0 tail -n 5 saq_jax.log ;;
  stop) need PROJECT ZONE NAME; on all bash tpu_host.sh stop ;;
  *) die "${command:-no command}: see --help" ;;
esac
