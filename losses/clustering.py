"""K-Means over feature rows that stay on the ranks that computed them.

The iteration is faiss's (`faiss.contrib.clustering.kmeans`: initial rows, updates, splits of empty clusters), run in
lockstep on every rank with the same seed. What it asks of the data is answered by all ranks together: each searches
its own rows, and one all-reduce adds up the sums of the clusters. Sums are integers (fixed point), which add up to the
same bits in any order, so the centroids are equal on all ranks and do not depend on how rows are spread over them.
"""

import contextlib
import functools
import io
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from losses.distributed import all_reduce_sum_
from losses.functional import exact_products

# 28 bits behind the point: rows of unit length lose less than float32 rounding, and 2^31 rows of entries up to
# MAX_ENTRY fit into 63 bits.
_FIXED_POINT = float(1 << 28)
MAX_ENTRY = 16.0
# Of squared distances, which are larger.
_FIXED_POINT_DISTANCE = float(1 << 20)
_SUM_CHUNK_ROWS = 1 << 16
# Distances of one chunk of rows to all centroids, in bytes.
_SEARCH_CHUNK_BYTES = 256 * 2**20


class KMeans(NamedTuple):
    """Result of `kmeans`.

    Attributes:
        centroids: float32 [K, p], the same bits on every rank.
        objectives: Sum of squared distances over the rows of all ranks at the start of each iteration.
    """

    centroids: Tensor
    objectives: list[float]


class ClusterSums:
    """Sums of rows by label, over the rows of all ranks, exact in any order.

    Args:
        clusters: K.
        dim: Width of a row.
        device: Where the rows will be.
    """

    def __init__(self, clusters: int, dim: int, device: torch.device) -> None:
        # One tensor, so that one all-reduce takes it all: sums, a column of counts, and a row that begins with the
        # squared distances.
        self._table = torch.zeros(clusters + 1, dim + 1, dtype=torch.int64, device=device)

    def add(self, rows: Tensor, labels: Tensor, distances: Tensor) -> None:
        """Add this rank's rows.

        Args:
            rows: [m, dim], entries up to `MAX_ENTRY` in size.
            labels: int64 [m], in [0, K).
            distances: [m], squared distance of each to its centroid.
        """
        for part, own in zip(rows.split(_SUM_CHUNK_ROWS), labels.split(_SUM_CHUNK_ROWS), strict=True):
            fixed = part.double().mul_(_FIXED_POINT).round_().long()
            self._table.index_add_(0, own, torch.cat([fixed, torch.ones_like(own).unsqueeze(1)], dim=1))
        self._table[-1, 0] += distances.double().mul(_FIXED_POINT_DISTANCE).round_().long().sum()

    def total(self) -> tuple[Tensor, Tensor, Tensor]:
        """Sums float64 [K, dim], counts int64 [K] and summed squared distance float64 [] of all ranks. Collective."""
        table = all_reduce_sum_(self._table)
        return table[:-1, :-1].double() / _FIXED_POINT, table[:-1, -1], table[-1, 0].double() / _FIXED_POINT_DISTANCE

    def means(self) -> tuple[Tensor, Tensor, Tensor]:
        """As `total`, with means float32 [K, dim], zero for a label without rows, instead of sums. Collective."""
        sums, counts, distance = self.total()
        return (sums / counts.clamp(min=1).unsqueeze(1)).float(), counts, distance


