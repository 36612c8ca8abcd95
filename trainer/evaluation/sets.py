"""Evaluation sets: folders in CLIP_benchmark's WebDataset layout, image folders, built-in sets, or plain shards."""

import re
from dataclasses import dataclass
from pathlib import Path

from data.demo import NAME as DEMO_NAME
from data.demo import ensure_unicode_symbols
from data.errors import DataError
from data.image_folder import ImageFolder, folders_in, open_image_folder
from data.shards.index_store import IndexedSource, IndexStore, load_sources
from data.sources import parse_sources
from trainer.config.sections import EvalSet
from trainer.errors import ConfigError
from trainer.evaluation.classes import (
    ClassFolders,
    NameList,
    listed_classes,
    read_class_names,
    read_lines,
    unlisted_classes,
)
from trainer.evaluation.splits import Splits, find_splits, is_image_folder, shards_in

_DEFAULT_TEMPLATES = ["{c}"]
_NEED_CLASSES = ("zero_shot", "linear_probe", "few_shot", "bias")
_NEED_TRAINING = ("linear_probe", "few_shot")
# Lists that ship with open_clip.
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
        ConfigError: Missing folder, no shards, a shard that cannot be indexed, class folders or names that do not
            belong together, or a task without the class names, captions or training samples it needs; the message
            names the set.
    """
    try:
        return _open_set(name, config, cache, store)
    except (ConfigError, DataError) as error:
        raise ConfigError(f"eval.sets.{name}: {error}") from None


def _open_set(name: str, config: EvalSet, cache: Path, store: IndexStore) -> EvalData:
    folder = _folder(config.data, cache)
    listed = read_class_names(config.class_names, None if folder is None else folder / "classnames.txt")
    needing = next((task for task in config.tasks if task in _NEED_TRAINING), None)
    splits = None if folder is None else find_splits(folder)
    if needing and (splits is None or splits.train is None):
        raise ConfigError(f"{needing} needs a folder '{config.data}/train' beside test, with classes or shards")
    if splits is None:
        test, train = load_sources(parse_sources(config.data, cache), store, captions=False), None
        class_names = [] if listed is None else listed.names
    else:
        test, train, class_names = _open_splits(splits, listed, bool(needing), cache, store)
    _check_tasks(config, test, class_names)
    probe = (config.probe_group, config.probe)
    return EvalData(
        name, test, train, tuple(config.tasks), class_names, _templates(config, folder), *probe, config.max_samples
    )


def _open_splits(
    splits: Splits, listed: NameList | None, train_needed: bool, cache: Path, store: IndexStore
) -> tuple[Samples, Samples | None, list[str]]:
    """Both splits and their one list of class names."""
    classes = [_class_folders(split) for split in (splits.test, splits.train)]
    if listed is not None:
        class_names, labels = listed.names, listed_classes(*classes, listed, train_needed)
    elif classes[0] is None:
        class_names, labels = [], [{}, {}]
    elif train_needed and classes[1] is None:
        raise ConfigError(
            f"{splits.test} holds class folders and {splits.train} shards, whose labels mean nothing without a list; "
            "add a classnames.txt or set class_names"
        )
    else:
        class_names, labels = unlisted_classes(*classes, train_needed)
        if len(class_names) == 1:
            raise ConfigError(f"{splits.test} has one class folder only ('{class_names[0]}'); expected one per class")
    known = [None if listed is None else split for split in classes]
    test = _open_split(splits.test, classes[0], labels[0], known[0] or classes[1], cache, store)
    if not train_needed:
        return test, None, class_names
    train = _open_split(splits.train, classes[1], labels[1], known[1], cache, store)
    if isinstance(train, ImageFolder) and isinstance(test, ImageFolder):
        lacking = sorted(set(test.labels) - set(train.labels))
        if lacking:
            raise ConfigError(
                f"{splits.train} holds no picture of class '{class_names[lacking[0]]}', of which {splits.test} has some"
                "; probes need all classes"
            )
    return test, train, class_names


def _class_folders(split: Path | None) -> ClassFolders | None:
    if split is None or not is_image_folder(split):
        return None
    return ClassFolders(split, folders_in(split))


def _open_split(
    split: Path,
    classes: ClassFolders | None,
    labels: dict[str, int],
    known: ClassFolders | None,
    cache: Path,
    store: IndexStore,
) -> Samples:
    """One split; a class folder may be empty where a list or the other split knows the class."""
    if classes is not None:
        return open_image_folder(split, labels, () if known is None else known.folders)
    return load_sources(parse_sources(_shards(split), cache), store, captions=False)


def _check_tasks(config: EvalSet, test: Samples, class_names: list[str]) -> None:
    needing = next((task for task in config.tasks if task in _NEED_CLASSES), None)
    if needing and not class_names:
        raise ConfigError(
            f"{needing} needs class names, '{config.data}' has no classnames.txt (CLIP_benchmark's layout); add it, "
            "set class_names, or set tasks: [retrieval]"
        )
    if "retrieval" in config.tasks:
        samples = _total(test)
        without = samples if isinstance(test, ImageFolder) else sum(source.num_uncaptioned for source in test)
        if without:
            raise ConfigError(
                f"retrieval needs captions, {without} of {samples} samples of '{config.data}' have none; set tasks: "
                "[zero_shot]"
            )
    if "bias" in config.tasks:
        _check_probe(config.probe)


def _check_probe(probe: dict[str, list[str]]) -> None:
    if not probe or not all(probe.values()):
        raise ConfigError("bias needs 'probe', class names by category, and 'probe_group'")
    seen: dict[str, str] = {}
    for category, names in probe.items():
        for probed in names:
            if probed in seen:
                raise ConfigError(
                    f"bias: '{probed}' of probe.{category} is also among {seen[probed]}; pictures cannot land in both"
                )
            seen[probed] = f"probe.{category}"


def _total(samples: Samples) -> int:
    return samples.num_samples if isinstance(samples, ImageFolder) else sum(part.num_samples for part in samples)


def _templates(config: EvalSet, folder: Path | None) -> list[str]:
    value, own = config.templates, [] if folder is None else _prompts(folder / "zeroshot_classification_templates.txt")
    if value is None:
        templates = own
    elif value in _NAMED_TEMPLATES:
        from open_clip import zero_shot_metadata

        templates = [prompt("{c}") for prompt in getattr(zero_shot_metadata, _NAMED_TEMPLATES[value])]
    else:
        templates = _prompts(Path(value))
        if not templates:
            raise ConfigError(f"templates: '{value}' is neither {' nor '.join(_NAMED_TEMPLATES)} nor a file with lines")
    wrong = next((template for template in templates if "{c}" not in template), None)
    if wrong is not None:
        raise ConfigError(f"the template {wrong!r} has no {{c}} where the class name goes")
    return templates or _DEFAULT_TEMPLATES


def _prompts(path: Path) -> list[str]:
    return [line for line in read_lines(path) if line]


def _shards(folder: Path) -> str | list[str]:
    """The tars of a folder: those nshards.txt counts, so that a missing one is noticed, else all there are."""
    lines = _prompts(folder / "nshards.txt")
    if not lines:
        return shards_in(folder) or str(folder)
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
