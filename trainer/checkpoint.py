"""Checkpoints: published atomically, verified before use, falling back when the newest is damaged."""

import hashlib
import json
import os
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trainer.engine import Engine
from trainer.errors import ConfigError
from trainer.zero_state import Layout, load_engine_state

FORMAT = 1
MANIFEST = "manifest.json"
TRAINER_STATE = "trainer_state.pt"
_NAME = re.compile(r"step_(\d+)")
_PARTIAL = ".partial"


@dataclass
class TrainerState:
    """Everything a run needs besides the engine's tensors; the same on every rank."""

    step: int
    config: str
    tokenizer_hash: str
    data_fingerprint: str
    order_fingerprint: str
    samples_seen: dict[str, int]
    bad_samples: int = 0
    method_state: dict[str, Any] = field(default_factory=dict)
    method_digest: str = ""
    grad_scaler: dict[str, Any] | None = None
    # Step n trains on global batch n + data_offset of the order: what rollbacks have left out.
    data_offset: int = 0
    guard: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT


def save_checkpoint(engine: Engine, checkpoints: Path, state: TrainerState, rank: int, world_size: int) -> Path:
    """Write `checkpoints/step_<N>` so that it appears complete or not at all. Collective: all ranks call it.

    Everything goes to a hidden folder first; its files are hashed and flushed, the folder is renamed, and only then
    `latest` moves. A crash at any moment leaves the older checkpoints and `latest` as they were.
    """
    name = f"step_{state.step}"
    partial = checkpoints / _PARTIAL
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    engine.deepspeed.save_checkpoint(str(partial), tag=name, save_latest=False)
    folder = partial / name
    layout = Layout(engine.stage, world_size, engine.parameter_names, engine.parameter_shapes)
    if rank == 0:
        torch.save({**asdict(state), "layout": asdict(layout)}, folder / TRAINER_STATE)
    dist.barrier()
    entries = _hash_files(folder, rank, world_size)
    final = checkpoints / name
    if rank == 0:
        manifest = {"format": FORMAT, "step": state.step, "world_size": world_size, "stage": engine.stage}
        _write_durably(folder / MANIFEST, json.dumps({**manifest, "files": entries}, indent=1).encode())
        _sync_folder(folder)
        if final.exists():
            set_aside(final, "replaced")
        folder.rename(final)
        _sync_folder(checkpoints)
        point_latest(checkpoints, name)
        sweep(checkpoints)
    dist.barrier()
    return final


