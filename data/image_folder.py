"""Folders of pictures for evaluation: one folder per class, as torchvision's ImageFolder lays them out."""

from dataclasses import dataclass
from pathlib import Path

from data.errors import BadSample, DataError
from data.shards.reader import RawSample, ReadLimits
from data.shards.shard_index import IMAGE

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True)
class ImageFolder:
    """Labelled pictures in files.

    Attributes:
        root: Holds one folder per class.
        class_names: Names of these folders, sorted; a label is a position in this list.
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


def open_image_folder(root: Path) -> ImageFolder:
    """Lists an image folder.

    Raises:
        DataError: No class folders, or one without pictures.
    """
    # Here, as it imports torch's compiler, a second that every loader worker would spend.
    from torchvision.datasets.folder import find_classes, make_dataset

    try:
        names, by_name = find_classes(str(root))
        found = make_dataset(str(root), by_name, extensions=EXTENSIONS)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(
            f"{root} is no image folder (one folder of {', '.join(EXTENSIONS)} per class): {error}"
        ) from None
    return ImageFolder(root, tuple(names), tuple(path for path, _ in found), tuple(label for _, label in found))
