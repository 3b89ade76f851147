#!/bin/bash
# Tokenize a corpus on a Slurm cluster, one task per GPU:
#
#     sbatch --nodes=4 examples/tokenize_slurm.sh CORPUS OUT [option of nemo-lfr tokenize ...]
#
# All nodes need access to CORPUS and OUT. If a job is requeued or submitted again with the same number of tasks, it
# resumes. On nodes without GPUs, remove --gpus-per-task, and set --ntasks-per-node and --cpus-per-task for your nodes.
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

# --shard-of auto reads SLURM_PROCID and SLURM_NTASKS, so each task encodes its own shards. --readers 4 reads audio in
# 4 threads, so that the GPU does not wait for it.
code=0
srun --kill-on-bad-exit=0 nemo-lfr tokenize "$corpus" --out "$out" --shard-of auto --readers 4 "$@" || code=$?
if [ "$code" -gt 1 ]; then  # 1: clips or a task failed; the last command encodes missing shards
  echo "tokenize_slurm.sh: a task ended with exit code $code; submit the job again to resume" >&2
  exit "$code"
fi

# Encodes the shards that failed tasks left out, and completes the output if no task has done so. The exit code is 1 if
# clips failed.
exec nemo-lfr tokenize "$corpus" --out "$out" --readers 4 "$@"
