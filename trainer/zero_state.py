"""Reading and placing ZeRO state: any world size and stage to any other, bitwise, without unpickling code.

DeepSpeed writes flat fp32 partitions. Seen as one vector per parameter group (its parameters concatenated), every
layout is an index map onto that vector, so loading is: find the bytes this rank's partition needs, and copy them.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.engine import Engine
from trainer.errors import ConfigError

_MODEL_FILE = "mp_rank_00_model_states.pt"


@dataclass(frozen=True)
class Layout:
    """How a checkpoint's optimizer state is cut up."""

    stage: int
    world_size: int
    parameter_names: list[list[str]]
    parameter_shapes: dict[str, tuple[int, ...]]

    def group_sizes(self, group: int) -> list[int]:
        """Element counts of the group's parameters, in order."""
        return [_numel(self.parameter_shapes[name]) for name in self.parameter_names[group]]


def load_engine_state(engine: Engine, folder: Path, saved: Layout, rank: int, world_size: int) -> None:
    """Load parameters, buffers and optimizer state saved by `engine.deepspeed.save_checkpoint`.

    Args:
        engine: A freshly built engine of the same model.
        folder: The checkpoint folder.
        saved: Layout the checkpoint was written with.
        rank: This rank.
        world_size: Number of ranks now; may differ from the saved one.

    Raises:
        ConfigError: The checkpoint holds other parameters than the model.
    """
    _check_same_parameters(engine, saved, folder)
    groups = [_SavedGroup(folder, saved, index) for index in range(len(saved.parameter_names))]
    _load_untrained(engine, folder, saved)
    for index, group in enumerate(groups):
        _place_group(engine, index, group, rank, world_size)


def _check_same_parameters(engine: Engine, saved: Layout, folder: Path) -> None:
    if saved.parameter_names == engine.parameter_names and saved.parameter_shapes == engine.parameter_shapes:
        return
    missing = sorted(set(engine.parameter_shapes) - set(saved.parameter_shapes))
    extra = sorted(set(saved.parameter_shapes) - set(engine.parameter_shapes))
    changed = sorted(
        name
        for name in set(saved.parameter_shapes) & set(engine.parameter_shapes)
        if saved.parameter_shapes[name] != engine.parameter_shapes[name]
    )
    detail = "; ".join(
        f"{label} {names[:3]}"
        for label, names in (("missing", missing), ("extra", extra), ("reshaped", changed))
        if names
    )
    raise ConfigError(
        f"checkpoint {folder} is of another model ({detail or 'other parameter groups'}); "
        "resume with the recipe it was started with, or use a new --run_dir"
    )


class _SavedGroup:
    """One parameter group of a checkpoint: whole-group vectors by name (`fp32`, `exp_avg`, ...) and scalars."""

    def __init__(self, folder: Path, layout: Layout, index: int) -> None:
        self.vectors: dict[str, Tensor] = {}
        self.scalars: dict[str, Any] = {}
        self.group_step: Any = None
        if layout.stage == 0:
            self._read_unsharded(folder, layout, index)
        else:
            self._read_sharded(folder, layout, index)

    def _read_unsharded(self, folder: Path, layout: Layout, index: int) -> None:
        saved = _load(folder / _MODEL_FILE)
        names = layout.parameter_names[index]
        self.vectors["fp32"] = torch.cat([saved["module"][name].flatten().float() for name in names])
        self.group_step = saved["optimizer"]["param_groups"][index].get("step")
        states = [saved["optimizer"]["state"].get(i, {}) for i in saved["optimizer"]["param_groups"][index]["params"]]
        for key in states[0]:
            values = [state[key] for state in states]
            if isinstance(values[0], Tensor) and values[0].ndim:
                self.vectors[key] = torch.cat([value.flatten() for value in values])
            else:
                # DeepSpeed's FusedAdam advances the counter of the last parameter of a group only.
                self.scalars[key] = max(values, key=float) if key == "step" else values[0]

    def _read_sharded(self, folder: Path, layout: Layout, index: int) -> None:
        shards = [_load_shard(folder, rank)["optimizer_state_dict"] for rank in range(layout.world_size)]
        if layout.stage == 3:
            pieces = [_stage3_pieces(shard, layout, index) for shard in shards]
        else:
            pieces = [_stage12_pieces(shard, index) for shard in shards]
        for key in pieces[0][0]:
            parts = [vectors[key] for vectors, _, _ in pieces]
            self.vectors[key] = _join_partitions(parts, layout, index)
        self.scalars, self.group_step = pieces[0][1], pieces[0][2]

    def parameter_slices(self, sizes: list[int]) -> list[Tensor]:
        """The fp32 vector cut into parameters."""
        return list(self.vectors["fp32"][: sum(sizes)].split(sizes))


