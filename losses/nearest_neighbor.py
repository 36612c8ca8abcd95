"""The queue of past text features in which nearest-neighbour supervision looks for a second positive caption."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn

from losses.distributed import agree, rank
from losses.functional import exact_products

# Similarities of one chunk of queue rows against all queries, in bytes.
_SEARCH_CHUNK_BYTES = 32 * 2**20
# Places in `NearestNeighborQueue.counters`.
_POINTER, _FILLED, _SKIPPED = range(3)


class NearestNeighborQueue(nn.Module):
    """First-in first-out queue of unit-length text features, searched by cosine similarity.

    Global use (one logical queue, identical bits on every rank): enqueue the gathered rows, one's own included, and
    let `contrastive_terms` index each rank's replica by gathered slots. Local use (a queue per rank, as in the
    published run): enqueue the rank's own rows and pass `rows[slots]` as `neighbour_vectors`, with `identities(slots)`
    as slots where duplicates are masked; start it with warmup="random", so that no rank is ever without neighbours
    while another has some.

    Order in a step: search first, enqueue last, so that no sample finds itself or its sibling view.

    Neither waits for the device: a block that holds a value which is not finite is refused there, and counted. The
    properties `pointer`, `filled` and `skipped_blocks` do wait: for logged steps and checkpoints.

    Args:
        size: Number of slots Q.
        dim: Width of a feature.
        warmup: "skip" searches filled slots only and is not `ready` before the first enqueue; "random" starts from
            seeded random unit vectors that count as neighbours from the first step.
        enqueue_views: "both" stores every text view, the last view first; "orig" stores view 0 only.
        seed: Of the random rows; must be equal on all ranks.

    Attributes:
        rows: float32 [Q, dim]; moved with the module, never cast, not part of `state_dict` (see `state`).
        counters: int64 [3] on the same device: pointer, filled, skipped_blocks.

    Source: Li et al. (DeCLIP, 2022), nearest-neighbour supervision. Deviations: a wrapping block is split instead of
    truncated, and the queue can be global.
    """

    rows: Tensor

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        warmup: Literal["skip", "random"] = "skip",
        enqueue_views: Literal["both", "orig"] = "both",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if size < 1 or dim < 1:
            raise ValueError(f"NearestNeighborQueue got size {size} and dim {dim}, expected both at least 1")
        if warmup not in ("skip", "random"):
            raise ValueError(f"NearestNeighborQueue got warmup {warmup!r}, expected 'skip' or 'random'")
        if enqueue_views not in ("both", "orig"):
            raise ValueError(f"NearestNeighborQueue got enqueue_views {enqueue_views!r}, expected 'both' or 'orig'")
        self.size = size
        self.dim = dim
        self.warmup = warmup
        self.enqueue_views = enqueue_views
        self.seed = seed
        # At least `filled`, whose exact value only the device knows.
        self._offered = 0
        self.register_buffer("rows", self._initial_rows(), persistent=False)
        self.register_buffer("counters", torch.from_numpy(np.zeros(3, dtype=np.int64)), persistent=False)

    @torch.no_grad()
    def restart(self, seed: int) -> None:
        """Empties the queue; with warmup="random" its rows are those of `seed` from now on."""
        self.seed = seed
        self.rows.copy_(self._initial_rows())
        self.counters.zero_()
        self._offered = 0

    def _initial_rows(self) -> Tensor:
        # Engines that partition parameters patch torch's constructors to make half-precision tensors; numpy is safe.
        if self.warmup == "skip":
            return torch.from_numpy(np.zeros((self.size, self.dim), dtype=np.float32))
        rows = np.random.default_rng(self.seed).standard_normal((self.size, self.dim), dtype=np.float32)
        return torch.from_numpy(rows / np.linalg.norm(rows, axis=1, keepdims=True))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        rows = self.rows
        super()._apply(fn, recurse)
        if self.rows.dtype != torch.float32:
            self.rows = rows.to(self.rows.device)
        return self

    @property
    def pointer(self) -> int:
        """Slot that the next row goes to."""
        return int(self.counters[_POINTER])

    @property
    def filled(self) -> int:
        """Slots that hold enqueued rows; always the lowest ones."""
        return int(self.counters[_FILLED])

    @property
    def skipped_blocks(self) -> int:
        """Blocks refused by `enqueue`."""
        return int(self.counters[_SKIPPED])

    @property
    def ready(self) -> bool:
        """Whether there may be anything to find; equal on all ranks, and known without waiting for the device."""
        return self.warmup == "random" or self._offered > 0

    @torch.no_grad()
    def search(self, text_features: Tensor) -> tuple[Tensor, Tensor]:
        """Finds each feature's most similar row; equal similarities go to the lowest slot.

        Args:
            text_features: [K, b, dim], unit length.

        Returns:
            slots, int64 [K, b], and their cosine similarities, float32 [K, b]. If all blocks so far were refused: slot
            0, whose row is zero, and -inf.

        Raises:
            ValueError: The queue is still empty; ask `ready` first.
        """
        if not self.ready:
            raise ValueError("search in an empty queue; skip the neighbour term until `ready`, or use warmup='random'")
        queries = text_features.detach().flatten(0, -2).float()
        best = queries.new_full((queries.shape[0],), -torch.inf)
        slots = torch.zeros_like(best, dtype=torch.int64)
        chunk = max(1, _SEARCH_CHUNK_BYTES // (4 * max(1, queries.shape[0])))
        searchable = self.size if self.warmup == "random" else self._offered
        with exact_products(queries.device):
            for start in range(0, searchable, chunk):
                rows = self.rows[start : min(start + chunk, searchable)]
                cosine, slot = torch.addmm(self._unfilled(start, len(rows)), queries, rows.t()).max(dim=1)
                # Strictly greater: an equal row in a later chunk has a higher slot.
                better = cosine > best
                best = torch.where(better, cosine, best)
                slots = torch.where(better, slot + start, slots)
        return slots.view(text_features.shape[:-1]), best.view(text_features.shape[:-1])

    @torch.no_grad()
    def identities(self, slots: Tensor) -> Tensor:
        """Numbers for slots of a local queue that are equal on two ranks exactly when the rows are the same one.

        Rows that were enqueued belong to this rank alone; random rows that wait to be overwritten are those of all.
        """
        enqueued = slots < self.counters[_FILLED]
        return slots + self.size * enqueued * (1 + rank())

    def _unfilled(self, start: int, count: int) -> Tensor:
        """What to add to the similarities with `count` slots from `start`: -inf where nothing has been stored."""
        offsets = self.rows.new_zeros(count)
        if self.warmup == "random":
            return offsets
        slots = torch.arange(start, start + count, device=self.rows.device)
        return offsets.masked_fill_(slots >= self.counters[_FILLED], -torch.inf)

    @torch.no_grad()
    def enqueue(self, text_features: Tensor) -> Tensor:
        """Overwrites the oldest rows with a step's text features.

        Args:
            text_features: [K, B, dim], unit length: `ContrastiveTerms.gathered_text`, or local rows in local use.

        Returns:
            Whether the block was stored, one boolean on the device; if it held a value that is not finite, it is
            counted and the queue is unchanged. Ranks holding the same block decide the same.
        """
        if text_features.dim() != 3 or text_features.shape[2] != self.dim:
            raise ValueError(f"enqueue got {tuple(text_features.shape)}, expected [K, B, {self.dim}]")
        views = text_features.detach()[: 1 if self.enqueue_views == "orig" else None]
        # One bad value would win or poison searches until it is overwritten; a sum carries it without a copy.
        stored = views.sum(dtype=torch.float32).isfinite()
        self.counters[_SKIPPED].add_(~stored)
        for view in views.unbind()[::-1]:
            self._write(view.to(self.rows), stored)
        return stored

    def _write(self, block: Tensor, stored: Tensor) -> None:
        count = block.shape[0]
        dropped = max(0, count - self.size)
        slots = torch.arange(dropped, count, device=self.rows.device).add_(self.counters[_POINTER]) % self.size
        self.rows.index_copy_(0, slots, torch.where(stored, block[dropped:], self.rows[slots]))
        advance = stored * count
        self.counters[_POINTER].add_(advance).remainder_(self.size)
        self.counters[_FILLED].add_(advance).clamp_(max=self.size)
        self._offered = min(self.size, self._offered + count)

    def content_hash(self) -> str:
        """Hex digest of everything that searches depend on; equal on all ranks for a global queue."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(np.array([self.size, self.dim, self.pointer, self.filled], dtype="<i8").tobytes())
        digest.update(self.rows.cpu().numpy().data)
        return digest.hexdigest()

    def replicas_agree(self) -> bool:
        """Whether all ranks hold the same queue; a collective, with the same answer on every rank."""
        return agree(bytes.fromhex(self.content_hash()), self.rows.device)

    def rows_by_age(self) -> Tensor:
        """The enqueued rows [filled, dim], oldest first."""
        return _by_age({"rows": self.rows, "pointer": self.pointer, "filled": self.filled})

    def state(self) -> dict[str, Any]:
        """A copy of the queue on the CPU as plain tensors and numbers, for `load_state`."""
        return {
            "rows": self.rows.detach().to("cpu", copy=True),
            "pointer": self.pointer,
            "filled": self.filled,
            "offered": self._offered,
            "skipped_blocks": self.skipped_blocks,
        }

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        """Restores a saved queue: bit for bit at the same size, else its newest rows in order of age.

        Raises:
            ValueError: The saved rows have another width.
        """
        saved = state["rows"]
        if saved.dim() != 2 or saved.shape[1] != self.dim:
            raise ValueError(
                f"the saved neighbour queue has rows {tuple(saved.shape)}, this model needs width {self.dim}; "
                "resume with the saved embed_dim, or start with an empty queue"
            )
        if saved.shape[0] == self.size:
            self.rows.copy_(saved)
            self._set_counters(state["pointer"], state["filled"], state["skipped_blocks"])
            self._offered = state["offered"]
            return
        self.rows.copy_(self._initial_rows())
        self._set_counters(0, 0, state["skipped_blocks"])
        self._offered = 0
        newest_last = _by_age(state).to(self.rows)
        self._write(newest_last, torch.ones((), dtype=torch.bool, device=self.rows.device))

    def _set_counters(self, pointer: int, filled: int, skipped_blocks: int) -> None:
        self.counters.copy_(torch.tensor([pointer, filled, skipped_blocks]))


