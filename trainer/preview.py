"""What precedes a step, and samples shown to the method before they are trained on, where it asks for that."""

import time

import torch

from trainer.engine.replicas import average_local_statistics
from trainer.ranks.agreement import together
from trainer.state import Ahead, Run


def look_ahead(run: Run, step: int) -> None:
    """Tell the method of the step, and give it its preview, if one is due before. Collective.

    Which batches it covers follows from the step and the data offset, and what it finds from them and the weights: a
    run that is killed here, and resumed from a checkpoint at this step, does and finds the same.
    """
    engine, method, enter = run.engine, run.engine.method, run.watchdog.enter
    enter(step, "begin")
    due = method.begin_step(step, step - 1 + run.state.data_offset)
    if due is None:
        return
    started = time.perf_counter()
    enter(step, "preview")
    average_local_statistics(engine)
    ahead = _open(run, due.start)
    with engine.evaluating(), torch.no_grad():
        for _ in due:
            for batch in next(ahead.batches):
                # Training meets the same bad samples, and reports them.
                del batch["bad_samples"]
                batch = ahead.data.to_device(batch)
                method.collect(engine("preview", batch), batch)
            enter(step, "preview")
    ahead.next_batch = due.stop
    summary = method.end_preview()
    run.console.line(f"{summary} ({time.perf_counter() - started:.1f} s)")


def _open(run: Run, batch: int) -> Ahead:
    """The loader of the last preview where it stands at `batch`, so that its workers live on; else another one."""
    if run.ahead is not None and run.ahead.next_batch == batch:
        return run.ahead
    if run.ahead is not None:
        run.ahead.data.close()
        run.ahead = None
    data = together(lambda: run.open_data(batch, 0, preview=True))
    run.ahead = Ahead(data, data.steps(), batch)
    return run.ahead
