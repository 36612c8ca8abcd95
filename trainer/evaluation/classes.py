"""Which number a class has: lists of class names, and the folders that belong to their lines."""

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data.image_folder import in_class_order, is_number
from trainer.errors import ConfigError

_MAX_LIST_BYTES = 16 << 20
# Lists that ship with open_clip.
_NAMED = {"imagenet": "IMAGENET_CLASSNAMES"}


@dataclass(frozen=True)
class NameList:
    """Class names in the order of the labels: label n is line n + 1.

    Attributes:
        source: The file, or what a shipped list is called.
        names: No two alike, but for those of ImageNet.
    """

    source: str
    names: list[str]

    def place(self, label: int) -> str:
        """Where the name of a label stands, for messages."""
        return f"{self.source} line {label + 1} ('{self.names[label]}')"


@dataclass(frozen=True)
class ClassFolders:
    """The class folders of one split.

    Attributes:
        root: Where they are.
        folders: Their names.
    """

    root: Path
    folders: list[str]


def read_lines(path: Path) -> list[str]:
    """Lines of a text file, stripped, those after the last text left out; none without the file.

    Raises:
        ConfigError: It is too large for a list or no UTF-8.
    """
    if not path.is_file():
        return []
    if path.stat().st_size > _MAX_LIST_BYTES:
        raise ConfigError(f"{path} has more than {_MAX_LIST_BYTES} bytes; that is no list of names")
    try:
        # Not splitlines, which also cuts at characters that stand inside of names; the signature is Windows'.
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").split("\n")]
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text; save it as UTF-8") from None
    while lines and not lines[-1]:
        lines.pop()
    return lines


def read_class_names(value: str | None, own: Path | None) -> NameList | None:
    """The class names of a set.

    Args:
        value: `class_names` of the recipe: a file, or the name of a shipped list.
        own: The set's own classnames.txt, if it is a folder.

    Returns:
        The list; None where there is none.

    Raises:
        ConfigError: A file that is no list, a blank or repeated line, or lists of two lengths.
    """
    ours = None if own is None else _checked(str(own), read_lines(own))
    if value is None:
        return ours
    if value in _NAMED:
        given = NameList(f"the list '{value}'", _shipped(value))
    else:
        given = _checked(value, read_lines(Path(value)))
    if given is None:
        raise ConfigError(f"class_names: '{value}' is neither {' nor '.join(_NAMED)} nor a file with lines")
    if ours is not None and len(ours.names) != len(given.names):
        raise ConfigError(
            f"class_names: {given.source} has {len(given.names)} names, the set's own {own} has {len(ours.names)}; "
            "line n + 1 of both must be the class with label n"
        )
    return given


def folder_labels(split: ClassFolders, listed: NameList) -> dict[str, int]:
    """Labels of class folders by a list: they are named by the line's number from 0, or by the line's name.

    For ImageNet's list also by the WordNet ids of its classes.

    Raises:
        ConfigError: A folder that is neither, one that may be both, or two for one line.
    """
    names = listed.names
    readings = [_by_number(split.folders, names), _by_name(split.folders, names), _by_synset(split.folders, listed)]
    found = [reading for reading in readings if reading is not None]
    if not found:
        raise ConfigError(_misfit(split, listed))
    labels = found[0]
    other = next((reading for reading in found[1:] if reading != labels), None)
    if other is not None:
        folder = next(folder for folder in split.folders if labels[folder] != other[folder])
        raise ConfigError(
            f"class folder {split.root / folder} may be {listed.place(labels[folder])} by its number or "
            f"{listed.place(other[folder])} by its name; rename the folders"
        )
    _check_distinct(split, labels, listed.place)
    return labels


def listed_classes(
    test: ClassFolders | None, train: ClassFolders | None, listed: NameList, train_needed: bool
) -> list[dict[str, int]]:
    """Labels of the class folders of both splits by a list.

    Args:
        test: None where it is shards.
        train: None where it is shards or not there.
        listed: The list.
        train_needed: Whether train will be read; if not, it only shows which classes there are.

    Returns:
        Folder to label of each split; empty where it has no class folders.

    Raises:
        ConfigError: See `folder_labels`; or a line for which neither split has a folder.
    """
    own = {} if test is None else folder_labels(test, listed)
    try:
        others = {} if train is None else folder_labels(train, listed)
    except ConfigError:
        if train_needed:
            raise
        others = {}
    if test is not None:
        missing = sorted(set(range(len(listed.names))) - {*own.values(), *others.values()})
        if missing:
            raise ConfigError(
                f"{len(listed.names)} class names for {len(listed.names) - len(missing)} class folders in {test.root}: "
                f"{listed.place(missing[0])} has no folder, which could be '{missing[0]}'; correct the list, or make "
                "an empty folder for a class without pictures"
            )
    return [own, others]


