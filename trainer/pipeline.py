"""From the recipe's data section to micro-batches on the device."""

import functools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data.captions.tokenizer import CaptionTokenizer, ClipTokenizer
from data.delivery import Patience
from data.loader import TrainLoader, build_train_loader
from data.sample import SampleTransform, SampleViews
from data.shards.cache import cache_dir
from data.shards.index_store import (
    IndexedSource,
    IndexStore,
    bad_shards_error,
    empty_warning,
    index_shards,
    load_sources,
)
from data.sources import parse_sources
from models.architectures import HF_PREFIX
from models.hf_backbone import BUILTIN_PREFIX
from trainer.config.ds_config import BatchPlan
from trainer.config.sections import RunConfig
from trainer.errors import ConfigError
from trainer.methods.base import Method
from trainer.metrics import BAD_SAMPLES, Console, writable
from trainer.ranks.agreement import together
from trainer.ranks.launch import Place
from trainer.ranks.signals import told_to_stop
from trainer.views import sample_transform

# They decide the shapes of the text tower's work, which the host has to know without asking the device.
_ON_HOST = frozenset({"text_lengths", "mlm_index"})


def project_cache(config: RunConfig) -> Path:
    """Folder for everything made once: indexes, rendered sets, fetched shards."""
    return Path(config.data.cache_dir) if config.data.cache_dir else cache_dir()


def index_store(config: RunConfig) -> IndexStore:
    """Where shard indexes are kept and remote shards are fetched to."""
    return IndexStore.create(
        project_cache(config), max_bytes=int(config.data.cache_gib * 2**30), allow_pipe=config.data.allow_pipe
    )


def build_tokenizer(config: RunConfig) -> CaptionTokenizer:
    """The tokenizer of the recipe.

    Raises:
        ConfigError: `data.mask_token` with a tokenizer whose mask token is its own affair.
        DataError: A tokenizer that cannot be read.
    """
    name, context_length = tokenizer_name(config), config.model.context_length
    if name == "clip":
        return ClipTokenizer(mask_token=config.data.mask_token, context_length=context_length)
    if config.data.mask_token:
        raise ConfigError(f"data.mask_token is for CLIP's tokenizer, {name} brings its own; set data.mask_token false")
    from data.captions.hf_tokenizer import HfTokenizer

    return HfTokenizer(name.removeprefix("hf:"), context_length)


def tokenizer_name(config: RunConfig) -> str:
    """What `data.tokenizer: auto` means: `clip`, or the source of a Hugging Face text tower that has one."""
    if config.data.tokenizer != "auto":
        return config.data.tokenizer
    name = config.model.text_name
    return "clip" if name is None or name.startswith(HF_PREFIX + BUILTIN_PREFIX) else name


@dataclass(frozen=True)
class _DrawnAnew:
    """A transform with other random numbers: views of the same samples that are not those of training."""

    transform: SampleTransform

    @property
    def text_views(self) -> tuple[str, ...]:
        return self.transform.text_views

    @property
    def context_size(self) -> int | None:
        return self.transform.context_size

    def __call__(self, image_bytes: bytes, captions: list[str], key: tuple[int | str, ...]) -> SampleViews:
        return self.transform(image_bytes, captions, (*key, "preview"))


