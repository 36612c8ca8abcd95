"""Random access to the samples of indexed sources, with bounded memory and open files."""

import os
import re
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from data.errors import BadSample, DataError
from data.shards.index_store import IndexedSource, IndexStore
from data.shards.records import MAX_JSON_BYTES, caption_list, parse_json
from data.shards.remote import FetchError, display_name
from data.shards.shard_index import CAPTION, CLS, IMAGE, JSON, ROLES, ShardIndex
from data.shards.sources import is_remote
from data.shards.tar_reader import read_members

_MAX_OPEN_FILES = 64
_MAX_INDEX_BYTES = 128 << 20
_MAX_LABEL_BYTES = 80
# How often a shard in use is marked as recently used in the remote cache.
_TOUCH_EVERY_S = 20.0


@dataclass(frozen=True)
class ReadLimits:
    """Largest members that are read; larger ones make a bad sample instead of a full memory.

    Args:
        max_image_bytes: Stored, compressed image.
        max_caption_bytes: `.txt` and `.cls` members.
        max_json_bytes: `.json` member.
    """

    max_image_bytes: int = 64 << 20
    max_caption_bytes: int = 1 << 20
    max_json_bytes: int = MAX_JSON_BYTES

    def for_role(self, role: int) -> int:
        """Returns the limit of a member role of `data.shards.shard_index`."""
        return {IMAGE: self.max_image_bytes, JSON: self.max_json_bytes}.get(role, self.max_caption_bytes)


@dataclass(frozen=True)
class RawSample:
    """One stored sample.

    Args:
        shard: Shard name for records.
        key: Key in the shard.
        image: Stored image.
        captions: At least one; none for a sample with a class label only.
        metadata: Content of the `.json` member, and the integer or text of the `.cls` member as "cls".
    """

    shard: str
    key: str
    image: bytes
    captions: list[str]
    metadata: dict[str, Any]


class _OpenShard:
    """An open shard file."""

    def __init__(self, stream: BinaryIO, *, remote: bool) -> None:
        self.stream = stream
        self._remote = remote
        self._touched = time.monotonic()

    def descriptor(self) -> int:
        """Returns the file descriptor, and keeps the file among the recently used ones of the cache."""
        now = time.monotonic()
        if self._remote and now - self._touched > _TOUCH_EVERY_S:
            os.utime(self.stream.fileno())
            self._touched = now
        return self.stream.fileno()


