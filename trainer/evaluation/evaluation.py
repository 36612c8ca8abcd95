"""All evaluation sets of a recipe, run together."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from data.captions.tokenizer import CaptionTokenizer
from data.image_folder import ImageFolder
from data.loader import build_eval_loader
from data.sample import EvalTransform
from data.shards.index_store import empty_warning
from data.shards.remote import display_name
from trainer.config.sections import RunConfig
from trainer.errors import ConfigError
from trainer.evaluation.bias import ALL_GROUPS, joined_classes, probe_table
from trainer.evaluation.encode import Encoder, encode_images, encode_texts
from trainer.evaluation.linear_probe import Labelled, few_shot, linear_probe
from trainer.evaluation.results import SetResult
from trainer.evaluation.retrieval import retrieval_figures
from trainer.evaluation.sets import EvalData, Samples, open_eval_set
from trainer.evaluation.similarity import pooled
from trainer.evaluation.zero_shot import class_embeddings, classification_figures, zero_shot_ranks
from trainer.metrics import Console
from trainer.pipeline import index_store, patience, project_cache, resolve_workers
from trainer.ranks.launch import Place


@dataclass(frozen=True)
class Embedded:
    """The readable samples of a set, in stored order, the same on every rank.

    Attributes:
        samples: The set they are of.
        images: [N, d], or tokens [N, P, d], unit norm.
        rows: Position of each in the stored set.
        captions: Of each sample.
        metadata: Of each sample: its key, "cls", and the group of the bias probe.
        unreadable: Samples left out.
    """

    samples: Samples
    images: Tensor
    rows: list[int]
    captions: list[list[str]]
    metadata: list[dict[str, Any]]
    unreadable: int


class Evaluation:
    """The recipe's evaluation sets, opened once so that a missing one fails before training.

    Args:
        config: The run's configuration.
        tokenizer: Its tokenizer.
        place: This rank.

    Raises:
        ConfigError: A set that cannot be evaluated.
        DataError: A shard that cannot be indexed.
    """

    def __init__(self, config: RunConfig, tokenizer: CaptionTokenizer, place: Place) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._place = place
        self._store = index_store(config)
        cache = project_cache(config)
        self.sets = [open_eval_set(name, entry, cache, self._store) for name, entry in config.eval.sets.items()]
        for data in self.sets:
            _warn_of_empty_shards(data, place)

    def run(self, encoder: Encoder) -> Iterator[SetResult]:
        """Evaluate every set. Collective."""
        with encoder.evaluating():
            for data in self.sets:
                yield self._run_one(encoder, data)

    def embed(self, encoder: Encoder, data: EvalData, samples: Samples) -> Embedded:
        """Encode the pictures of a set. Collective."""
        batch_size, world_size = self._config.eval.batch_size, self._place.world_size
        image_size = encoder.method.model.image_tower.image_size
        config = self._config
        transform = EvalTransform(
            image_size, config.eval.resize_size, config.data.max_image_pixels, config.eval.interpolation
        )
        loader = build_eval_loader(
            samples,
            transform,
            store=self._store,
            rank=self._place.rank,
            world_size=world_size,
            batch_size=batch_size,
            max_samples=data.max_samples,
            workers=resolve_workers(self._config, self._place),
            pin_memory=encoder.device.type == "cuda",
            patience=patience(self._config),
            background=config.train.cpu_threads == "all",
        )
        total = data.num_samples(samples)
        records: dict[int, tuple[list[str], dict]] = {}
        rounds = -(-total // (batch_size * world_size))
        images = encode_images(encoder, _note_records(loader, records, data.probe_group), total, rounds, image_size)
        merged, bad = self._merge_records(records, loader.bad_samples)
        # Samples that could not be read have no record and leave the set.
        kept = sorted(merged)
        if not kept:
            raise ConfigError(f"eval set '{data.name}': none of its {total} samples can be read; check the data")
        if len(kept) < total:
            example = f", e.g. {bad['shard']} sample '{bad['key']}': {bad['reason']}" if bad else ""
            count = f"{total - len(kept)} of {total} samples cannot be read and are left out"
            Console(self._place.is_main).warn(f"eval set '{data.name}': {count}{example}")
        captions, metadata = zip(*(merged[index] for index in kept), strict=True)
        images = images[torch.tensor(kept, device=images.device)]
        return Embedded(samples, images, kept, list(captions), list(metadata), total - len(kept))

    def classes(self, encoder: Encoder, data: EvalData, names: list[str]) -> Tensor:
        """Class embeddings under the set's templates, see `class_embeddings`. Collective."""
        return class_embeddings(encoder, self._tokenizer, names, data.templates, self._config.eval.batch_size)

    def _run_one(self, encoder: Encoder, data: EvalData) -> SetResult:
        test = self.embed(encoder, data, data.test)
        tasks: dict[str, dict[str, Any]] = {}
        if "zero_shot" in data.tasks:
            labels = labels_of(test, data)
            ranks = zero_shot_ranks(test.images, labels, self.classes(encoder, data, data.class_names))
            tasks["zero_shot"] = classification_figures(ranks, labels)
        if "retrieval" in data.tasks:
            tasks["retrieval"] = self._retrieval(encoder, data, test)
        if data.train is not None:
            train = self.embed(encoder, data, data.train)
            probed = [Labelled(pooled(part.images), labels_of(part, data)) for part in (train, test)]
            if "linear_probe" in data.tasks:
                tasks["linear_probe"] = linear_probe(*probed, len(data.class_names))
            if "few_shot" in data.tasks:
                tasks["few_shot"] = few_shot(*probed, len(data.class_names))
        if "bias" in data.tasks:
            tasks["bias"] = self._bias(encoder, data, test)
        seen = len({entry.get("cls") for entry in test.metadata})
        return SetResult(data.name, tasks, len(test.images), test.unreadable, len(data.class_names), seen)

    def _retrieval(self, encoder: Encoder, data: EvalData, test: Embedded) -> dict[str, float]:
        texts = [caption for entry in test.captions for caption in entry]
        owners = [row for row, entry in enumerate(test.captions) for _ in entry]
        embeddings = encode_texts(encoder, self._tokenizer, texts, self._config.eval.batch_size)
        return retrieval_figures(test.images, embeddings, torch.tensor(owners, device=test.images.device))

    def _bias(self, encoder: Encoder, data: EvalData, test: Embedded) -> dict[str, Any]:
        lacking = next((entry["key"] for entry in test.metadata if data.probe_group not in entry), None)
        if lacking is not None:
            raise ConfigError(
                f"eval set '{data.name}': sample '{lacking}' has no '{data.probe_group}' in its .json member, by which "
                "the bias probe groups; set probe_group to one that all samples have"
            )
        probed = {name: self.classes(encoder, data, labels) for name, labels in data.probe.items()}
        classes, categories = joined_classes(self.classes(encoder, data, data.class_names), probed)
        groups = [str(entry[data.probe_group]) for entry in test.metadata]
        if not {"", ALL_GROUPS}.isdisjoint(groups):
            raise ConfigError(
                f"eval set '{data.name}': '{ALL_GROUPS}' names all pictures in the table of the bias probe, and cannot "
                f"be a group, nor can ''; give another name to them in '{data.probe_group}' of the .json members"
            )
        return probe_table(test.images, groups, classes, categories)

    def _merge_records(
        self, records: dict[int, tuple[list[str], dict]], bad_samples: list[dict[str, str]]
    ) -> tuple[dict[int, tuple[list[str], dict]], dict[str, str] | None]:
        """Captions and metadata of the whole set on every rank, and one sample that cannot be read. Collective."""
        parts: list = [None] * self._place.world_size
        dist.all_gather_object(parts, (records, bad_samples[:1]))
        merged = {index: record for found, _ in parts for index, record in found.items()}
        return merged, next((entry for _, examples in parts for entry in examples), None)