class TrainData:
    """The training data of a run on this rank.

    Args:
        start_step: Steps that are done.
        offset: How many global batches rollbacks have left out: step n trains on batch n + offset of the order.
        preview: Draw the views of each sample anew, for a look at samples before they are trained on.

    Attributes:
        loader: Yields this rank's micro-batches from the start step.
    """

    def __init__(
        self,
        config: RunConfig,
        method: Method,
        tokenizer: CaptionTokenizer,
        sources: list[IndexedSource],
        plan: BatchPlan,
        place: Place,
        device: torch.device,
        start_step: int,
        offset: int = 0,
        preview: bool = False,
    ) -> None:
        self._accumulation_steps = plan.accumulation_steps
        self._offset = offset
        self._device = device
        transform = sample_transform(config, method, tokenizer)
        self.loader: TrainLoader = build_train_loader(
            sources,
            _DrawnAnew(transform) if preview else transform,
            store=index_store(config),
            seed=config.train.seed,
            global_batch_size=plan.global_batch_size,
            micro_batch_size=plan.micro_batch_size,
            rank=place.rank,
            world_size=place.world_size,
            start_step=start_step + offset,
            lanes=config.data.lanes,
            shuffle_window=config.data.shuffle_window,
            with_places=method.needs_places,
            workers=resolve_workers(config, place),
            prefetch=config.data.prefetch,
            pin_memory=device.type == "cuda",
            patience=patience(config),
            background=config.train.cpu_threads == "all",
        )

    @functools.cached_property
    def _copies(self) -> torch.cuda.Stream | None:
        return torch.cuda.Stream(self._device) if self._device.type == "cuda" else None

    def steps(self) -> Iterator[list[dict[str, Any]]]:
        """Yield the micro-batches of one step after the other, from the start step on."""
        while True:
            yield [next(self.loader) for _ in range(self._accumulation_steps)]

    def to_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Copy a micro-batch's tensors to the device: on a GPU beside the step before, and without waiting."""
        names = [name for name, value in batch.items() if torch.is_tensor(value) and name not in _ON_HOST]
        if self._copies is None:
            return batch | {name: batch[name].to(self._device) for name in names}
        # The host is ahead of the device: a stream of its own begins while the step before is still being computed.
        with torch.cuda.stream(self._copies):
            moved = {name: batch[name].to(self._device, non_blocking=True) for name in names}
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self._copies)
        for tensor in moved.values():
            # Else its memory would be free for the next copy as soon as the host lets go of it.
            tensor.record_stream(computing)
        return batch | moved

    def samples_seen(self, step: int) -> dict[str, int]:
        """Samples of each source after `step` steps, those that rollbacks left out included."""
        return self.loader.samples_seen(step + self._offset)

    def epoch(self, step: int) -> float:
        """Epochs of the first source after `step` steps."""
        return next(iter(self.loader.epochs_seen(step + self._offset).values()))

    def write_bad_samples(self, run_dir: Path, records: list[dict[str, str]], step: int) -> None:
        """Append to bad_samples.jsonl."""
        path = run_dir / BAD_SAMPLES
        with writable(path), path.open("a", encoding="utf-8") as stream:
            for record in records:
                stream.write(json.dumps({"step": step, **record}) + "\n")

    def close(self) -> None:
        """Stop the workers."""
        self.loader.close()


def index_sources(config: RunConfig, place: Place) -> list[IndexedSource]:
    """Index the training shards, the work spread over the ranks. Collective.

    Empty shards are left out with a warning.

    Raises:
        ConfigError, DataError: Shards are missing, damaged or without usable samples (all are named), or more samples
            than `data.max_bad_fraction` lack an image or a caption.
    """
    cache, store = together(lambda: (project_cache(config), index_store(config)))
    # Rank 0 renders or lists first, so that the others find it done.
    together(lambda: parse_sources(config.data.train, cache) if place.is_main else None)
    parsed = together(lambda: parse_sources(config.data.train, cache))
    shards = [shard for source in parsed for shard in source.shards]
    found = together(lambda: index_shards(shards, place.rank, place.world_size, store=store))
    problems: list[dict[str, str]] = [{}] * place.world_size
    dist.all_gather_object(problems, found)
    merged = {shard: problem for part in problems for shard, problem in part.items()}
    if merged:
        raise bad_shards_error({shard: merged[shard] for shard in shards if shard in merged}, len(shards))
    sources = together(lambda: load_sources(parsed, store))
    for source in sources:
        if source.empty:
            Console(place.is_main).warn(f"data source '{source.name}': {empty_warning(source.empty)}")
        total = source.num_samples + source.num_excluded
        if source.num_excluded > config.data.max_bad_fraction * total:
            raise ConfigError(
                f"data source '{source.name}': {source.num_excluded} of {total} samples lack an image or a caption, "
                f"more than data.max_bad_fraction {config.data.max_bad_fraction}; list them with "
                "`python -m data.index --excluded SHARDS` (a key ends at the first dot of a name), repair the shards "
                "or raise the limit"
            )
    return sources


def patience(config: RunConfig) -> Patience:
    """How long this run waits for a batch."""
    return Patience(config.train.timeout_minutes, told_to_stop)


def resolve_workers(config: RunConfig, place: Place) -> int:
    """Loader processes of this rank: `auto` shares the cores out and leaves one to the training process."""
    if config.data.workers != "auto":
        return config.data.workers
    cores = len(os.sched_getaffinity(0)) // place.local_world_size
    return max(1, cores - 1)
