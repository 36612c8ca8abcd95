"""The collectives the losses need, over torch.distributed's default group; one rank needs none and starts none."""

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """This process's rank, 0 when no process group is initialised."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks, 1 when no process group is initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_gather_rows(local: Tensor) -> Tensor:
    """Concatenates the rows of all ranks in rank order, separately for each view; carries no gradient.

    Args:
        local: [K, b, ...], this rank's rows of K views; b must be the same on every rank.

    Returns:
        [K, W * b, ...]; on one rank `local` itself (detached), not a copy.
    """
    local = local.detach()
    ranks = world_size()
    if ranks == 1:
        return local
    num_views, rows = local.shape[:2]
    gathered = local.new_empty(ranks * num_views, *local.shape[1:])
    dist.all_gather_into_tensor(gathered, local.contiguous())
    return gathered.view(ranks, *local.shape).transpose(0, 1).reshape(num_views, ranks * rows, *local.shape[2:])


def reduce_scatter_rows(partial: Tensor) -> Tensor:
    """Sums over ranks and hands each rank its own rows: the adjoint of `all_gather_rows`.

    Args:
        partial: [K, W * b, ...], this rank's contribution to the rows of all ranks.

    Returns:
        [K, b, ...]; on one rank `partial` itself, not a copy.
    """
    ranks = world_size()
    if ranks == 1:
        return partial
    num_views, rows = partial.shape[0], partial.shape[1] // ranks
    by_rank = partial.reshape(num_views, ranks, rows, *partial.shape[2:]).transpose(0, 1).flatten(0, 1).contiguous()
    own = partial.new_empty(num_views, rows, *partial.shape[2:])
    dist.reduce_scatter_tensor(own, by_rank, op=dist.ReduceOp.SUM)
    return own


def all_reduce_sum_(values: Tensor) -> Tensor:
    """Sums `values` over ranks in place and returns it."""
    if world_size() > 1:
        dist.all_reduce(values, op=dist.ReduceOp.SUM)
    return values


def agree(digest: bytes, device: torch.device) -> bool:
    """Whether every rank passed the same bytes (of one length); the answer is the same on every rank.

    Args:
        digest: For instance a hash of state that is replicated on all ranks.
        device: Where the process group communicates.
    """
    local = torch.tensor(list(digest), dtype=torch.uint8, device=device)
    return bool((all_gather_rows(local[None, None])[0] == local).all()) if world_size() > 1 else True