def _warn_of_empty_shards(data: EvalData, place: Place) -> None:
    for samples in (data.test, data.train):
        empty = [] if isinstance(samples, ImageFolder) else [shard for part in samples or () for shard in part.empty]
        if empty:
            Console(place.is_main).warn(f"eval set '{data.name}': {empty_warning(empty)}")


def labels_of(embedded: Embedded, data: EvalData) -> Tensor:
    """int64 [N] labels on the embeddings' device.

    Raises:
        ConfigError: A sample without a label that indexes the class names; the message says where it is.
    """
    labels, count = [entry.get("cls") for entry in embedded.metadata], len(data.class_names)
    # Not isinstance: true and false of a .json member are no numbers of classes.
    bad = next((n for n, label in enumerate(labels) if type(label) is not int or not 0 <= label < count), None)
    if bad is not None:
        raise ConfigError(
            f"eval set '{data.name}': label {labels[bad]!r} of sample '{embedded.metadata[bad]['key']}' in "
            f"{_shard_of(embedded.samples, embedded.rows[bad])} is not in [0, {count}); each sample needs a .cls "
            "member with its line in classnames.txt, counted from 0"
        )
    return torch.tensor(labels, device=embedded.images.device)


def _shard_of(samples: Samples, row: int) -> str:
    if isinstance(samples, ImageFolder):
        return str(samples.root)
    for source in samples:
        if row < source.num_samples:
            return display_name(source.shards[int(np.searchsorted(np.cumsum(source.counts), row, side="right"))])
        row -= source.num_samples
    raise IndexError(row)


def _note_records(loader: Iterator[dict], records: dict[int, tuple[list[str], dict]], group: str) -> Iterator[dict]:
    for batch in loader:
        rows = zip(batch["sample_index"].tolist(), batch["captions"], batch["metadata"], strict=True)
        for index, captions, metadata in rows:
            # The whole .json members of a large set would not fit where every rank has the records of all.
            kept = {name: metadata[name] for name in ("key", "cls", group) if name in metadata}
            records[index] = (captions, kept)
        yield batch
