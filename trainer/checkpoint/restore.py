"""Loading: a checkpoint placed into an engine of any world size and stage, bitwise.

Rank 0 reads the weights and broadcasts them, parameter by parameter. Of the optimizer state each rank reads only the
shards that overlap its own partition, one at a time and memory-mapped; in the layout it was saved from that is its own.
"""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.checkpoint.layout import Layout, overlaps
from trainer.checkpoint.shards import TRAINER_STATE, Joined, Shard, read_file, read_rank_states, read_weights
from trainer.checkpoint.state import TrainerState
from trainer.engine.ema import AVERAGE
from trainer.engine.engine import Engine
from trainer.engine.optimizer import optimizer_family
from trainer.errors import ConfigError
from trainer.ranks.agreement import together


def layout_of(engine: Engine, world_size: int) -> Layout:
    """How the engine's state is cut up."""
    partitions = engine.optimizer.single_partition_of_fp32_groups if engine.stage in (1, 2) else []
    return Layout(
        stage=engine.stage,
        world_size=world_size,
        optimizer=optimizer_family(engine.base_optimizer),
        parameter_names=engine.parameter_names,
        parameter_shapes=engine.parameter_shapes,
        frozen_shapes={
            name: tuple(getattr(parameter, "ds_shape", parameter.shape))
            for name, parameter in engine.method.named_parameters()
            if not parameter.requires_grad
        },
        partition_sizes=[partition.numel() for partition in partitions],
    )


def read_state(folder: Path) -> tuple[TrainerState, Layout]:
    """What a checkpoint holds besides the engine's tensors, and how those are cut up; needs no engine.

    Raises:
        ConfigError: The file cannot be read.
    """
    saved = read_file(folder / TRAINER_STATE)
    layout = Layout(**saved.pop("layout"))
    state = TrainerState(**saved)
    # Checkpoints from before this was saved.
    state.setup = {"ranks": layout.world_size, **state.setup}
    return state, layout


def load_checkpoint(engine: Engine, folder: Path, rank: int, world_size: int) -> TrainerState:
    """Restore the engine and return the trainer's state. Collective: all ranks call it.

    Raises:
        ConfigError: The checkpoint is of another model or optimizer, or a file of it cannot be read.
    """
    state, layout = together(lambda: read_state(folder))
    current = layout_of(engine, world_size)
    _check_same_model(layout, current, folder)
    _check_same_optimizer(layout, current, folder)
    _place_weights(engine, together(lambda: read_weights(folder) if rank == 0 else {}), folder)
    together(lambda: _place_optimizer_state(engine, folder, layout, current, rank))
    scaler = engine.grad_scaler()
    if scaler is not None and state.grad_scaler:
        scaler.load_state_dict(state.grad_scaler)
    engine.deepspeed.global_steps = state.step
    return state


def load_method_state(engine: Engine, saved: TrainerState, folder: Path) -> None:
    """Restore what the method keeps besides parameters and buffers: for all ranks, and for each alone. Collective.

    Raises:
        ConfigError: A file of the checkpoint cannot be read.
    """
    own = together(lambda: read_rank_states(folder))
    engine.method.load_method_state(saved.method_state)
    engine.method.load_rank_states(own)


def _check_same_model(saved: Layout, current: Layout, folder: Path) -> None:
    old, new = saved.parameter_shapes | saved.frozen_shapes, current.parameter_shapes | current.frozen_shapes
    differences = {
        "missing": set(new) - set(old),
        "extra": set(old) - set(new),
        "reshaped": {name for name in set(old) & set(new) if old[name] != new[name]},
        "frozen then and trained now": set(saved.frozen_shapes) & set(current.parameter_shapes),
        "trained then and frozen now": set(saved.parameter_shapes) & set(current.frozen_shapes),
    }
    detail = "; ".join(f"{label} {sorted(names)[:3]}" for label, names in differences.items() if names)
    groups = "other parameter groups: restore optimizer.no_decay and optimizer.groups as they were"
    if detail or saved.parameter_names != current.parameter_names:
        raise ConfigError(
            f"checkpoint {folder} is of another model ({detail or groups}); "
            "resume with the recipe it was started with, or use a new --run_dir"
        )


def _check_same_optimizer(saved: Layout, current: Layout, folder: Path) -> None:
    if saved.optimizer != current.optimizer:
        raise ConfigError(
            f"checkpoint {folder} holds the state of {saved.optimizer}, this run's optimizer is {current.optimizer}; "
            "restore optimizer.name (and optimizer.momentum) as they were, or start a new --run_dir"
        )


