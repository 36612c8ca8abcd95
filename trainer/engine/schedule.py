"""The learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

import math


def learning_rate(step: int, *, peak_lr: float, start_lr: float, end_lr: float, warmup_steps: int, steps: int) -> float:
    """Linear warm-up, then cosine.

    Args:
        step: Optimizer step about to be taken, 1 to `steps`.
        peak_lr: Rate at the end of warm-up (step `warmup_steps`).
        start_lr: Rate at step 1 when there is a warm-up of at least two steps.
        end_lr: Rate at step `steps`.
        warmup_steps: Length of the warm-up; 0 or 1 starts at the peak.
        steps: Length of the whole run.

    Returns:
        start + (peak - start) * (step - 1) / (warmup - 1) during warm-up (DeCLIP's convention), then
        end + (peak - end) * (1 + cos(pi * t)) / 2 with t the fraction of the remaining steps that are done.
    """
    if step < warmup_steps:
        return start_lr + (peak_lr - start_lr) * (step - 1) / (warmup_steps - 1)
    first = max(warmup_steps, 1)
    progress = (step - first) / max(1, steps - first)
    return end_lr + (peak_lr - end_lr) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
