"""What must be equal on all ranks: comparing it, and making it so where training lets it differ."""

import socket
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from models.batch_norm import BatchNorm
from trainer.engine.engine import Engine
from trainer.errors import ConfigError

# Elements summed at a time: bounds the 64-bit copies to 128 MiB each.
_CHUNK = 1 << 24


def average_local_statistics(engine: Engine) -> None:
    """Replace the running statistics of batch norms in `local` mode by their mean over ranks. Collective.

    They are moving averages, and the mean of moving averages is the moving average of the mean: doing this before
    evaluating or saving changes nothing later but roundings, and what comes out is the same on every rank.
    """
    layers = [layer for layer in engine.method.modules() if isinstance(layer, BatchNorm) and not layer.sync]
    statistics = [buffer for layer in layers for buffer in (layer.running_mean, layer.running_var)]
    if not statistics or dist.get_world_size() == 1:
        return
    with torch.no_grad():
        flat = torch.cat([buffer.double() for buffer in statistics])
        dist.all_reduce(flat)
        means = (flat / dist.get_world_size()).split([buffer.numel() for buffer in statistics])
        for buffer, mean in zip(statistics, means, strict=True):
            buffer.copy_(mean)


def has_finite_buffers(engine: Engine) -> Tensor:
    """Whether every floating-point buffer of this rank is finite, as a bool scalar on the device."""
    found = [buffer.isfinite().all() for buffer in engine.method.buffers() if buffer.is_floating_point()]
    return torch.stack(found).all() if found else torch.ones((), dtype=torch.bool, device=engine.device)


def verify_replicas(engine: Engine, step: int) -> None:
    """Compare across ranks the weights, buffers and method state that must be equal. Collective.

    At ZeRO 0 to 2 these are all weights; at ZeRO 3 those that are kept whole. Running statistics of batch norms in
    `local` mode and a method's `own_buffers` may differ.

    Raises:
        ConfigError: A rank differs; the message names it, its host and what differs.
    """
    names, tensors = zip(*_replicated(engine), strict=True)
    sums = torch.stack([_checksum(tensor) for tensor in tensors]).cpu()
    mine = ([tuple(pair) for pair in sums.tolist()], engine.method.state_digest(), socket.gethostname())
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    for index, name in enumerate((*names, "the method's state")):
        differing = differing_ranks([sums[index] if index < len(names) else digest for sums, digest, _ in everyone])
        if differing:
            rank = differing[0]
            raise ConfigError(
                f"step {step}: {name} on rank {rank} (host {everyone[rank][2]}) is not what it is on the other ranks "
                f"({len(differing)} of {len(everyone)} ranks differ); check that host's memory and GPU or leave it "
                "out, and continue with --resume auto"
            )


def differing_ranks(values: list[Any]) -> list[int]:
    """Ranks whose value is not the one most ranks hold, or where two are as frequent, that of the lowest rank."""
    expected = Counter(values).most_common(1)[0][0]
    return [rank for rank, value in enumerate(values) if value != expected]


def _replicated(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in engine.method.named_parameters():
        # ZeRO 3 leaves an empty tensor behind where it has cut a parameter up.
        if engine.stage != 3 or parameter.numel() == parameter.ds_numel:
            yield f"weight {name}", parameter.detach()
    local = {
        id(buffer)
        for layer in engine.method.modules()
        if isinstance(layer, BatchNorm) and not layer.sync
        for buffer in layer.buffers()
    } | {id(buffer) for buffer in engine.method.own_buffers()}
    for name, buffer in engine.method.named_buffers():
        if id(buffer) not in local:
            yield f"buffer {name}", buffer


def _checksum(tensor: Tensor) -> Tensor:
    """Two sums modulo 2^64 over a tensor's bits, int64 [2]: one bare, one weighted by place, so that order counts."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = tensor.contiguous().view(-1).view(kinds[tensor.element_size()])
    sums = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    for start in range(0, bits.numel(), _CHUNK):
        chunk = bits[start : start + _CHUNK].long()
        places = torch.arange(start + 1, start + 1 + chunk.numel(), device=chunk.device)
        sums += torch.stack([chunk.sum(), (chunk * places).sum()])
    return sums
