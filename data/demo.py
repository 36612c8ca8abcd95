"""The built-in data set `unicode-symbols`: pictures of named characters, made on first use from installed typefaces.

python -m data.demo                 make it in the cache folder (or find it there) and print what it holds
python -m data.demo --out DIR       make it under DIR
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    # Before what takes a second to import.
    from data.command import leave_on_interrupt, run_command

    leave_on_interrupt()

from filelock import FileLock

from data.builtin.rendering import MANIFEST, NAME, VERSION, UnicodeSymbols, describe, render_unicode_symbols
from data.errors import DataError
from data.paths import path_argument
from data.shards.cache import cache_dir as default_cache_dir
from data.shards.cache import writing_cache
from data.writing import try_folder, writing_to

_LOCK_TIMEOUT_S = 600
# More would wait for the largest typeface.
_MAX_PROCESSES = 4


def ensure_unicode_symbols(cache_dir: Path) -> UnicodeSymbols:
    """Returns the set, rendering it first (some seconds) where the cache folder lacks it.

    Any number of processes may call this at once: one renders, the others wait, and nobody sees a half-finished folder.

    Args:
        cache_dir: Folder for made files; created if needed.

    Raises:
        DataError: The folder cannot be written.
    """
    with writing_cache(cache_dir):
        return _ensure(Path(cache_dir) / f"{NAME}-{VERSION}")


def _ensure(root: Path) -> UnicodeSymbols:
    if not root.is_dir():
        root.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(root.parent / f".{root.name}.lock", timeout=_LOCK_TIMEOUT_S):
            if not root.is_dir():
                _render_and_publish(root)
    return describe(root)


def resolve_builtin(name: str, cache_dir: Path | None) -> list[str] | None:
    """Returns the training shards of a built-in set, or None if there is no such set.

    Args:
        name: For example "unicode-symbols".
        cache_dir: Folder for made files; None for the project's own.
    """
    if name != NAME:
        return None
    return [str(shard) for shard in ensure_unicode_symbols(cache_dir or default_cache_dir()).train]


def _render_and_publish(root: Path) -> None:
    partial = f".{root.name}.partial-"
    for leftover in root.parent.glob(f"{partial}*"):
        # The lock is ours, so whoever made this is dead.
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=partial, dir=root.parent))
    try:
        render_unicode_symbols(temporary, processes=min(_MAX_PROCESSES, len(os.sched_getaffinity(0))))
        # mkdtemp makes private folders; a cache may be shared.
        temporary.chmod(0o755)
        temporary.rename(root)
    except OSError:
        # Without working locks (some network file systems) another process may have been faster: its folder is as good.
        if not root.is_dir():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _ensure_in(out: Path) -> UnicodeSymbols:
    advice = "choose another --out"
    if not (out / f"{NAME}-{VERSION}").is_dir():
        try_folder(out, advice)
    with writing_to(out, advice):
        return _ensure(out / f"{NAME}-{VERSION}")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m data.demo", description="Make the built-in set unicode-symbols.")
    parser.add_argument(
        "--out", type=path_argument, metavar="DIR", help="folder to make it under (default: the cache folder)"
    )
    options = parser.parse_args(arguments)
    try:
        symbols = _ensure_in(options.out) if options.out else ensure_unicode_symbols(default_cache_dir())
    except DataError as error:
        print(f"error: cannot make {NAME}: {error}", file=sys.stderr)
        return 2
    manifest = json.loads((symbols.root / MANIFEST).read_text(encoding="utf-8"))
    print(symbols.root)
    for name, count in manifest["samples"].items():
        print(f"{name:<20}{count:>8} samples")
    print(f"{'characters in train':<20}{manifest['characters_in_train']:>8}")
    return 0


if __name__ == "__main__":
    run_command(main)
