"""What the user may write under `data.train`, turned into data sources; names of built-in sets are known here."""

import os
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.paths import expand_path, split_existing
from data.shards.sources import Source, expand_shards, local_shards

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


def _weighted(name: str, value: Any, cache: Path | None) -> Source:
    patterns, weight = name, value
    if isinstance(value, Mapping):
        unknown = sorted(set(value) - {"path", "weight"})
        if unknown or "path" not in value:
            raise DataError(f"data source {name!r} takes the keys path and weight, got {sorted(value)}")
        patterns, weight = value["path"], value.get("weight", 1)
    try:
        positive = not isinstance(weight, bool) and Fraction(str(weight)) > 0
    except (ValueError, ZeroDivisionError):
        positive = False
    if not positive:
        raise DataError(f"the weight of data source {name!r} must be a number above 0, got {weight!r}")
    return _source(name, patterns, weight, cache)


def parse_sources(spec: Any, cache: Path | None = None) -> list[Source]:
    """Parses a `data.train` value.

    Args:
        spec: A string (path, folder, wildcard, brace range, URL, built-in name): one source. A list of strings: one
            source with all their shards. A mapping {pattern: weight}, or {name: {path: pattern or list, weight: 2}}: a
            mixture. An unweighted source is named "train", so its order survives a move of the files; entries of a
            mapping are named by their key.
        cache: Folder for built-in sets; default: the cache folder of the project.

    Returns:
        At least one source.

    Raises:
        DataError: For anything else, and for patterns that match nothing.
    """
    if isinstance(spec, Mapping):
        if not spec:
            raise DataError("data.train is an empty mapping; give at least one source with its weight")
        return [_weighted(str(name), value, cache) for name, value in spec.items()]
    if isinstance(spec, str) or (isinstance(spec, Sequence) and spec):
        return [_source(_DEFAULT_NAME, spec, 1, cache)]
    raise DataError(f"data.train must be a path, a list of paths or a weighted mapping, got {spec!r}")
