#!/usr/bin/env bash
#SBATCH --job-name=saq_jax
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
# Trains on GPU nodes under SLURM: submits itself as a job, which goes on in a next one by itself.
#
# usage: launch/slurm.sh [--dry-run] [FLAGS]
# Trains CONFIG in WORKDIR with FLAGS (--config.KEY=VALUE) on NODES nodes of GPUS GPUs and CPUS
# cores, a job for at most TIME. Set WORKDIR and DATA_DIR, which all nodes mount; PYTHON is the
# interpreter. sbatch takes SBATCH_PARTITION, SBATCH_ACCOUNT and the like from the environment.
# Begin it in the directory of configs/. --dry-run prints sbatch's command and the job's own.
#
# One process a node drives all its GPUs: one compilation and one set of data workers for them,
# and a single node needs no network. Five minutes before TIME is over the run saves, and the job
# queues again; so it does when it is preempted or a node fails. scancel ends it for good.
set -euo pipefail
NODES=${NODES:-1} GPUS=${SLURM_GPUS_ON_NODE:-${GPUS:-8}} CPUS=${CPUS:-32} TIME=${TIME:-24:00:00}
CONFIG=${CONFIG:-configs/vitb16_4bit.py} WORKDIR=${WORKDIR:-} DATA_DIR=${DATA_DIR:-}
PYTHON=${PYTHON:-python} PRECISION=${PRECISION:-highest} # docs/scaling.md
here=$(dirname "$0")
[[ -f $here/common.sh ]] || here=launch # in a job, which runs a copy of this file
source "$here/common.sh"

need WORKDIR DATA_DIR
for name in NODES GPUS CPUS; do
  [[ ${!name} =~ ^[1-9][0-9]*$ ]] || die "$name=${!name} must be a number from 1"
done
# Without their list, JAX gives a process under SLURM one GPU.
step=(srun --ntasks-per-node=1 --cpus-per-task="$CPUS" --kill-on-bad-exit=1
  env JAX_LOCAL_DEVICE_IDS="$(seq -s, 0 $((GPUS - 1)))" JAX_DEFAULT_MATMUL_PRECISION="$PRECISION"
  "$PYTHON" -m saq_jax.main --config="$CONFIG" --workdir="$WORKDIR"
  --config.data.data_dir="$DATA_DIR" "$@")

if [[ ! ${SLURM_JOB_ID:-} ]]; then
  run sbatch --nodes="$NODES" --gpus-per-node="$GPUS" --cpus-per-task="$CPUS" --time="$TIME" \
    --export=ALL "$0" "$@"
fi
if [[ $dry ]]; then run "${step[@]}"; fi
if [[ $dry || ! ${SLURM_JOB_ID:-} ]]; then exit; fi
again=''
# srun itself would kill its processes at the signal; scancel hands it on to them.
trap 'again=1; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
"${step[@]}" &
code=0
wait "$!" || code=$?
if [[ $again ]]; then # which has interrupted the wait
  code=0
  wait "$!" || code=$?
  [[ $code != 0 ]] || scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