def _join_partitions(parts: list[Tensor], layout: Layout, index: int) -> Tensor:
    sizes = layout.group_sizes(index)
    if layout.stage != 3:
        return torch.cat(parts)[: sum(sizes)]
    # ZeRO 3 partitions each parameter on its own, padded to a multiple of the world size.
    shares = [-(-size // layout.world_size) for size in sizes]
    by_rank = [part[: sum(shares)].split(shares) for part in parts]
    return torch.cat([torch.cat([by_rank[r][i] for r in range(len(parts))])[:size] for i, size in enumerate(sizes)])


def _stage12_pieces(shard: dict[str, Any], index: int) -> tuple[dict[str, Tensor], dict[str, Any], Any]:
    flat = shard["single_partition_of_fp32_groups"][index]
    base = shard["base_optimizer_state"]
    vectors, scalars = _split_state(base["state"].get(index, {}))
    return {"fp32": flat, **vectors}, scalars, base["param_groups"][index].get("step")


def _stage3_pieces(shard: dict[str, Any], layout: Layout, index: int) -> tuple[dict[str, Tensor], dict[str, Any], Any]:
    flats = shard["fp32_flat_groups"]
    base = shard["optimizer_state_dict"]
    begin, end = _subgroups_of(index, [flat.numel() for flat in flats], layout)
    states = [_split_state(base["state"].get(i, {})) for i in range(begin, end)]
    vectors = {key: torch.cat([vectors[key] for vectors, _ in states]) for key in states[0][0]}
    return {"fp32": torch.cat(flats[begin:end]), **vectors}, states[0][1], base["param_groups"][index].get("step")


def _subgroups_of(index: int, flat_sizes: list[int], layout: Layout) -> tuple[int, int]:
    """Which of ZeRO 3's flat sub-groups belong to a parameter group: they follow each other in group order."""
    position = 0
    for group in range(index + 1):
        begin = position
        wanted = sum(-(-size // layout.world_size) for size in layout.group_sizes(group))
        while wanted > 0:
            wanted -= flat_sizes[position]
            position += 1
    return begin, position


def _split_state(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    # Moments keep the padding of the last rank that the saved masters have lost, so only their rank tells them apart.
    vectors = {key: value for key, value in state.items() if isinstance(value, Tensor) and value.ndim}
    return vectors, {key: value for key, value in state.items() if key not in vectors}


def _place_group(engine: Engine, index: int, group: _SavedGroup, rank: int, world_size: int) -> None:
    names = engine.parameter_names[index]
    parameters = dict(engine.method.named_parameters())
    sizes = [_numel(engine.parameter_shapes[name]) for name in names]
    _place_parameters(engine, [parameters[name] for name in names], group.parameter_slices(sizes))
    optimizer = engine.base_optimizer
    scalars = _adapt_step(optimizer, index, group)
    if engine.stage == 0:
        for offset, (name, size) in zip(_offsets(sizes), zip(names, sizes, strict=True), strict=True):
            parameter = parameters[name]
            local = {key: vector[offset : offset + size].view_as(parameter) for key, vector in group.vectors.items()}
            _set_state(optimizer, parameter, local, scalars)
        return
    for flat, local in _local_partitions(engine, index, group, sizes, rank, world_size):
        flat.data.copy_(local["fp32"])
        _set_state(optimizer, flat, local, scalars)


def _adapt_step(optimizer: torch.optim.Optimizer, index: int, group: _SavedGroup) -> dict[str, Any]:
    """The saved step counter in the form this kernel keeps it: a tensor (torch), an int, or in the group (apex)."""
    counters = [int(float(step)) for step in (group.scalars.get("step"), group.group_step) if step is not None]
    if not counters:
        return group.scalars
    step = max(counters)
    if "step" in optimizer.param_groups[index] or type(optimizer).__module__.startswith("apex"):
        optimizer.param_groups[index]["step"] = step
    in_torch = type(optimizer).__module__.startswith("torch.")
    return {**group.scalars, "step": torch.tensor(float(step)) if in_torch else step}


def _place_parameters(engine: Engine, parameters: list[torch.nn.Parameter], values: list[Tensor]) -> None:
    if engine.stage == 3:
        import deepspeed

        for parameter, value in zip(parameters, values, strict=True):
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(value.view(parameter.ds_shape))
        return
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data.copy_(value.view_as(parameter))


def _local_partitions(
    engine: Engine, index: int, group: _SavedGroup, sizes: list[int], rank: int, world_size: int
) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """This rank's flat master tensors of one group, each with the slices of the saved vectors that belong in it."""
    optimizer = engine.optimizer
    if engine.stage != 3:
        flat = optimizer.single_partition_of_fp32_groups[index]
        begin = rank * flat.numel()
        return [(flat, {key: _slice(vector, begin, flat.numel()) for key, vector in group.vectors.items()})]
    shares = [-(-size // world_size) for size in sizes]
    local = {
        key: torch.cat(
            [
                _slice(vector[offset : offset + size], rank * share, share)
                for offset, size, share in zip(_offsets(sizes), sizes, shares, strict=True)
            ]
        )
        for key, vector in group.vectors.items()
    }
    flats = [
        flat
        for i, flat in enumerate(optimizer.fp32_partitioned_groups_flat)
        if optimizer.sub_group_to_group_id[i] == index
    ]
    bounds = _offsets([flat.numel() for flat in flats])
    return [
        (flat, {key: _slice(vector, begin, flat.numel()) for key, vector in local.items()})
        for flat, begin in zip(flats, bounds, strict=True)
    ]


def _slice(vector: Tensor, begin: int, length: int) -> Tensor:
    piece = vector[min(begin, vector.numel()) : min(begin + length, vector.numel())]
    return torch.nn.functional.pad(piece, (0, length - piece.numel()))


def _set_state(
    optimizer: torch.optim.Optimizer, key: Tensor, vectors: dict[str, Tensor], scalars: dict[str, Any]
) -> None:
    state = optimizer.state[key]
    for name, value in vectors.items():
        if name != "fp32":
            if name not in state:
                state[name] = torch.empty_like(key.data)
            state[name].copy_(value)
    for name, value in scalars.items():
        # Cloned: sub-groups that shared one step tensor would advance it several times a step.
        state[name] = value.clone().to(key.device) if isinstance(value, Tensor) else value


def _load_untrained(engine: Engine, folder: Path, saved: Layout) -> None:
    """Buffers and frozen parameters, which are in the model files only."""
    if saved.stage < 3:
        files = [_load(folder / _MODEL_FILE)]
    else:
        files = [_load(folder / f"zero_pp_rank_{rank}_{_MODEL_FILE}") for rank in range(saved.world_size)]
    for key, buffer in engine.method.named_buffers():
        if key in files[0]["module"]:
            buffer.copy_(files[0]["module"][key])
    frozen = {name: p for name, p in engine.method.named_parameters() if not p.requires_grad}
    values = [_frozen_value(files, name) if saved.stage == 3 else files[0]["module"][name] for name in frozen]
    _place_parameters(engine, list(frozen.values()), values)


def _frozen_value(files: list[dict[str, Any]], name: str) -> Tensor:
    shape = files[0]["frozen_param_shapes"][name]
    return torch.cat([file["frozen_param_fragments"][name].flatten() for file in files])[: _numel(tuple(shape))]


def _load_shard(folder: Path, rank: int) -> dict[str, Any]:
    return _load(folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")


def _load(path: Path) -> dict[str, Any]:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    # The few plain classes DeepSpeed pickles; anything else in the file is refused by torch.
    with torch.serialization.safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _offsets(sizes: list[int]) -> list[int]:
    offsets, total = [], 0
    for size in sizes:
        offsets.append(total)
        total += size
    return offsets


def _numel(shape: tuple[int, ...]) -> int:
    total = 1
    for extent in shape:
        total *= extent
    return total
