"""The index of one shard: which samples a WebDataset tar holds and where their members lie."""

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data.cache import atomic_path
from data.errors import BadSample, DataError
from data.records import caption_list, parse_json
from data.tar_reader import BLOCK, TarError, TarMember, scan_members

ROLES = ("image", "caption", "json", "cls")
IMAGE, CAPTION, JSON, CLS = range(4)
# Earlier ones win where a sample has several images.
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
_ROLE_OF_EXTENSION = {**dict.fromkeys(IMAGE_EXTENSIONS, IMAGE), "txt": CAPTION, "json": JSON, "cls": CLS}
_FORMAT = 1
_MAX_SCANNED_JSON = 16 << 20
_UNREADABLE = (ValueError, KeyError, OSError, EOFError, NotImplementedError, zipfile.BadZipFile)


@dataclass(frozen=True)
class ShardIndex:
    """Samples of one shard, in the order of their first member.

    Args:
        file_size: Bytes of the shard.
        mtime_ns: Modification time of a local shard, 0 for a remote one.
        offset_blocks: uint32 [n, 4], payload position in 512-byte blocks for each role; 0 = no such member.
        sizes: uint32 [n, 4], payload bytes.
        key_bytes: uint8 [m], keys one after the other, UTF-8 with surrogate escapes.
        key_ends: int64 [n], end of each key in `key_bytes`.
        excluded: (key, reason) of samples that lack an image or a caption.
    """

    file_size: int
    mtime_ns: int
    offset_blocks: np.ndarray
    sizes: np.ndarray
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
        return self.offset_blocks.nbytes + self.sizes.nbytes + self.key_bytes.nbytes + self.key_ends.nbytes

    def key(self, row: int) -> str:
        """Returns the key of a sample."""
        start = int(self.key_ends[row - 1]) if row else 0
        return self.key_bytes[start : int(self.key_ends[row])].tobytes().decode("utf-8", "surrogateescape")

    def extent(self, row: int, role: int) -> tuple[int, int] | None:
        """Returns (payload offset, size) of a member of a sample, or None if the sample has no such member."""
        block = int(self.offset_blocks[row, role])
        return (block * BLOCK, int(self.sizes[row, role])) if block else None

    def save(self, path: Path) -> None:
        """Writes the index, atomically."""
        excluded = np.frombuffer(json.dumps(self.excluded).encode(), dtype=np.uint8)
        meta = np.array([_FORMAT, self.file_size, self.mtime_ns, self.num_samples, len(self.excluded)], dtype=np.int64)
        with atomic_path(path) as temporary:
            np.savez(
                temporary,
                meta=meta,
                offset_blocks=self.offset_blocks,
                sizes=self.sizes,
                key_bytes=self.key_bytes,
                key_ends=self.key_ends,
                excluded=excluded,
            )

    @staticmethod
    def load(path: Path | BinaryIO) -> "ShardIndex":
        """Reads an index.

        Raises:
            DataError: If the file is damaged or of another format.
        """
        try:
            with np.load(path, allow_pickle=False) as arrays:
                meta = _checked_meta(arrays["meta"])
                index = ShardIndex(
                    file_size=meta.file_size,
                    mtime_ns=meta.mtime_ns,
                    offset_blocks=arrays["offset_blocks"],
                    sizes=arrays["sizes"],
                    key_bytes=arrays["key_bytes"],
                    key_ends=arrays["key_ends"],
                    excluded=tuple((key, reason) for key, reason in json.loads(arrays["excluded"].tobytes())),
                )
        except _UNREADABLE as error:
            raise DataError(f"{path}: not a readable shard index ({error}); delete it") from None
        shape = (meta.num_samples, len(ROLES))
        if index.offset_blocks.shape != shape or index.sizes.shape != shape or len(index.key_ends) != shape[0]:
            raise DataError(f"{path}: not a readable shard index (its arrays do not fit together); delete it")
        return index


@dataclass(frozen=True)
class ShardMeta:
    """What a run keeps of every shard.

    Args:
        file_size: Bytes of the shard.
        mtime_ns: Modification time of a local shard, 0 for a remote one.
        num_samples: Usable samples.
        num_excluded: Samples without an image or a caption.
    """

    file_size: int
    mtime_ns: int
    num_samples: int
    num_excluded: int


