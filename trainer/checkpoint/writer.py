"""Writing one file of a checkpoint: hashed while it is written, flushed, and never failing half-way through a save."""

import errno
import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

import torch

# Below this, handing a piece to the hashing thread takes longer than hashing it.
_INLINE_BYTES = 1 << 16


class FolderWriter:
    """Writes this rank's files of a checkpoint.

    DeepSpeed saves between barriers, so a rank that raised in the middle would leave the others waiting: errors of the
    file system are kept in `error`, and what follows is discarded.

    Attributes:
        entries: Size and checksum of each file, by name.
        error: What went wrong, in a line; None while all is well.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: dict[str, dict[str, Any]] = {}
        self.error: str | None = None
        self._pool = ThreadPoolExecutor(1)

    def save(self, state_dict: dict[str, Any], path: str | Path) -> None:
        """Write one file with `torch.save`; same signature as a DeepSpeed checkpoint engine's."""
        if self.error is not None:
            return
        try:
            with Path(path).open("wb", buffering=0) as stream:
                sink = _HashingSink(stream, self._pool)
                with _without_crc():
                    torch.save(_plain(state_dict), sink)
                if sink.error is None:
                    os.fsync(stream.fileno())
        except OSError as error:
            self.error = describe_os_error(error, path)
            return
        if sink.error is not None:
            self.error = describe_os_error(sink.error, path)
            return
        name = str(Path(path).relative_to(self.folder))
        self.entries[name] = {"size": sink.size, "sha256": sink.digest.hexdigest()}

    def close(self) -> None:
        """End the hashing thread."""
        self._pool.shutdown()


def describe_os_error(error: OSError, path: str | Path | None = None) -> str:
    """One line about a failed write."""
    hints = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota is used up", errno.EFBIG: "the file is too big"}
    reason = hints.get(error.errno, error.strerror or str(error))
    where = path or error.filename
    return f"{where}: {reason}" if where else reason


def _plain(value: Any) -> Any:
    """Containers with the values of enumerations for their members: Python before 3.11.4 pickles these by `getattr`,
    which no reader may be asked to call.
    """
    if isinstance(value, Enum):
        return value.value
    if type(value) is dict:
        return {key: _plain(entry) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain(entry) for entry in value)
    return value


class _HashingSink:
    """What `torch.save` writes to. It never raises: the zip writer behind it cannot be left half-way."""

    def __init__(self, stream: Any, pool: ThreadPoolExecutor) -> None:
        self._stream = stream
        self._pool = pool
        self.digest = hashlib.sha256()
        self.size = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if self.error is None:
            # The bytes are only lent for this call, so hashing runs beside writing, not after it.
            hashing = self._pool.submit(self.digest.update, view) if len(view) > _INLINE_BYTES else None
            try:
                self._write_all(view)
            except OSError as error:
                self.error = error
            if hashing is None:
                self.digest.update(view)
            else:
                hashing.result()
            self.size += len(view)
        return len(view)

    def _write_all(self, view: memoryview) -> None:
        while view:
            view = view[self._stream.write(view) :]

    def flush(self) -> None:
        """Nothing is buffered."""


@contextmanager
def _without_crc() -> Iterator[None]:
    """Leave the zip format's own checksums out: they cost more time than writing, and every file has a SHA-256."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)
