#!/usr/bin/env bash
# What tpu.sh runs on each host of a pod; it copies this file into the home directory there.
#
# usage: tpu_host.sh setup REPO REF SHARE MOUNT | run PRECISION [FLAGS of saq_jax.main] | stop
set -euo pipefail
LOG=$HOME/saq_jax.log PID=$HOME/saq_jax.pid

die() {
  printf 'tpu_host.sh: %s\n' "$1" >&2
  exit "${2:-2}"
}

# Whether the process that was begun last is there, and no other one that got its number.
runs() { [[ -f $PID ]] && grep -qs saq_jax.main "/proc/$(<"$PID")/cmdline"; }

setup() {
  local repo=$1 ref=$2 share=$3 mount=$4
  ! runs || die 'a run is there, and keeps what it has: stop it first' 1
  cd
  sudo apt-get -qq update
  sudo DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o DPkg::Lock::Timeout=600 \
    install git nfs-common python3-venv
  if [[ $share ]] && ! mountpoint -q "$mount"; then
    sudo mkdir -p "$mount"
    sudo mount -t nfs "$share" "$mount"
  fi
  [[ -d saq_jax ]] || git clone -q -- "$repo" saq_jax
  cd saq_jax
  git fetch -q -- origin "$ref"
  git checkout -q --detach FETCH_HEAD
  # The Python of the image may be older than 3.11.
  python3 -m venv ~/uv
  ~/uv/bin/pip install -q uv
  ~/uv/bin/uv venv -q --allow-existing --python 3.12 venv
  ~/uv/bin/uv pip install -q --python venv/bin/python -e '.[tpu,hub]'
}

train() {
  ! runs || die 'a run is there already: stop it first' 1
  cd ~/saq_jax
  JAX_DEFAULT_MATMUL_PRECISION=$1 nohup venv/bin/python -m saq_jax.main "${@:2}" \
    >>"$LOG" 2>&1 </dev/null &
  echo "$!" >"$PID"
  sleep 10 # In this time a wrong flag or setting shows.
  tail -n 5 "$LOG"
  runs || die 'the run has ended' 1
}

case ${1:-} in
  setup) setup "${@:2}" ;;
  run) train "${@:2}" ;;
  stop)
    runs || die 'there is no run' 1
    kill -TERM "$(<"$PID")"
    ;;
  --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" ;;
  *) die 'setup, run or stop; see --help' ;;
esac
