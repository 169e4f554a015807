#!/bin/bash
#SBATCH --job-name=fastslots
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@120

# One training on all GPUs of a job. When the job's time is nearly over it saves a checkpoint and queues the job again, which
# then goes on from there, until the run has all its steps:
#
#   sbatch examples/slurm.sh clevr6 --data "$SCRATCH/clevr6.packed" --out "$HOME/runs/clevr6"

first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

srun torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv-backend c10d --rdzv-endpoint "$first_node:${PORT:-29500}" --rdzv-id "$SLURM_JOB_ID" \
    -m fastslots train "$@" --resume &
training=$!

again() { # Slurm sends SIGTERM to this script two minutes before the end
    kill -TERM "$training"
    wait "$training"
    scontrol requeue "$SLURM_JOB_ID"
    exit
}
trap again TERM

wait "$training"
