"""Signals that mean "save and leave": SIGTERM, SIGUSR1 and Ctrl-C, agreed by all ranks."""

import signal
from types import FrameType

import torch
import torch.distributed as dist

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Preemption:
    """Turns a signal on any rank into one decision that every rank takes at the same step.

    The vote runs on a gloo group beside the step: started at one step, read at the next, so no rank waits for it.
    """

    def __init__(self, world_size: int) -> None:
        self._requested = 0
        self._group = dist.new_group(backend="gloo") if world_size > 1 else None
        self._vote: tuple[torch.Tensor, dist.Work] | None = None
        self._previous = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == self._requested == signal.SIGINT:
            raise KeyboardInterrupt
        self._requested = number

    def should_stop(self) -> bool:
        """True on all ranks alike once any rank was told to stop. Collective: call once per step."""
        if self._group is None:
            return bool(self._requested)
        decided = False
        if self._vote is not None:
            votes, work = self._vote
            work.wait()
            decided = bool(votes.item())
        votes = torch.tensor([self._requested], dtype=torch.int32)
        self._vote = (votes, dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self._group, async_op=True))
        return decided

    def close(self) -> None:
        """Finish the vote in flight and give the signals back."""
        if self._vote is not None:
            self._vote[1].wait()
            self._vote = None
        for number, handler in self._previous.items():
            signal.signal(number, handler)
