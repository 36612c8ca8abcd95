"""Exponential moving average of the weights: `train.ema_decay`.

The average lies beside the optimizer's moments, one element per element of the fp32 masters that this rank owns. So an
update is elementwise and needs no communication, the average does not depend on ZeRO stage or world size beyond
rounding of the weights themselves, and checkpoints save, reshape and restore it like a moment.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.engine.engine import Engine

AVERAGE = "ema"


@torch.no_grad()
def update_average(engine: Engine) -> None:
    """Move the average towards the weights: average = decay * average + (1 - decay) * weights.

    Called after each step, a skipped one included. The first call starts it from the weights as they are then.
    Running statistics of batch norms are averages already and are left as they are.
    """
    if engine.ema_decay is None:
        return
    masters, averages = [], []
    optimizer = engine.base_optimizer
    for master in _masters(engine):
        state = optimizer.state[master]
        if not state and not isinstance(optimizer, torch.optim.SGD):
            # Adam makes its moments on its first step, if it finds no state at all.
            return
        if AVERAGE not in state:
            state[AVERAGE] = master.detach().clone()
        masters.append(master.data)
        averages.append(state[AVERAGE])
    torch._foreach_lerp_(averages, masters, 1.0 - engine.ema_decay)


@contextmanager
def averaged_weights(engine: Engine) -> Iterator[None]:
    """Exchange weights and average for the duration, on all ranks; does nothing without one. Collective.

    What comes back afterwards is bitwise what was there. Not restored after an error, which ends the run: the ranks
    could wait for each other for ever.
    """
    state = engine.base_optimizer.state
    masters = [master for master in _masters(engine) if AVERAGE in state[master]]
    if engine.ema_decay is None or not masters:
        yield
        return
    _exchange(engine, masters)
    yield
    _exchange(engine, masters)


@torch.no_grad()
def _exchange(engine: Engine, masters: list[Tensor]) -> None:
    for master in masters:
        average = engine.base_optimizer.state[master][AVERAGE]
        weights = master.data.clone()
        master.data.copy_(average)
        average.copy_(weights)
    if engine.stage == 3:
        _refresh_partitioned(engine)
    elif engine.stage:
        _refresh_replicated(engine)


def _masters(engine: Engine) -> list[Tensor]:
    """The fp32 weights that this rank's optimizer steps, in the optimizer's order."""
    if engine.stage == 0:
        return [parameter for group in engine.base_optimizer.param_groups for parameter in group["params"]]
    if engine.stage < 3:
        return list(engine.optimizer.single_partition_of_fp32_groups)
    return list(engine.optimizer.fp32_partitioned_groups_flat)


def _refresh_replicated(engine: Engine) -> None:
    """ZeRO 1 and 2: the parameters from the masters of all ranks, as after a step."""
    optimizer = engine.optimizer
    for group, master in enumerate(optimizer.single_partition_of_fp32_groups):
        parts = optimizer.parallel_partitioned_bit16_groups[group]
        parts[dist.get_rank()].data.copy_(master.data)
        for rank, part in enumerate(parts):
            dist.broadcast(part.data, src=rank)


def _refresh_partitioned(engine: Engine) -> None:
    """ZeRO 3: what each rank holds of the parameters from its masters; none may be left gathered, see `step` there."""
    optimizer = engine.optimizer
    optimizer._partition_all_parameters()
    for index in range(len(optimizer.fp32_partitioned_groups_flat)):
        optimizer._reassign_or_swap_out_partitioned_parameters(index)
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
