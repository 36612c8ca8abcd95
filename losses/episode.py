"""An episode: a stretch of the training data whose features are clustered before it is trained on.

Everything is keyed by position, the place of a sample in the order of the data: a sample that occurs twice is two
points, and which rank computed a row makes no difference.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from losses.clustering import ClusterSums, kmeans, nearest
from losses.distributed import all_reduce_sum_
from losses.row_store import RowStore

IMAGE, TEXT, EXTERNAL = range(3)
# (modality whose features are averaged, modality whose clusters they are averaged over) of each table.
TABLES = ((IMAGE, TEXT), (TEXT, IMAGE), (IMAGE, EXTERNAL), (TEXT, EXTERNAL))
# Rows that are on the device at a time.
_CHUNK_ROWS = 1 << 16


@dataclass(frozen=True)
class Clusters:
    """The clusters of an episode; the same bits on every rank.

    Attributes:
        first: Position at which the episode begins.
        labels: int32 [modalities, n], cluster of each sample in the image, text and, if there is one, external
            features; -1 throughout for a sample whose features were not finite.
        counts: int64 [modalities, K], members of each cluster.
        centroids: float32 [2, K, p], of image and text; as K-Means leaves them, not of unit length.
        tables: float32 [2 or 4, K, p], prototypical back-translation: the means of one modality's features over the
            clusters of another (`TABLES`); zero for clusters without members.
        inertia: float64 [modalities], mean squared distance to the centroid.
    """

    first: int
    labels: Tensor
    counts: Tensor
    centroids: Tensor
    tables: Tensor
    inertia: Tensor

    def of(self, positions: Tensor) -> Tensor:
        """Labels int32 [modalities, b] of int64 positions [b] within the episode."""
        return self.labels[:, positions - self.first]

    @property
    def left_out(self) -> int:
        """Samples without a cluster; waits for the device."""
        return int((self.labels[IMAGE] < 0).sum())

    def state(self) -> dict[str, Any]:
        """Plain numbers and tensors on the CPU."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value.cpu() if torch.is_tensor(value) else value for name, value in values.items()}

    @classmethod
    def from_state(cls, state: dict[str, Any], device: torch.device) -> Self:
        """What `state` returned, on a device."""
        return cls(**{name: value.to(device) if torch.is_tensor(value) else value for name, value in state.items()})

    def content_hash(self) -> str:
        """Hex digest of everything."""
        digest = hashlib.blake2b(str(self.first).encode(), digest_size=16)
        for value in self.state().values():
            if torch.is_tensor(value):
                digest.update(value.contiguous().numpy().data)
        return digest.hexdigest()


