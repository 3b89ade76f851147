#!/bin/bash
# Tokenize a corpus on a Slurm cluster, one task per GPU:
#
#     sbatch --nodes=4 examples/tokenize_slurm.sh CORPUS OUT [option of nemo-lfr tokenize ...]
#
# All nodes need access to CORPUS and OUT. A job that is requeued or submitted again resumes if the number of tasks is
# the same. On nodes without GPUs, remove --gpus-per-task and set --ntasks-per-node and --cpus-per-task.
#SBATCH --job-name=tokenize
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --requeue
set -euo pipefail

if [ $# -lt 2 ]; then
  echo "usage: sbatch tokenize_slurm.sh CORPUS OUT [option ...]" >&2
  exit 2
fi
corpus=$1 out=$2
shift 2

# Each task computes its own shards: --shard-of auto reads SLURM_PROCID and SLURM_NTASKS. Readers keep the GPU busy.
code=0
srun --kill-on-bad-exit=0 nemo-lfr tokenize "$corpus" --out "$out" --shard-of auto --readers 4 "$@" || code=$?
if [ "$code" -gt 1 ]; then  # 1: clips or a task failed; the last command computes missing shards
  echo "tokenize_slurm.sh: a task ended with exit code $code; submit the job again to resume" >&2
  exit "$code"
fi

# Completes the output if no task has done so, and computes the shards of lost tasks. Exit code 1 means failed clips.
exec nemo-lfr tokenize "$corpus" --out "$out" --readers 4 "$@"