def unlisted_classes(
    test: ClassFolders, train: ClassFolders | None, train_needed: bool
) -> tuple[list[str], list[dict[str, int]]]:
    """Names and labels of class folders without a list: one numbering for both splits, by train where it has all.

    Returns:
        Class names by label, and folder to label of each split.

    Raises:
        ConfigError: Folders that give the same name, or a class of test that train lacks though it is needed.
    """
    known = {_normal(folder) for folder in train.folders} if train is not None else set()
    strange = [folder for folder in test.folders if _normal(folder) not in known]
    if strange and train_needed:
        raise ConfigError(
            f"class folder {test.root / strange[0]} has no counterpart in {train.root}"
            f"{f', nor have {len(strange) - 1} more' if len(strange) > 1 else ''}; both splits need the same classes"
        )
    base = test if strange or train is None else train
    folders = in_class_order(base.folders)
    names = [_normal(folder).replace("_", " ") for folder in folders]
    numbers: dict[str, int] = {}
    for label, name in enumerate(names):
        if name in numbers:
            raise ConfigError(
                f"class folders '{folders[numbers[name]]}' and '{folders[label]}' of {base.root} give the same class "
                f"name '{name}'; rename one"
            )
        numbers[name] = label
    by_folder = {_normal(folder): label for label, folder in enumerate(folders)}
    labels: list[dict[str, int]] = [{}, {}]
    for number, split in enumerate((test, None if strange else train)):
        if split is not None:
            labels[number] = {folder: by_folder[_normal(folder)] for folder in split.folders}
            _check_distinct(split, labels[number], lambda label: f"'{names[label]}'")
    return names, labels


def _checked(source: str, lines: list[str]) -> NameList | None:
    if not lines:
        return None
    blank = next((number for number, line in enumerate(lines, start=1) if not line), None)
    if blank is not None:
        raise ConfigError(f"{source} line {blank} is blank; line n + 1 names the class with label n, so take it out")
    first: dict[str, int] = {}
    repeated = [(first[line], number) for number, line in enumerate(lines) if first.setdefault(line, number) != number]
    # ImageNet's list, which sets of CLIP_benchmark hold, repeats two names.
    if repeated and lines != _shipped("imagenet"):
        before, number = repeated[0]
        raise ConfigError(
            f"{source} line {number + 1} repeats '{lines[number]}' of line {before + 1}; two classes of one name "
            "cannot be told apart"
        )
    return NameList(source, lines)


def _shipped(name: str) -> list[str]:
    from open_clip import zero_shot_metadata

    return list(getattr(zero_shot_metadata, _NAMED[name]))


def _by_number(folders: list[str], names: list[str]) -> dict[str, int] | None:
    if not all(is_number(folder) and int(folder) < len(names) for folder in folders):
        return None
    return {folder: int(folder) for folder in folders}


def _by_name(folders: list[str], names: list[str]) -> dict[str, int] | None:
    numbers = {_normal(name): label for label, name in reversed(list(enumerate(names)))}

    def label(folder: str) -> int | None:
        return numbers.get(_normal(folder), numbers.get(_normal(folder).replace("_", " ")))

    found = {folder: label(folder) for folder in folders}
    return None if None in found.values() else found


def _by_synset(folders: list[str], listed: NameList) -> dict[str, int] | None:
    if not all(_is_synset(folder) for folder in folders) or listed.names != _shipped("imagenet"):
        return None
    from timm.data import ImageNetInfo

    numbers = {synset: label for label, synset in enumerate(ImageNetInfo("imagenet-1k").label_names())}
    found = {folder: numbers.get(folder) for folder in folders}
    return None if None in found.values() else found


def _is_synset(folder: str) -> bool:
    return len(folder) == 9 and folder[0] == "n" and is_number(folder[1:])


def _misfit(split: ClassFolders, listed: NameList) -> str:
    """Why class folders do not belong to a list."""
    count, names = len(listed.names), {_normal(name) for name in listed.names}
    if all(map(is_number, split.folders)):
        numbers = sorted(map(int, split.folders))
        folder = next(folder for folder in split.folders if int(folder) >= count)
        counted = "; they count from 1 instead of 0" if numbers[0] == 1 and numbers[-1] == count else ""
        return (
            f"class folder {split.root / folder} is beyond {listed.source}, which has {count} names: folders are its "
            f"line numbers from 0, so 0 to {count - 1}{counted}; rename the folders or correct the list"
        )
    by_number = [f for f in split.folders if not (is_number(f) and int(f) < count)]
    by_name = [f for f in split.folders if not {_normal(f), _normal(f).replace("_", " ")} & names]
    folder = min(by_number, by_name, key=len)[0]
    return (
        f"class folder {split.root / folder} belongs to no line of {listed.source}: with a list, folders are its line "
        f"numbers (0 to {count - 1}) or its names; rename them, or leave the list out and the folders give the names"
    )


def _check_distinct(split: ClassFolders, labels: dict[str, int], place: Callable[[int], str]) -> None:
    first: dict[int, str] = {}
    for folder, label in labels.items():
        if label in first:
            raise ConfigError(
                f"class folders '{first[label]}' and '{folder}' of {split.root} are both {place(label)}; keep one"
            )
        first[label] = folder


def _normal(name: str) -> str:
    """The same text in one form: file systems compose accents in different ways."""
    return unicodedata.normalize("NFC", name)
