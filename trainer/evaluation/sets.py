"""Evaluation sets: folders in CLIP_benchmark's WebDataset layout, built-in sets, or plain shards."""

import re
from dataclasses import dataclass
from pathlib import Path

from data.demo import NAME as DEMO_NAME
from data.demo import ensure_unicode_symbols
from data.index import IndexedSource, IndexStore, load_sources
from data.sources import parse_sources
from trainer.config import EvalSet
from trainer.errors import ConfigError

_DEFAULT_TEMPLATES = ["{c}"]
_MAX_LIST_BYTES = 16 << 20


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
        ConfigError: Missing folder, no shards, zero-shot without class names, or retrieval without captions.
        DataError: A shard that cannot be indexed.
    """
    folder = _folder(config.data, cache)
    class_names: list[str] = []
    templates = _DEFAULT_TEMPLATES
    pattern: str | list[str] = config.data
    if folder is not None:
        pattern = _shards(folder / "test" if (folder / "test").is_dir() else folder)
        class_names = _lines(folder / "classnames.txt")
        templates = _lines(folder / "zeroshot_classification_templates.txt") or _DEFAULT_TEMPLATES
    if "zero_shot" in config.tasks and not class_names:
        raise ConfigError(
            f"eval.sets.{name}: zero_shot needs a folder with classnames.txt (CLIP_benchmark's layout), "
            f"'{config.data}' has none; add it or set tasks: [retrieval]"
        )
    (source,) = load_sources(parse_sources(pattern, cache), store, captions=False)
    if "retrieval" in config.tasks and source.num_uncaptioned:
        raise ConfigError(
            f"eval.sets.{name}: retrieval needs captions, {source.num_uncaptioned} of {source.num_samples} samples of "
            f"'{config.data}' have only a class label; set tasks: [zero_shot]"
        )
    return EvalData(name, source, tuple(config.tasks), class_names, templates, config.max_samples)


def _shards(folder: Path) -> str | list[str]:
    """The tars of a folder: those nshards.txt counts, so that a missing one is noticed, else all there are."""
    lines = _lines(folder / "nshards.txt")
    if not lines:
        return str(folder)
    if len(lines) > 1 or not re.fullmatch(r"[1-9]\d{0,5}", lines[0]):
        raise ConfigError(f"{folder / 'nshards.txt'} must hold the number of shards, got {lines[0][:80]!r}")
    return [str(folder / f"{number}.tar") for number in range(int(lines[0]))]


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
    """Lines that are not blank, stripped, as CLIP_benchmark reads them; none without the file."""
    if not path.is_file():
        return []
    if path.stat().st_size > _MAX_LIST_BYTES:
        raise ConfigError(f"{path} has more than {_MAX_LIST_BYTES} bytes; that is no list of names")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text; save it as UTF-8") from None
    return [line.strip() for line in lines if line.strip()]
