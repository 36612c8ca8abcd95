"""Remote shards: fetched whole into a bounded folder that all ranks and workers of a node share.

A shard is a local file once it is here, so random access, the index and the order work as for local data. Files appear
by rename, complete or not at all; a lock file makes one process fetch what several want; the least recently used files
go first when the folder is full. A file that is removed while open stays readable for whoever has it open.
"""

import errno
import hashlib
import http.client
import os
import random
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock

from data.errors import DataError, printable
from data.shards.cache import atomic_path, writing_cache

DEFAULT_CACHE_BYTES = 100 << 30
MAX_FILE_BYTES = 64 << 30
MAX_SMALL_FILE_BYTES = 256 << 20
_CHUNK = 1 << 20
_LOCK_FILES = 1024
_PERMANENT_STATUS = frozenset({400, 401, 403, 404, 405, 410, 451})
_DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG})
_REMEMBER_FAILURE_S = 120.0
_ABANDONED_S = 6 * 3600.0
_MAX_BACKOFF_S = 30.0
# A server that sends less than this over a whole `timeout_s` is taken for dead.
_MIN_BYTES_PER_S = 1024
# What fsspec may be asked for; its other schemes reach into local files, archives and chains of them.
_SCHEMES = frozenset(
    {"s3", "s3a", "gs", "gcs", "hf", "abfs", "abfss", "az", "adl", "oss", "oci", "hdfs", "webhdfs", "sftp", "memory"}
)
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub", "abfs": "adlfs"}


class FetchError(Exception):
    """A remote file could not be fetched.

    Args:
        reason: Made one line.
        permanent: Whether trying again is pointless.
        absent: Whether the server says that there is no such file.
    """

    def __init__(self, reason: str, *, permanent: bool = False, absent: bool = False) -> None:
        super().__init__(reason)
        self.reason = printable(reason)
        self.permanent = permanent
        self.absent = absent


