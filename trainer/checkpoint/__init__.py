"""Checkpoints: published atomically, verified before use, placed into any world size and ZeRO stage.

`python -m trainer.checkpoint` lists, verifies and consolidates them.
"""

import importlib
from typing import Any

_HOMES = {
    "TrainerState": "state",
    "find_checkpoint": "folders",
    "list_checkpoints": "folders",
    "load_checkpoint": "restore",
    "load_method_state": "restore",
    "prepare_checkpoints": "space",
    "prune_checkpoints": "folders",
    "read_state": "restore",
    "read_weights": "shards",
    "save_checkpoint": "save",
    "set_aside": "folders",
    "step_of": "folders",
    "sweep": "folders",
    "verify_checkpoint": "folders",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    # On first use: the command's own mistakes and its help need no torch.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