def _place_weights(engine: Engine, weights: dict[str, Tensor], folder: Path) -> None:
    """Parameters, frozen ones and buffers, from rank 0 to all."""
    is_reader = dist.get_rank() == 0
    parameters = dict(engine.method.named_parameters())
    whole = engine.method.state_dict(keep_vars=True)
    buffers = {name: value for name, value in whole.items() if not isinstance(value, torch.nn.Parameter)}
    missing = sorted({*parameters, *buffers} - set(weights)) if is_reader else []
    together(lambda: _require_none(missing, folder))
    with torch.no_grad():
        for name, parameter in parameters.items():
            if engine.stage == 3:
                _place_partitioned(parameter, weights.get(name))
            else:
                _place_whole(parameter.data, weights.get(name))
        for name, buffer in buffers.items():
            _place_whole(buffer, weights.get(name))


def _require_none(missing: list[str], folder: Path) -> None:
    if missing:
        raise ConfigError(
            f"checkpoint {folder} is of another model (it lacks {missing[:3]}); "
            "resume with the recipe it was started with, or use a new --run_dir"
        )


def _place_whole(tensor: Tensor, value: Tensor | None) -> None:
    if value is not None:
        tensor.copy_(value.view_as(tensor))
    if dist.get_world_size() > 1:
        dist.broadcast(tensor, src=0)


def _place_partitioned(parameter: torch.nn.Parameter, value: Tensor | None) -> None:
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        if value is not None:
            parameter.data.copy_(value.view(parameter.ds_shape))


def _place_optimizer_state(engine: Engine, folder: Path, saved: Layout, current: Layout, rank: int) -> None:
    groups = range(len(current.parameter_names))
    owned = [current.runs(group, rank) for group in groups]
    wanted = [
        shard
        for shard in range(saved.num_shards)
        if any(next(overlaps(saved.runs(group, shard), owned[group]), None) for group in groups)
    ]
    # A rank that owns nothing still needs the step counters.
    for number, shard_rank in enumerate(wanted or [0]):
        shard = Shard(folder, saved, shard_rank)
        for group in groups:
            targets = _Targets(engine, group)
            if number == 0:
                targets.clear()
                targets.set_scalars(shard.scalars(group))
            moves = list(overlaps(saved.runs(group, shard_rank), owned[group]))
            for key, parts in shard.vectors(group).items():
                source = Joined(parts)
                target = targets.vector(key)
                for source_offset, target_offset, length in moves:
                    source.copy_to(target, source_offset, target_offset, length)


class _Targets:
    """Where an engine keeps a group's state on this rank."""

    def __init__(self, engine: Engine, group: int) -> None:
        self._optimizer = engine.base_optimizer
        self._group = self._optimizer.param_groups[group]
        if engine.stage == 0:
            parameters = dict(engine.method.named_parameters())
            self._keys = [parameters[name] for name in engine.parameter_names[group]]
        elif engine.stage < 3:
            self._keys = [engine.optimizer.single_partition_of_fp32_groups[group]]
        else:
            flats, owner = engine.optimizer.fp32_partitioned_groups_flat, engine.optimizer.sub_group_to_group_id
            self._keys = [flat for i, flat in enumerate(flats) if owner[i] == group]

    def vector(self, name: str) -> Joined:
        """The flat tensors of one kind, which follow each other."""
        if name == "fp32":
            return Joined([key.data.view(-1) for key in self._keys])
        for key in self._keys:
            state = self._optimizer.state[key]
            if name not in state:
                state[name] = torch.zeros_like(key.data)
        return Joined([self._optimizer.state[key][name].view(-1) for key in self._keys])

    def clear(self) -> None:
        """As before the first step: an engine that goes back in the middle of a run has moments of its own."""
        for key in self._keys:
            # A checkpoint from before it was switched on has none, and it starts from the weights again.
            self._optimizer.state[key].pop(AVERAGE, None)
            for name, value in self._optimizer.state[key].items():
                if isinstance(value, Tensor):
                    value.zero_()
                elif name == "step":
                    self._optimizer.state[key][name] = 0

    def set_scalars(self, scalars: dict[str, Any]) -> None:
        """The step counter in the form this kernel keeps it: a tensor (torch), an int, or in the group (apex)."""
        module = type(self._optimizer).__module__
        if "step" in scalars and ("step" in self._group or module.startswith("apex")):
            self._group["step"] = scalars["step"]
        for key in self._keys:
            for name, value in scalars.items():
                if name == "step" and module.startswith("torch."):
                    # A tensor of its own each: sub-groups that shared one would advance it several times a step.
                    value = torch.tensor(float(value), device=key.device)
                self._optimizer.state[key][name] = value
