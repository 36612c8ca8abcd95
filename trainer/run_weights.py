"""The weights of a run's folder or checkpoint, without building its model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer.checkpoint.folders import MANIFEST, list_checkpoints, verify_alone
from trainer.checkpoint.shards import TRAINER_STATE, read_file, read_optimizer_state, read_weights
from trainer.config.safe_yaml import YamlError, parse_yaml
from trainer.engine.ema import AVERAGE
from trainer.errors import ConfigError


@dataclass(frozen=True)
class RunWeights:
    """What a checkpoint of ours holds.

    Attributes:
        checkpoint: Its folder.
        tensors: The method's state dict, with the moving average where the run keeps one.
        weights: `ema`, or `trained`.
        model: The `model` section it was trained with.
        notes: About newer checkpoints that are damaged.
    """

    checkpoint: Path
    tensors: dict[str, Tensor]
    weights: str
    model: dict[str, Any]
    notes: list[str]


def read_averaged(folder: Path, keeps_average: bool) -> tuple[dict[str, Tensor], str]:
    """A checkpoint's state dict with the moving average in it where there is one, and which weights these are.

    Raises:
        ConfigError: See `trainer.checkpoint.shards.read_weights`.
    """
    state = dict(read_weights(folder))
    averaged = read_optimizer_state(folder)[0].get(AVERAGE) if keeps_average else None
    return (state, "trained") if averaged is None else (state | averaged, "ema")


def read_run_weights(path: Path) -> RunWeights | None:
    """The weights of the newest complete checkpoint.

    Args:
        path: A run's folder, its `checkpoints`, or one of these.

    Returns:
        None if it is none of them.

    Raises:
        ConfigError: A run without a complete checkpoint, or one that cannot be read.
    """
    candidates = _checkpoints(path)
    if candidates is None:
        return None
    notes: list[str] = []
    for folder in candidates:
        problems = verify_alone(folder)
        if problems:
            notes.append(f"checkpoint {folder} is damaged ({problems[0]}), the one before was taken")
            continue
        section = _config(folder)
        state, weights = read_averaged(folder, bool(section.get("train", {}).get("ema_decay")))
        return RunWeights(folder, state, weights, section.get("model", {}), notes)
    reason = f"{candidates[0].name} is damaged: {problems[0]}" if candidates else "it has saved none yet"
    raise ConfigError(
        f"{path} is a run without a complete checkpoint ({reason}); give another run, or weights that "
        "`python -m trainer.export RUN --to safetensors` wrote"
    )


def _checkpoints(path: Path) -> list[Path] | None:
    """Newest first."""
    if (path / MANIFEST).is_file():
        return [path]
    for place in (path / "checkpoints", path):
        found = [folder for folder in list_checkpoints(place) if (folder / MANIFEST).is_file()]
        if found:
            return list_checkpoints(place)
    is_run = (path / "config.yaml").is_file() and ((path / "metrics.jsonl").exists() or (path / "checkpoints").is_dir())
    return [] if is_run else None


def _config(folder: Path) -> dict[str, Any]:
    try:
        tree = parse_yaml(str(read_file(folder / TRAINER_STATE)["config"]))
    except (YamlError, KeyError) as error:
        raise ConfigError(f"{folder / TRAINER_STATE} holds no settings ({error}); give another checkpoint") from None
    return tree if isinstance(tree, dict) else {}
