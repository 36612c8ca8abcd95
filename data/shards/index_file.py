"""Index files: plain arrays in an uncompressed zip, read within bounds, because they come with shards from anywhere."""

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data.errors import DataError, printable
from data.shards.cache import atomic_path

# Far above the index of any shard that can be indexed; see `data.shards.tar_reader`.
MAX_INDEX_BYTES = 1 << 30


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays, atomically.

    Args:
        path: Where to.
        arrays: By name.
    """
    with atomic_path(path) as temporary:
        np.savez(temporary, **arrays)


def read_arrays(source: Path | BinaryIO, dtypes: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Reads arrays of known types. What the file claims about sizes is believed only as far as its bytes go.

    Args:
        source: A file, or a seekable binary stream.
        dtypes: Name and type, for example "<u4", of each array to read.

    Raises:
        DataError: If the file is damaged, too large, or holds anything else.
    """
    try:
        size = source.stat().st_size if isinstance(source, Path) else source.seek(0, io.SEEK_END)
        if size > MAX_INDEX_BYTES:
            raise ValueError(f"{size} bytes")
        with zipfile.ZipFile(source) as archive:
            return {name: _read_array(archive, name, np.dtype(dtype), size) for name, dtype in dtypes.items()}
    except Exception as error:  # zipfile and numpy raise nearly every class on damaged files
        raise unreadable(source, f"{type(error).__name__}: {error}") from None


def unreadable(source: Path | BinaryIO, why: str) -> DataError:
    """The error for an index that cannot be used."""
    name = source if isinstance(source, Path) else "the index beside the shard"
    return DataError(f"{name}: not a readable shard index ({printable(why)[:200]}); delete it")


def _read_array(archive: zipfile.ZipFile, name: str, dtype: np.dtype, file_size: int) -> np.ndarray:
    entry = archive.getinfo(f"{name}.npy")
    # Uncompressed, an entry cannot be larger than the file.
    if entry.compress_type != zipfile.ZIP_STORED or max(entry.file_size, entry.compress_size) > file_size:
        raise ValueError(f"{name} is compressed or cut")
    stream = io.BytesIO(archive.read(entry))
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError(f"{name} is of another format")
    shape, fortran_order, found = np.lib.format.read_array_header_1_0(stream)
    if found != dtype or fortran_order:
        raise ValueError(f"{name} holds {found}")
    # numpy's own reader would allocate what the header claims.
    return np.frombuffer(stream.getbuffer(), dtype, offset=stream.tell()).reshape(shape)
