#!/bin/bash
# Shared by every template of this folder: derives everything from SLURM, starts one rank per task with srun, and after
# a preemption or just before the time limit saves, requeues the job and continues where it stopped.
#
# Read from the environment: RECIPE, DS_CONFIG, and optionally
#   RUN_DIR      folder of the run           (default runs/<recipe>-<job id>; the same after a requeue)
#   DATA         value of data.train         (default: the recipe's)
#   VENV         virtual environment to activate
#   CONTAINER    image for srun --container-image (pyxis/enroot); CONTAINER_MOUNTS for its mounts
#   SRUN_FLAGS   further flags for srun
#   TRAIN_FLAGS  further flags for trainer/run.py, e.g. "--train.seed 3"
set -u

: "${RECIPE:?set RECIPE to a recipe of trainer/recipes}"
: "${DS_CONFIG:=ds_configs/zero1.json}"
cd "${SLURM_SUBMIT_DIR:-$PWD}" || exit 1

job=${SLURM_ARRAY_JOB_ID:-${SLURM_JOB_ID:?start this with sbatch}}
name=$RECIPE-$job
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
  # Job arrays run seeds: sbatch --array=0-2 slurm/<template>.sh
  name=$name-seed$SLURM_ARRAY_TASK_ID
  TRAIN_FLAGS="--train.seed $SLURM_ARRAY_TASK_ID ${TRAIN_FLAGS:-}"
fi
RUN_DIR=${RUN_DIR:-runs/$name}
mkdir -p "$RUN_DIR"
if [ -n "${VENV:-}" ]; then
  # shellcheck disable=SC1091
  . "$VENV/bin/activate"
fi

flags=(--ds_config "$DS_CONFIG" --recipe "$RECIPE" --run_dir "$RUN_DIR" --resume auto)
[ -n "${DATA:-}" ] && flags+=(--data.train "$DATA")
container=()
[ -n "${CONTAINER:-}" ] && container=(--container-image "$CONTAINER" --container-mounts "${CONTAINER_MOUNTS:-$PWD:$PWD}")

# A marker of an earlier start must not requeue a job that fails before training.
rm -f "$RUN_DIR/stopped_early"
# Since SLURM 22.05 srun does not inherit this from sbatch, and one core a rank would starve the loader.
[ -n "${SLURM_CPUS_PER_TASK:-}" ] && export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
# The first rank to fail ends the others; nobody waits in a collective for a rank that is gone. Unlabelled output of
# rank 0 is the log; other ranks print only when they fail.
# shellcheck disable=SC2086
srun --kill-on-bad-exit=1 ${SRUN_FLAGS:-} "${container[@]}" \
  python trainer/run.py "${flags[@]}" ${TRAIN_FLAGS:-} &
step=$!

# SLURM signals this script alone (--signal=B:USR1@...); pass it on to the ranks, which save and leave.
pass_on() { scancel --signal=USR1 "$SLURM_JOB_ID" 2>/dev/null || kill -USR1 "$step" 2>/dev/null; }
trap pass_on USR1 TERM

# A trapped signal ends `wait` early, so wait until srun is really gone.
wait "$step"
status=$?
while kill -0 "$step" 2>/dev/null; do
  wait "$step"
  status=$?
done

if [ -e "$RUN_DIR/stopped_early" ]; then
  echo "stopped early: requeueing job $SLURM_JOB_ID"
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$status"