def load_meta(path: Path) -> ShardMeta:
    """Reads only the totals of an index.

    Raises:
        DataError: If the file is damaged or of another format.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return _checked_meta(arrays["meta"])
    except _UNREADABLE as error:
        raise DataError(f"{path}: not a readable shard index ({error}); delete it") from None


def _checked_meta(values: np.ndarray) -> ShardMeta:
    if values.shape != (5,) or values[0] != _FORMAT:
        raise ValueError("another format version")
    return ShardMeta(*(int(value) for value in values[1:]))


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
    """Groups the members of one shard by key."""

    def __init__(self) -> None:
        self.rows: dict[str, list[TarMember | None]] = {}
        self.links: set[str] = set()
        self.extensions: set[str] = set()
        self.last_key: str | None = None

    def add(self, member: TarMember) -> None:
        parts = split_member_name(member.name)
        if parts is None:
            return
        key, extension = parts
        self.last_key = key
        row = self.rows.setdefault(key, [None] * len(ROLES))
        self.extensions.add(extension)
        role = _ROLE_OF_EXTENSION.get(extension)
        if role is None:
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

    def reason_to_exclude(self, key: str, stream: BinaryIO) -> str | None:
        """Says why a sample cannot be used, or None if it can."""
        image, caption, record, _ = self.rows[key]
        if image is None:
            return "its image is a link" if key in self.links else "no image"
        if image.size == 0:
            return "the image is empty"
        if caption is not None and caption.size:
            return None
        if record is None and caption is not None:
            return "the caption is empty"
        if record is None:
            return "its caption is a link" if key in self.links else "no caption"
        if record.size > _MAX_SCANNED_JSON:
            return f"the .json member has {record.size} bytes"
        # Only here is a payload read: without a .txt member, a usable caption must be in the JSON.
        stream.seek(record.offset)
        try:
            caption_list(None, parse_json(stream.read(record.size)))
        except BadSample as bad:
            return bad.reason
        return None


def scan_stream(stream: BinaryIO, file_size: int, *, name: str, mtime_ns: int = 0) -> ShardIndex:
    """Builds the index of a shard.

    Args:
        stream: Seekable binary file.
        file_size: Its bytes.
        name: Name of the shard for messages.
        mtime_ns: Modification time to record.

    Raises:
        DataError: If the archive is damaged, has duplicate keys or no usable sample.
    """
    collector = _Collector()
    try:
        for member in scan_members(stream, file_size):
            collector.add(member)
    except TarError as error:
        last = f"; the last good key is {collector.last_key!r}" if collector.last_key is not None else ""
        raise DataError(f"{name}: found {error.reason}{last}; write or download the shard again") from None
    if not collector.rows:
        raise DataError(f"{name}: an archive without samples; expected members KEY.jpg and KEY.txt")
    kept, excluded = [], []
    for key in collector.rows:
        reason = collector.reason_to_exclude(key, stream)
        if reason is None:
            kept.append(key)
        else:
            excluded.append((key, reason))
    if not kept:
        found = ", ".join(sorted(collector.extensions)[:8])
        raise DataError(
            f"{name}: none of its {len(excluded)} samples has an image and a caption (the first: {excluded[0][1]}; "
            f"extensions found: {found}); expected KEY.{'|'.join(IMAGE_EXTENSIONS)} and KEY.txt"
        )
    return _pack(collector.rows, kept, excluded, file_size=file_size, mtime_ns=mtime_ns, name=name)


def _pack(
    rows: dict[str, list[TarMember | None]],
    kept: list[str],
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
        offset_blocks=np.array([[m.offset // BLOCK if m else 0 for m in row] for row in members], dtype=np.uint32),
        # Members of 4 GiB and more are refused when read, whatever their exact size.
        sizes=np.array([[min(m.size, limit) if m else 0 for m in row] for row in members], dtype=np.uint32),
        key_bytes=np.frombuffer(b"".join(encoded), dtype=np.uint8),
        key_ends=np.cumsum([len(key) for key in encoded], dtype=np.int64),
        excluded=tuple(excluded),
    )
