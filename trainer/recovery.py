"""Going back to the last good checkpoint, in place, with the data moved past what went wrong."""

from pathlib import Path

from trainer.checkpoint import (
    list_checkpoints,
    load_checkpoint,
    load_method_state,
    set_aside,
    step_of,
    sweep,
    verify_checkpoint,
)
from trainer.errors import ConfigError
from trainer.guard import Trouble
from trainer.metrics import truncate_records
from trainer.ranks.agreement import on_main, together
from trainer.state import Run, Window

_ADVICE = (
    "lower optimizer.lr, warm up longer or set optimizer.gradient_clipping, then continue from an earlier checkpoint "
    "with --resume <run_dir>/checkpoints/step_<N>"
)


def roll_back(run: Run, trouble: Trouble) -> None:
    """Load the newest checkpoint from before the trouble and go on with samples not seen yet. Collective.

    Step n trains on global batch n + data_offset of the order. Going back from step s to step c adds s - c, so the
    batches of the steps from c on, good and bad, are left out, and nothing else about the order changes.

    Raises:
        ConfigError: `guard.max_rollbacks` is spent, or no checkpoint is old enough.
    """
    limit, failed = run.config.guard.max_rollbacks, run.state.step
    begin = f"step {failed}: {trouble.reason} (since step {trouble.first_step})"
    if run.guard.rollbacks >= limit:
        raise ConfigError(f"{begin}, and the run has gone back {limit} times (guard.max_rollbacks); {_ADVICE}")
    checkpoint = _last_good(run.run_dir / "checkpoints", trouble.first_step)
    if checkpoint is None:
        raise ConfigError(f"{begin}, and there is no checkpoint from before to go back to; {_ADVICE}")
    rollbacks = run.guard.rollbacks + 1
    left_out = failed - step_of(checkpoint)
    offset = run.state.data_offset + left_out
    run.console.warn(f"{begin}: going back to {checkpoint.name}, leaving out {left_out} global batches")

    saved = load_checkpoint(run.engine, checkpoint, run.place.rank, run.place.world_size)
    load_method_state(run.engine, saved, checkpoint)
    run.guard.load_state(saved.guard)
    run.guard.rollbacks = rollbacks
    run.state.step, run.state.bad_samples, run.state.data_offset = saved.step, saved.bad_samples, offset
    run.last_saved, run.window = saved.step, Window()
    run.data.close()
    run.data = together(lambda: run.open_data(saved.step, offset))
    together(lambda: _rewrite_records(run, checkpoint) if run.place.is_main else None)
    if run.metrics:
        run.metrics.event(
            "rollback",
            saved.step,
            checkpoint=str(checkpoint),
            from_step=failed,
            first_bad_step=trouble.first_step,
            reason=trouble.reason,
            data_offset=offset,
            rollbacks=rollbacks,
        )


def _last_good(checkpoints: Path, before: int) -> Path | None:
    """The newest checkpoint of an earlier step that is as it was written. Collective."""
    older = on_main(lambda: [folder for folder in list_checkpoints(checkpoints) if step_of(folder) < before])
    return next((folder for folder in older if not verify_checkpoint(folder)), None)


def _rewrite_records(run: Run, checkpoint: Path) -> None:
    """The branch that failed leaves the records and the checkpoints, as it would had the run been resumed there."""
    run.metrics.close()
    truncate_records(run.run_dir, run.state.step)
    run.metrics = run.open_metrics(run.state.step)
    leave_later_branch(run.run_dir, checkpoint)


def leave_later_branch(run_dir: Path, checkpoint: Path | None) -> None:
    """Going back to an older checkpoint starts another branch: later ones must not be found by the next resume."""
    checkpoints = run_dir / "checkpoints"
    sweep(checkpoints)
    if checkpoint is None or checkpoint.parent.resolve() != checkpoints.resolve():
        return
    for folder in list_checkpoints(checkpoints):
        if step_of(folder) > step_of(checkpoint):
            set_aside(folder, "abandoned")
