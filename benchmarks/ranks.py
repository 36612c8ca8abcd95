"""Several real ranks on this machine, and what they receive from each other."""

import json
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_TIMEOUT = timedelta(minutes=5)
_NAMESPACES = ("c10d::", "_c10d_functional::", "_c10d_functional_autograd::")
_SILENT = ("wait_tensor", "barrier", "_wrap_tensor_autograd")
# Every rank receives the shards of all others.
_SHARDED = (
    "allgather_",
    "_allgather_base_",
    "all_gather_into_tensor",
    "reduce_scatter_",
    "_reduce_scatter_base_",
    "reduce_scatter_tensor",
)
_REDUCED = ("allreduce_", "all_reduce", "all_reduce_")


class Traffic(TorchDispatchMode):
    """Counts what this rank communicates inside a `with` block, whichever interface of torch.distributed starts it.

    Attributes:
        calls: Number of collectives.
        received_bytes: What comes from other ranks in a bandwidth-optimal algorithm.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0.0
        self.received_bytes = 0.0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.name().startswith(_NAMESPACES):
            sizes = [leaf.nbytes for leaf in tree_leaves((args, result)) if isinstance(leaf, torch.Tensor)]
            self._count(function._overloadpacket.__name__, sizes)
        return result

    def _count(self, name: str, sizes: list[int]) -> None:
        if name in _SILENT:
            return
        ranks = dist.get_world_size()
        calls = 1.0
        if name in _SHARDED:
            received = min(sizes) * (ranks - 1)
        elif name in _REDUCED:
            received = 2 * max(sizes) * (ranks - 1) / ranks
        elif name == "scatter_":
            # On gloo, torch.distributed.nn makes of one reduce-scatter a scatter from every rank; on NCCL it is one.
            calls = 1 / ranks
            received = min(sizes) * (ranks - 1) / ranks
        else:
            raise RuntimeError(f"no rule to count the collective {name}; add one to benchmarks.ranks")
        self.calls += calls
        self.received_bytes += received


def run_on_ranks(function: Callable[..., Any], world_size: int, arguments: dict[str, Any]) -> list[Any]:
    """Calls `function(**arguments)` on every rank of a gloo process group.

    Args:
        function: Module-level function with a result that JSON can hold.
        world_size: Number of ranks, each a process of one thread.
        arguments: Keyword arguments.

    Returns:
        The results in rank order.
    """
    # Held here, so that the port is free by construction and the store outlives every rank.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_run_rank, (world_size, store.port, folder, function, arguments), nprocs=world_size)
        return [json.loads(_result_file(folder, rank).read_text()) for rank in range(world_size)]


def _result_file(folder: str, rank: int) -> Path:
    return Path(folder) / f"{rank}.json"


def _run_rank(
    rank: int, world_size: int, port: int, folder: str, function: Callable[..., Any], arguments: dict[str, Any]
) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=_TIMEOUT)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=_TIMEOUT)
    _result_file(folder, rank).write_text(json.dumps(function(**arguments)))
    # A rank that leaves early closes its sockets under the ranks still communicating.
    dist.barrier()
    dist.destroy_process_group()
