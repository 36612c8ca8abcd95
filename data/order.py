"""The order of the data as a pure function of the step.

Which samples make up global batch n depends only on the seed, the data set, the global batch size, the lane count and
the shuffle window: never on the world size, the rank, the workers or on what ran before. Resuming is therefore
evaluating the function at another step, and a resumed run may use another number of GPUs.

Per source and epoch: shards are permuted, their samples concatenated and cut into L contiguous lanes of near-equal
length. Position p of the epoch is place p // L of lane p % L, and a keyed permutation inside windows of
`shuffle_window` places turns the place into a sample. A global batch sorts its positions by lane, so that a rank's
contiguous slice of the batch stays on the same few lanes, and reads the same few shards, step after step.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from data.errors import DataError
from data.rng import combine64, keyed_hash, keyed_permutation, shuffled_index

MAX_AUTO_LANES = 1024
DEFAULT_SHUFFLE_WINDOW = 4096
_EPOCHS_KEPT = 4


@dataclass(frozen=True)
class OrderSource:
    """What the order needs to know of one data source.

    Args:
        name: Unique name, part of every random key of the source.
        shard_counts: int64 array, samples in each shard, in listed order.
        weight: Share of the source in every global batch, relative to the other sources; > 0.
    """

    name: str
    shard_counts: np.ndarray
    weight: float | int | str | Fraction = 1


@dataclass(frozen=True)
class BatchPlan:
    """Samples of (a slice of) one global batch; row i stands in slot[i].

    Args:
        source: int64 [n], position of the source in `GlobalOrder.sources`.
        epoch: int64 [n], epoch of that source.
        sample: int64 [n], index into the source's shards concatenated in listed order.
        slot: int64 [n], place in the global batch.
    """

    source: np.ndarray
    epoch: np.ndarray
    sample: np.ndarray
    slot: np.ndarray

    def __len__(self) -> int:
        return len(self.slot)


def auto_lanes(global_batch_size: int, num_shards: int) -> int:
    """Returns the largest divisor of the global batch size not above min(1024, number of shards).

    Args:
        global_batch_size: Samples per optimizer step over all ranks.
        num_shards: Shards of the source, > 0.
    """
    limit = min(MAX_AUTO_LANES, num_shards, global_batch_size)
    return next(lanes for lanes in range(limit, 0, -1) if global_batch_size % lanes == 0)


class _SourceOrder:
    """Maps running positions of one source to (epoch, sample)."""

    def __init__(self, source: OrderSource, *, seed: int, lanes: int, shuffle_window: int) -> None:
        counts = np.asarray(source.shard_counts, dtype=np.int64)
        self.name = source.name
        self.num_samples = int(counts.sum())
        if self.num_samples == 0 or (counts < 0).any():
            raise DataError(f"source {source.name!r} holds no samples; check its shards with python -m data.index")
        self.lanes = lanes
        self._seed = seed
        self._window = shuffle_window
        self._counts = counts
        self._starts = np.concatenate(([0], np.cumsum(counts)[:-1]))
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def _shards_of_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the shard permutation of an epoch and the running end of each permuted shard."""
        if epoch not in self._epochs:
            while len(self._epochs) >= _EPOCHS_KEPT:
                self._epochs.pop(next(iter(self._epochs)))
            permutation = keyed_permutation(len(self._counts), "shards", self._seed, self.name, epoch)
            self._epochs[epoch] = permutation, np.cumsum(self._counts[permutation])
        return self._epochs[epoch]

    def _samples_of_epoch(self, epoch: int, position: np.ndarray) -> np.ndarray:
        lane, place = position % self.lanes, position // self.lanes
        short, longer = divmod(self.num_samples, self.lanes)
        lane_start = lane * short + np.minimum(lane, longer)
        lane_length = short + (lane < longer)
        window = place // self._window
        window_start = window * self._window
        window_length = np.minimum(self._window, lane_length - window_start)
        key = combine64(keyed_hash("window", self._seed, self.name, epoch), lane, window)
        place = window_start + shuffled_index(place - window_start, window_length, key)

        permutation, ends = self._shards_of_epoch(epoch)
        concatenated = lane_start + place
        rank_of_shard = np.searchsorted(ends, concatenated, side="right")
        shard = permutation[rank_of_shard]
        return self._starts[shard] + concatenated - (ends[rank_of_shard] - self._counts[shard])

    def samples(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns (epoch, sample) of running positions, both int64 [n]."""
        epochs, within = np.divmod(positions, self.num_samples)
        result = np.empty_like(positions)
        for epoch in np.unique(epochs):
            rows = epochs == epoch
            result[rows] = self._samples_of_epoch(int(epoch), within[rows])
        return epochs, result


class GlobalOrder:
    """The sequence of global batches of a run; see the module docstring.

    Args:
        sources: One or more data sources. Source i contributes floor((n+1)*w_i*B) - floor(n*w_i*B) samples to global
            batch n, in exact rational arithmetic over the normalised weights; the heaviest source takes the rest.
        seed: Any integer.
        global_batch_size: Samples per optimizer step over all ranks, B.
        lanes: Divisor of B, or "auto": for each source the largest divisor of B not above min(1024, its shards).
        shuffle_window: Samples of one lane that are shuffled together, >= 1. There is no buffer behind it, so it may
            be as large as the data set (then reads are random over the lane).

    Raises:
        DataError: For values that cannot work; the message names the value and the fix.
    """

    def __init__(
        self,
        sources: Sequence[OrderSource],
        *,
        seed: int,
        global_batch_size: int,
        lanes: int | str = "auto",
        shuffle_window: int = DEFAULT_SHUFFLE_WINDOW,
    ) -> None:
        _check_settings(sources, global_batch_size, lanes, shuffle_window)
        self.sources = tuple(source.name for source in sources)
        self.seed = seed
        self.global_batch_size = global_batch_size
        self.shuffle_window = shuffle_window
        self._orders = [
            _SourceOrder(
                source,
                seed=seed,
                lanes=auto_lanes(global_batch_size, len(source.shard_counts)) if lanes == "auto" else int(lanes),
                shuffle_window=shuffle_window,
            )
            for source in sources
        ]
        weights = [_exact_weight(source) for source in sources]
        self.weights = tuple(weight / sum(weights) for weight in weights)
        self._heaviest = self.weights.index(max(self.weights))
        if self.weights[self._heaviest] * global_batch_size < len(sources) - 1:
            raise DataError(
                f"{len(sources)} sources do not fit a global batch of {global_batch_size}: its share for the heaviest "
                f"source must be at least {len(sources) - 1}; raise train.global_batch_size or merge sources"
            )
        self._plan: tuple[int, np.ndarray, np.ndarray] | None = None

    @property
    def num_samples(self) -> tuple[int, ...]:
        """Samples in one epoch of each source."""
        return tuple(order.num_samples for order in self._orders)

    @property
    def lanes(self) -> tuple[int, ...]:
        """Lane count of each source."""
        return tuple(order.lanes for order in self._orders)

    @property
    def fingerprint(self) -> str:
        """Hex digest of everything the order depends on: equal digests mean equal batches at every step."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(repr((self.seed, self.global_batch_size, self.shuffle_window)).encode())
        for order, weight in zip(self._orders, self.weights, strict=True):
            digest.update(repr((order.name, str(weight), order.lanes)).encode())
            digest.update(order._counts.astype("<i8").tobytes())
        return digest.hexdigest()

    def _seen(self, step: int) -> list[int]:
        total = step * self.global_batch_size
        seen = [(weight.numerator * total) // weight.denominator for weight in self.weights]
        seen[self._heaviest] = total - (sum(seen) - seen[self._heaviest])
        return seen

    def samples_seen(self, step: int) -> dict[str, int]:
        """Returns how many samples of each source the first `step` global batches hold.

        Args:
            step: Number of finished steps, >= 0.
        """
        return dict(zip(self.sources, self._seen(step), strict=True))

    def epochs_seen(self, step: int) -> dict[str, float]:
        """Returns how many epochs of each source the first `step` global batches are.

        Args:
            step: Number of finished steps, >= 0.
        """
        seen = self._seen(step)
        return {order.name: count / order.num_samples for order, count in zip(self._orders, seen, strict=True)}

    def _positions(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns source and running position of every slot of a global batch."""
        if self._plan is None or self._plan[0] != step:
            first, last = self._seen(step), self._seen(step + 1)
            positions = []
            for order, start, stop in zip(self._orders, first, last, strict=True):
                running = np.arange(start, stop, dtype=np.int64)
                positions.append(running[np.argsort(running % order.lanes, kind="stable")])
            counts = [len(running) for running in positions]
            source = np.repeat(np.arange(len(counts)), counts)
            # Equal rationals divide to equal floats, so the comparison below is exact.
            fraction = np.concatenate([(np.arange(count) + 0.5) / max(count, 1) for count in counts])
            by_slot = np.lexsort((source, fraction))
            self._plan = step, source[by_slot], np.concatenate(positions)[by_slot]
        return self._plan[1], self._plan[2]

    def slots(self, step: int, start: int, stop: int) -> BatchPlan:
        """Returns the samples in slots [start, stop) of a global batch.

        Args:
            step: Global batch, counted from 0.
            start: First slot, >= 0.
            stop: End of the slots, <= global batch size.
        """
        if step < 0 or not 0 <= start <= stop <= self.global_batch_size:
            raise ValueError(f"no slots [{start}, {stop}) in step {step} of a batch of {self.global_batch_size}")
        all_sources, all_positions = self._positions(step)
        source, position = all_sources[start:stop], all_positions[start:stop]
        epoch, sample = np.empty_like(position), np.empty_like(position)
        for number, order in enumerate(self._orders):
            rows = source == number
            epoch[rows], sample[rows] = order.samples(position[rows])
        return BatchPlan(source=source, epoch=epoch, sample=sample, slot=np.arange(start, stop, dtype=np.int64))

    def batch(self, step: int) -> BatchPlan:
        """Returns the whole global batch of a step.

        Args:
            step: Global batch, counted from 0.
        """
        return self.slots(step, 0, self.global_batch_size)

    def rank_slice(self, step: int, rank: int, world_size: int) -> BatchPlan:
        """Returns the contiguous slice of a global batch that a rank trains on.

        Args:
            step: Global batch, counted from 0.
            rank: 0 <= rank < world_size.
            world_size: Must divide the global batch size.

        Raises:
            DataError: If the ranks do not divide the global batch.
        """
        if self.global_batch_size % world_size:
            raise DataError(f"global batch {self.global_batch_size} is not a multiple of the {world_size} ranks")
        share = self.global_batch_size // world_size
        return self.slots(step, rank * share, (rank + 1) * share)


def _exact_weight(source: OrderSource) -> Fraction:
    # str() first: the user who writes 0.1 means one tenth, not the binary float beside it.
    try:
        weight = Fraction(str(source.weight))
    except ValueError:
        weight = Fraction(0)
    if weight <= 0:
        raise DataError(f"weight {source.weight!r} of source {source.name!r} must be a number above 0")
    return weight


def _check_settings(
    sources: Sequence[OrderSource], global_batch_size: int, lanes: int | str, shuffle_window: int
) -> None:
    if not sources:
        raise DataError("no data sources given; set data.train to a path, a brace range, a list or a weighted mapping")
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise DataError(f"source names must differ, got {names}")
    if global_batch_size < 1:
        raise DataError(f"train.global_batch_size is {global_batch_size}; it must be at least 1")
    if shuffle_window < 1:
        raise DataError(f"data.shuffle_window is {shuffle_window}; it must be at least 1 (1 = no shuffling in a lane)")
    if lanes != "auto" and (isinstance(lanes, str) or lanes < 1 or global_batch_size % lanes):
        raise DataError(f"data.lanes is {lanes!r}; it must be 'auto' or a divisor of the batch {global_batch_size}")
