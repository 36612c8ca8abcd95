"""Folders of pictures for evaluation: one folder per class, laid out as for torchvision's ImageFolder."""

import os
import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from data.errors import BadSample, DataError
from data.shards.reader import RawSample, ReadLimits
from data.shards.shard_index import IMAGE

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")
# What operating systems and storage boxes leave in folders.
_LITTER = frozenset(("__MACOSX", "lost+found", "@eaDir", "$RECYCLE.BIN", "System Volume Information"))


@dataclass(frozen=True)
class ImageFolder:
    """Labelled pictures in files.

    Attributes:
        root: Holds one folder per class.
        class_names: Names of these folders, by label.
        files: Paths of the pictures, class by class.
        labels: Their labels.
    """

    root: Path
    class_names: tuple[str, ...]
    files: tuple[str, ...]
    labels: tuple[int, ...]

    @property
    def num_samples(self) -> int:
        """Pictures in all classes."""
        return len(self.files)

    def key(self, sample: int) -> str:
        """Path of a picture below the root, without its ending."""
        return str(Path(self.files[sample]).relative_to(self.root).with_suffix(""))

    def read(self, sample: int, limits: ReadLimits) -> RawSample:
        """Reads a picture; its label is in the metadata as "cls" and it has no captions.

        Raises:
            BadSample: The file cannot be read or is too large.
        """
        path, limit = Path(self.files[sample]), limits.for_role(IMAGE)
        try:
            with path.open("rb") as stream:
                image = stream.read(limit + 1)
        except OSError as error:
            raise BadSample(f"cannot read the file: {error.strerror}") from None
        if len(image) > limit:
            raise BadSample(f"the file is above the limit of {limit} bytes")
        return RawSample(str(self.root), self.key(sample), image, [], {"cls": self.labels[sample]})


def is_number(name: str) -> bool:
    """Whether a folder is named by a number: digits only, with or without leading zeros."""
    return re.fullmatch(r"[0-9]{1,18}", name) is not None


def in_class_order(names: Iterable[str]) -> list[str]:
    """Numbers by their value, where all are numbers; else by the alphabet."""
    names = list(names)
    if all(map(is_number, names)):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def folders_in(root: Path) -> list[str]:
    """Names of the folders in a folder, links to folders included, in class order; what a dot begins is skipped.

    Raises:
        DataError: The folder cannot be read, or a link in it leads nowhere.
    """
    found = []
    for entry in _entries(root):
        if entry.is_dir():
            found.append(entry.name)
        elif _is_broken_link(entry) and not _is_picture(entry.name):
            raise DataError(f"{entry.path} is a link to nothing; repair or remove it")
    return in_class_order(found)


def holds_pictures(folder: Path) -> bool:
    """Whether pictures lie in a folder itself."""
    return any(_is_picture(entry.name) for entry in _entries(folder))


def open_image_folder(
    root: Path, labels: Mapping[str, int] | None = None, may_be_empty: Container[str] = ()
) -> ImageFolder:
    """Lists an image folder.

    Pictures lie in the class folders and in folders below them. A link is followed like the folder or file it leads to,
    and nothing is counted twice: what a class reaches a second time is skipped, what a second class reaches is refused.

    Args:
        root: Holds the class folders.
        labels: Label of each class folder; default: their positions in class order.
        may_be_empty: Class folders in which there need not be a picture.

    Raises:
        DataError: No class folders, one without pictures, one that cannot be read, or pictures with two labels.
    """
    names = folders_in(root)
    if not names:
        raise DataError(f"{root} is no image folder: expected one folder of {', '.join(EXTENSIONS)} per class")
    if labels is None:
        labels = {name: label for label, name in enumerate(names)}
    names.sort(key=labels.__getitem__)
    listing = _Listing(root)
    by_class = listing.pictures(names)
    empty = next((name for name in names if not by_class[name] and name not in may_be_empty), None)
    if empty is not None or not any(by_class.values()):
        empty = names[0] if empty is None else empty
        raise DataError(
            f"class folder {root / empty} holds no pictures ({', '.join(EXTENSIONS)}); fill it, or remove it"
        )
    pairs = [(file, labels[name]) for name in names for file in by_class[name]]
    return ImageFolder(root, tuple(names), tuple(file for file, _ in pairs), tuple(label for _, label in pairs))