class EpisodeFeatures:
    """This rank's features of an episode while they are gathered.

    Args:
        capacity: Rows of this rank.
        dims: Width of each modality's rows: image, text and perhaps external.
        memory_bytes: What all of them may take in memory; see `RowStore`.
    """

    def __init__(self, capacity: int, dims: Sequence[int], memory_bytes: int) -> None:
        self.stores = [RowStore(capacity, dim, memory_bytes * dim // sum(dims)) for dim in dims]
        self.usable = torch.zeros(capacity, dtype=torch.bool)
        self.positions = torch.zeros(capacity, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.stores[IMAGE])

    def append(self, rows: Sequence[Tensor], positions: Tensor) -> None:
        """Add the rows [m, dim] of each modality and their positions int64 [m]."""
        part = slice(len(self), len(self) + len(positions))
        self.positions[part] = positions.cpu()
        finite = torch.stack([entry.isfinite().all(dim=1).cpu() for entry in rows])
        self.usable[part] = finite.all(dim=0)
        for store, entry in zip(self.stores, rows, strict=True):
            store.append(entry)


@torch.no_grad()
def cluster_episode(
    features: EpisodeFeatures,
    first: int,
    size: int,
    clusters: int,
    *,
    iterations: int,
    restarts: int,
    sample: int,
    seed: int,
    back_translation: bool,
    device: torch.device,
) -> Clusters:
    """Cluster each modality of an episode and translate the clusters back. Collective.

    Args:
        features: This rank's rows; all ranks together have each position of the episode once.
        first: Position at which the episode begins.
        size: Samples n of the episode.
        clusters: K.
        iterations: Of K-Means.
        restarts: See `kmeans`.
        sample: Rows of the episode to fit the centroids on, at most; all are assigned to them.
        seed: Equal on all ranks; decides the sample and the initial rows.
        back_translation: Whether to make tables.
        device: Where to compute.

    Returns:
        The clusters; without any, and all labels -1, if fewer than K samples have finite features.
    """
    local = features.positions - first
    members = torch.zeros(size, dtype=torch.int32)
    members[local[features.usable]] = 1
    usable = all_reduce_sum_(members.to(device)).cpu().nonzero().squeeze(1)
    tables = TABLES[: 2 * (len(features.stores) - 1)] if back_translation else ()
    if len(usable) < clusters:
        return _no_clusters(features, first, size, clusters, len(tables), device)
    chosen = _draw(usable, sample, seed)
    place = torch.full((size,), -1, dtype=torch.int64)
    place[chosen] = torch.arange(len(chosen))
    fitted = (place[local] >= 0).nonzero().squeeze(1)
    centroids = [
        kmeans(
            store.select(fitted).to(device),
            place[local[fitted]],
            len(chosen),
            clusters,
            iterations=iterations,
            restarts=restarts,
            seed=seed + modality * restarts,
        ).centroids
        for modality, store in enumerate(features.stores)
    ]
    labels, counts, means, inertia = _assign(features, centroids, tables, local, size, device)
    centroids = torch.stack(centroids[:EXTERNAL])
    return Clusters(first, labels, counts, centroids, _stacked(means, centroids), inertia / len(usable))


def _draw(positions: Tensor, count: int, seed: int) -> Tensor:
    """`count` of the positions, ascending, as a function of the seed."""
    if len(positions) <= count:
        return positions
    # Raw draws: numpy keeps them the same in all its versions.
    draws = np.random.Philox(key=seed).random_raw(len(positions))
    return positions[torch.from_numpy(np.sort(np.argsort(draws, kind="stable")[:count]))]


def _assign(
    features: EpisodeFeatures,
    centroids: list[Tensor],
    tables: Sequence[tuple[int, int]],
    local: Tensor,
    size: int,
    device: torch.device,
) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """One pass over this rank's rows: labels of all ranks [modalities, n], counts, tables, summed distances."""
    clusters = len(centroids[IMAGE])
    # Shifted by one, as each position is labelled by one rank and zero on the others; 0 stays for no cluster.
    labels = torch.zeros(len(centroids), size, dtype=torch.int32)
    sums = [ClusterSums(clusters, centroids[source].shape[1], device) for source, _ in tables]
    inertia = torch.zeros(len(centroids), dtype=torch.float64, device=device)
    for start in range(0, len(features), _CHUNK_ROWS):
        part = slice(start, start + _CHUNK_ROWS)
        usable = features.usable[: len(features)][part]
        rows = [store.rows(part.start, part.stop)[usable].to(device) for store in features.stores]
        found = []
        for modality, entry in enumerate(rows):
            label, distance = nearest(entry, centroids[modality])
            inertia[modality] += distance.double().sum()
            labels[modality, local[part][usable]] = label.cpu().int() + 1
            found.append(label)
        for (source, target), total in zip(tables, sums, strict=True):
            total.add(rows[source], found[target], rows[source].new_empty(0))
    labels = all_reduce_sum_(labels.to(device)) - 1
    counts = torch.stack([(entry.long() + 1).bincount(minlength=clusters + 1)[1:] for entry in labels])
    return labels, counts, [total.means()[0] for total in sums], all_reduce_sum_(inertia)


def _stacked(means: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(means) if means else like.new_zeros(0, *like.shape[1:])


def _no_clusters(
    features: EpisodeFeatures, first: int, size: int, clusters: int, num_tables: int, device: torch.device
) -> Clusters:
    modalities, dim = len(features.stores), features.stores[IMAGE].dim
    return Clusters(
        first,
        torch.full((modalities, size), -1, dtype=torch.int32, device=device),
        torch.zeros(modalities, clusters, dtype=torch.int64, device=device),
        torch.zeros(2, clusters, dim, device=device),
        torch.zeros(num_tables, clusters, dim, device=device),
        torch.zeros(modalities, dtype=torch.float64, device=device),
    )
