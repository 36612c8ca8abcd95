"""What a run does about steps that went wrong: count them, and say when to go back to a checkpoint."""

import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import Any

from trainer.config.sections import GuardConfig

# Of a normal distribution: median absolute deviation to standard deviation.
_MAD_TO_SIGMA = 1.4826
_SMALLEST_SPREAD = 0.01


@dataclass(frozen=True)
class Trouble:
    """Why the run cannot go on as it is.

    Attributes:
        first_step: The first of the bad steps: a checkpoint before it is good.
        reason: What was seen, for messages and events.
    """

    first_step: int
    reason: str


@dataclass(frozen=True)
class BadStep:
    """One step that was skipped, or whose loss is out of line (`bound` is what it was allowed to be)."""

    step: int
    loss: float
    in_a_row: int
    bound: float | None = None


class Guard:
    """Judges finished steps in order. What it is shown is equal on all ranks, so all reach the same verdict.

    Args:
        config: Limits.
    """

    def __init__(self, config: GuardConfig) -> None:
        self._config = config
        self._losses: deque[float] = deque(maxlen=config.spike_window)
        self._skipped = 0
        self._spiked = 0
        self._first_skipped = 0
        self._first_spiked = 0
        self._poisoned: tuple[int, str] | None = None
        self.rollbacks = 0

    def judge(self, step: int, skipped: bool, loss: float) -> BadStep | None:
        """Take note of a step.

        Args:
            step: Its number.
            skipped: Whether its update was left out.
            loss: Its loss over the global batch.

        Returns:
            What is wrong with it, if anything.
        """
        if skipped:
            self._first_skipped = self._first_skipped if self._skipped else step
            self._skipped += 1
            return BadStep(step, loss, self._skipped)
        self._skipped = 0
        if not self._config.spike_factor:
            return None
        bound = self._bound()
        if bound is not None and not loss <= bound:
            self._first_spiked = self._first_spiked if self._spiked else step
            self._spiked += 1
            return BadStep(step, loss, self._spiked, bound)
        self._spiked = 0
        if math.isfinite(loss):
            self._losses.append(loss)
        return None

    def _bound(self) -> float | None:
        if len(self._losses) < self._config.spike_window:
            return None
        median = statistics.median(self._losses)
        spread = _MAD_TO_SIGMA * statistics.median(abs(loss - median) for loss in self._losses)
        return median + self._config.spike_factor * max(spread, _SMALLEST_SPREAD * abs(median))

    @property
    def is_calm(self) -> bool:
        """Whether the last step was good, so that the newest checkpoint is one to go back to."""
        return not (self._skipped or self._spiked or self._poisoned)

    def poison(self, first_step: int, reason: str) -> None:
        """Declare the run beyond repair by further steps, from `first_step` on."""
        self._poisoned = self._poisoned or (first_step, reason)

    def trouble(self) -> Trouble | None:
        """What makes it pointless to go on, once there is too much of it."""
        if self._poisoned:
            return Trouble(*self._poisoned)
        if self._skipped >= self._config.max_skipped:
            what = "the loss or a gradient was not finite"
            return Trouble(self._first_skipped, f"{what} in {self._skipped} steps in a row")
        if self._spiked >= self._config.spike_steps:
            return Trouble(self._first_spiked, f"the loss was out of line in {self._spiked} steps in a row")
        return None

    def state(self) -> dict[str, Any]:
        """Everything later verdicts depend on, for checkpoints."""
        return {
            "losses": list(self._losses),
            "skipped": [self._skipped, self._first_skipped],
            "spiked": [self._spiked, self._first_spiked],
            "poisoned": self._poisoned,
            "rollbacks": self.rollbacks,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned; an empty one starts afresh."""
        self._losses = deque(state.get("losses", ()), maxlen=self._config.spike_window)
        self._skipped, self._first_skipped = state.get("skipped", (0, 0))
        self._spiked, self._first_spiked = state.get("spiked", (0, 0))
        self._poisoned = state.get("poisoned")
        self.rollbacks = state.get("rollbacks", 0)
