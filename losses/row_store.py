"""Feature rows that wait to be clustered: in memory, or where they would take too much of it in a mapped file."""

import os
import tempfile

import numpy as np
import torch
from torch import Tensor


class RowStore:
    """float32 rows of one width in the order they came.

    Args:
        capacity: Rows it can take.
        dim: Width of a row.
        memory_bytes: A larger store is a file in the folder for temporary files (TMPDIR), mapped into memory, which
            the system writes out and reads back as it needs. The file has no name and ends with the process.

    Raises:
        OSError: There is no room for the file; says what moves it.
    """

    def __init__(self, capacity: int, dim: int, memory_bytes: int) -> None:
        self.dim = dim
        self.is_mapped = 4 * capacity * dim > memory_bytes
        self._count = 0
        if self.is_mapped:
            try:
                self._rows = _mapped(capacity, dim)
            except OSError as error:
                needed = f"{4 * capacity * dim} bytes of features; TMPDIR moves them"
                raise OSError(error.errno, f"{error.strerror or error}, for {needed}", tempfile.gettempdir()) from None
        else:
            self._rows = np.empty((capacity, dim), dtype=np.float32)

    def __len__(self) -> int:
        return self._count

    def append(self, rows: Tensor) -> None:
        """Add rows [m, dim] of any device and floating dtype."""
        stop = self._count + len(rows)
        self._rows[self._count : stop] = rows.detach().float().cpu().numpy()
        self._count = stop

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) on the CPU, a copy."""
        return torch.from_numpy(np.array(self._rows[start : min(stop, self._count)]))

    def select(self, index: Tensor) -> Tensor:
        """The rows at int64 [m] ascending places, on the CPU, a copy."""
        return torch.from_numpy(self._rows[: self._count][index.numpy()])


def _mapped(capacity: int, dim: int) -> np.ndarray:
    with tempfile.TemporaryFile() as file:
        # Not `truncate`: a hole that cannot be filled later kills the process by a signal.
        os.posix_fallocate(file.fileno(), 0, 4 * capacity * dim)
        return np.memmap(file, dtype=np.float32, mode="r+", shape=(capacity, dim))
