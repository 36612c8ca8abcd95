"""Near-duplicate pictures between a training set and an evaluation set, by perceptual hashes.

Purpose: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021, section 5. They
trained a detector of their own; this is the DCT hash of the imagehash library, whose Hamming distance is small for
pictures that differ by size, compression or slight colour changes, and arbitrary for crops and rotations.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.delivery import Patience
from data.image_folder import ImageFolder
from data.images.decode import DEFAULT_MAX_PIXELS, open_image
from data.loader import build_eval_loader
from data.shards.index_store import IndexedSource, IndexStore

HASH_BITS = 64
DEFAULT_DISTANCE = 4
_SIDE = 32
# Candidates compared at a time: bounds the memory of one round.
_CHUNK = 1 << 22


@dataclass(frozen=True)
class PerceptualHash:
    """Transform for `build_eval_loader`: image bytes to the 64-bit hash, as int64 [1]."""

    max_image_pixels: int = DEFAULT_MAX_PIXELS

    def __call__(self, image_bytes: bytes) -> np.ndarray:
        """Returns the hash.

        Raises:
            BadSample: A picture that cannot be decoded.
        """
        import imagehash

        image = open_image(image_bytes, self.max_image_pixels)
        bits = imagehash.phash(image.decode(shrink=min(image.size) / (2 * _SIDE))).hash
        return np.packbits(bits.reshape(-1)).view(np.int64)


def hash_pictures(
    samples: Sequence[IndexedSource] | ImageFolder,
    store: IndexStore,
    *,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    max_samples: int | None = None,
    max_image_pixels: int = DEFAULT_MAX_PIXELS,
    patience: Patience | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Hashes this rank's share of a set.

    Returns:
        (indices int64 [n], hashes uint64 [n]) of the pictures that can be read.

    Raises:
        DataError: A shard that cannot be read at all.
    """
    loader = build_eval_loader(
        samples,
        PerceptualHash(max_image_pixels),
        store=store,
        rank=rank,
        world_size=world_size,
        batch_size=512,
        workers=workers,
        max_samples=max_samples,
        pin_memory=False,
        patience=patience,
    )
    indices, hashes = [np.empty(0, np.int64)], [np.empty(0, np.uint64)]
    for batch in loader:
        indices.append(batch["sample_index"].numpy())
        hashes.append(batch["images"].numpy().reshape(-1).view(np.uint64))
    return np.concatenate(indices), np.concatenate(hashes)


def nearest_within(queries: np.ndarray, others: np.ndarray, distance: int = DEFAULT_DISTANCE) -> np.ndarray:
    """For each query the position of a closest other hash, if one is near enough.

    Exact without comparing all pairs: hashes that differ in at most `distance` bits agree in one of distance + 1 bands.

    Args:
        queries: uint64 [n].
        others: uint64 [m].
        distance: Largest Hamming distance that counts, 0 to 15.

    Returns:
        int64 [n], -1 where none is near.

    Raises:
        ValueError: distance out of range.
    """
    if not 0 <= distance <= 15:
        raise ValueError(f"distance {distance} is not in 0 to 15; wider searches would compare nearly all pairs")
    best = np.full(len(queries), -1, dtype=np.int64)
    best_distance = np.full(len(queries), distance + 1, dtype=np.uint8)
    edges = np.linspace(0, HASH_BITS, distance + 2).astype(int)
    for low, high in itertools.pairwise(edges):
        mask = np.uint64(((1 << int(high - low)) - 1) << int(low))
        order = np.argsort(others & mask, kind="stable")
        keys = (others & mask)[order]
        begins = np.searchsorted(keys, queries & mask, side="left")
        counts = np.searchsorted(keys, queries & mask, side="right") - begins
        for rows in _chunks(counts):
            query = np.repeat(np.arange(rows.start, rows.stop), counts[rows])
            within = np.arange(len(query)) - np.repeat(np.cumsum(counts[rows]) - counts[rows], counts[rows])
            candidate = order[np.repeat(begins[rows], counts[rows]) + within]
            far = np.bitwise_count(queries[query] ^ others[candidate])
            # Sorted so that the first of each query is its closest, and of equals the lowest position.
            first = np.lexsort((candidate, far, query))
            query, candidate, far = query[first], candidate[first], far[first]
            query, at = np.unique(query, return_index=True)
            better = far[at] < best_distance[query]
            best[query[better]] = candidate[at][better]
            best_distance[query[better]] = far[at][better]
    return best


def _chunks(counts: np.ndarray) -> list[slice]:
    """Runs of queries with a bounded number of candidates together."""
    parts = np.cumsum(counts) // _CHUNK
    edges = [0, *(np.flatnonzero(np.diff(parts)) + 1).tolist(), len(counts)]
    return [slice(begin, end) for begin, end in itertools.pairwise(edges) if end > begin]
