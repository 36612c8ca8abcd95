"""Map-style data sets whose items are whole collated batches, built in the worker that is asked for them."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from data.errors import BadSample, DataError
from data.image_folder import ImageFolder
from data.order import GlobalOrder
from data.rng import keyed_hash
from data.sample import has_masked
from data.shards.index_store import IndexedSource, IndexStore
from data.shards.reader import RawSample, ReadLimits, SampleReader

MAX_REPLACEMENTS = 100


class Views(Protocol):
    """What a sample transform returns; see `data.sample.SampleViews`."""

    images: np.ndarray
    token_ids: list[list[int]]
    mlm_positions: list[int]
    mlm_targets: list[int]


# (image bytes, captions, (seed, source, epoch, sample)) -> views; raises BadSample. An attribute `text_views` that
# has a masked one asks for mlm_index and mlm_targets in the batch; a `context_size` for a crop around all views.
TrainTransform = Callable[[bytes, list[str], tuple[int | str, ...]], Views]


def collate_views(views: Sequence[Views], *, masked: bool, in_context: bool = False) -> dict[str, torch.Tensor]:
    """Stacks the views of the samples of one micro-batch.

    Args:
        views: Views of m samples; each has images uint8 [V, 3, H, W] and K lists of token ids.
        masked: Whether one text view is masked for MLM.
        in_context: Whether each has a crop around its views.

    Returns:
        images uint8 [V, m, 3, H, W]; token_ids int64 [K, m, T] padded with 0 to the longest caption of the micro-batch
        over all K views; text_lengths int64 [K, m]; with `masked` also mlm_index int64 [n], flat positions
        row * T + position of the masked view, and mlm_targets int64 [n]; with `in_context` also context_images uint8
        [1, m, 3, C, C] and crop_boxes int64 [1 + V, m, 4], (left, top, right, bottom) of the context and each view.
    """
    first = np.asarray(views[0].images)
    images = np.empty((first.shape[0], len(views), *first.shape[1:]), dtype=np.uint8)
    for row, view in enumerate(views):
        images[:, row] = view.images
    lengths = np.array([[len(ids) for ids in view.token_ids] for view in views], dtype=np.int64).T
    width = int(lengths.max())
    token_ids = np.zeros((*lengths.shape, width), dtype=np.int64)
    for row, view in enumerate(views):
        for text_view, ids in enumerate(view.token_ids):
            token_ids[text_view, row, : len(ids)] = ids
    batch = {
        "images": torch.from_numpy(images),
        "token_ids": torch.from_numpy(token_ids),
        "text_lengths": torch.from_numpy(np.ascontiguousarray(lengths)),
    }
    if masked:
        index = [row * width + position for row, view in enumerate(views) for position in view.mlm_positions]
        targets = [target for view in views for target in view.mlm_targets]
        batch["mlm_index"] = torch.tensor(index, dtype=torch.int64)
        batch["mlm_targets"] = torch.tensor(targets, dtype=torch.int64)
    if in_context:
        batch["context_images"] = torch.from_numpy(np.stack([view.context for view in views])[None])
        batch["crop_boxes"] = torch.from_numpy(np.stack([view.crop_boxes for view in views], axis=1))
    return batch


class _ReadingDataset(Dataset):
    """Holds what a worker needs to read samples; the reader itself is made on first use in each process."""

    def __init__(self, sources: Sequence[IndexedSource], store: IndexStore, limits: ReadLimits) -> None:
        self._sources = tuple(sources)
        self._store = store
        self._limits = limits
        self._reader: SampleReader | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None}

    @property
    def reader(self) -> SampleReader:
        """The reader of this process."""
        if self._reader is None:
            self._reader = SampleReader(self._sources, self._store, self._limits)
        return self._reader


class TrainDataset(_ReadingDataset):
    """Item (step, micro_index) is the collated micro-batch of this rank.

    Besides what `collate_views` makes it has sample_hash int64 [m], a fingerprint of each slot and its sample;
    view_keys int64 [V, m], a hash of each image view (seed, source, epoch, sample, view) to key random numbers that
    are drawn in the model; and bad_samples, a list of records. `with_places` also position int64 [m], the running place
    of each slot in the order (global batch times its size, plus the slot), and sample_index int64 [m], the place of the
    sample used among those of all sources in listed order.

    A sample that cannot be used is replaced by another one of its source, drawn by a hash of (seed, source, epoch,
    sample, attempt), so replacements too are the same for any world size and worker count. A DataError comes back as
    {"error": message}, because an exception would arrive in the main process wrapped in a worker's traceback.

    Args:
        sources: Indexed sources.
        order: The global order over the same sources.
        transform: See `TrainTransform`.
        micro_batch_size: m.
        rank: 0 <= rank < world_size.
        world_size: world_size * m must divide the global batch.
        store: Where indexes are found and remote shards fetched.
        limits: Largest members that are read.
        with_places: Whether batches hold position and sample_index.

    Raises:
        DataError: If the batch sizes do not fit together.
    """

    def __init__(
        self,
        sources: Sequence[IndexedSource],
        order: GlobalOrder,
        transform: TrainTransform,
        *,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        store: IndexStore,
        limits: ReadLimits,
        with_places: bool = False,
    ) -> None:
        super().__init__(sources, store, limits)
        if micro_batch_size < 1 or order.global_batch_size % (micro_batch_size * world_size):
            raise DataError(
                f"train.global_batch_size {order.global_batch_size} is not a multiple of train.micro_batch_size "
                f"{micro_batch_size} times {world_size} ranks; choose sizes that divide"
            )
        self.micro_batches_per_step = order.global_batch_size // (micro_batch_size * world_size)
        self._order = order
        self._transform = transform
        self._masked = has_masked(getattr(transform, "text_views", ()))
        self._in_context = getattr(transform, "context_size", None) is not None
        self._micro_batch_size = micro_batch_size
        self._first_slot = rank * self.micro_batches_per_step * micro_batch_size
        self._first_samples = np.cumsum([0, *order.num_samples])
        self._with_places = with_places

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        step, micro_index = item
        start = self._first_slot + micro_index * self._micro_batch_size
        plan = self._order.slots(step, start, start + self._micro_batch_size)
        views: list[Views | None] = [None] * len(plan)
        keys: list[tuple[int | str, ...]] = [()] * len(plan)
        hashes = np.empty(len(plan), dtype=np.int64)
        sample_index = np.empty(len(plan), dtype=np.int64)
        bad_samples: list[dict[str, str]] = []
        # In the order of the files, so that a micro-batch opens each of its shards once and reads it forwards.
        for row in np.lexsort((plan.sample, plan.source)):
            source, epoch, sample = int(plan.source[row]), int(plan.epoch[row]), int(plan.sample[row])
            views[row], used, key = self._sample(source, epoch, sample, bad_samples)
            name = self._sources[source].name
            keys[row] = (self._order.seed, name, epoch, used)
            hashes[row] = keyed_hash(int(plan.slot[row]), name, used, key) >> 1
            sample_index[row] = self._first_samples[source] + used
        batch = collate_views(views, masked=self._masked, in_context=self._in_context)
        batch["sample_hash"] = torch.from_numpy(hashes)
        batch["view_keys"] = torch.from_numpy(_view_keys(keys, len(batch["images"])))
        if self._with_places:
            batch["position"] = torch.from_numpy(step * self._order.global_batch_size + plan.slot)
            batch["sample_index"] = torch.from_numpy(sample_index)
        return {**batch, "bad_samples": bad_samples}

    def _sample(
        self, source: int, epoch: int, sample: int, bad_samples: list[dict[str, str]]
    ) -> tuple[Views, int, str]:
        """Returns the views of a sample or of its replacement, and which sample that is."""
        seed, name = self._order.seed, self._sources[source].name
        candidate = sample
        for attempt in range(MAX_REPLACEMENTS):
            try:
                raw = self.reader.read(source, candidate)
                return self._transform(raw.image, raw.captions, (seed, name, epoch, candidate)), candidate, raw.key
            except BadSample as bad:
                shard, key = self.reader.describe(source, candidate)
                bad_samples.append({"shard": shard, "key": key, "reason": bad.reason})
            draw = keyed_hash("replacement", seed, name, epoch, sample, attempt)
            candidate = draw % self._order.num_samples[source]
        last = bad_samples[-1]
        raise DataError(
            f"source {name!r}: {MAX_REPLACEMENTS} samples in a row cannot be used (the last: {last['key']!r} of "
            f"{last['shard']}: {last['reason']}); check the data"
        )


def _view_keys(keys: Sequence[tuple[int | str, ...]], num_views: int) -> np.ndarray:
    """A hash [V, m] of each image view of each sample, for randomness inside the model such as patch dropout."""
    hashes = [[keyed_hash(*key, "model", view) >> 1 for key in keys] for view in range(num_views)]
    return np.array(hashes, dtype=np.int64)


class EvalDataset(_ReadingDataset):
    """Item (start, stop) is the collated batch of these samples of all sources, one source after the other.

    Args:
        sources: Indexed sources.
        transform: Image bytes -> uint8 [3, H, W]; raises BadSample.
        store: Where indexes are found and remote shards fetched.
        limits: Largest members that are read.
    """

    def __init__(
        self,
        sources: Sequence[IndexedSource],
        transform: Callable[[bytes], np.ndarray],
        *,
        store: IndexStore,
        limits: ReadLimits,
    ) -> None:
        super().__init__(sources, store, limits)
        self._transform = transform
        self._ends = np.cumsum([source.num_samples for source in sources])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        images, raws, kept, bad_samples = [], [], [], []
        for sample in range(*item):
            try:
                raw = self._read(sample)
                images.append(np.asarray(self._transform(raw.image)))
            except BadSample as bad:
                shard, key = self._describe(sample)
                bad_samples.append({"shard": shard, "key": key, "reason": bad.reason})
                continue
            raws.append(raw)
            kept.append(sample)
        return {
            "images": torch.from_numpy(np.stack(images)) if images else torch.empty((0, 3, 0, 0), dtype=torch.uint8),
            "captions": [raw.captions for raw in raws],
            "metadata": [{**raw.metadata, "key": raw.key} for raw in raws],
            "sample_index": torch.tensor(kept, dtype=torch.int64),
            "bad_samples": bad_samples,
        }

    def _locate(self, sample: int) -> tuple[int, int]:
        source = int(np.searchsorted(self._ends, sample, side="right"))
        return source, sample - int(self._ends[source]) + self._sources[source].num_samples

    def _read(self, sample: int) -> RawSample:
        return self.reader.read(*self._locate(sample))

    def _describe(self, sample: int) -> tuple[str, str]:
        return self.reader.describe(*self._locate(sample))


class FolderDataset(EvalDataset):
    """The same over an image folder."""

    def __init__(
        self, folder: ImageFolder, transform: Callable[[bytes], np.ndarray], *, store: IndexStore, limits: ReadLimits
    ) -> None:
        super().__init__((), transform, store=store, limits=limits)
        self._folder = folder

    def __len__(self) -> int:
        return self._folder.num_samples

    def _read(self, sample: int) -> RawSample:
        return self._folder.read(sample, self._limits)

    def _describe(self, sample: int) -> tuple[str, str]:
        return str(self._folder.root), self._folder.key(sample)
