"""Evaluation sets: folders in CLIP_benchmark's WebDataset layout, built-in sets, or plain shards."""

from dataclasses import dataclass
from pathlib import Path

from data.demo import NAME as DEMO_NAME
from data.demo import ensure_unicode_symbols
from data.index import IndexedSource, IndexStore, load_sources
from data.sources import parse_sources
from trainer.config import EvalSet
from trainer.errors import ConfigError

_DEFAULT_TEMPLATES = ["{c}"]


@dataclass(frozen=True)
class EvalData:
    """One set, indexed.

    Attributes:
        name: Its name in the recipe.
        source: Its shards and sample counts.
        tasks: `zero_shot`, `retrieval`.
        class_names: Class names by label; empty without classification.
        templates: Prompts with `{c}` for the class name.
        max_samples: Only the first so many samples are used.
    """

    name: str
    source: IndexedSource
    tasks: tuple[str, ...]
    class_names: list[str]
    templates: list[str]
    max_samples: int | None

    @property
    def num_samples(self) -> int:
        """Samples that are evaluated."""
        return min(self.source.num_samples, self.max_samples or self.source.num_samples)


def open_eval_set(name: str, config: EvalSet, cache: Path, store: IndexStore) -> EvalData:
    """Find and index one evaluation set.

    Raises:
        ConfigError: Missing folder, no shards, or zero-shot without class names.
        DataError: A shard that cannot be indexed.
    """
    folder = _folder(config.data, cache)
    class_names: list[str] = []
    templates = _DEFAULT_TEMPLATES
    pattern = config.data
    if folder is not None:
        pattern = str(folder / "test" if (folder / "test").is_dir() else folder)
        class_names = _lines(folder / "classnames.txt")
        templates = _lines(folder / "zeroshot_classification_templates.txt") or _DEFAULT_TEMPLATES
    if "zero_shot" in config.tasks and not class_names:
        raise ConfigError(
            f"eval.sets.{name}: zero_shot needs a folder with classnames.txt (CLIP_benchmark's layout), "
            f"'{config.data}' has none; add it or set tasks: [retrieval]"
        )
    (source,) = load_sources(parse_sources(pattern, cache), store)
    return EvalData(name, source, tuple(config.tasks), class_names, templates, config.max_samples)


def _folder(data: str, cache: Path) -> Path | None:
    prefix, _, split = data.partition("/")
    if prefix == DEMO_NAME:
        sets = ensure_unicode_symbols(cache).evaluation
        if split not in sets:
            raise ConfigError(
                f"eval set '{data}' is unknown: use {', '.join(f'{DEMO_NAME}/{s}' for s in sorted(sets))}"
            )
        return sets[split]
    path = Path(data)
    return path if path.is_dir() else None


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
