"""The command that indexes shards once: `python -m data.index SHARDS`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    # Before what takes a second to import.
    from data.command import leave_on_interrupt, run_command

    leave_on_interrupt()

from data.errors import DataError, escape_unencodable, printable
from data.shards.index_store import IndexStore, empty_warning, in_threads, sidecar_path
from data.shards.remote import display_name
from data.shards.shard_index import ShardIndex
from data.shards.sources import is_remote
from data.sources import parse_sources
from data.writing import os_reason, try_folder

_ELSEWHERE = "use --cache to write to the cache folder instead"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data.index",
        description="Scan shards once and write an index beside each (SHARD.index.npz), so that runs start at once. "
        "Publish the indexes with the shards and remote runs need no scan either.",
        epilog="examples:\n"
        "  python -m data.index unicode-symbols          index the built-in set and print its totals\n"
        "  python -m data.index 'shards/{00000..00099}.tar' --force\n"
        "  python -m data.index /data/cc3m --cache       keep the indexes in the cache folder instead",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shards", nargs="+", help="paths, folders, wildcards, brace ranges, URLs or built-in names")
    parser.add_argument("--cache", action="store_true", help="write to the cache folder, not beside the shards")
    parser.add_argument("--force", action="store_true", help="scan again even where there is an index")
    parser.add_argument("--excluded", action="store_true", help="list samples that lack an image or a caption")
    return parser


def _index_one(shard: str, store: IndexStore, arguments: argparse.Namespace) -> tuple[str, ShardIndex]:
    index = store.load(shard, rebuild=arguments.force)
    if not arguments.cache and not is_remote(shard):
        try:
            index.save(sidecar_path(shard))
        except OSError as error:
            raise DataError(f"{sidecar_path(shard)} cannot be written ({os_reason(error)}); {_ELSEWHERE}") from None
    return shard, index


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    arguments = _parser().parse_args(argv)
    escape_unencodable()
    try:
        store = IndexStore.create()
        (source,) = parse_sources(arguments.shards)
        if not arguments.cache:
            # Before hours of scanning.
            for folder in {Path(shard).parent for shard in source.shards if Path(shard).is_file()}:
                try_folder(folder, _ELSEWHERE)
        samples, excluded, empty = 0, 0, []
        for shard, index in in_threads(lambda shard: _index_one(shard, store, arguments), source.shards):
            usable, labels = index.with_captions(), int((~index.captioned).sum())
            only = f" ({labels} have a class label, which evaluation can use)" if labels else ""
            name = printable(display_name(shard), None)
            print(f"{name}: {usable.num_samples} samples, {len(usable.excluded)} excluded{only}")
            if not index.num_samples and not index.excluded:
                empty.append(shard)
            samples, excluded = samples + usable.num_samples, excluded + len(usable.excluded)
            for key, reason in usable.excluded if arguments.excluded else ():
                print(f"  excluded {printable(key)}: {reason}")
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if empty:
        print(f"warning: {empty_warning(empty)}", file=sys.stderr)
    print(f"total: {len(source.shards)} shards, {samples} samples, {excluded} excluded")
    return 0


if __name__ == "__main__":
    run_command(main)
