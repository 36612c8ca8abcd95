"""The command that indexes shards once: `python -m data.index SHARDS`."""

import argparse
import sys
from collections.abc import Sequence

from data.errors import DataError, escape_unencodable, printable
from data.shards.index_store import IndexStore, in_threads, sidecar_path
from data.shards.remote import display_name
from data.shards.shard_index import ShardIndex
from data.shards.sources import is_remote
from data.sources import parse_sources


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
            raise DataError(f"{sidecar_path(shard)}: {error.strerror}; use --cache to write elsewhere") from None
    return shard, index


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    arguments = _parser().parse_args(argv)
    escape_unencodable()
    store = IndexStore.create()
    try:
        (source,) = parse_sources(arguments.shards)
        samples, excluded = 0, 0
        for shard, index in in_threads(lambda shard: _index_one(shard, store, arguments), source.shards):
            usable, labels = index.with_captions(), int((~index.captioned).sum())
            only = f" ({labels} have a class label, which evaluation can use)" if labels else ""
            name = printable(display_name(shard), None)
            print(f"{name}: {usable.num_samples} samples, {len(usable.excluded)} excluded{only}")
            samples, excluded = samples + usable.num_samples, excluded + len(usable.excluded)
            for key, reason in usable.excluded if arguments.excluded else ():
                print(f"  excluded {printable(key)}: {reason}")
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"total: {len(source.shards)} shards, {samples} samples, {excluded} excluded")
    return 0


if __name__ == "__main__":
    sys.exit(main())
