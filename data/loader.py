"""Loaders: endless micro-batches for training from any step, and one pass over a rank's share for evaluation."""

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from data.dataset import EvalDataset, FolderDataset, TrainDataset, TrainTransform
from data.delivery import Patience, Pipeline
from data.errors import DataError
from data.image_folder import ImageFolder
from data.order import DEFAULT_SHUFFLE_WINDOW, GlobalOrder, OrderSource
from data.prefetch import ShardPrefetcher
from data.shards.index_store import IndexedSource, IndexStore, fingerprint
from data.shards.reader import ReadLimits
from data.shards.sources import is_remote

# What a loop over an evaluation set holds: the batch it works on, while the next one comes.
_HELD_IN_LOOP = 2


class _StepsFrom:
    """Endless items (step, micro_index) from a start step."""

    def __init__(self, start_step: int, micro_batches_per_step: int) -> None:
        self._start_step = start_step
        self._micro_batches_per_step = micro_batches_per_step

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for step in itertools.count(self._start_step):
            for micro_index in range(self._micro_batches_per_step):
                yield step, micro_index


class TrainLoader:
    """Endless iterator over the micro-batches of this rank, in order, from a start step; see `build_train_loader`.

    It can be iterated once and knows no position: to resume, build one with another start step.
    """

    def __init__(
        self,
        dataset: TrainDataset,
        order: GlobalOrder,
        sources: Sequence[IndexedSource],
        pipeline: Pipeline,
        prefetcher: ShardPrefetcher | None,
        start_step: int,
    ) -> None:
        self.micro_batches_per_step = dataset.micro_batches_per_step
        self.order = order
        self.sources = tuple(sources)
        self._pipeline = pipeline
        self._prefetcher = prefetcher
        self._start_step = start_step
        self._taken = 0

    @property
    def fingerprint(self) -> str:
        """Hex digest of the data set: shard names, sizes and sample counts."""
        return fingerprint(self.sources)

    @property
    def order_fingerprint(self) -> str:
        """Hex digest of everything the order depends on; see `GlobalOrder.fingerprint`."""
        return self.order.fingerprint

    @property
    def num_excluded(self) -> int:
        """Stored samples that lack an image or a caption and are not part of the data set."""
        return sum(source.num_excluded for source in self.sources)

    def samples_seen(self, step: int) -> dict[str, int]:
        """Returns how many samples of each source the first `step` steps hold."""
        return self.order.samples_seen(step)

    def epochs_seen(self, step: int) -> dict[str, float]:
        """Returns how many epochs of each source the first `step` steps are."""
        return self.order.epochs_seen(step)

    def __iter__(self) -> "TrainLoader":
        return self

    def __next__(self) -> dict[str, Any]:
        if self._prefetcher is not None and self._taken % self.micro_batches_per_step == 0:
            self._prefetcher.advance(self._start_step + self._taken // self.micro_batches_per_step)
        batch = next(self._pipeline)
        self._taken += 1
        return batch

    def close(self) -> None:
        """Ends workers and downloads; the loader is exhausted afterwards."""
        self._pipeline.close()
        if self._prefetcher is not None:
            self._prefetcher.close()


def build_train_loader(
    sources: Sequence[IndexedSource],
    sample_transform: TrainTransform,
    *,
    seed: int,
    global_batch_size: int,
    micro_batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    start_step: int = 0,
    lanes: int | str = "auto",
    shuffle_window: int = DEFAULT_SHUFFLE_WINDOW,
    with_places: bool = False,
    workers: int = 0,
    prefetch: int = 2,
    pin_memory: bool = False,
    limits: ReadLimits | None = None,
    store: IndexStore | None = None,
    patience: Patience | None = None,
    background: bool = False,
) -> TrainLoader:
    """Builds the training loader of one rank.

    Args:
        sources: From `data.index.load_sources`.
        sample_transform: (image bytes, captions, (seed, source, epoch, sample)) -> views; see `data.sample`. It is
            pickled to the workers.
        seed: Seed of the order and of all sample randomness.
        global_batch_size: Samples per optimizer step over all ranks.
        micro_batch_size: Samples per micro-batch of one rank; a step is global / (world * micro) micro-batches.
        rank: 0 <= rank < world_size.
        world_size: Number of ranks.
        start_step: First step; the same as running up to there.
        lanes: See `GlobalOrder`.
        shuffle_window: See `GlobalOrder`.
        with_places: See `TrainDataset`.
        workers: Worker processes; 0 = load in this process.
        prefetch: Micro-batches each worker prepares ahead.
        pin_memory: Whether batches are for a GPU, to which pinned memory is copied without waiting.
        limits: Largest members that are read.
        store: Where indexes are found and remote shards fetched; default: the cache folder of the project.
        patience: How long a micro-batch is waited for.
        background: Workers take only the processor time that other processes leave.

    Returns:
        A TrainLoader.

    Raises:
        DataError: If the settings do not fit together.
    """
    store, limits = store or IndexStore.create(), limits or ReadLimits()
    order = GlobalOrder(
        [OrderSource(source.name, source.counts, source.weight) for source in sources],
        seed=seed,
        global_batch_size=global_batch_size,
        lanes=lanes,
        shuffle_window=shuffle_window,
    )
    dataset = TrainDataset(
        sources,
        order,
        sample_transform,
        micro_batch_size=micro_batch_size,
        rank=rank,
        world_size=world_size,
        store=store,
        limits=limits,
        with_places=with_places,
    )
    prefetcher = None
    if any(is_remote(shard) for source in sources for shard in source.shards):
        upcoming = _UpcomingShards(sources, copy.deepcopy(order), rank, world_size)
        prefetcher = ShardPrefetcher(store.remote, upcoming, start_step)
    pipeline = Pipeline(
        dataset,
        _StepsFrom(start_step, dataset.micro_batches_per_step),
        transform=sample_transform,
        workers=workers,
        prefetch=prefetch,
        pin_memory=pin_memory,
        # Those of a step, until those of the next one are there.
        held_by_user=2 * dataset.micro_batches_per_step,
        patience=patience or Patience(),
        background=background,
    )
    return TrainLoader(dataset, order, sources, pipeline, prefetcher, start_step)


class _UpcomingShards:
    """Step -> {URL: bytes} of the remote shards of a rank."""

    def __init__(self, sources: Sequence[IndexedSource], order: GlobalOrder, rank: int, world_size: int) -> None:
        self._sources = sources
        self._ends = [np.cumsum(source.counts) for source in sources]
        self._order = order
        self._rank = rank
        self._world_size = world_size

    def __call__(self, step: int) -> dict[str, int]:
        plan = self._order.rank_slice(step, self._rank, self._world_size)
        needed = {}
        for number, source in enumerate(self._sources):
            samples = plan.sample[plan.source == number]
            for shard in np.unique(np.searchsorted(self._ends[number], samples, side="right")):
                if is_remote(source.shards[shard]):
                    needed[source.shards[shard]] = int(source.sizes[shard])
        return needed


class EvalLoader:
    """One pass over a rank's share of the samples; see `build_eval_loader`.

    Attributes:
        bad_samples: {shard, key, reason} of the samples left out so far.
    """

    def __init__(self, open_pipeline: Callable[[], Pipeline], num_samples: int) -> None:
        self.num_samples = num_samples
        self.bad_samples: list[dict[str, str]] = []
        self._open_pipeline = open_pipeline
        self._pipeline: Pipeline | None = None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.close()
        self.bad_samples = []
        self._pipeline = pipeline = self._open_pipeline()
        try:
            while True:
                try:
                    batch = next(pipeline)
                except StopIteration:
                    return
                self.bad_samples.extend(batch["bad_samples"])
                if len(batch["sample_index"]):
                    yield batch
        finally:
            pipeline.close()

    def close(self) -> None:
        """Ends the workers."""
        if self._pipeline is not None:
            self._pipeline.close()


def build_eval_loader(
    sources: Sequence[IndexedSource] | ImageFolder,
    eval_transform: Callable[[bytes], np.ndarray],
    *,
    rank: int = 0,
    world_size: int = 1,
    batch_size: int = 256,
    max_samples: int | None = None,
    workers: int = 0,
    prefetch: int = 2,
    pin_memory: bool = False,
    limits: ReadLimits | None = None,
    store: IndexStore | None = None,
    patience: Patience | None = None,
    background: bool = False,
) -> EvalLoader:
    """Builds a loader that visits every sample exactly once over all ranks, in stored order, without padding.

    Args:
        sources: From `data.index.load_sources`, weights do not matter; or a folder of pictures.
        eval_transform: Image bytes -> uint8 [3, H, W]; see `data.sample.EvalTransform`.
        rank: 0 <= rank < world_size; ranks take the batches rank, rank + world_size, ... of one list, so that what is
            computed per batch does not depend on the number of ranks.
        world_size: Number of ranks.
        batch_size: Samples per batch; the last one of the list may be smaller.
        max_samples: Visit only the first so many samples.
        workers: Worker processes; 0 = load in this process.
        prefetch: Batches each worker prepares ahead.
        pin_memory: Whether batches are for a GPU, to which pinned memory is copied without waiting.
        limits: Largest members that are read.
        store: See `build_train_loader`.
        patience: How long a batch is waited for.
        background: See `build_train_loader`.

    Returns:
        An EvalLoader, to be iterated as often as wanted. Batches are dicts of images uint8 [m, 3, H, W], captions
        (m lists of str), metadata (m dicts: key, content of the .json member, cls), sample_index int64 [m] and
        bad_samples; samples that cannot be read are left out.

    Raises:
        DataError: If the settings do not fit together.
    """
    if batch_size < 1:
        raise DataError(f"the evaluation batch size is {batch_size}; it must be at least 1")
    dataset = _eval_dataset(sources, eval_transform, store, limits)
    total = min(len(dataset), max_samples or len(dataset))
    batches = [(start, min(start + batch_size, total)) for start in range(0, total, batch_size)]
    items = batches[rank::world_size]

    def open_pipeline() -> Pipeline:
        return Pipeline(
            dataset,
            items,
            transform=eval_transform,
            workers=min(workers, len(items)),
            prefetch=prefetch,
            pin_memory=pin_memory,
            held_by_user=_HELD_IN_LOOP,
            patience=patience or Patience(),
            background=background,
        )

    return EvalLoader(open_pipeline, total)


def read_eval_samples(
    sources: Sequence[IndexedSource] | ImageFolder,
    positions: Sequence[int],
    eval_transform: Callable[[bytes], np.ndarray],
    store: IndexStore | None = None,
) -> list[np.ndarray]:
    """Reads a few pictures of an evaluation set, in this process.

    Args:
        sources: As for `build_eval_loader`.
        positions: `sample_index` of each picture.
        eval_transform: As for `build_eval_loader`.
        store: As for `build_eval_loader`.

    Raises:
        DataError: One of them cannot be read.
    """
    dataset = _eval_dataset(sources, eval_transform, store, None)
    pictures = []
    for position in positions:
        batch = dataset[position, position + 1]
        if not len(batch["images"]):
            raise DataError(f"sample {position} cannot be read: {batch['bad_samples'][0]['reason']}")
        pictures.append(batch["images"][0].numpy())
    return pictures


def _eval_dataset(
    sources: Sequence[IndexedSource] | ImageFolder,
    eval_transform: Callable[[bytes], np.ndarray],
    store: IndexStore | None,
    limits: ReadLimits | None,
) -> EvalDataset:
    kind = FolderDataset if isinstance(sources, ImageFolder) else EvalDataset
    return kind(sources, eval_transform, store=store or IndexStore.create(), limits=limits or ReadLimits())
