#!/usr/bin/env bash
# Trains with several processes on this machine's CPUs: what a pod does, to try it or test it.
#
# usage: launch/local.sh [--dry-run] N [FLAGS of saq_jax.main]
# N processes of DEVICES virtual devices each, over loopback on PORT (a free one by default).
# PYTHON is the interpreter. Ctrl-C and SIGTERM are passed on: the run saves and ends; a second one
# ends it at once. If a process fails, the others are ended, after GRACE seconds by force.
set -euo pipefail
PYTHON=${PYTHON:-python} DEVICES=${DEVICES:-1} PORT=${PORT:-} GRACE=${GRACE:-10}
source "$(dirname "$0")/common.sh"

N=${1:-} && shift $(($# > 0))
for name in N DEVICES GRACE; do
  [[ ${!name} =~ ^[1-9][0-9]*$ ]] || die "$name=${!name} must be a number from 1; see --help"
done
while [[ ! $PORT ]]; do
  PORT=$((20000 + RANDOM % 12000)) # below those that systems give out
  if (exec 3<>"/dev/tcp/127.0.0.1/$PORT") 2>/dev/null; then PORT=''; fi
done

pids=() failed=0 signals=0
# To each process alone, as its data workers go on until it has saved, or (-) to its group.
send() {
  for pid in ${pids[@]+"${pids[@]}"}; do kill -s "$1" -- "${2:-}$pid" 2>/dev/null || true; done
}
trap 'signals=$((signals + 1)); if ((signals == 1)); then send TERM; else send KILL -; fi' INT TERM

set -m # each process in a group of its own, which the terminal's Ctrl-C leaves to this script
for ((i = 0; i < N && signals == 0; i++)); do
  word=(env JAX_PLATFORMS=cpu
    XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$DEVICES"
    "$PYTHON" -m saq_jax.main --coordinator="127.0.0.1:$PORT" --processes="$N" --process="$i" "$@")
  if [[ $dry ]]; then run "${word[@]}"; continue; fi
  "${word[@]}" </dev/null &
  pids+=("$!")
done
set +m
while ((${#pids[@]})); do
  sleep 0.2 || true
  for i in "${!pids[@]}"; do
    kill -0 "${pids[i]}" 2>/dev/null && continue
    code=0
    wait "${pids[i]}" || code=$?
    unset 'pids[i]'
    ((code && !failed)) || continue
    failed=$code deadline=$((SECONDS + GRACE))
    echo "local.sh: process $i has ended with code $code: ending the others" >&2
    ((signals)) || send TERM
  done
  if ((failed && SECONDS >= deadline)); then send KILL -; fi
done
exit "$failed"
