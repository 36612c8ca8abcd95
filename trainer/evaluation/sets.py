"""Evaluation sets: folders in CLIP_benchmark's WebDataset layout, image folders, built-in sets, or plain shards."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data.demo import NAME as DEMO_NAME
from data.demo import ensure_unicode_symbols
from data.errors import DataError
from data.image_folder import ImageFolder, open_image_folder
from data.shards.index_store import IndexedSource, IndexStore, load_sources
from data.sources import parse_sources
from trainer.config.sections import EvalSet
from trainer.errors import ConfigError

_DEFAULT_TEMPLATES = ["{c}"]
_MAX_LIST_BYTES = 16 << 20
_NEED_CLASSES = ("zero_shot", "linear_probe", "few_shot", "bias")
_NEED_TRAINING = ("linear_probe", "few_shot")
# Lists that ship with open_clip.
_NAMED_CLASSES = {"imagenet": "IMAGENET_CLASSNAMES"}
_NAMED_TEMPLATES = {"openai_imagenet": "OPENAI_IMAGENET_TEMPLATES", "simple_imagenet": "SIMPLE_IMAGENET_TEMPLATES"}

Samples = list[IndexedSource] | ImageFolder


@dataclass(frozen=True)
class EvalData:
    """One set, indexed.

    Attributes:
        name: Its name in the recipe.
        test: The samples that are evaluated.
        train: Samples to fit probes on; None where no task needs them.
        tasks: What is measured.
        class_names: Class names by label; empty without classification.
        templates: Prompts with `{c}` for the class name.
        probe_group: For the bias probe, the key of a sample's `.json` member that names its group.
        probe: For the bias probe, class names by probed category.
        max_samples: Only the first so many samples are used.
    """

    name: str
    test: Samples
    train: Samples | None
    tasks: tuple[str, ...]
    class_names: list[str]
    templates: list[str]
    probe_group: str
    probe: dict[str, list[str]]
    max_samples: int | None

    def num_samples(self, samples: Samples) -> int:
        """How many of these samples are used."""
        total = _total(samples)
        return min(total, self.max_samples or total)


def open_eval_set(name: str, config: EvalSet, cache: Path, store: IndexStore) -> EvalData:
    """Find and index one evaluation set.

    Raises:
        ConfigError: Missing folder, no shards, a shard that cannot be indexed, or a task without the class names,
            captions or training samples it needs; the message names the set.
    """
    folder = _folder(config.data, cache)
    test = _open(name, config.data if folder is None else folder / "test", folder, cache, store)
    train = None
    needing = [task for task in config.tasks if task in _NEED_TRAINING]
    if needing:
        if folder is None or not (folder / "train").is_dir():
            raise ConfigError(f"eval.sets.{name}: {needing[0]} needs a folder '{config.data}/train' beside test")
        train = _open(name, folder / "train", folder, cache, store)
    class_names = _class_names(name, config, folder, test)
    for task in config.tasks:
        if task in _NEED_CLASSES and not class_names:
            raise ConfigError(
                f"eval.sets.{name}: {task} needs class names, '{config.data}' has no classnames.txt (CLIP_benchmark's "
                "layout); add it, set class_names, or set tasks: [retrieval]"
            )
    if "retrieval" in config.tasks:
        samples = _total(test)
        without = samples if isinstance(test, ImageFolder) else sum(source.num_uncaptioned for source in test)
        if without:
            raise ConfigError(
                f"eval.sets.{name}: retrieval needs captions, {without} of {samples} samples of '{config.data}' have "
                "none; set tasks: [zero_shot]"
            )
    if "bias" in config.tasks and not config.probe:
        raise ConfigError(f"eval.sets.{name}: bias needs 'probe', class names by category, and 'probe_group'")
    templates = _templates(name, config, folder)
    probe = (config.probe_group, config.probe)
    return EvalData(name, test, train, tuple(config.tasks), class_names, templates, *probe, config.max_samples)


def _total(samples: Samples) -> int:
    return samples.num_samples if isinstance(samples, ImageFolder) else sum(part.num_samples for part in samples)


def _open(name: str, place: str | Path, folder: Path | None, cache: Path, store: IndexStore) -> Samples:
    try:
        if isinstance(place, Path):
            place = place if place.is_dir() else folder
            if not any(place.glob("*.tar")) and any(entry.is_dir() for entry in place.iterdir()):
                return open_image_folder(place)
            place = _shards(place)
        return load_sources(parse_sources(place, cache), store, captions=False)
    except DataError as error:
        raise ConfigError(f"eval.sets.{name}: {error}") from None


def _class_names(name: str, config: EvalSet, folder: Path | None, test: Samples) -> list[str]:
    names = _listed(name, "class_names", config.class_names, _NAMED_CLASSES, str)
    if names is None:
        names = _lines(folder / "classnames.txt") if folder is not None else []
    if isinstance(test, ImageFolder):
        names = names or [entry.replace("_", " ") for entry in test.class_names]
        if len(names) != len(test.class_names):
            raise ConfigError(
                f"eval.sets.{name}: {len(names)} class names for {len(test.class_names)} class folders in {test.root}"
            )
    return names


def _templates(name: str, config: EvalSet, folder: Path | None) -> list[str]:
    templates = _listed(name, "templates", config.templates, _NAMED_TEMPLATES, lambda prompt: prompt("{c}"))
    if templates is None and folder is not None:
        templates = _lines(folder / "zeroshot_classification_templates.txt")
    wrong = next((template for template in templates or () if "{c}" not in template), None)
    if wrong is not None:
        raise ConfigError(f"eval.sets.{name}: the template {wrong!r} has no {{c}} where the class name goes")
    return templates or _DEFAULT_TEMPLATES


def _listed(
    name: str, key: str, value: str | None, named: dict[str, str], text: Callable[..., str]
) -> list[str] | None:
    if value is None:
        return None
    if value in named:
        from open_clip import zero_shot_metadata

        return [text(entry) for entry in getattr(zero_shot_metadata, named[value])]
    lines = _lines(Path(value))
    if not lines:
        raise ConfigError(f"eval.sets.{name}.{key}: '{value}' is neither {' nor '.join(named)} nor a file with lines")
    return lines


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
