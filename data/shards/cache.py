"""Where the project keeps files it can make again, and how it writes them."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from data.errors import DataError
from data.paths import expand_path
from data.writing import writing_to

_ADVICE = "choose another cache folder with data.cache_dir or the environment variable DECLIP_CACHE, or free some space"


def cache_dir() -> Path:
    """Returns the cache folder of the project (not created here).

    The environment variable DECLIP_CACHE wins, then $XDG_CACHE_HOME/declip-trainer, then ~/.cache/declip-trainer.

    Raises:
        DataError: None of them says a folder: in a container the user may have no home.
    """
    explicit = os.environ.get("DECLIP_CACHE")
    if explicit:
        try:
            return Path(expand_path(explicit))
        except DataError as error:
            raise DataError(
                f"there is no folder for caches: DECLIP_CACHE: {error}; or choose one with data.cache_dir"
            ) from None
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        root = Path(base).expanduser() if base else Path.home() / ".cache"
        return root / "declip-trainer"
    except RuntimeError:
        raise DataError(
            f"there is no folder for caches: user {os.getuid()} has no home folder for '{base or '~'}'; "
            "set HOME, or choose one with data.cache_dir or the environment variable DECLIP_CACHE"
        ) from None


def writing_cache(folder: Path) -> AbstractContextManager[None]:
    """Turns what the system refuses in the cache folder into a DataError that names it and the setting that moves it.

    Args:
        folder: The cache folder, or one in it.
    """
    return writing_to(folder, _ADVICE)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path` and moves it there when the block ends without an error.

    Readers see the old file, or the whole new one; two writers do no harm to each other.

    Args:
        path: The file to create or replace; its folder is created.

    Yields:
        An existing empty file in the same folder, to be overwritten.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays, because numpy appends .npz to names that lack it.
    handle, name = tempfile.mkstemp(prefix=f".{path.name[:100]}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes files private; a shared cache wants what a plain open() would have given.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