def display_name(shard: str) -> str:
    """Returns the name of a shard for messages and records: URLs lose passwords, tokens and queries.

    Args:
        shard: Path, URL or `pipe:` command.
    """
    if shard.startswith("pipe:") or "://" not in shard:
        return printable(shard)
    try:
        parts = urllib.parse.urlsplit(shard)
    except ValueError:
        return printable(shard.partition("?")[0].rpartition("@")[2])
    return printable(urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", "")))


@dataclass
class RemoteCache:
    """Fetches remote files into a bounded folder.

    Args:
        folder: Where the files go; created when first used.
        max_bytes: Total size that is kept; one file larger than that is still fetched.
        max_file_bytes: Largest file that is fetched.
        allow_pipe: Whether `pipe:COMMAND` shards may run their shell command.
        attempts: How often a fetch is tried, with growing pauses.
        timeout_s: Longest silence of a server.
        backoff_s: First pause; each next one is twice as long.
    """

    folder: Path
    max_bytes: int = DEFAULT_CACHE_BYTES
    max_file_bytes: int = MAX_FILE_BYTES
    allow_pipe: bool = False
    attempts: int = 5
    timeout_s: float = 60.0
    backoff_s: float = 0.5
    _failed: dict[str, tuple[float, FetchError]] = field(default_factory=dict, repr=False)

    def path(self, url: str) -> Path:
        """Returns where a URL is kept, fetched or not."""
        digest = hashlib.blake2b(url.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()
        return self.folder / f"{digest}.shard"

    def fetch(self, url: str, size: int | None = None) -> Path:
        """Makes sure that a file is here, and marks it as recently used.

        Args:
            url: http(s), any scheme fsspec knows, or `pipe:COMMAND`.
            size: Its bytes, if known. Servers and proxies have sent part of a file as if it were the whole; what is
                here or arrives with another size is fetched again.

        Returns:
            Its path; another process may evict it at any time, so prefer `open`.

        Raises:
            FetchError: If it cannot be fetched. The failure is remembered for two minutes, so that the samples of a
                lost shard do not wait one by one.
            DataError: If the scheme needs a package or a permission that is missing, or the disk is full.
        """
        path = self.path(url)
        with writing_cache(self.folder):
            if _touch(path, size):
                return path
        when, error = self._failed.get(url, (0.0, None))
        if error is not None and time.monotonic() - when < _REMEMBER_FAILURE_S:
            raise error
        with writing_cache(self.folder), self._lock(path.stem):
            if not _touch(path, size):
                try:
                    self._fetch_with_retries(url, path, self.max_file_bytes, size)
                except FetchError as failure:
                    self._failed[url] = time.monotonic(), failure
                    raise
                self._failed.pop(url, None)
        with writing_cache(self.folder):
            self._evict(keep=path)
        return path

    def discard(self, url: str) -> None:
        """Forgets a file, so that it is fetched again when next asked for."""
        self.path(url).unlink(missing_ok=True)

    def pause(self, attempt: int) -> None:
        """Waits before trying something again; longer after each attempt, counted from 0."""
        # Many ranks that lost the same server should not come back in the same instant.
        time.sleep(min(_MAX_BACKOFF_S, self.backoff_s * 2**attempt) * (0.5 + random.random() / 2))

    def open(self, url: str, size: int | None = None) -> BinaryIO:
        """Opens a file, fetched first if need be.

        Args:
            url: See `fetch`.
            size: See `fetch`.

        Raises:
            FetchError, DataError: See `fetch`.
        """
        for _ in range(10):
            path = self.fetch(url, size)
            try:
                return path.open("rb", buffering=1 << 16)
            except FileNotFoundError:
                # Evicted between the two lines by another process.
                continue
        raise DataError(
            f"{display_name(url)} is evicted from {self.folder} as soon as it is fetched; raise the cache limit above "
            f"{self.max_bytes} bytes"
        )

    def fetch_bytes(self, url: str) -> bytes | None:
        """Fetches a small file, without keeping it.

        Args:
            url: See `fetch`.

        Returns:
            Its content, or None if the server says that it does not exist.

        Raises:
            FetchError, DataError: See `fetch`.
        """
        with writing_cache(self.folder), atomic_path(self.folder / "small.bin") as temporary:
            try:
                self._try_repeatedly(url, temporary, min(MAX_SMALL_FILE_BYTES, self.max_file_bytes))
            except FetchError as error:
                if error.absent:
                    return None
                raise
            return temporary.read_bytes()

    def _lock(self, stem: str) -> FileLock:
        # A fixed number of lock files: one per URL would leave as many files behind as there are shards.
        folder = self.folder / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / f"{int(stem, 16) % _LOCK_FILES:04d}.lock")

    def _fetch_with_retries(self, url: str, path: Path, limit: int, size: int | None) -> None:
        with atomic_path(path) as temporary:
            self._try_repeatedly(url, temporary, limit, size)

    def _try_repeatedly(self, url: str, target: Path, limit: int, size: int | None = None) -> None:
        for attempt in range(self.attempts):
            try:
                self._download(url, target, limit)
                found = target.stat().st_size
                if size is None or found == size:
                    return
                raise FetchError(f"{display_name(url)}: got {found} bytes, its index says {size}; index it again")
            except FetchError as error:
                if error.permanent or attempt + 1 == self.attempts:
                    raise
            self.pause(attempt)

    def _download(self, url: str, target: Path, limit: int) -> None:
        scheme = url.partition(":")[0].lower()
        if scheme == "pipe":
            self._run_pipe(url.partition(":")[2], target, limit)
        elif scheme in ("http", "https"):
            self._download_http(url, target, limit)
        else:
            _download_fsspec(url, scheme, target, limit)

    def _run_pipe(self, command: str, target: Path, limit: int) -> None:
        if not self.allow_pipe:
            raise DataError(
                f"the shard 'pipe:{printable(command)}' would run a shell command; set data.allow_pipe true if you "
                "trust it"
            )
        with subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
            try:
                _copy(process.stdout, target, limit, f"the command {command!r}")
            except BaseException:
                process.kill()
                raise
        if process.returncode:
            raise FetchError(f"the command {command!r} ended with status {process.returncode}")

    def _download_http(self, url: str, target: Path, limit: int) -> None:
        name = display_name(url)
        try:
            request = urllib.request.Request(url, headers={"User-Agent": "declip-trainer"})
            opener = urllib.request.build_opener(_SafeRedirects)
            with opener.open(request, timeout=self.timeout_s) as response:
                announced = response.headers.get("Content-Length", "")
                expected = int(announced) if announced.isdecimal() and len(announced) < 20 else None
                if expected is not None and expected > limit:
                    raise _too_large(name, limit)
                written = _copy(response, target, limit, name, self.timeout_s)
        except urllib.error.HTTPError as error:
            raise FetchError(
                f"{name}: HTTP status {error.code}",
                # Redirections that reach this place lead nowhere, or in a circle.
                permanent=error.code in _PERMANENT_STATUS or 300 <= error.code < 400,
                absent=error.code in (403, 404, 410),
            ) from None
        except (OSError, http.client.HTTPException) as error:
            if getattr(error, "errno", None) in _DISK_ERRORS:
                raise
            raise FetchError(f"{name}: {error or type(error).__name__}") from None
        except ValueError as error:
            raise FetchError(f"{name}: not a URL that can be fetched ({error})", permanent=True) from None
        if expected is not None and expected != written:
            raise FetchError(f"{name}: got {written} of {expected} bytes")

    def _evict(self, keep: Path) -> None:
        with FileLock(self.folder / "locks" / "evict.lock"):
            files = []
            for path in self.folder.glob("*.shard"):
                try:
                    status = path.stat()
                except FileNotFoundError:
                    continue
                files.append((status.st_mtime, status.st_size, path))
            total = sum(size for _, size, _ in files)
            for used, size, path in sorted(files):
                # Hidden files are being written; one that has not grown for hours lost its writer.
                unfinished = path.name.startswith(".")
                if unfinished and time.time() - used < _ABANDONED_S:
                    continue
                if path != keep and (unfinished or total > self.max_bytes):
                    path.unlink(missing_ok=True)
                    total -= size


def _touch(path: Path, size: int | None = None) -> bool:
    """Marks a file as recently used; False if it is not there, or not of this size."""
    try:
        found = path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return False
    # Another user's file, or one on a read-only disk, cannot be marked and is as good; one that is gone is asked for
    # again by whoever opens it.
    with suppress(OSError):
        os.utime(path)
    return size is None or found == size


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects from http to http(s) and from https to https: never to files, ftp or a less safe channel."""

    def redirect_request(self, request: Any, stream: Any, code: int, message: str, headers: Any, target: str) -> Any:
        scheme = urllib.parse.urlsplit(target).scheme.lower()
        if scheme != "https" and scheme != request.type:
            raise FetchError(f"{display_name(request.full_url)}: redirected to {display_name(target)}", permanent=True)
        return super().redirect_request(request, stream, code, message, headers, target)


def _too_large(name: str, limit: int) -> FetchError:
    return FetchError(f"{name}: more than {limit} bytes, the largest file that is fetched", permanent=True)


def _copy(source: BinaryIO, target: Path, limit: int, name: str, timeout_s: float | None = None) -> int:
    """Copies a stream into a file and returns its bytes, within a size and, with a timeout, above a lowest rate."""
    # One arrival at a time where possible: waiting for a whole chunk would hide a server that sends drops.
    read = getattr(source, "read1", source.read)
    written, since, at_since = 0, time.monotonic(), 0
    with target.open("wb") as output:
        while piece := read(_CHUNK):
            written += len(piece)
            if written > limit:
                raise _too_large(name, limit)
            output.write(piece)
            now = time.monotonic()
            if timeout_s is not None and now - since > timeout_s:
                if written - at_since < timeout_s * _MIN_BYTES_PER_S:
                    raise FetchError(f"{name}: less than {timeout_s * _MIN_BYTES_PER_S:g} bytes in {timeout_s:g} s")
                since, at_since = now, written
    return written


def _download_fsspec(url: str, scheme: str, target: Path, limit: int) -> None:
    name = display_name(url)
    if scheme not in _SCHEMES:
        raise DataError(f"{name}: {scheme!r} URLs are not read; use a path, http(s), {', '.join(sorted(_SCHEMES))}")
    try:
        import fsspec

        filesystem, path = fsspec.core.url_to_fs(url)
    except ImportError:
        package = _PACKAGES.get(scheme, "fsspec")
        raise DataError(f"{name}: {scheme} URLs need the package {package}; pip install {package}") from None
    except ValueError as error:
        raise DataError(f"{name}: {printable(str(error))}; use a path, http(s), s3, gs or hf URL") from None
    try:
        expected = filesystem.info(path).get("size")
        with filesystem.open(path, "rb") as source:
            written = _copy(source, target, limit, name)
    except FetchError:
        raise
    except FileNotFoundError:
        raise FetchError(f"{name}: no such file", permanent=True, absent=True) from None
    except PermissionError as error:
        raise FetchError(f"{name}: {error}", permanent=True) from None
    except Exception as error:
        if getattr(error, "errno", None) in _DISK_ERRORS:
            raise
        # Storage back ends raise exceptions of their own client libraries.
        raise FetchError(f"{name}: {type(error).__name__}: {error}") from None
    if expected is not None and expected != written:
        raise FetchError(f"{name}: got {written} of {expected} bytes")