def set_aside(folder: Path, reason: str) -> Path:
    """Rename a checkpoint so that it no longer counts as one; returns where it is."""
    aside = folder.with_name(f".{reason}-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    return aside


def sweep(checkpoints: Path) -> None:
    """Delete what an interrupted save or clean-up left. A file system that refuses only keeps the leftovers."""
    for pattern in (_PARTIAL, ".removing-*", ".replaced-*"):
        for folder in checkpoints.glob(pattern):
            shutil.rmtree(folder, ignore_errors=True)


def point_latest(checkpoints: Path, name: str) -> None:
    """Move `latest` to a checkpoint, atomically."""
    temporary = checkpoints / ".latest"
    _write_durably(temporary, name.encode())
    temporary.replace(checkpoints / "latest")
    _sync_folder(checkpoints)


def prune_checkpoints(checkpoints: Path, keep_last: int, keep_every: int) -> list[Path]:
    """Delete checkpoints beyond the newest `keep_last`, except steps that `keep_every` divides.

    Returns:
        The folders that were removed.
    """
    removed = []
    for folder in list_checkpoints(checkpoints)[keep_last:]:
        if keep_every and step_of(folder) % keep_every == 0:
            continue
        # Renamed first: a half-deleted folder must never look like a checkpoint.
        shutil.rmtree(set_aside(folder, "removing"), ignore_errors=True)
        removed.append(folder)
    return removed


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    if not checkpoints.is_dir():
        return []
    found = [path for path in checkpoints.iterdir() if path.is_dir() and _NAME.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """The step in a checkpoint folder's name."""
    return int(_NAME.fullmatch(folder.name).group(1))


def verify_checkpoint(folder: Path) -> str | None:
    """What is wrong with a checkpoint: a missing, short or changed file. None when every byte is as written."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = manifest["files"]
        if manifest["format"] != FORMAT:
            return f"format {manifest['format']} is not the format {FORMAT} this version reads"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} is missing or damaged ({error.__class__.__name__})"
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["size"]:
            return f"{name} has {path.stat().st_size} bytes instead of {entry['size']}"
        if _sha256(path) != entry["sha256"]:
            return f"{name} has changed (checksum differs)"
    return None


def find_checkpoint(run_dir: Path, resume: str) -> tuple[Path | None, list[str]]:
    """Choose what `--resume` means. Runs on one rank; the caller broadcasts.

    Args:
        run_dir: The run's folder.
        resume: `never`, `auto`, a checkpoint folder or a run folder.

    Returns:
        The verified checkpoint (None to start afresh) and warnings about damaged ones that were passed over.

    Raises:
        ConfigError: The folder has checkpoints and resume is `never`, or nothing that exists can be used.
    """
    own = list_checkpoints(run_dir / "checkpoints")
    if resume == "never":
        if own:
            raise ConfigError(
                f"run_dir {run_dir} already has checkpoints (newest {own[0].name}); "
                "continue it with --resume auto, or choose another --run_dir"
            )
        return None, []
    if resume == "auto":
        return _newest_valid(own, run_dir)
    path = Path(resume)
    if own and run_dir.resolve() not in path.resolve().parents and run_dir.resolve() != path.resolve():
        raise ConfigError(
            f"run_dir {run_dir} has checkpoints of its own (newest {own[0].name}), --resume {resume} is of another "
            "run; choose a new --run_dir for the continuation"
        )
    if _NAME.fullmatch(path.name) and path.is_dir():
        problem = verify_checkpoint(path)
        if problem:
            raise ConfigError(f"--resume {path}: {problem}; choose another checkpoint or use --resume auto")
        return path, []
    if (path / "checkpoints").is_dir():
        found, warnings = _newest_valid(list_checkpoints(path / "checkpoints"), path)
        if found is not None:
            return found, warnings
    raise ConfigError(f"--resume {resume}: neither a checkpoint folder (step_<N>) nor a run folder with checkpoints")


def _newest_valid(candidates: list[Path], run_dir: Path) -> tuple[Path | None, list[str]]:
    warnings = []
    for folder in candidates:
        problem = verify_checkpoint(folder)
        if problem is None:
            return folder, warnings
        warnings.append(f"checkpoint {folder} is damaged: {problem}; trying the one before")
    if candidates:
        raise ConfigError(
            f"no checkpoint of {run_dir} can be used ({warnings[0]}); restore one from a backup, "
            "or start afresh with another --run_dir"
        )
    return None, warnings


def load_checkpoint(engine: Engine, folder: Path, rank: int, world_size: int) -> TrainerState:
    """Restore the engine and return the trainer's state. Collective: all ranks call it.

    Raises:
        ConfigError: The checkpoint is of another model.
    """
    saved = torch.load(folder / TRAINER_STATE, map_location="cpu", weights_only=True)
    layout = Layout(**saved.pop("layout"))
    load_engine_state(engine, folder, layout, rank, world_size)
    state = TrainerState(**saved)
    scaler = engine.grad_scaler()
    if scaler is not None and state.grad_scaler:
        scaler.load_state_dict(state.grad_scaler)
    engine.deepspeed.global_steps = state.step
    return state


def _hash_files(folder: Path, rank: int, world_size: int) -> dict[str, dict[str, Any]]:
    """Size and checksum of every file, the work spread over the ranks; complete on rank 0."""
    # Network file systems may show ranks different listings for a while: work on all names anyone sees.
    listings: list[Any] = [None] * world_size
    dist.all_gather_object(listings, [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()])
    names = sorted(set().union(*listings))
    mine = {}
    for name in names[rank::world_size]:
        path = folder / name
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
        mine[name] = {"size": path.stat().st_size, "sha256": _sha256(path)}
    parts: list[Any] = [None] * world_size
    dist.all_gather_object(parts, mine)
    return {name: entry for part in parts for name, entry in part.items()}


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write_durably(path: Path, content: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
