#!/usr/bin/env bash
# Training on a SLURM cluster, across time limits and preemption: sbatch scripts/slurm_train.sh SCRIPT FLAGS
#
#   sbatch --nodes 2 scripts/slurm_train.sh scripts/cm_train.py --preset imagenet64_cd_lpips --data_dir DATA \
#       --teacher_model_path TEACHER --out_dir RUN
#
# Five minutes before the time limit, and when the job is preempted, the ranks get a signal: they finish their step,
# save and exit with code 75, and the job goes back to the queue under its number. The same command then goes on.
# Any other code ends the job. RUN/status.json says why a run ended. Flags of sbatch win over the lines below.
#SBATCH --job-name=cm
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@300
#SBATCH --output=slurm-%j.out
set -u
if [ $# -eq 0 ]; then
    echo "usage: sbatch scripts/slurm_train.sh SCRIPT FLAGS" >&2
    exit 2
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# The signals are for the ranks; this shell waits for them to save. Ranks end each other when one is lost, so srun need
# not: it would kill those that are still leaving, and their codes would hide the 75.
trap : TERM USR1
srun --kill-on-bad-exit=0 --wait=60 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" python "$@"
code=$?

unfinished=75
if [ "$code" -eq "$unfinished" ]; then
    echo "not finished: job ${SLURM_JOB_ID} goes back to the queue (start ${SLURM_RESTART_COUNT:-0})"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
