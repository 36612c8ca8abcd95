"""Where the splits of an evaluation set are, and whether a folder holds shards or class folders."""

from dataclasses import dataclass
from pathlib import Path

from data.image_folder import folders_in, holds_pictures
from trainer.errors import ConfigError

# Best first. Compared in lower case.
_TEST = ("test", "testing", "val", "valid", "validation", "eval", "dev")
_TRAIN = ("train", "training")


@dataclass(frozen=True)
class Splits:
    """Folders of a set.

    Attributes:
        test: What is evaluated; the whole set where it has no splits.
        train: What probes are fitted on, if there is such a folder.
    """

    test: Path
    train: Path | None


def find_splits(root: Path) -> Splits:
    """The splits of a set: `test` (else `val` and its other names) and `train`, or the folder itself.

    A folder of pictures without classes, as ImageNet's `test`, is no split.

    Raises:
        ConfigError: Splits without one to evaluate, or folders that may be splits or classes.
        DataError: A folder cannot be read.
    """
    names = folders_in(root)
    train = _first(root, names, _TRAIN)
    test = _first(root, names, _TEST)
    if test is not None:
        return Splits(test, train)
    if shards_in(root):
        return Splits(root, train)
    split_names = [name for name in names if name.lower() in (*_TEST, *_TRAIN)]
    flat = next((name for name in split_names if name.lower() in _TEST or len(split_names) == len(names)), None)
    if train is not None or flat is not None:
        given = train.name if train is not None else flat
        raise ConfigError(
            f"{root} has '{given}' and no test or val folder with classes or shards to evaluate; put one folder per "
            "class below test, or give the folder of the classes itself"
        )
    for name in names:
        inner = folders_in(root / name)
        if inner and all(part.lower() in (*_TEST, *_TRAIN) for part in inner):
            raise ConfigError(
                f"{root / name} holds the splits {', '.join(inner)}; give that folder if it is the set, or put the "
                "splits above the classes"
            )
    return Splits(root, None)


def shards_in(folder: Path) -> list[str]:
    """Paths of the tars in a folder, hidden ones left out."""
    return sorted(str(entry) for entry in folder.glob("*.tar") if not entry.name.startswith("."))


def is_image_folder(folder: Path) -> bool:
    """Whether a split is one of class folders; else it is one of shards.

    Raises:
        ConfigError: It holds both.
        DataError: It cannot be read.
    """
    names = folders_in(folder)
    shards = shards_in(folder)
    if not shards or (folder / "nshards.txt").is_file():
        return not shards and bool(names)
    with_pictures = next((name for name in names if holds_pictures(folder / name)), None)
    if with_pictures is not None:
        raise ConfigError(
            f"{folder} holds shards ({Path(shards[0]).name}) and a folder of pictures ('{with_pictures}'); "
            "leave only one of the two in it"
        )
    return False


def _first(root: Path, names: list[str], wanted: tuple[str, ...]) -> Path | None:
    """The first wanted folder that holds classes or shards."""
    for name in sorted((name for name in names if name.lower() in wanted), key=lambda n: (wanted.index(n.lower()), n)):
        folder = root / name
        if folders_in(folder) or shards_in(folder) or (folder / "nshards.txt").is_file():
            return folder
        if wanted is _TEST and not holds_pictures(folder):
            raise ConfigError(f"{folder} holds neither class folders nor shards; fill or remove it")
    return None