def nearest(rows: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's nearest centroid (Euclidean).

    Args:
        rows: float32 [m, p].
        centroids: float32 [K, p].

    Returns:
        Labels int64 [m] and squared distances float32 [m].
    """
    search = _faiss_search(rows.device) or _search
    chunk = max(1, _SEARCH_CHUNK_BYTES // (4 * len(centroids)))
    found = [search(part, centroids) for part in rows.split(chunk)] if len(rows) else []
    labels = [part for part, _ in found] or [torch.empty(0, dtype=torch.int64, device=rows.device)]
    distances = [part for _, part in found] or [rows.new_empty(0)]
    return torch.cat(labels), torch.cat(distances)


def _search(rows: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    half_norms = centroids.square().sum(1) / 2
    with exact_products(rows.device):
        score, label = torch.addmm(half_norms, rows, centroids.t(), alpha=-1).min(dim=1)
    return label, (rows.square().sum(1) + 2 * score).clamp(min=0)


@functools.cache
def _gpu_resources() -> Any:
    """faiss's scratch memory and handles on a GPU, which cost time and memory and are made once."""
    import faiss

    # Teaches faiss to take tensors.
    import faiss.contrib.torch_utils

    resources = faiss.StandardGpuResources()
    resources.setDefaultNullStreamAllDevices()
    return resources


def _faiss_search(device: torch.device) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """faiss's own search where it has one for the device, which never holds a whole chunk of distances."""
    import faiss

    if device.type == "cpu":

        def search_on_cpu(rows: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
            distances, labels = faiss.knn(rows.numpy(), centroids.numpy(), 1)
            return torch.from_numpy(labels[:, 0]), torch.from_numpy(distances[:, 0])

        return search_on_cpu
    if not hasattr(faiss, "StandardGpuResources"):
        return None
    resources = _gpu_resources()

    def search_on_gpu(rows: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
        distances, labels = faiss.knn_gpu(resources, rows, centroids, 1, device=device.index or 0)
        return labels[:, 0], distances[:, 0]

    return search_on_gpu


class _SpreadRows:
    """The rows of all ranks, with the interface that faiss's `kmeans` asks for. Every method but `dim` is collective.

    Args:
        rows: float32 [m, p], this rank's.
        index: int64 [m], their places among the rows of all ranks.
        count: Rows of all ranks.
    """

    def __init__(self, rows: Tensor, index: Tensor, count: int) -> None:
        self._rows = rows
        self._index = index
        self._count = count

    def count(self) -> int:
        return self._count

    def dim(self) -> int:
        return self._rows.shape[1]

    def get_subset(self, indices: np.ndarray) -> Tensor:
        places = torch.full((self._count,), -1, dtype=torch.int64)
        places[torch.from_numpy(indices)] = torch.arange(len(indices))
        chosen = places[self._index.cpu()].to(self._rows.device)
        owned = chosen >= 0
        subset = self._rows.new_zeros(len(indices), self.dim())
        # Each row comes from one rank and meets zeros from the others.
        subset[chosen[owned]] = self._rows[owned]
        return all_reduce_sum_(subset)

    def assign_to(self, centroids: Tensor) -> tuple[np.ndarray, Tensor, Tensor]:
        labels, distances = nearest(self._rows, centroids)
        sums = ClusterSums(*centroids.shape, centroids.device)
        sums.add(self._rows, labels, distances)
        totals, counts, objective = sums.total()
        # Its caller only counts how often each label occurs, so their order may be any.
        labels = np.repeat(np.arange(len(centroids)), counts.cpu().numpy())
        return labels, objective, totals.float()


@torch.no_grad()
def kmeans(
    rows: Tensor, index: Tensor, count: int, clusters: int, *, iterations: int = 20, restarts: int = 1, seed: int = 0
) -> KMeans:
    """Euclidean K-Means of the rows of all ranks; the best of several starts. Collective.

    Args:
        rows: float32 [m, p], this rank's rows, finite, entries up to `MAX_ENTRY` in size.
        index: int64 [m], the place of each among the rows of all ranks, [0, count).
        count: Rows of all ranks, at least `clusters`.
        clusters: K.
        iterations: Of each start.
        restarts: Starts with seeds of their own; the lowest last objective wins.
        seed: Equal on all ranks.

    Raises:
        ValueError: Fewer rows than clusters.

    Source: Lloyd, "Least squares quantization in PCM", 1982; Johnson et al., "Billion-scale similarity search with
    GPUs" (faiss), 2017.
    """
    from faiss.contrib import clustering as faiss_clustering

    if count < clusters:
        raise ValueError(f"kmeans got {count} rows for {clusters} clusters, expected at least one row for each")
    data = _SpreadRows(rows, index, count)
    best: KMeans | None = None
    for start in range(restarts):
        # It prints a line whatever `verbose` says.
        with contextlib.redirect_stdout(io.StringIO()):
            centroids, statistics = faiss_clustering.kmeans(
                clusters, data, niter=iterations, seed=(seed + start) % 2**32, verbose=False, return_stats=True
            )
        found = KMeans(centroids.float(), [float(entry["obj"]) for entry in statistics])
        if best is None or found.objectives[-1] < best.objectives[-1]:
            best = found
    return best
