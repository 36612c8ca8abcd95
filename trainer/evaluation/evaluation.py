"""All evaluation sets of a recipe, run together."""

from collections.abc import Iterator

import torch

from data.loader import build_eval_loader
from data.sample import EvalTransform
from data.tokenizer import CaptionTokenizer
from trainer.config import RunConfig
from trainer.engine import Engine
from trainer.errors import ConfigError
from trainer.evaluation.encode import encode_images, encode_texts
from trainer.evaluation.retrieval import retrieval_figures
from trainer.evaluation.sets import EvalData, open_eval_set
from trainer.evaluation.zero_shot import class_embeddings, zero_shot_figures
from trainer.launch import Place
from trainer.pipeline import index_store, project_cache, resolve_workers


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

    def run(self, engine: Engine) -> Iterator[tuple[str, dict[str, float]]]:
        """Evaluate every set and yield (name, figures). Collective."""
        engine.deepspeed.eval()
        for data in self.sets:
            yield data.name, self._run_one(engine, data)
        engine.deepspeed.train()

    def summary(self, name: str, figures: dict[str, float]) -> str:
        """One line for the console, with chance level beside the figures."""
        data = next(entry for entry in self.sets if entry.name == name)
        parts = []
        if "acc1" in figures:
            chance = 1.0 / len(data.class_names)
            parts.append(
                f"zero-shot top-1 {figures['acc1']:.1%} top-5 {figures['acc5']:.1%} "
                f"({len(data.class_names)} classes, chance {chance:.2%})"
            )
        if "image_retrieval_recall@1" in figures:
            parts.append(
                f"retrieval R@1 {figures['image_retrieval_recall@1']:.1%} (text to image) "
                f"{figures['text_retrieval_recall@1']:.1%} (image to text), "
                f"R@10 {figures['image_retrieval_recall@10']:.1%} / {figures['text_retrieval_recall@10']:.1%} "
                f"({data.num_samples} images, chance R@1 {1.0 / data.num_samples:.2%})"
            )
        return "; ".join(parts)

    def _run_one(self, engine: Engine, data: EvalData) -> dict[str, float]:
        batch_size = self._config.eval.batch_size
        image_size = engine.method.model.image_tower.image_size
        loader = build_eval_loader(
            [data.source],
            EvalTransform(image_size, self._config.eval.resize_size, self._config.data.max_image_pixels),
            store=self._store,
            rank=self._place.rank,
            world_size=self._place.world_size,
            batch_size=batch_size,
            max_samples=data.max_samples,
            workers=resolve_workers(self._config, self._place),
        )
        records: dict[int, tuple[list[str], dict]] = {}
        rounds = -(-data.num_samples // (batch_size * self._place.world_size))
        images = encode_images(engine, _note_records(loader, records), data.num_samples, rounds, image_size)
        merged = self._merge_records(records)
        # Samples that could not be read have no record and leave the set.
        kept = sorted(merged)
        images = images[torch.tensor(kept, device=engine.device)]
        figures: dict[str, float] = {}
        if "zero_shot" in data.tasks:
            labels = _labels([merged[index][1] for index in kept], data)
            classes = class_embeddings(engine, self._tokenizer, data.class_names, data.templates, batch_size)
            figures |= zero_shot_figures(images, torch.tensor(labels, device=engine.device), classes)
        if "retrieval" in data.tasks:
            captions = [merged[index][0] for index in kept]
            texts = [caption for entry in captions for caption in entry]
            owners = [row for row, entry in enumerate(captions) for _ in entry]
            embeddings = encode_texts(engine, self._tokenizer, texts, batch_size)
            figures |= retrieval_figures(images, embeddings, torch.tensor(owners, device=engine.device))
        return figures | {"samples": len(kept), "unreadable": data.num_samples - len(kept)}

    def _merge_records(self, records: dict[int, tuple[list[str], dict]]) -> dict[int, tuple[list[str], dict]]:
        """Captions and metadata of the whole set on every rank. Collective."""
        parts: list = [None] * self._place.world_size
        torch.distributed.all_gather_object(parts, records)
        return {index: record for part in parts for index, record in part.items()}


def _labels(metadata: list[dict], data: EvalData) -> list[int]:
    labels = [entry.get("cls") for entry in metadata]
    bad = [label for label in labels if not isinstance(label, int) or not 0 <= label < len(data.class_names)]
    if bad:
        raise ConfigError(
            f"eval set '{data.name}': label {bad[0]!r} is not in [0, {len(data.class_names)}); "
            "each sample needs a .cls member that indexes classnames.txt"
        )
    return labels


def _note_records(loader: Iterator[dict], records: dict[int, tuple[list[str], dict]]) -> Iterator[dict]:
    for batch in loader:
        rows = zip(batch["sample_index"].tolist(), batch["captions"], batch["metadata"], strict=True)
        for index, captions, metadata in rows:
            records[index] = (captions, metadata)
        yield batch
