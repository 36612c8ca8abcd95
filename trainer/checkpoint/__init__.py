"""Checkpoints: published atomically, verified before use, placed into any world size and ZeRO stage.

`python -m trainer.checkpoint` lists, verifies and consolidates them.
"""

from trainer.checkpoint.folders import (
    find_checkpoint,
    list_checkpoints,
    prune_checkpoints,
    set_aside,
    step_of,
    sweep,
    verify_checkpoint,
)
from trainer.checkpoint.restore import load_checkpoint, load_method_state, read_state
from trainer.checkpoint.save import save_checkpoint
from trainer.checkpoint.shards import read_weights
from trainer.checkpoint.space import prepare_checkpoints
from trainer.checkpoint.state import TrainerState

__all__ = [
    "TrainerState",
    "find_checkpoint",
    "list_checkpoints",
    "load_checkpoint",
    "load_method_state",
    "prepare_checkpoints",
    "prune_checkpoints",
    "read_state",
    "read_weights",
    "save_checkpoint",
    "set_aside",
    "step_of",
    "sweep",
    "verify_checkpoint",
]