class SampleReader:
    """Reads samples by (source, sample).

    One reader belongs to one process; it keeps at most 64 files open and 128 MiB of indexes.

    Args:
        sources: Indexed sources.
        store: Where indexes are found and remote shards fetched.
        limits: Largest members that are read.
    """

    def __init__(self, sources: Sequence[IndexedSource], store: IndexStore, limits: ReadLimits) -> None:
        self._sources = sources
        self._ends = [np.cumsum(source.counts) for source in sources]
        self._store = store
        self._limits = limits
        self._files: OrderedDict[str, _OpenShard] = OrderedDict()
        self._indexes: OrderedDict[str, ShardIndex] = OrderedDict()
        self._index_bytes = 0

    def locate(self, source: int, sample: int) -> tuple[int, int]:
        """Returns (shard number, row in the shard) of a sample of a source."""
        shard = int(np.searchsorted(self._ends[source], sample, side="right"))
        return shard, sample - int(self._ends[source][shard] - self._sources[source].counts[shard])

    def describe(self, source: int, sample: int) -> tuple[str, str]:
        """Returns (shard name, key) for records; a sample whose index is gone is named by its row."""
        number, row = self.locate(source, sample)
        shard = self._sources[source].shards[number]
        try:
            return display_name(shard), self._index(source, number).key(row)
        except BadSample:
            return display_name(shard), f"#{row}"

    def read(self, source: int, sample: int) -> RawSample:
        """Reads a sample.

        Args:
            source: Position of the source.
            sample: Index into its shards concatenated in listed order.

        Raises:
            BadSample: If it cannot be read, whatever the cause: the shard is gone or changed, a member is too large,
                the caption is missing.
            DataError: If remote access is not set up; see `data.shards.remote`.
        """
        number, row = self.locate(source, sample)
        shard = self._sources[source].shards[number]
        index = self._index(source, number)
        roles, extents = [], []
        for role in range(len(ROLES)):
            extent = index.extent(row, role)
            if extent is None:
                continue
            limit = self._limits.for_role(role)
            if extent[1] > limit:
                raise BadSample(f"the {ROLES[role]} member has {extent[1]} bytes, above the limit of {limit}")
            roles.append(role)
            extents.append(extent)
        members = dict(zip(roles, self._read(shard, index, extents), strict=True))
        metadata = parse_json(members[JSON]) if JSON in members else {}
        captions = []
        if index.captioned[row]:
            captions = caption_list(members.get(CAPTION), metadata, by_line=not self._sources[source].captions)
        if CLS in members:
            metadata = {**metadata, "cls": _class_label(members[CLS])}
        return RawSample(display_name(shard), index.key(row), members[IMAGE], captions, metadata)

    def close(self) -> None:
        """Closes all files."""
        for opened in self._files.values():
            opened.stream.close()
        self._files.clear()

    def _index(self, source: int, number: int) -> ShardIndex:
        shard = self._sources[source].shards[number]
        index = self._indexes.get(shard)
        if index is not None:
            self._indexes.move_to_end(shard)
            return index
        try:
            index = self._store.load(shard)
        except DataError as error:
            raise BadSample(str(error)) from None
        if self._sources[source].captions:
            index = index.with_captions()
        if index.num_samples != self._sources[source].counts[number]:
            raise BadSample(f"the shard has {index.num_samples} samples now, other than at the start of the run")
        self._indexes[shard] = index
        self._index_bytes += index.num_bytes
        while self._index_bytes > _MAX_INDEX_BYTES and len(self._indexes) > 1:
            self._index_bytes -= self._indexes.popitem(last=False)[1].num_bytes
        return index

    def _read(self, shard: str, index: ShardIndex, extents: list[tuple[int, int]]) -> list[bytes]:
        try:
            return read_members(self._open(shard, index).descriptor(), extents)
        except OSError:
            # A handle of a network file system goes stale when its server restarts; opening again helps then.
            self._drop(shard)
        try:
            return read_members(self._open(shard, index).descriptor(), extents)
        except OSError as error:
            raise BadSample(f"cannot read the shard: {error.strerror}") from None

    def _drop(self, shard: str) -> None:
        opened = self._files.pop(shard, None)
        if opened is not None:
            opened.stream.close()

    def _open(self, shard: str, index: ShardIndex) -> _OpenShard:
        opened = self._files.get(shard)
        if opened is not None:
            self._files.move_to_end(shard)
            return opened
        remote = is_remote(shard)
        try:
            if remote:
                stream = self._store.remote.open(shard, index.file_size)
            else:
                stream = open(shard, "rb", buffering=0)  # noqa: SIM115, PTH123
        except FetchError as error:
            raise BadSample(error.reason) from None
        size = os.fstat(stream.fileno()).st_size
        if size != index.file_size:
            stream.close()
            raise BadSample(f"the shard has {size} bytes, its index says {index.file_size}; index it again")
        while len(self._files) >= _MAX_OPEN_FILES:
            self._files.popitem(last=False)[1].stream.close()
        self._files[shard] = _OpenShard(stream, remote=remote)
        return self._files[shard]


def _class_label(payload: bytes) -> int | str:
    text = payload[:_MAX_LABEL_BYTES].decode("utf-8", "replace").strip()
    # int() takes more for a number: 1_0, and digits of any script.
    is_number = len(payload) <= _MAX_LABEL_BYTES and re.fullmatch(r"-?[0-9]+", text)
    return int(text) if is_number else text
