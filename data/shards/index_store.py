"""Shard indexes of a data set: found, made where missing, and kept.

An index is an .npz file beside its shard (`SHARD.index.npz`, written by `python -m data.index`) or in the cache folder
of the project, named by the path, size and modification time of the shard. It holds about 50 bytes per sample; a run
keeps only the sample counts in memory and loads the rest shard by shard when needed.
"""

import hashlib
import io
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TypeVar

import numpy as np

from data.errors import DataError
from data.shards.cache import atomic_path, cache_dir, writing_cache
from data.shards.remote import FetchError, RemoteCache, display_name
from data.shards.shard_index import ShardIndex, ShardMeta, load_meta, scan_stream
from data.shards.sources import Source, is_remote
from data.shards.tar_reader import has_end_mark

_SCAN_BUFFER = 64 << 10
_THREADS = 8
# How often a remote shard that looks cut short is fetched before that is believed.
_SCANS = 3
# Opening fewer indexes than this one by one takes less than a second.
_SUMMARY_FROM = 512
# How many bad shards are named, and how much of what is wrong with each.
_NAMED_SHARDS = 20
_MAX_LISTED_CHARS = 200
_MAX_LIST_CHARS = 8000
_Result = TypeVar("_Result")
_Found = TypeVar("_Found", ShardIndex, ShardMeta)


@dataclass(frozen=True)
class IndexedSource:
    """A source with the totals of its shards.

    Args:
        name: See `data.shards.sources.Source`.
        shards: Paths or URLs.
        weight: See `data.shards.sources.Source`.
        counts: int64 [shards], usable samples of each shard.
        sizes: int64 [shards], bytes of each shard.
        num_excluded: Samples that lack what is needed, over all shards.
        captions: Whether every sample needs a caption (training); else a class label will do.
        num_uncaptioned: Samples among the usable ones that have a label only.
        empty: Shards of no samples at all, which are left out of `shards`.
    """

    name: str
    shards: tuple[str, ...]
    weight: float | int | str | Fraction
    counts: np.ndarray
    sizes: np.ndarray
    num_excluded: int = 0
    captions: bool = True
    num_uncaptioned: int = 0
    empty: tuple[str, ...] = ()

    @property
    def num_samples(self) -> int:
        """Usable samples of the source."""
        return int(self.counts.sum())


def fingerprint(sources: Sequence[IndexedSource]) -> str:
    """Returns a hex digest of a data set: source names and weights, shard base names, sizes and sample counts.

    Folders and hosts are left out, so a data set may move between runs.

    Args:
        sources: In order.
    """
    digest = hashlib.blake2b(digest_size=16)
    for source in sources:
        names = [os.path.basename(display_name(shard)) for shard in source.shards]  # noqa: PTH119 - also URLs
        digest.update(repr((source.name if len(sources) > 1 else "", str(source.weight), names)).encode())
        digest.update(source.sizes.astype("<i8").tobytes() + source.counts.astype("<i8").tobytes())
    return digest.hexdigest()


def describe_sources(sources: Sequence[IndexedSource]) -> dict[str, str]:
    """Returns what `fingerprint` goes by, a line for each source by name, to tell where two data sets differ.

    Args:
        sources: In order.
    """
    return {
        source.name: f"{len(source.shards)} shards, {source.num_samples} samples, {int(source.sizes.sum())} bytes, "
        f"weight {source.weight}"
        for source in sources
    }


