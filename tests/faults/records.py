"""What a run folder tells: steps on record, figures, published checkpoints, leftovers. Only its documented contract."""

import json
import re
from pathlib import Path
from typing import Any

from tests.trainer.harness import VOLATILE

_TIMES = {*VOLATILE, "seconds"}
_PUBLISHED = re.compile(r"step_(\d+)")


def lines(run_dir: Path) -> list[str]:
    """Whole lines of metrics.jsonl; the writer may be in the middle of another."""
    try:
        text = (run_dir / "metrics.jsonl").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    return text[: text.rfind("\n") + 1].splitlines()


def parse(found: list[str]) -> list[dict[str, Any]]:
    """Records of these lines; a line that was torn by a full disk and written over by a later one is none."""
    records = []
    for line in found:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def new_lines(before: list[str], now: list[str]) -> list[str]:
    """What this attempt has written: a resumed run cuts the file back before it appends."""
    same = 0
    while same < min(len(before), len(now)) and before[same] == now[same]:
        same += 1
    return now[same:]


def steps(records: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Reproducible part of the logged steps: losses, norms, learning rate, `data_hash`, `state_hash`."""
    return {
        record["step"]: {key: value for key, value in record.items() if key not in VOLATILE}
        for record in records
        if "event" not in record
    }


def evaluations(records: list[dict[str, Any]]) -> dict[tuple[int, str], dict[str, Any]]:
    """Figures of each evaluation by step and set."""
    return {
        (record["step"], record["set"]): {key: value for key, value in record.items() if key not in _TIMES}
        for record in records
        if record.get("event") == "eval"
    }


def resumed_at(records: list[dict[str, Any]]) -> int | None:
    """Step of the first `resumed` event, None where there is none."""
    return next((record["step"] for record in records if record.get("event") == "resumed"), None)


def published(run_dir: Path) -> int:
    """Step of the newest published checkpoint, 0 without one."""
    folder = run_dir / "checkpoints"
    names = [_PUBLISHED.fullmatch(path.name) for path in folder.iterdir()] if folder.is_dir() else []
    return max((int(name[1]) for name in names if name), default=0)


def half_written(run_dir: Path) -> dict[str, tuple[int, int]]:
    """Everything in the checkpoint folder that is neither a checkpoint nor `latest`: inode and change by name."""
    folder = run_dir / "checkpoints"
    found = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name != "latest" and not _PUBLISHED.fullmatch(path.name):
            try:
                status = path.stat()
            except FileNotFoundError:
                # Renamed or removed by the run in the meantime.
                continue
            # Inodes are used again; the time tells a new folder from one that was left.
            found[path.name] = status.st_ino, status.st_mtime_ns
    return found


def differences(ours: dict, reference: dict, *, whole: bool) -> list[str]:
    """Steps or evaluations that are not bitwise those of the reference.

    Args:
        ours: From `steps` or `evaluations`.
        reference: The same of the uninterrupted run.
        whole: Whether everything in the reference must be there.
    """
    found = [f"{key}: not in the reference" for key in ours if key not in reference]
    if whole:
        found += [f"{key}: missing" for key in reference if key not in ours]
    for key in ours.keys() & reference.keys():
        changed = [name for name in ours[key].keys() | reference[key].keys() if not _same(ours, reference, key, name)]
        if changed:
            name = min(changed)
            found.append(f"{key}: {name} {ours[key].get(name)} instead of {reference[key].get(name)}")
    return sorted(found)


def _same(ours: dict, reference: dict, key: Any, name: str) -> bool:
    absent = object()
    return ours[key].get(name, absent) == reference[key].get(name, absent)
