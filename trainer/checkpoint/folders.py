"""Checkpoint folders: their names, what is wrong with one, which to resume from, which to delete."""

import hashlib
import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist

from trainer.checkpoint.state import FORMAT
from trainer.errors import ConfigError
from trainer.ranks.agreement import on_main

MANIFEST = "manifest.json"
PARTIAL = ".partial"
_NAME = re.compile(r"step_(\d+)")
_MAX_MANIFEST_BYTES = 1 << 28


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    if not checkpoints.is_dir():
        return []
    found = [path for path in checkpoints.iterdir() if path.is_dir() and _NAME.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """The step in a checkpoint folder's name."""
    return int(_NAME.fullmatch(folder.name).group(1))


def set_aside(folder: Path, reason: str) -> Path:
    """Rename a checkpoint so that it no longer counts as one; returns where it is."""
    aside = folder.with_name(f".{reason}-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    return aside


def sweep(checkpoints: Path) -> None:
    """Delete what an interrupted save or clean-up left. A file system that refuses only keeps the leftovers."""
    for pattern in (PARTIAL, ".removing-*", ".replaced-*", ".probe-*"):
        for path in checkpoints.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def prune_checkpoints(checkpoints: Path, keep_last: int, keep_every: int) -> list[Path]:
    """Delete checkpoints beyond the newest `keep_last`, except steps that `keep_every` divides.

    Only complete checkpoints count as kept, so that damaged ones never push out the last good one.

    Returns:
        The folders that were removed.
    """
    removed, kept = [], 0
    for folder in list_checkpoints(checkpoints):
        if kept < keep_last:
            kept += not quick_problems(folder)
        elif not (keep_every and step_of(folder) % keep_every == 0):
            # Renamed first: a half-deleted folder must never look like a checkpoint.
            shutil.rmtree(set_aside(folder, "removing"), ignore_errors=True)
            removed.append(folder)
    return removed


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Raises:
        ValueError: It is missing or damaged, or of another format; the message says which.
    """
    path = folder / MANIFEST
    try:
        if path.stat().st_size > _MAX_MANIFEST_BYTES:
            raise ValueError(f"{MANIFEST} is larger than {_MAX_MANIFEST_BYTES} bytes")
        manifest = json.loads(path.read_text(encoding="utf-8"))
        found = manifest["format"]
        for name, entry in manifest["files"].items():
            if folder.resolve() not in (folder / name).resolve().parents:
                raise KeyError(name)
            int(entry["size"]), str(entry["sha256"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{MANIFEST} is missing or damaged ({error.__class__.__name__})") from None
    if found != FORMAT:
        raise ValueError(f"format {found} is not the format {FORMAT} this version reads")
    return manifest


def quick_problems(folder: Path) -> list[str]:
    """What is wrong with a checkpoint without reading its files: one missing, or of another size."""
    try:
        files = read_manifest(folder)["files"]
    except ValueError as error:
        return [str(error)]
    found = []
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif path.stat().st_size != entry["size"]:
            found.append(f"{name} has {path.stat().st_size} bytes instead of {entry['size']}")
    return found


def checksum_problems(folder: Path, part: int = 0, parts: int = 1) -> list[str]:
    """Files of a checkpoint whose bytes are not those that were written.

    Args:
        folder: A checkpoint that has no `quick_problems`.
        part: Which share of the work to do.
        parts: Number of shares; files are dealt out by size.
    """
    files = read_manifest(folder)["files"]
    by_size = sorted(files, key=lambda name: (-files[name]["size"], name))
    found = []
    for name in by_size[part::parts]:
        try:
            with (folder / name).open("rb") as stream:
                changed = hashlib.file_digest(stream, "sha256").hexdigest() != files[name]["sha256"]
        except OSError as error:
            found.append(f"{name} cannot be read ({error.strerror})")
            continue
        if changed:
            found.append(f"{name} has changed (checksum differs)")
    return found


def verify_alone(folder: Path) -> list[str]:
    """`verify_checkpoint` for one process, which reads several files at a time."""
    problems = quick_problems(folder)
    if problems:
        return problems
    parts = min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(parts) as pool:
        shares = pool.map(lambda part: checksum_problems(folder, part, parts), range(parts))
        return [problem for share in shares for problem in share]


def verify_checkpoint(folder: Path) -> list[str]:
    """What is wrong with a checkpoint: missing, short and changed files. Empty when every byte is as written.

    Collective: the ranks share the reading, and all get the same answer.
    """
    problems = on_main(lambda: quick_problems(folder))
    if problems:
        return problems
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, checksum_problems(folder, dist.get_rank(), dist.get_world_size()))
    return [problem for share in shares for problem in share]


def find_checkpoint(run_dir: Path, resume: str) -> tuple[Path | None, list[str]]:
    """Choose what `--resume` means, the same for all ranks. Collective.

    Args:
        run_dir: The run's folder.
        resume: `never`, `auto`, a checkpoint folder or a run folder.

    Returns:
        The verified checkpoint (None to start afresh) and warnings about damaged ones that were passed over.

    Raises:
        ConfigError: The folder has checkpoints and resume is `never`, or nothing that exists can be used.
    """
    candidates = on_main(lambda: _candidates(run_dir, resume))
    warnings = []
    for folder in candidates:
        problems = verify_checkpoint(folder)
        if not problems:
            return folder, warnings
        if resume != "auto" and folder == Path(resume):
            raise ConfigError(f"--resume {folder}: {problems[0]}; choose another checkpoint or use --resume auto")
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        warnings.append(f"checkpoint {folder} is damaged: {problems[0]}{more}; trying the one before")
    if candidates:
        raise ConfigError(
            f"no checkpoint of {candidates[0].parent.parent} can be used ({warnings[0]}); restore one from a backup, "
            "or start afresh with another --run_dir"
        )
    return None, warnings


def _candidates(run_dir: Path, resume: str) -> list[Path]:
    """What `resume` may continue from, best first."""
    own = list_checkpoints(run_dir / "checkpoints")
    if resume == "never":
        if own:
            raise ConfigError(
                f"run_dir {run_dir} already has checkpoints (newest {own[0].name}); "
                "continue it with --resume auto, or choose another --run_dir"
            )
        return []
    if resume == "auto":
        return own
    path = Path(resume)
    if own and run_dir.resolve() not in path.resolve().parents and run_dir.resolve() != path.resolve():
        raise ConfigError(
            f"run_dir {run_dir} has checkpoints of its own (newest {own[0].name}), --resume {resume} is of another "
            "run; choose a new --run_dir for the continuation"
        )
    found = [path] if _NAME.fullmatch(path.name) and path.is_dir() else list_checkpoints(path / "checkpoints")
    if not found:
        raise ConfigError(
            f"--resume {resume}: neither a checkpoint folder (step_<N>) nor a run folder with checkpoints"
        )
    return found
