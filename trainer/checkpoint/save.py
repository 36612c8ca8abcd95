"""Saving: complete or absent, and when it fails all ranks know and what was there before is untouched."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from trainer.checkpoint.folders import MANIFEST, PARTIAL, set_aside, sweep
from trainer.checkpoint.restore import layout_of
from trainer.checkpoint.shards import TRAINER_STATE, rank_file
from trainer.checkpoint.space import shortage
from trainer.checkpoint.state import FORMAT, TrainerState
from trainer.checkpoint.writer import FolderWriter, describe_os_error
from trainer.engine.engine import Engine
from trainer.errors import SaveError
from trainer.files import sync_folder, write_atomically


def save_checkpoint(engine: Engine, checkpoints: Path, state: TrainerState, rank: int, world_size: int) -> Path:
    """Write `checkpoints/step_<N>` so that it appears complete or not at all. Collective: all ranks call it.

    Everything goes to a hidden folder first, hashed while it is written and flushed; then the folder is renamed, and
    only then `latest` moves. A crash at any moment leaves the older checkpoints and `latest` as they were.

    Raises:
        SaveError: On all ranks alike: no room, or a rank could not write. Nothing half-written is left.
    """
    folder = checkpoints / PARTIAL / f"step_{state.step}"
    problem = _agreed(_on_disk(lambda: _prepare(checkpoints, folder)) if rank == 0 else None)
    problem = problem or shortage(engine, checkpoints, state.method_state)
    if problem is None:
        problem = _write(engine, folder, state, rank, world_size)
    if problem is not None:
        if rank == 0:
            sweep(checkpoints)
        dist.barrier()
        raise SaveError(f"no checkpoint of step {state.step} was written: {problem}")
    return checkpoints / folder.name


def _write(engine: Engine, folder: Path, state: TrainerState, rank: int, world_size: int) -> str | None:
    """Write and publish; what went wrong on any rank, or None."""
    writer = FolderWriter(folder)
    try:
        with _written_by(writer, engine):
            engine.deepspeed.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)
        own = engine.method.rank_state()
        if own:
            writer.save(own, rank_file(folder, rank))
        if rank == 0:
            writer.save({**state.as_saved(), "layout": asdict(layout_of(engine, world_size))}, folder / TRAINER_STATE)
    finally:
        writer.close()
    written: list[Any] = [None] * world_size
    dist.all_gather_object(written, writer.entries)
    problem = _agreed(writer.error)
    if problem is not None:
        return problem
    files = {name: entry for part in written for name, entry in part.items()}
    manifest = {"format": FORMAT, "step": state.step, "samples": sum(state.samples_seen.values())}
    manifest |= {"world_size": world_size, "stage": engine.stage, "saved": time.time(), "files": files}
    return _agreed(_on_disk(lambda: _publish(folder, manifest)) if rank == 0 else None)


def _prepare(checkpoints: Path, folder: Path) -> None:
    sweep(checkpoints)
    folder.mkdir(parents=True)


def _publish(folder: Path, manifest: dict[str, Any]) -> None:
    for name, entry in manifest["files"].items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != entry["size"]:
            raise OSError(f"rank 0 does not see {name}: --run_dir must be one folder that all nodes share")
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1))
    checkpoints = folder.parent.parent
    final = checkpoints / folder.name
    replaced = set_aside(final, "replaced") if final.exists() else None
    try:
        folder.rename(final)
    except OSError:
        if replaced is not None:
            replaced.rename(final)
        raise
    sync_folder(checkpoints)
    write_atomically(checkpoints / "latest", folder.name)
    sweep(checkpoints)


@contextmanager
def _written_by(writer: FolderWriter, engine: Engine) -> Iterator[None]:
    """Let DeepSpeed write through `writer`, and leave out the scripts it copies into every checkpoint."""
    wrapped = engine.deepspeed
    wrapped.checkpoint_engine.save = writer.save
    wrapped._copy_recovery_script = lambda folder: None
    try:
        yield
    finally:
        del wrapped.checkpoint_engine.save, wrapped._copy_recovery_script


def _on_disk(action: Callable[[], None]) -> str | None:
    """Do something with the file system; what went wrong, or None."""
    try:
        action()
    except OSError as error:
        return describe_os_error(error)
    return None


def _agreed(problem: str | None) -> str | None:
    """The problem of the lowest rank that has one, on all ranks."""
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    return next((f"rank {rank}: {text}" for rank, text in enumerate(problems) if text is not None), None)
