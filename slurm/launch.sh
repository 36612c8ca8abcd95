#!/bin/bash
# Shared by every template of this folder: derives everything from SLURM, starts one rank per task with srun, and after
# a preemption or just before the time limit saves, requeues the job and continues where it stopped.
#
# Read from the environment; arguments go to trainer/run.py:
#   RECIPE       recipe of trainer/recipes, or a YAML file
#   DS_CONFIG    DeepSpeed JSON
#   RUN_DIR      folder of the run           (default runs/<recipe>-<job id>; the same after a requeue)
#   DATA         value of data.train         (default: the recipe's)
#   VENV         virtual environment to activate
#   CONTAINER    image for srun --container-image (pyxis/enroot); CONTAINER_MOUNTS for its mounts
#   SITE         a script to source first: modules, network settings, defaults for the above (default slurm/site.sh)
#   SRUN_FLAGS   further flags for srun
#   TRAIN_FLAGS  further flags for trainer/run.py
#   RETRIES      how often a crashed run is started again within the job before it has saved anything new (default 2)
#   MASTER_PORT  port of the rendezvous      (default: a free one, derived from the job id)
set -u

fail() { echo "error: $*" >&2; exit 2; }

cd "${DECLIP_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}" && [ -f trainer/run.py ] ||
  fail "$PWD is no checkout of declip-trainer; submit from its root, or set DECLIP_ROOT to it"
: "${SLURM_JOB_ID:?start this with sbatch}"

[ -z "${SITE:-}" ] || [ -f "$SITE" ] || fail "SITE names $SITE, which is no file"
if [ -f "${SITE:=slurm/site.sh}" ]; then
  # shellcheck disable=SC1090
  . "$SITE"
fi
[ -n "${RECIPE:-}" ] || fail "set RECIPE to a recipe of trainer/recipes, or submit one of slurm/*.sh"
if [ -n "${VENV:-}" ]; then
  [ -f "$VENV/bin/activate" ] || fail "VENV names $VENV, which is no virtual environment"
  # shellcheck disable=SC1091
  . "$VENV/bin/activate"
fi

