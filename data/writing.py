"""What the operating system refuses, in words; and finding out before the work, not after."""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data.errors import DataError, printable

# What the user can change, and trying again cannot. Not a file that is missing: where one may be, that is asked before.
_FOR_THE_USER = frozenset(
    {
        errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOTDIR, errno.EISDIR,
        errno.ENAMETOOLONG, errno.ELOOP,
    }
)  # fmt: skip
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG})
# More than file systems keep beside the name: a full disk takes an empty file.
_PROBE_BYTES = 1 << 16


def os_reason(error: OSError) -> str:
    """Why the system refused, in a few words."""
    if isinstance(error, FileExistsError):
        return "a file is in the place of the folder"
    return error.strerror or str(error) or type(error).__name__


def refusal(error: Exception) -> str | None:
    """One line about an error that the user has to deal with; None for others (a bug, a network, a failing disk)."""
    if isinstance(error, RuntimeError) and "determine home directory" in str(error):
        return f"user {os.getuid()} has no home folder for '~'; set HOME, or write paths without it"
    if not isinstance(error, OSError):
        return None
    if error.errno == errno.ENOENT and "temporary directory" in str(error):
        return f"{printable(os_reason(error))}; set TMPDIR to a folder that can be written"
    # Sockets and processes are refused as well, without a file's name.
    if error.errno not in (_FOR_THE_USER if error.filename else _FULL):
        return None
    where = f"{error.filename}: " if error.filename else ""
    return printable(f"{where}{os_reason(error)}; check the path, its permissions and the space on its disk")


@contextmanager
def writing_to(place: Path, advice: str) -> Iterator[None]:
    """Turns what the system refuses in the block into one line.

    Args:
        place: What is written, or the folder it is in.
        advice: What to do about it, e.g. "choose another --out".

    Raises:
        DataError: Names the place, the reason and the advice.
    """
    try:
        yield
    except OSError as error:
        raise DataError(f"{place} cannot be written ({os_reason(error)}); {advice}") from None


def try_folder(folder: Path, advice: str, *, make: bool = True) -> None:
    """Makes a folder and tries a file in it, so that hours of work do not end at a place that refuses.

    Args:
        folder: Where something will be written.
        advice: See `writing_to`.
        make: False refuses a folder that is not there.

    Raises:
        DataError: See `writing_to`.
    """
    with writing_to(folder, advice):
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=".probe-", dir=folder) as probe:
            probe.write(bytes(_PROBE_BYTES))
            probe.flush()


def try_file(path: Path, advice: str, *, make: bool = True) -> None:
    """`try_folder` for a file that will be written, or replaced.

    Args:
        path: The file.
        advice: See `writing_to`.
        make: See `try_folder`; of the folder it is in.

    Raises:
        DataError: See `writing_to`.
    """
    try_folder(path.parent, advice, make=make)
    with writing_to(path, advice):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if path.exists():
            with path.open("ab"):
                pass