@dataclass
class _Listing:
    """Walks the class folders of a root: first what really lies in them, then what links lead to.

    Attributes:
        root: Holds the class folders.
        owners: Class of each real folder that was walked, and of each real file a link led to, with the path taken.
        found: (class, folder, name) of the pictures.
        folder_links: (class, path) of links to folders.
        file_links: The same of links to files.
    """

    root: Path
    owners: dict[str, tuple[str, str]] = field(default_factory=dict)
    found: list[tuple[str, str, str]] = field(default_factory=list)
    folder_links: list[tuple[str, str]] = field(default_factory=list)
    file_links: list[tuple[str, str]] = field(default_factory=list)

    def pictures(self, names: list[str]) -> dict[str, list[str]]:
        """Paths of the pictures of each class, in torchvision's order: by folder, then by name."""
        for name in names:
            path = f"{self.root}/{name}"
            if Path(path).is_symlink():
                self.folder_links.append((name, path))
            else:
                self._walk(name, path)
        # The list grows while it is gone through: links lead to further links.
        for name, path in self.folder_links:
            real = os.path.realpath(path)
            if os.path.commonpath([real, os.path.realpath(self.root)]) == real:
                raise DataError(f"{path} is a link to {real}, which holds the set itself; remove it")
            self._walk(name, path)
        for name, path in self.file_links:
            self._add_linked_file(name, path)
        by_class: dict[str, list[str]] = {name: [] for name in names}
        for name, folder, file in sorted(self.found):
            by_class[name].append(f"{folder}/{file}")
        return by_class

    def _walk(self, name: str, top: str) -> None:
        waiting = [(top, os.path.realpath(top))]
        while waiting:
            folder, real = waiting.pop()
            if not self._claim(name, folder, real):
                continue
            for entry in _entries(Path(folder)):
                is_link, is_picture = entry.is_symlink(), _is_picture(entry.name)
                if is_link and entry.is_dir():
                    self.folder_links.append((name, entry.path))
                elif entry.is_dir():
                    waiting.append((entry.path, f"{real}/{entry.name}"))
                elif is_link and is_picture:
                    self.file_links.append((name, entry.path))
                elif _is_broken_link(entry):
                    raise DataError(f"{entry.path} is a link to nothing; repair or remove it")
                elif is_picture and entry.is_file():
                    self.found.append((name, folder, entry.name))

    def _add_linked_file(self, name: str, path: str) -> None:
        real = os.path.realpath(path)
        folder, file = os.path.split(real)
        is_listed = folder in self.owners and _is_picture(file) and not file.startswith(".")
        if is_listed:
            self._claim(name, path, folder)
        # A broken one stays, so that it is counted among the pictures that cannot be read.
        elif self._claim(name, path, real) and (Path(real).is_file() or not Path(real).exists()):
            self.found.append((name, *os.path.split(path)))

    def _claim(self, name: str, path: str, real: str) -> bool:
        """Whether something real is met for the first time."""
        owner, before = self.owners.setdefault(real, (name, path))
        if owner != name:
            raise DataError(
                f"{path} leads to what class '{owner}' already has ({before}), so that pictures would have two labels; "
                "remove the link or put a copy in its place"
            )
        return before == path


def _entries(folder: Path) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            kept = [entry for entry in entries if not entry.name.startswith(".") and entry.name not in _LITTER]
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({error.strerror}); it should hold one folder per class") from None
    # Of two links to one thing the first counts, on every rank the same.
    return sorted(kept, key=lambda entry: entry.name)


def _is_broken_link(entry: os.DirEntry) -> bool:
    return entry.is_symlink() and not Path(entry.path).exists()


def _is_picture(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)