@dataclass(frozen=True)
class IndexStore:
    """Finds, makes and keeps the indexes of shards.

    Args:
        cache: Cache folder of the project.
        remote: Where remote shards are fetched to.
    """

    cache: Path
    remote: RemoteCache

    @staticmethod
    def create(cache: Path | None = None, **remote_options: object) -> "IndexStore":
        """Makes a store in a cache folder.

        Args:
            cache: Default: the cache folder of the project.
            **remote_options: Options of `RemoteCache`.
        """
        cache = Path(cache) if cache is not None else cache_dir()
        return IndexStore(cache, RemoteCache(cache / "remote", **remote_options))

    def load(self, shard: str, *, rebuild: bool = False) -> ShardIndex:
        """Returns the index of a shard, scanned and kept if there is none yet.

        Args:
            shard: Path or URL.
            rebuild: Scan even if there is an index.

        Raises:
            DataError: If the shard is missing, unreadable, damaged or without usable samples among its members.
        """
        found = None if rebuild else self._find(shard, ShardIndex.load)
        if found is not None:
            return found
        index = self._fetch_or_scan_remote(shard) if is_remote(shard) else scan_shard(shard)
        with writing_cache(self.cache):
            index.save(self._cached_path(shard, index.file_size, index.mtime_ns))
        return index

    def load_meta(self, shard: str) -> ShardMeta:
        """Returns the totals of a shard; see `load`."""
        found = self._find(shard, load_meta)
        if found is not None:
            return found
        index = self.load(shard)
        captioned = int(index.captioned.sum())
        return ShardMeta(index.file_size, index.mtime_ns, index.num_samples, len(index.excluded), captioned)

    def _cached_path(self, shard: str, file_size: int, mtime_ns: int) -> Path:
        identity = shard if is_remote(shard) else f"{Path(shard).absolute()}\n{file_size}\n{mtime_ns}"
        name = hashlib.blake2b(identity.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
        return self.cache / "index" / name[:2] / f"{name}.npz"

    def _find(self, shard: str, read: Callable[[Path], _Found]) -> _Found | None:
        """Reads the index beside a shard, or the one in the cache, if it belongs to the present file."""
        size, mtime_ns = (0, 0) if is_remote(shard) else _file_identity(shard)
        candidates = [self._cached_path(shard, size, mtime_ns)]
        if not is_remote(shard):
            candidates.insert(0, sidecar_path(shard))
        for path in candidates:
            try:
                found = read(path)
            except DataError:
                continue
            if is_remote(shard) or found.file_size == size:
                return found
        return None

    def _fetch_or_scan_remote(self, shard: str) -> ShardIndex:
        try:
            content = None if shard.startswith("pipe:") else self.remote.fetch_bytes(sidecar_url(shard))
            if content is not None:
                # A server may answer anything where there is no index.
                with suppress(DataError):
                    return ShardIndex.load(io.BytesIO(content))
            return self._scan_remote(shard)
        except FetchError as error:
            raise DataError(f"{error.reason}; check the URL and the network") from None

    def _scan_remote(self, shard: str) -> ShardIndex:
        """Scans a fetched shard; one that is damaged, or may have been cut between two members, is fetched again."""
        for attempt in range(_SCANS - 1):
            with self.remote.open(shard) as stream, suppress(DataError):
                size = os.fstat(stream.fileno()).st_size
                index = scan_stream(stream, size, name=display_name(shard))
                # Archives without an end mark exist; most that lack it have lost their second part on the way.
                if has_end_mark(stream, size):
                    return index
            self.remote.discard(shard)
            self.remote.pause(attempt)
        try:
            with self.remote.open(shard) as stream:
                return scan_stream(stream, os.fstat(stream.fileno()).st_size, name=display_name(shard))
        except DataError:
            # Not kept: the next start should find what the server has by then.
            self.remote.discard(shard)
            raise


def sidecar_path(shard: str) -> Path:
    """Returns where the index beside a local shard is."""
    return Path(f"{shard}.index.npz")


def sidecar_url(shard: str) -> str:
    """Returns where the index beside a remote shard is; a query stays at the end."""
    address, mark, query = shard.partition("?")
    return f"{address}.index.npz{mark}{query}"


def _file_identity(shard: str) -> tuple[int, int]:
    try:
        status = Path(shard).stat()
    except OSError as error:
        raise DataError(f"{shard}: {error.strerror}; check the path and its permissions") from None
    return status.st_size, status.st_mtime_ns


def scan_shard(shard: str) -> ShardIndex:
    """Builds the index of a local shard in one pass over its headers.

    Args:
        shard: Path.

    Raises:
        DataError: If the shard is missing, unreadable, damaged or without usable samples.
    """
    try:
        with Path(shard).open("rb", buffering=_SCAN_BUFFER) as stream:
            status = os.fstat(stream.fileno())
            return scan_stream(stream, status.st_size, name=shard, mtime_ns=status.st_mtime_ns)
    except OSError as error:
        raise DataError(f"{shard}: {error.strerror}; check the path and its permissions") from None


def in_threads(work: Callable[[str], _Result], shards: Sequence[str]) -> list[_Result]:
    """Maps over shards in threads.

    Raises:
        DataError: Names all bad shards, after all were tried; see `bad_shards_error`.
    """
    results, problems = _try_each(work, shards)
    if problems:
        raise bad_shards_error(problems, len(shards))
    return results


def _try_each(work: Callable[[str], _Result], shards: Sequence[str]) -> tuple[list[_Result], dict[str, str]]:
    """Returns the results of the good shards, and what is wrong with the others."""

    def attempt(shard: str) -> _Result | DataError:
        try:
            return work(shard)
        except DataError as error:
            return error

    pool = ThreadPoolExecutor(_THREADS)
    try:
        results = list(pool.map(attempt, shards))
    finally:
        # An interrupt must not wait for the shards that are still to come.
        pool.shutdown(wait=False, cancel_futures=True)
    problems = {
        shard: str(result) for shard, result in zip(shards, results, strict=True) if isinstance(result, DataError)
    }
    return [result for result in results if not isinstance(result, DataError)], problems


def bad_shards_error(problems: Mapping[str, str], total: int) -> DataError:
    """One error for all shards that cannot be used.

    Args:
        problems: Shard -> what is wrong with it, at least one.
        total: How many shards there are.
    """
    if len(set(problems.values())) == 1:
        # Of one shard; or word for word of all, which is about no shard: a cache folder that cannot be written.
        return DataError(next(iter(problems.values())))
    named: dict[str, list[str]] = {}
    for shard, problem in list(problems.items())[:_NAMED_SHARDS]:
        name = display_name(shard)
        named.setdefault(problem.removeprefix(f"{name}: ")[:_MAX_LISTED_CHARS], []).append(name[-_MAX_LISTED_CHARS:])
    listed = "; ".join(f"{', '.join(names)}: {problem}" for problem, names in named.items())
    more = len(problems) - _NAMED_SHARDS
    rest = f"; and {more} more" if more > 0 else ""
    return DataError(f"{len(problems)} of {total} shards cannot be used: {listed}{rest}", _MAX_LIST_CHARS)


def index_shards(
    shards: Sequence[str],
    rank: int = 0,
    world_size: int = 1,
    *,
    store: IndexStore | None = None,
    progress: Callable[[], None] | None = None,
) -> dict[str, str]:
    """Makes the missing indexes of this rank's share of the shards.

    There is no communication in here: ranks take shards rank::world_size, and a barrier after it lets every rank read
    what the others made.

    Args:
        shards: All shards, the same list on every rank.
        rank: 0 <= rank < world_size.
        world_size: Ranks that share the work.
        store: Where indexes are kept; default: the cache folder of the project.
        progress: Called after each shard, from several threads.

    Returns:
        Shard -> what is wrong with it, for those of the share that cannot be used; see `bad_shards_error`.
    """
    store = store or IndexStore.create()

    def work(shard: str) -> None:
        store.load_meta(shard)
        if progress is not None:
            progress()

    return _try_each(work, shards[rank::world_size])[1]


def load_sources(
    sources: Sequence[Source], store: IndexStore | None = None, *, captions: bool = True
) -> list[IndexedSource]:
    """Collects the totals of every shard; what has no index yet is scanned.

    Args:
        sources: From `data.shards.sources.parse_sources`.
        store: Where indexes are kept; default: the cache folder of the project.
        captions: False also takes samples that have a class label but no caption, for evaluation.

    Raises:
        DataError: Names all shards that cannot be used; or a source has no samples.
    """
    store = store or IndexStore.create()
    return [_load_source(source, store, captions) for source in sources]


def _load_source(source: Source, store: IndexStore, captions: bool) -> IndexedSource:
    totals = _load_totals(source.shards, store)
    shards, empty = _part_empty(source, totals)
    counts, sizes, excluded, captioned = totals[totals[:, 0] > 0].T
    if captions and not captioned.all():
        shard = shards[int(np.argmin(captioned))]
        raise DataError(f"{display_name(shard)}: no sample has a caption, only class labels; training needs KEY.txt")
    uncaptioned = int((counts - captioned).sum())
    return IndexedSource(
        name=source.name,
        shards=shards,
        weight=source.weight,
        counts=captioned if captions else counts,
        sizes=sizes,
        num_excluded=int(excluded.sum()) + (uncaptioned if captions else 0),
        captions=captions,
        num_uncaptioned=0 if captions else uncaptioned,
        empty=empty,
    )


def _part_empty(source: Source, totals: np.ndarray) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the shards with samples and those without."""
    has_samples = (totals[:, 0] > 0).tolist()
    shards, empty = (
        tuple(shard for shard, there in zip(source.shards, has_samples, strict=True) if there == wanted)
        for wanted in (True, False)
    )
    if not shards:
        raise DataError(
            f"data source {source.name!r}: all of its {len(empty)} shards are empty archives, the first is "
            f"{display_name(empty[0])}; write them again"
        )
    return shards, empty


def empty_warning(shards: Sequence[str]) -> str:
    """What to say about empty shards, at least one."""
    more = f" and {len(shards) - _NAMED_SHARDS} more" if len(shards) > _NAMED_SHARDS else ""
    names = ", ".join(display_name(shard)[-_MAX_LISTED_CHARS:] for shard in shards[:_NAMED_SHARDS])
    return f"{len(shards)} shard(s) are archives without a single member and are left out: {names}{more}"


def _load_totals(shards: Sequence[str], store: IndexStore) -> np.ndarray:
    """Returns int64 [shards, 4]: samples, bytes, excluded samples, samples with captions."""
    if len(shards) < _SUMMARY_FROM:
        return _totals_one_by_one(shards, store)
    # A stat per shard is some ten times cheaper than opening its index, above all on a network file system.
    identities = in_threads(lambda shard: (0, 0) if is_remote(shard) else _file_identity(shard), shards)
    digest = hashlib.blake2b(repr(list(zip(shards, identities, strict=True))).encode("utf-8", "surrogateescape"))
    path = store.cache / "index" / "summaries" / f"{digest.hexdigest()[:32]}.npy"
    try:
        totals = np.load(path, allow_pickle=False)
        if totals.shape == (len(shards), 4) and totals.dtype == np.int64:
            return totals
    except (OSError, ValueError, EOFError):
        pass
    totals = _totals_one_by_one(shards, store)
    with writing_cache(store.cache), atomic_path(path) as temporary:
        np.save(temporary, totals)
    return totals


def _totals_one_by_one(shards: Sequence[str], store: IndexStore) -> np.ndarray:
    metas = in_threads(store.load_meta, shards)
    rows = [(meta.num_samples, meta.file_size, meta.num_excluded, meta.num_captioned) for meta in metas]
    return np.array(rows, dtype=np.int64).reshape(-1, 4)
