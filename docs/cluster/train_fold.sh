#!/usr/bin/env bash
# Five folds of one model as a SLURM array; a job that is pre-empted or reaches its time limit requeues itself.
#
#   sbatch docs/cluster/train_fold.sh 27 3d_fullres -p MaskSAMPlans
#
# What follows the file is nnUNetv2_train's: dataset, configuration, then options; the fold is the array's index.
#SBATCH --job-name=masksam
#SBATCH --array=0-4
#SBATCH --gpus=1
#SBATCH --cpus-per-task=12
#SBATCH --mem=48G
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=masksam_%A_%a.log
set -euo pipefail
: "${SLURM_ARRAY_TASK_ID:?submit this with sbatch}"
dataset=$1 configuration=$2
shift 2
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # since SLURM 22.05 srun does not take it from sbatch

status=0
srun masksam train "$dataset" "$configuration" "$SLURM_ARRAY_TASK_ID" "$@" --c || status=$?
if [[ $status -eq 75 ]]; then # saved because a signal asked for it
    scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
fi
exit "$status"
