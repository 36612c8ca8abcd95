"""Reading files of one JSON record a line, as they are after crashes and full disks: what is whole counts."""

import json
from pathlib import Path
from typing import Any, NamedTuple


class Records(NamedTuple):
    """What a file holds.

    Args:
        whole: Records with a step, in order.
        torn: How many lines are none: cut off, overwritten, or of another kind.
    """

    whole: list[dict[str, Any]]
    torn: int


def read_records(path: Path) -> Records:
    """Every whole record of a file.

    Raises:
        OSError: It cannot be read.
    """
    whole, torn = [], 0
    with path.open("rb") as stream:
        for line in stream:
            record = parse_record(line)
            if record is not None:
                whole.append(record)
            elif line.strip():
                torn += 1
    return Records(whole, torn)


def parse_record(line: bytes) -> dict[str, Any] | None:
    """The record of a line; None if it is not a whole one with a step."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return record if isinstance(step, int) and not isinstance(step, bool) else None


def cut_records(path: Path, step: int) -> int:
    """Drop what comes after a step, and torn lines; the file is the old or the new one whole.

    Returns:
        How many lines were dropped.

    Raises:
        OSError: It cannot be read or written.
    """
    if not path.is_file():
        return 0
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    records = [(line, parse_record(line)) for line in lines]
    kept = [line.rstrip(b"\r\n") + b"\n" for line, record in records if record is not None and record["step"] <= step]
    whole = b"".join(kept)
    if whole != content:
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(whole)
        temporary.replace(path)
    return len(lines) - len(kept)


def end_line(path: Path) -> None:
    """Give a file's torn last line an end, so that what is appended begins its own.

    Raises:
        OSError: It cannot be read or written.
    """
    if not path.is_file() or not path.stat().st_size:
        return
    with path.open("rb+") as stream:
        stream.seek(-1, 2)
        if stream.read(1) != b"\n":
            stream.write(b"\n")