def _by_age(state: dict[str, Any]) -> Tensor:
    rows, filled = state["rows"], state["filled"]
    return rows[:filled].roll(-(state["pointer"] if filled == rows.shape[0] else 0), dims=0)


def reshard_queue_states(states: Sequence[dict[str, Any]], num_shards: int) -> list[dict[str, Any]]:
    """Redistributes the local queues of a run for another number of ranks, newest rows first in line.

    The rows of all shards are merged by age and dealt round-robin; each new shard keeps its newest rows, at most as
    many as an old one had. A global queue needs none of this: every rank loads the one saved copy.

    Args:
        states: `NearestNeighborQueue.state()` of every old rank, in rank order, all of one size.
        num_shards: Number of ranks of the resumed run; 1 for a global queue.

    Returns:
        One state per new rank, for `load_state`.
    """
    size = states[0]["rows"].shape[0]
    newest_first = [_by_age(state).flip(0) for state in states]
    ages = torch.cat([torch.arange(rows.shape[0]) for rows in newest_first])
    # Stable: rows of one age keep the order of their ranks.
    merged = torch.cat(newest_first)[ages.sort(stable=True).indices]
    skipped = max(state["skipped_blocks"] for state in states)
    shards = []
    for shard in range(num_shards):
        chosen = merged[shard::num_shards][:size].flip(0)
        # Stored rows alone: a queue that is larger keeps the start it has for the others.
        filled = chosen.shape[0]
        shards.append({"rows": chosen, "pointer": 0, "filled": filled, "offered": filled, "skipped_blocks": skipped})
    return shards


@torch.no_grad()
def neighbour_statistics(slots: Tensor, cosine: Tensor) -> dict[str, float]:
    """Health of the neighbour term: many samples sharing few neighbours bound its loss from below.

    Args:
        slots: int64 [K, B], the neighbours of the global batch (`ContrastiveTerms.gathered_slots`).
        cosine: [K, b], their similarities on this rank.

    Returns:
        "distinct_ratio", distinct neighbours of a view over B, and "mean_cosine", both averaged over views.
    """
    distinct = [view.unique().numel() / view.numel() for view in slots]
    return {"distinct_ratio": sum(distinct) / len(distinct), "mean_cosine": cosine.double().mean().item()}
