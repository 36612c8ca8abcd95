"""The index of one shard: which samples a WebDataset tar holds and where their members lie."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data.errors import BadSample, DataError, printable
from data.shards.index_file import read_arrays, unreadable, write_arrays
from data.shards.records import MAX_JSON_BYTES, caption_list, parse_json
from data.shards.tar_reader import BLOCK, TarError, TarMember, scan_members

ROLES = ("image", "caption", "json", "cls")
IMAGE, CAPTION, JSON, CLS = range(4)
# Earlier ones win where a sample has several images.
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
_ROLE_OF_EXTENSION = {**dict.fromkeys(IMAGE_EXTENSIONS, IMAGE), "txt": CAPTION, "json": JSON, "cls": CLS}
_FORMAT = 2
_ARRAYS = {
    "meta": "<i8",
    "offset_blocks": "<u4",
    "sizes": "<u4",
    "captioned": "|b1",
    "key_bytes": "|u1",
    "key_ends": "<i8",
    "excluded": "|u1",
}
_NO_CAPTION = "no caption"
# An archive of nothing is two blocks, padded by some writers; zeros beyond are a file that was never filled.
_MAX_EMPTY_BYTES = 1 << 20


@dataclass(frozen=True)
class ShardIndex:
    """Samples of one shard, in the order of their first member: an image, and a caption or a class label.

    An archive without any member has none, and is no error: writers leave such shards where every download failed.

    Args:
        file_size: Bytes of the shard.
        mtime_ns: Modification time of a local shard, 0 for a remote one.
        offset_blocks: uint32 [n, 4], payload position in 512-byte blocks for each role; 0 = no such member.
        sizes: uint32 [n, 4], payload bytes.
        captioned: bool [n], whether there is a caption; samples without one serve evaluation only.
        key_bytes: uint8 [m], keys one after the other, UTF-8 with surrogate escapes.
        key_ends: int64 [n], end of each key in `key_bytes`.
        excluded: (key, reason) of samples that lack an image, or both a caption and a label.
    """

    file_size: int
    mtime_ns: int
    offset_blocks: np.ndarray
    sizes: np.ndarray
    captioned: np.ndarray
    key_bytes: np.ndarray
    key_ends: np.ndarray
    excluded: tuple[tuple[str, str], ...]

    @property
    def num_samples(self) -> int:
        """Usable samples."""
        return len(self.sizes)

    @property
    def num_bytes(self) -> int:
        """Memory the arrays take."""
        arrays = (self.offset_blocks, self.sizes, self.captioned, self.key_bytes, self.key_ends)
        return sum(array.nbytes for array in arrays)

    def key(self, row: int) -> str:
        """Returns the key of a sample."""
        start = int(self.key_ends[row - 1]) if row else 0
        return self.key_bytes[start : int(self.key_ends[row])].tobytes().decode("utf-8", "surrogateescape")

    def extent(self, row: int, role: int) -> tuple[int, int] | None:
        """Returns (payload offset, size) of a member of a sample, or None if the sample has no such member."""
        block = int(self.offset_blocks[row, role])
        return (block * BLOCK, int(self.sizes[row, role])) if block else None

    def with_captions(self) -> "ShardIndex":
        """Returns the index of the samples that have a caption; the others are excluded."""
        if self.captioned.all():
            return self
        rows = np.flatnonzero(self.captioned)
        keys = [self.key(int(row)).encode("utf-8", "surrogateescape") for row in rows]
        return ShardIndex(
            file_size=self.file_size,
            mtime_ns=self.mtime_ns,
            offset_blocks=self.offset_blocks[rows],
            sizes=self.sizes[rows],
            captioned=self.captioned[rows],
            key_bytes=np.frombuffer(b"".join(keys), dtype=np.uint8),
            key_ends=np.cumsum([len(key) for key in keys], dtype=np.int64),
            excluded=(*self.excluded, *((self.key(int(row)), _NO_CAPTION) for row in np.flatnonzero(~self.captioned))),
        )

    def save(self, path: Path) -> None:
        """Writes the index, atomically."""
        totals = (self.num_samples, len(self.excluded), int(self.captioned.sum()))
        arrays = {
            "meta": np.array([_FORMAT, self.file_size, self.mtime_ns, *totals], dtype=np.int64),
            "excluded": np.frombuffer(json.dumps(self.excluded).encode(), dtype=np.uint8),
        }
        write_arrays(path, arrays | {name: getattr(self, name) for name in _ARRAYS if name not in arrays})

    @staticmethod
    def load(path: Path | BinaryIO) -> "ShardIndex":
        """Reads an index.

        Raises:
            DataError: If the file is damaged, of another format, or contradicts itself.
        """
        arrays = read_arrays(path, _ARRAYS)
        try:
            meta = _checked_meta(arrays.pop("meta"))
            excluded = tuple((str(key), str(reason)) for key, reason in json.loads(arrays.pop("excluded").tobytes()))
            index = ShardIndex(file_size=meta.file_size, mtime_ns=meta.mtime_ns, excluded=excluded, **arrays)
            _check_arrays(index, meta)
        except (ValueError, TypeError, RecursionError) as error:
            raise unreadable(path, str(error)) from None
        return index


@dataclass(frozen=True)
class ShardMeta:
    """What a run keeps of every shard.

    Args:
        file_size: Bytes of the shard.
        mtime_ns: Modification time of a local shard, 0 for a remote one.
        num_samples: Samples with an image and a caption or a label.
        num_excluded: The others.
        num_captioned: Samples with an image and a caption.
    """

    file_size: int
    mtime_ns: int
    num_samples: int
    num_excluded: int
    num_captioned: int


def load_meta(path: Path) -> ShardMeta:
    """Reads only the totals of an index.

    Raises:
        DataError: If the file is damaged or of another format.
    """
    try:
        return _checked_meta(read_arrays(path, {"meta": _ARRAYS["meta"]})["meta"])
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise unreadable(path, str(error)) from None


def _checked_meta(values: np.ndarray) -> ShardMeta:
    if values.shape != (6,) or values[0] != _FORMAT:
        raise ValueError("another format version")
    meta = ShardMeta(*(int(value) for value in values[1:]))
    # An image takes two blocks at least, any other member one.
    fits = 0 <= meta.num_samples <= meta.file_size // (2 * BLOCK) and 0 <= meta.num_captioned <= meta.num_samples
    if not fits or not 0 <= meta.num_excluded <= meta.file_size // BLOCK:
        raise ValueError("more samples than its shard has room for")
    return meta


def _check_arrays(index: ShardIndex, meta: ShardMeta) -> None:
    shape = (meta.num_samples, len(ROLES))
    if index.offset_blocks.shape != shape or index.sizes.shape != shape:
        raise ValueError("its arrays do not fit together")
    if index.captioned.shape != shape[:1] or int(index.captioned.sum()) != meta.num_captioned:
        raise ValueError("its arrays do not fit together")
    if index.key_ends.shape != shape[:1] or index.key_bytes.ndim != 1 or len(index.excluded) != meta.num_excluded:
        raise ValueError("its arrays do not fit together")
    last_end = index.key_ends[-1] if len(index.key_ends) else 0
    if (np.diff(index.key_ends, prepend=0) < 0).any() or last_end != len(index.key_bytes):
        raise ValueError("its keys overlap")
    present = index.offset_blocks > 0
    texts = present[:, CAPTION] | present[:, JSON]
    if not (present[:, IMAGE] & np.where(index.captioned, texts, present[:, CLS])).all():
        raise ValueError("a sample without its members")
    ends = index.offset_blocks.astype(np.int64) * BLOCK + index.sizes
    if (ends[present] > index.file_size).any():
        raise ValueError("a member behind the end of the shard")


def split_member_name(name: str) -> tuple[str, str] | None:
    """Splits a member name into key and extension at the first dot of the last path component.

    Args:
        name: Member name, for example "a/0001.jpg".

    Returns:
        (key, lower-case extension), or None for names that belong to no sample (hidden files, no dot).
    """
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not stem or not dot:
        return None
    return folder + slash + stem, extension.lower()


class _Collector:
    """Groups the members of one shard by key.

    Attributes:
        dotted: Names of images by key, for those with a dot before their extension: "a.b.jpg" belongs to "a".
    """

    def __init__(self) -> None:
        self.rows: dict[str, list[TarMember | None]] = {}
        self.dotted: dict[str, list[str]] = {}
        self.num_members = 0
        self.links: set[str] = set()
        self.extensions: set[str] = set()
        self.last_key: str | None = None

    def add(self, member: TarMember) -> None:
        self.num_members += 1
        parts = split_member_name(member.name)
        if parts is None:
            return
        key, extension = parts
        self.last_key = key
        row = self.rows.setdefault(key, [None] * len(ROLES))
        self.extensions.add(extension)
        role = _ROLE_OF_EXTENSION.get(extension)
        if role is None:
            if extension.rpartition(".")[2] in IMAGE_EXTENSIONS:
                self.dotted.setdefault(key, []).append(member.name)
            return
        if member.is_link:
            self.links.add(key)
            return
        present = row[role]
        if present is not None:
            before = split_member_name(present.name)[1]
            if before == extension:
                raise TarError(f"the member {member.name!r} twice; keys must be unique in a shard")
            if IMAGE_EXTENSIONS.index(before) < IMAGE_EXTENSIONS.index(extension):
                return
        row[role] = member

    def lacks_image(self, key: str) -> str | None:
        """Says what is wrong with the image of a sample, or None."""
        image = self.rows[key][IMAGE]
        if image is None:
            return "its image is a link" if key in self.links else "no image"
        return "the image is empty" if image.size == 0 else None

    def excluded(self, key: str, reason: str) -> list[tuple[str, str]]:
        """Entries for a sample that is left out: one for each picture, where dots in names made them one sample."""
        images = self.dotted.get(key)
        if images is None or self.rows[key][IMAGE] is not None:
            return [(key, reason)]
        rule = f"no image: a key ends at the first dot, so this name has the key {printable(key, 60)!r}"
        return [(name, rule) for name in images]

    def lacks_caption(self, key: str, stream: BinaryIO) -> str | None:
        """Says why a sample has no caption, or None if it has one."""
        _, caption, record, _ = self.rows[key]
        if caption is not None and caption.size:
            return None
        if record is None and caption is not None:
            return "the caption is empty"
        if record is None:
            return "its caption is a link" if key in self.links else _NO_CAPTION
        if record.size > MAX_JSON_BYTES:
            return f"the .json member has {record.size} bytes, above the limit of {MAX_JSON_BYTES}"
        # Only here is a payload read: without a .txt member, a usable caption must be in the JSON.
        stream.seek(record.offset)
        try:
            caption_list(None, parse_json(stream.read(record.size)))
        except BadSample as bad:
            return bad.reason
        return None

    def is_labelled(self, key: str) -> bool:
        """Whether a sample has a class label."""
        label = self.rows[key][CLS]
        return label is not None and label.size > 0


def scan_stream(stream: BinaryIO, file_size: int, *, name: str, mtime_ns: int = 0) -> ShardIndex:
    """Builds the index of a shard.

    Args:
        stream: Seekable binary file.
        file_size: Its bytes.
        name: Name of the shard for messages.
        mtime_ns: Modification time to record.

    Returns:
        Its index; of no samples if the archive has no members at all.

    Raises:
        DataError: If the archive is damaged, has duplicate keys, or members of which none is a usable sample.
    """
    collector = _Collector()
    try:
        for member in scan_members(stream, file_size):
            collector.add(member)
    except TarError as error:
        last = f"; the last good key is {collector.last_key!r}" if collector.last_key is not None else ""
        raise DataError(f"{name}: found {error.reason}{last}; write or download the shard again") from None
    if not collector.num_members and file_size > _MAX_EMPTY_BYTES:
        raise DataError(f"{name}: {file_size} bytes without a single member; write or download the shard again")
    if collector.num_members and not collector.rows:
        raise DataError(f"{name}: an archive without samples; expected members KEY.jpg and KEY.txt")
    kept, captioned, excluded = [], [], []
    for key in collector.rows:
        reason = collector.lacks_image(key)
        without_caption = reason or collector.lacks_caption(key, stream)
        if without_caption is None or (reason is None and collector.is_labelled(key)):
            kept.append(key)
            captioned.append(without_caption is None)
        else:
            excluded.extend(collector.excluded(key, without_caption))
    if excluded and not kept:
        found = ", ".join(printable(name[:16]) for name in sorted(collector.extensions)[:8])
        raise DataError(
            f"{name}: none of its {len(excluded)} samples has an image and a caption (the first: {excluded[0][1]}; "
            f"extensions found: {found}); expected KEY.{'|'.join(IMAGE_EXTENSIONS)} and KEY.txt"
            f"{_dot_rule(collector)}"
        )
    return _pack(collector.rows, kept, captioned, excluded, file_size=file_size, mtime_ns=mtime_ns, name=name)


def _dot_rule(collector: _Collector) -> str:
    """What to say where names have dots before their extension."""
    first = next((images[0] for images in collector.dotted.values()), None)
    if first is None:
        return ", where KEY has no dot"
    key, extension = split_member_name(first)
    return (
        f"; a key ends at the first dot of a name, so {printable(first, 60)!r} has the key {printable(key, 60)!r} and "
        f"the extension {printable(extension, 60)!r}: write the shards with keys that have no dot"
    )


def _pack(
    rows: dict[str, list[TarMember | None]],
    kept: list[str],
    captioned: list[bool],
    excluded: list[tuple[str, str]],
    *,
    file_size: int,
    mtime_ns: int,
    name: str,
) -> ShardIndex:
    limit = np.iinfo(np.uint32).max
    if file_size // BLOCK > limit:
        raise DataError(f"{name}: {file_size} bytes; shards above 2 TiB are not supported, split it")
    members = [rows[key] for key in kept]
    encoded = [key.encode("utf-8", "surrogateescape") for key in kept]
    return ShardIndex(
        file_size=file_size,
        mtime_ns=mtime_ns,
        offset_blocks=_table([[m.offset // BLOCK if m else 0 for m in row] for row in members]),
        # Members of 4 GiB and more are refused when read, whatever their exact size.
        sizes=_table([[min(m.size, limit) if m else 0 for m in row] for row in members]),
        captioned=np.array(captioned, dtype=bool),
        key_bytes=np.frombuffer(b"".join(encoded), dtype=np.uint8),
        key_ends=np.cumsum([len(key) for key in encoded], dtype=np.int64),
        excluded=tuple(excluded),
    )


def _table(rows: list[list[int]]) -> np.ndarray:
    # The shape is that of no rows too.
    return np.array(rows, dtype=np.uint32).reshape(-1, len(ROLES))
