"""What the user may write under `data.train` and `data.val`, turned into lists of shards."""

import glob
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from data.errors import DataError

_MAX_SHARDS = 1_000_000
_MAX_DIGITS = 18
_MAX_DEPTH = 20
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(\d+))?")
_GLOB = re.compile(r"[*?\[]")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_FILE_URL = re.compile(r"^file://", re.IGNORECASE)
_DEFAULT_NAME = "train"


@dataclass(frozen=True)
class Source:
    """One data source.

    Args:
        name: Part of every random key of the source, so a renamed source has another order.
        shards: Paths or URLs of its tars, in listed order.
        weight: Share in every global batch, relative to the other sources.
    """

    name: str
    shards: tuple[str, ...]
    weight: float | int | str | Fraction = 1


def is_remote(shard: str) -> bool:
    """Tells whether a shard is fetched through the remote cache: a URL or a `pipe:` command."""
    return shard.startswith("pipe:") or _SCHEME.match(shard) is not None


def _range(content: str) -> list[str] | None:
    """Expands `first..last` or `first..last..step`; None if the text is not a range."""
    match = _RANGE.fullmatch(content)
    if match is None:
        return None
    if len(content) > 3 * _MAX_DIGITS:
        raise DataError(f"the range {{{content[:40]}...}} has ends of too many digits; check them")
    first, last, step = int(match[1]), int(match[2]), int(match[3] or 1) or 1
    if abs(last - first) // step >= _MAX_SHARDS:
        raise DataError(f"the range {{{content}}} has more than {_MAX_SHARDS} entries; check its ends")
    padded = any(len(end.lstrip("-")) > 1 and end.lstrip("-").startswith("0") for end in (match[1], match[2]))
    width = max(len(match[1]), len(match[2])) if padded else 0
    numbers = range(first, last + 1, step) if first <= last else range(first, last - 1, -step)
    return [f"{number:0{width}d}" for number in numbers]


def _pieces(pattern: str) -> Iterator[Sequence[str]]:
    """Cuts a pattern into its fixed and its expanding pieces; braces may nest."""
    position = 0
    for start, end in _outer_braces(pattern):
        yield [pattern[position:start]]
        content = pattern[start + 1 : end]
        parts = _split_at_outer_commas(content)
        if len(parts) > 1:
            yield [expanded for part in parts for expanded in expand_braces(part)]
        else:
            yield _range(content) or ["{" + inner + "}" for inner in expand_braces(content)]
        position = end + 1
    yield [pattern[position:]]


def _outer_braces(pattern: str) -> Iterator[tuple[int, int]]:
    depth, start = 0, 0
    for place, character in enumerate(pattern):
        if character == "{":
            start = place if depth == 0 else start
            depth += 1
            if depth > _MAX_DEPTH:
                raise DataError(f"the pattern {pattern[:80]!r} nests braces deeper than {_MAX_DEPTH}")
        elif character == "}" and depth:
            depth -= 1
            if depth == 0:
                yield start, place
    if depth:
        raise DataError(f"the pattern {pattern!r} has an opening brace without its closing one")


def _split_at_outer_commas(content: str) -> list[str]:
    parts, depth = [""], 0
    for character in content:
        depth += (character == "{") - (character == "}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def expand_braces(pattern: str) -> list[str]:
    """Expands `{000..099}`, `{0..10..2}` and `{a,b}` as a shell does, leftmost slowest.

    Args:
        pattern: Path or URL with any number of braces, nested or not.

    Raises:
        DataError: If a brace is not closed or the pattern stands for more than a million names.
    """
    if "{" not in pattern:
        return [pattern]
    pieces = list(_pieces(pattern))
    if math.prod(len(piece) for piece in pieces) > _MAX_SHARDS:
        raise DataError(f"the pattern {pattern!r} stands for more than {_MAX_SHARDS} names; check its ranges")
    return ["".join(parts) for parts in itertools.product(*pieces)]


def _builtin(name: str, cache: Path | None) -> list[str] | None:
    # Only a plain word can be a built-in set, and only then is the demo module needed.
    if not re.fullmatch(r"[A-Za-z][\w-]*(/[\w-]+)?", name) or Path(name).exists():
        return None
    from data.demo import resolve_builtin

    return resolve_builtin(name, cache)


def _local_shards(path: str, pattern: str) -> list[str]:
    path = str(Path(path).expanduser())
    if Path(path).is_dir():
        found = sorted(str(entry) for entry in Path(path).glob("*.tar"))
        if not found:
            raise DataError(f"the folder {path!r} holds no .tar files; give the folder of the shards, or a pattern")
        return found
    if _GLOB.search(path) and not Path(path).exists():
        found = sorted(glob.glob(path))  # noqa: PTH207 - Path.glob cannot take an absolute pattern
        if not found:
            raise DataError(f"the pattern {pattern!r} matched no file; check the folder and the wildcard")
        return found
    return [path]


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
    pattern = _FILE_URL.sub("", pattern.strip())
    if "\0" in pattern:
        raise DataError(f"{pattern!r} is not the name of a file: it holds a NUL character")
    if "::" in pattern:
        raise DataError(f"{pattern!r}: sources are not joined by '::' here; write a YAML list or a weighted mapping")
    builtin = _builtin(pattern, cache)
    if builtin is not None:
        return [shard for entry in builtin for shard in _local_shards(str(entry), pattern)]
    names = expand_braces(pattern)
    if is_remote(pattern):
        return names
    shards = [shard for name in names for shard in _local_shards(name, pattern)]
    if not any(Path(shard).exists() for shard in shards):
        what = "matched no existing file" if len(names) > 1 else "does not exist"
        raise DataError(f"data source {pattern!r} {what} (the first name is {shards[0]!r}); check the path")
    return shards


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
