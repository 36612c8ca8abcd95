"""What the user may write under `data.train`, turned into data sources; names of built-in sets are known here.

The name of a source is part of its random keys, so it must not change when the data moves: it is the user's own word,
or as much of the end of its path as tells it from the other sources.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.paths import expand_path, split_existing
from data.shards.index_store import IndexedSource, fingerprint
from data.shards.sources import Source, expand_shards, is_remote, local_shards

_FILE_URL = re.compile(r"^file://", re.IGNORECASE)
_DEFAULT_NAME = "train"


def _builtin(name: str, cache: Path | None) -> list[str] | None:
    # Only a plain word can be a built-in set, and only then is the demo module needed.
    if not re.fullmatch(r"[A-Za-z][\w-]*(/[\w-]+)?", name) or os.path.lexists(name):
        return None
    from data.demo import resolve_builtin

    return resolve_builtin(name, cache)


def expand_pattern(pattern: str, cache: Path | None = None) -> list[str]:
    """Returns the shards a pattern stands for.

    Args:
        pattern: Path, folder, wildcard, brace range, URL, `pipe:` command, or the name of a built-in set.
        cache: Folder for built-in sets; default: the cache folder of the project.

    Raises:
        DataError: If it matches nothing, with the pattern in the message.
    """
    if not isinstance(pattern, str) or not pattern.strip():
        raise DataError(f"a data source must be a path, pattern or URL, got {pattern!r}")
    pattern = expand_path(pattern.strip())
    if "::" in split_existing(pattern)[1]:
        raise DataError(f"{pattern!r}: sources are not joined by '::' here; write a YAML list or a weighted mapping")
    builtin = _builtin(pattern, cache)
    if builtin is not None:
        return [shard for entry in builtin for shard in local_shards(str(entry), pattern)]
    return expand_shards(pattern)


def _source(name: str, patterns: Any, weight: Any, cache: Path | None) -> Source:
    patterns = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(patterns, Sequence) or not patterns:
        raise DataError(f"data source {name!r} must be a path or a list of paths, got {patterns!r}")
    shards = [shard for pattern in patterns for shard in expand_pattern(pattern, cache)]
    repeated = next((shard for shard, count in _counts(shards).items() if count > 1), None)
    if repeated is not None:
        raise DataError(f"data source {name!r} lists {repeated!r} twice; to see data more often, give it a weight")
    return Source(name=name, shards=tuple(shards), weight=weight)


def _counts(shards: list[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for shard in shards:
        counts[shard] = counts.get(shard, 0) + 1
    return counts


def _weighted(name: str, key: str, value: Any, cache: Path | None) -> Source:
    patterns, weight = key, value
    if isinstance(value, Mapping):
        unknown = sorted(set(value) - {"path", "weight"})
        if unknown or "path" not in value:
            raise DataError(f"data source {key!r} takes the keys path and weight, got {sorted(value)}")
        patterns, weight = value["path"], value.get("weight", 1)
    try:
        positive = not isinstance(weight, bool) and Fraction(str(weight)) > 0
    except (ValueError, ZeroDivisionError):
        positive = False
    if not positive:
        raise DataError(f"the weight of data source {key!r} must be a number above 0, got {weight!r}")
    return _source(name, patterns, weight, cache)


def source_names(patterns: Sequence[str]) -> list[str]:
    """Names for the sources of a mixture that do not depend on the folder they lie in together.

    Args:
        patterns: What the user wrote for each, all different.

    Returns:
        The last parts of each path, as few as tell it from the others: `d1/a` and `d1/b` are `a` and `b`,
        `cc3m/{0..9}.tar` and `yfcc/{0..9}.tar` are these. Paths that are the same but for their form stay as written.
    """
    parts = [_parts(pattern) for pattern in patterns]
    names = []
    for pattern, own in zip(patterns, parts, strict=True):
        for depth in range(1, len(own) + 1):
            if sum(other[-depth:] == own[-depth:] for other in parts) == 1:
                names.append("/".join(own[-depth:]))
                break
        else:
            names.append(pattern)
    return names


def _parts(pattern: str) -> list[str]:
    if pattern.startswith("pipe:"):
        return [pattern]
    address = pattern.partition("?")[0] if is_remote(pattern) else pattern
    return [part for part in _FILE_URL.sub("", address.strip()).split("/") if part not in ("", ".")] or [pattern]


def continue_sources(
    sources: Sequence[IndexedSource], names: Sequence[str], saved_fingerprint: str
) -> list[IndexedSource]:
    """The same data under the names, and in the order, that a run began with, wherever it lies now.

    Args:
        sources: As they are listed now.
        names: Of the sources of the run, in its order.
        saved_fingerprint: `fingerprint` of the run's sources.

    Returns:
        The sources as the run had them; unchanged if they are not the same data.
    """
    for order in _orders(sources, names):
        found = [replace(source, name=name) for source, name in zip(order, names, strict=True)]
        if fingerprint(found) == saved_fingerprint:
            return found
    return list(sources)


def _orders(sources: Sequence[IndexedSource], names: Sequence[str]) -> Iterator[list[IndexedSource]]:
    """Which source may be which of the run: by name, by what a name without its folder would be, by place."""
    if len(sources) != len(names):
        return
    by_name = {source.name: source for source in sources}
    for wanted in (list(names), source_names(names)):
        if by_name.keys() == set(wanted):
            yield [by_name[name] for name in wanted]
    yield list(sources)


def parse_sources(spec: Any, cache: Path | None = None) -> list[Source]:
    """Parses a `data.train` value.

    Args:
        spec: A string (path, folder, wildcard, brace range, URL, built-in name): one source. A list of strings: one
            source with all their shards. A mapping {pattern: weight}, or {name: {path: pattern or list, weight: 2}}: a
            mixture. Their order survives a move of the files: an unweighted source is named "train", the others by
            their key or as `source_names` does.
        cache: Folder for built-in sets; default: the cache folder of the project.

    Returns:
        At least one source.

    Raises:
        DataError: For anything else, and for patterns that match nothing.
    """
    if isinstance(spec, Mapping):
        if not spec:
            raise DataError("data.train is an empty mapping; give at least one source with its weight")
        return [_weighted(name, str(key), value, cache) for name, (key, value) in _named(spec)]
    if isinstance(spec, str) or (isinstance(spec, Sequence) and spec):
        return [_source(_DEFAULT_NAME, spec, 1, cache)]
    raise DataError(f"data.train must be a path, a list of paths or a weighted mapping, got {spec!r}")


def _named(spec: Mapping[Any, Any]) -> list[tuple[str, tuple[Any, Any]]]:
    own = [str(key) for key, value in spec.items() if isinstance(value, Mapping)]
    patterns = [str(key) for key, value in spec.items() if not isinstance(value, Mapping)]
    short = dict(zip(patterns, source_names(patterns), strict=True))
    # A name that the user gave to another source is taken.
    names = [str(key) if str(key) in own or short[str(key)] in own else short[str(key)] for key in spec]
    return list(zip(names, spec.items(), strict=True))
