"""One file for a checkpoint: the weights, and on request everything else, by parameter name."""

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer.checkpoint.shards import (
    TRAINER_STATE,
    read_file,
    read_optimizer_state,
    read_rank_states,
    read_weights,
)
from trainer.errors import ConfigError
from trainer.files import sync_folder


def consolidate(folder: Path, out: Path, full_state: Path | None = None) -> int:
    """Write a checkpoint's weights as one safetensors file, from any ZeRO stage, without DeepSpeed or a GPU.

    Args:
        folder: A checkpoint, `checkpoints/step_<N>`.
        out: The file to write; appears complete or not at all. Its tensors are the method's state dict.
        full_state: A second file for the rest: `optimizer/<kind>/<parameter>` and `method/<name>` tensors, with
            numbers and the configuration in the header.

    Returns:
        Number of tensors in `out`.

    Raises:
        ConfigError: The checkpoint cannot be read, or a file cannot be written.
    """
    state = read_file(folder / TRAINER_STATE)
    header = {"step": str(state["step"]), "config": state["config"], "format": "pt"}
    weights = read_weights(folder)
    _write(weights, out, header)
    if full_state is not None:
        vectors, scalars = read_optimizer_state(folder)
        tensors = {f"optimizer/{kind}/{name}": value for kind in vectors for name, value in vectors[kind].items()}
        numbers = {key: state[key] for key in ("samples_seen", "bad_samples", "tokenizer_hash", "grad_scaler")}
        plain = _split(state["method_state"], "method", tensors)
        for rank, own in enumerate(read_rank_states(folder)):
            plain[f"rank_{rank}"] = _split(own, f"method/rank_{rank}", tensors)
        header |= {"state": json.dumps({**numbers, "optimizer": scalars, "method": plain}, default=str)}
        _write(tensors, full_state, header)
    return len(weights)


def _split(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Move the tensors of a tree to `tensors` under their path; returns what is left."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return None
    if isinstance(value, dict):
        return {key: _split(entry, f"{name}/{key}", tensors) for key, entry in value.items()}
    return value


def _write(tensors: dict[str, Tensor], out: Path, header: dict[str, str]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    temporary = out.with_name(f".{out.name}.new")
    try:
        save_file(_independent(tensors), temporary, header)
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(out)
        sync_folder(out.parent)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise ConfigError(f"{out} cannot be written ({error}); choose another --out") from None


def _independent(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors of which no two share memory, as the format wants them."""
    seen: set[int] = set()
    found = {}
    for name, value in tensors.items():
        value = value.contiguous()
        found[name] = value.clone() if value.data_ptr() in seen and value.numel() else value
        seen.add(value.data_ptr())
    return found
