"""Names of shards: paths, folders, wildcards, brace ranges and URLs, turned into lists."""

import glob
import itertools
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from data.errors import DataError
from data.paths import expand_path, split_existing

_MAX_SHARDS = 1_000_000
_MAX_DIGITS = 18
_MAX_DEPTH = 20
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(\d+))?")
_GLOB = re.compile(r"[*?\[]")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


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


def local_shards(path: str, pattern: str) -> list[str]:
    """The tars of a folder, the files of a wildcard, or the path itself.

    Args:
        path: A name without braces.
        pattern: What the user wrote, for messages.

    Raises:
        DataError: A folder without tars, or a wildcard that matches nothing.
    """
    path = str(Path(path))
    if os.path.isdir(path):  # noqa: PTH112 - a name that is too long is no folder
        found = sorted(str(entry) for entry in Path(path).glob("*.tar"))
        if not found:
            raise DataError(f"the folder {path!r} holds no .tar files; give the folder of the shards, or a pattern")
        return found
    if _GLOB.search(split_existing(path)[1]):
        found = _matches(path)
        if not found:
            raise DataError(f"the pattern {pattern!r} matched no file; check the folder and the wildcard")
        return found
    return [path]


def _matches(pattern: str) -> list[str]:
    """The paths that a pattern with wildcards stands for, in order; a part that is there as written is no wildcard."""
    found = [""]
    for part in Path(pattern).parts:
        found = [os.path.join(folder, name) for folder in found for name in _names(folder, part)]  # noqa: PTH118
    return sorted(found)


def _names(folder: str, part: str) -> list[str]:
    if os.path.lexists(os.path.join(folder, part)):  # noqa: PTH118
        return [part]
    # Path.glob would also find names that begin with a dot.
    return glob.glob(part, root_dir=folder or None) if _GLOB.search(part) else []  # noqa: PTH207


def expand_shards(pattern: str) -> list[str]:
    """Returns the shards a path, folder, wildcard, brace range, URL or `pipe:` command stands for.

    Raises:
        DataError: If it matches nothing, with the pattern in the message.
    """
    if is_remote(pattern):
        return expand_braces(pattern)
    folder, rest = split_existing(pattern)
    names = expand_braces(rest)
    # As in a shell, a brace may hold whole paths.
    paths = (expand_path(name) if name.startswith("~") else folder + name for name in names)
    shards = [shard for path in paths for shard in local_shards(path, pattern)]
    if not any(map(os.path.exists, shards)):
        what = "matched no existing file" if len(names) > 1 else "does not exist"
        raise DataError(f"data source {pattern!r} {what} (the first name is {shards[0]!r}); check the path")
    return shards
