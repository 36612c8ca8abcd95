"""Size and time of a checkpoint before the first one is written, and whether there is room for it."""

import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.checkpoint.layout import Layout
from trainer.checkpoint.restore import layout_of
from trainer.checkpoint.writer import describe_os_error
from trainer.engine.engine import Engine
from trainer.errors import ConfigError
from trainer.ranks.agreement import on_main, together

GIB = 2**30
_MOMENTS = {"adam": 2, "sgd with momentum": 1, "sgd without momentum": 0}
# Names, shapes and the rest of the pickled structure: per file and per tensor, generously.
_FILE_BYTES = 1 << 16
_TENSOR_BYTES = 1 << 10
# What all ranks together write to time the file system.
_PROBE_BYTES = 1 << 28
_MAX_PROBE_BYTES = 1 << 26
_SEEN_SECONDS = 10.0


@dataclass(frozen=True)
class Estimate:
    """What a save will take.

    Attributes:
        total: Bytes of all ranks.
        seconds: Expected time.
        bytes_per_second: Measured over all ranks at once, flushed to disk.
        free: Bytes free where checkpoints go.
    """

    total: int
    seconds: float
    bytes_per_second: float
    free: int

    def __str__(self) -> str:
        return (
            f"checkpoints: {self.total / GIB:.2f} GiB each, about {self.seconds:.1f} s to save "
            f"({self.bytes_per_second / GIB:.2f} GiB/s in a trial), {self.free / GIB:.1f} GiB free"
        )


def rank_bytes(engine: Engine, layout: Layout, method_state: dict[str, Any], rank: int) -> int:
    """Bytes that `rank`, which is this one, writes per checkpoint, an upper bound close to the truth."""
    copies = 1 + _MOMENTS[layout.optimizer] + (engine.ema_decay is not None)
    groups = range(len(layout.parameter_names))
    trained = sum(sum(layout.group_sizes(group)) for group in groups)
    frozen = sum(math.prod(shape) for shape in layout.frozen_shapes.values())
    state_dict = engine.method.state_dict(keep_vars=True)
    buffers = sum(value.nbytes for value in state_dict.values() if not isinstance(value, nn.Parameter))
    overhead = 2 * _FILE_BYTES + (2 + copies) * _TENSOR_BYTES * len(state_dict)
    extra = sum(tensor.nbytes for tensor in _tensors(method_state)) if rank == 0 else 0
    own = sum(buffer.nbytes for buffer in engine.method.own_buffers())
    extra += own + _FILE_BYTES if own else 0
    if layout.stage == 0:
        return overhead + extra + 4 * (copies * trained + frozen) + buffers if rank == 0 else extra
    if layout.stage == 3:
        owned = sum(sum(layout.shares(group)) for group in groups)
        shares = sum(-(-math.prod(shape) // layout.world_size) for shape in layout.frozen_shapes.values())
        return overhead + extra + 4 * (copies * owned + shares) + buffers
    model = 4 * (trained + frozen) + buffers if rank == 0 else 0
    return overhead + extra + 4 * copies * sum(layout.partition_sizes) + model


def shortage(engine: Engine, checkpoints: Path, method_state: dict[str, Any]) -> str | None:
    """Why there is no room for a checkpoint, the same on all ranks; None when there is. Collective."""
    total, _, free = _demand(engine, checkpoints, method_state)
    if total <= free:
        return None
    return f"it needs {total / GIB:.2f} GiB and {checkpoints} has {free / GIB:.2f} GiB free"


def prepare_checkpoints(engine: Engine, checkpoints: Path, must_fit: bool) -> Estimate:
    """Try the folder on all ranks before any training: shared, writable, large enough, and how fast. Collective.

    Args:
        engine: The engine whose state will be saved.
        checkpoints: The run's `checkpoints` folder; made here.
        must_fit: Whether having no room for one is an error.

    Raises:
        ConfigError: A rank cannot write there, it is not one folder for all ranks, or there is no room.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    together(lambda: _make_folder(checkpoints))
    total, writers, free = _demand(engine, checkpoints, engine.method.method_state() if rank == 0 else {})
    if must_fit and total > free:
        raise ConfigError(
            f"no room for a checkpoint: one takes {total / GIB:.2f} GiB and {checkpoints} has {free / GIB:.2f} GiB "
            "free; free some space or choose another --run_dir"
        )
    size = min(_PROBE_BYTES // writers, _MAX_PROBE_BYTES, total // writers, free // (4 * world_size))
    dist.barrier()
    elapsed = together(lambda: _write_probe(checkpoints / f".probe-{rank}", size if rank < writers else 0))
    on_main(lambda: _find_probes(checkpoints, world_size))
    (checkpoints / f".probe-{rank}").unlink(missing_ok=True)
    slowest = torch.tensor([elapsed], dtype=torch.float64, device=engine.device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    rate = max(1, size * writers) / float(slowest)
    return Estimate(total, total / rate, rate, free)


def _make_folder(checkpoints: Path) -> None:
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{describe_os_error(error, checkpoints)}; choose a --run_dir all ranks can write") from None


def _demand(engine: Engine, checkpoints: Path, method_state: dict[str, Any]) -> tuple[int, int, int]:
    """Bytes of a checkpoint, the number of ranks that write them, and the least free space any rank sees."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    needed = rank_bytes(engine, layout_of(engine, world_size), method_state, rank)
    seen: list[Any] = [None] * world_size
    dist.all_gather_object(seen, (needed, free_bytes(checkpoints)))
    return sum(need for need, _ in seen), sum(need > 0 for need, _ in seen), min(free for _, free in seen)


def free_bytes(folder: Path) -> int:
    """Bytes this user may still write to the file system of `folder`."""
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def _write_probe(path: Path, size: int) -> float:
    """Write and flush `size` bytes; seconds taken."""
    # Random, as file systems may compress.
    block = os.urandom(1 << 16)
    started = time.perf_counter()
    try:
        with path.open("wb", buffering=0) as stream:
            for _ in range(-(-size // len(block))):
                stream.write(block)
            os.fsync(stream.fileno())
    except OSError as error:
        raise ConfigError(
            f"rank {dist.get_rank()} cannot write checkpoints ({describe_os_error(error, path)})"
        ) from None
    return time.perf_counter() - started


def _find_probes(checkpoints: Path, world_size: int) -> None:
    deadline = time.monotonic() + _SEEN_SECONDS
    for rank in range(world_size):
        # Network file systems may take a moment to show what another node wrote.
        while not (checkpoints / f".probe-{rank}").exists():
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"rank 0 does not see what rank {rank} wrote to {checkpoints}: --run_dir must be one folder that "
                    "all nodes share"
                )
            time.sleep(0.1)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from _tensors(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _tensors(entry)
