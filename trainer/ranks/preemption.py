"""Told to stop: one decision of all ranks, and the mark it leaves."""

from pathlib import Path

import torch
import torch.distributed as dist

from trainer.ranks.signals import told_to_stop

# Left in the run folder when a signal ended the run before its last step: the job script requeues itself on it.
STOPPED_EARLY = "stopped_early"


class ToldToStop(Exception):
    """Raised on all ranks alike when a signal ends a run before its first step: there is nothing to save."""


def stop_if_told(run_dir: Path) -> None:
    """Leave together if any rank was told to. Collective; for the time before training, where no step votes.

    Raises:
        ToldToStop: On every rank. The run folder is marked, so that a job script starts it again.
    """
    told = [0] * dist.get_world_size()
    dist.all_gather_object(told, told_to_stop())
    if any(told):
        if dist.get_rank() == 0:
            (run_dir / STOPPED_EARLY).touch()
            print("told to stop before the first step: nothing to save", flush=True)
        raise ToldToStop


class Preemption:
    """Turns a signal on any rank into one decision that every rank takes at the same step.

    The vote runs on a gloo group beside the step: started at one step, read at the next, so no rank waits for it.
    """

    def __init__(self, world_size: int) -> None:
        self._group = dist.new_group(backend="gloo") if world_size > 1 else None
        self._vote: tuple[torch.Tensor, dist.Work] | None = None

    def should_stop(self) -> bool:
        """True on all ranks alike once any rank was told to stop. Collective: call once per step."""
        if self._group is None:
            return bool(told_to_stop())
        decided = False
        if self._vote is not None:
            votes, work = self._vote
            work.wait()
            decided = bool(votes.item())
        votes = torch.tensor([told_to_stop()], dtype=torch.int32)
        self._vote = (votes, dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self._group, async_op=True))
        return decided

    def close(self) -> None:
        """Finish the vote in flight."""
        if self._vote is not None:
            self._vote[1].wait()
            self._vote = None
