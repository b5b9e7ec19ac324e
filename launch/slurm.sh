#!/bin/bash
# A run on GPUs by SLURM: one task a node, which takes all of the node's GPUs. The processes find each other (docs/pods.md).
#
#   sbatch --nodes=4 launch/slurm.sh --gin_file configs/recipes/readme_llama2_7b.gin --output /shared/runs/llama2_7b
#   DRY_RUN=1 bash launch/slurm.sh --gin_file configs/recipes/readme_llama2_7b.gin      # prints what would be started
#
# Preempted or requeued, or begun again after a failure, it goes on from the last complete checkpoint in --output, which
# every node must see. CHECKOUT (default: where it is submitted) holds the repository and its .venv.
#SBATCH --job-name=readme-jax
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@300
set -euo pipefail

checkout=${CHECKOUT:-${SLURM_SUBMIT_DIR:-$PWD}}
command=(srun --kill-on-bad-exit=1 --wait=60 "$checkout/.venv/bin/python" "$checkout/train.py" "$@")

if [[ -n ${DRY_RUN:-} ]]; then
    printf '%q ' "${command[@]}"
    printf '\n'
    exit 0
fi

cd "$checkout"
code=0
"${command[@]}" || code=$?
# 143: told to stop, and saved. Back into the queue; anything else ends the job with its own code.
if [[ $code -eq 143 ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