# Job arrays run seeds, each in a folder of its own: sbatch --array=0-2 slurm/<template>.sh
name=$(basename "$RECIPE" .yaml)
RUN_DIR=${RUN_DIR:-runs/$name-${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}
seed=()
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
  RUN_DIR=$RUN_DIR-seed$SLURM_ARRAY_TASK_ID
  seed=(--train.seed "$SLURM_ARRAY_TASK_ID")
fi
logs=$RUN_DIR/logs
mkdir -p "$logs" || fail "RUN_DIR $RUN_DIR cannot be written"

flags=(--ds_config "${DS_CONFIG:-ds_configs/zero1.json}" --recipe "$RECIPE" --run_dir "$RUN_DIR" --resume auto)
[ -n "${DATA:-}" ] && flags+=(--data.train "$DATA")
# shellcheck disable=SC2206
flags+=("${seed[@]}" ${TRAIN_FLAGS:-} "$@")
container=()
[ -n "${CONTAINER:-}" ] &&
  container=(--container-image "$CONTAINER" --container-mounts "${CONTAINER_MOUNTS:-$PWD:$PWD}")

# Ranks other than 0 write there; a rank that fails says so in this log too.
export DECLIP_RANK_LOGS=$logs
# Since SLURM 22.05 srun does not inherit this from sbatch, and one core a rank would starve the loader.
[ -n "${SLURM_CPUS_PER_TASK:-}" ] && export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

# This script runs on the first node, where rank 0 listens. Ports above 32000 are the kernel's to give away.
free_port() {
  local try port
  for try in {0..99}; do
    port=$((20000 + (SLURM_JOB_ID + 101 * try) % 12000))
    (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break
  done
  echo "$port"
}

# A job that is ended by SLURM (scancel, preemption, scontrol requeue) is no longer RUNNING while its ranks save.
still_ours() { [ "$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T 2>/dev/null)" = RUNNING ]; }

# SLURM signals this script alone before the time limit (--signal=B:USR1@...); the ranks save and leave.
warned=
deadline=
on_warning() {
  warned=1
  echo "told to stop by SLURM: ranks save, then the job is requeued"
  scancel --signal=USR1 "$SLURM_JOB_ID" 2>/dev/null
  # A rank that does not get there, in a long evaluation say, would let the job end at its limit, never to be requeued.
  local end left
  end=$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %e 2>/dev/null)
  if [ -z "$deadline" ] && end=$(date -d "$end" +%s 2>/dev/null); then
    left=$((end - $(date +%s) - 15))
    (
      sleep "$((left > 1 ? left : 1))" &
      trap 'kill $!' TERM
      wait $! && still_ours && echo "not saved in time: requeueing at the last checkpoint" &&
        scontrol requeue "$SLURM_JOB_ID"
    ) &
    deadline=$!
  fi
}
trap on_warning USR1
# SIGTERM comes to the ranks as well; this script only has to survive it, for as long as they save.
trap 'echo "ended by SLURM: ranks save"' TERM

start() {
  # Neither a mark nor a message of an earlier start must be taken for one of this.
  rm -f "$RUN_DIR/stopped_early" "$logs"/rank_*.log "$logs"/error_*
  # The first rank to fail ends the others; nobody waits in a collective for a rank that is gone.
  # shellcheck disable=SC2086
  MASTER_PORT=${MASTER_PORT:-$(free_port)} srun --kill-on-bad-exit=1 ${SRUN_FLAGS:-} "${container[@]}" \
    python trainer/run.py "${flags[@]}" &
  local step=$!
  # A trapped signal ends `wait` early, so wait until srun is really gone.
  wait "$step"
  status=$?
  while kill -0 "$step" 2>/dev/null; do
    wait "$step"
    status=$?
  done
}

# Counts starts that ended without a new checkpoint, over all requeues of the job; succeeds up to $1 of them in a row.
may_go_on() {
  local newest count=0 before=
  newest=$(cat "$RUN_DIR/checkpoints/latest" 2>/dev/null || echo none)
  [ -f "$logs/restarts" ] && read -r before count <"$logs/restarts"
  [ "$before" = "$newest" ] || count=0
  echo "$newest $((count + 1))" >"$logs/restarts"
  [ "$count" -lt "$1" ]
}

echo "job $SLURM_JOB_ID on ${SLURM_JOB_NODELIST:-?}, requeued ${SLURM_RESTART_COUNT:-0} times: $name in $RUN_DIR"
while :; do
  start
  [ -z "$deadline" ] || kill "$deadline" 2>/dev/null
  if [ "$status" -eq 0 ] && [ ! -e "$RUN_DIR/stopped_early" ]; then
    rm -rf "$logs"
    exit 0
  fi
  if [ -e "$RUN_DIR/stopped_early" ] || [ -n "$warned" ]; then
    still_ours || { echo "stopped early: SLURM decides whether job $SLURM_JOB_ID starts again"; exit 0; }
    may_go_on 5 || { echo "error: started 5 times without a new checkpoint; raise --time" >&2; exit 1; }
    echo "stopped early: requeueing job $SLURM_JOB_ID"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
  fi
  # What happened, from the ranks that could no longer say it themselves (out of memory, killed by hand).
  compgen -G "$logs/error_*" >/dev/null ||
    find "$logs" -name 'rank_*.log' -size +0 | sort | head -n 3 | while read -r log; do
      echo "--- end of $log" >&2
      tail -n 5 "$log" >&2
    done
  compgen -G "$logs/error_2_*" >/dev/null && exit 2
  still_ours && may_go_on "${RETRIES:-2}" || exit "$status"
  echo "srun ended with code $status: starting again from the last checkpoint" >&2
done
