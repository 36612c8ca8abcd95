"""Reading the files of a checkpoint: memory-mapped, without DeepSpeed, and without unpickling code."""

import bisect
import math
import pickle
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoint.layout import Layout
from trainer.errors import ConfigError

TRAINER_STATE = "trainer_state.pt"
_RANK_FILE = "method_rank_{:05d}.pt"
_MODEL_FILE = "mp_rank_00_model_states.pt"
_OPTIMIZER_FILE = "mp_rank_00_optim_states.pt"


class _Ignored:
    """Stands in for the few plain objects DeepSpeed pickles; nothing of them is used, and none of its code runs."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __setstate__(self, state: Any) -> None:
        self.values = state


_STAND_INS = [
    (_Ignored, f"deepspeed.{name}")
    for name in (
        "runtime.fp16.loss_scaler.LossScaler",
        "runtime.fp16.loss_scaler.DynamicLossScaler",
        "utils.tensor_fragment.fragment_address",
    )
]


def read_file(path: Path) -> dict[str, Any]:
    """The content of one file; its tensors are memory-mapped.

    Raises:
        ConfigError: The file cannot be read, or holds anything but tensors and plain values.
    """
    try:
        with torch.serialization.safe_globals(_STAND_INS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{path} holds more than tensors and plain values and was not loaded, as that could run code "
            f"({reason[:160]}); use a checkpoint this trainer wrote"
        ) from None
    except (OSError, RuntimeError, EOFError) as error:
        raise ConfigError(
            f"{path} cannot be read ({' '.join(str(error).split())[:160]}); choose another checkpoint"
        ) from None


def read_layout(folder: Path) -> Layout:
    """How the state in a checkpoint folder is cut up."""
    return Layout(**read_file(folder / TRAINER_STATE)["layout"])


def rank_file(folder: Path, rank: int) -> Path:
    """Where a checkpoint keeps what the method on a rank has for itself (`Method.rank_state`)."""
    return folder / _RANK_FILE.format(rank)


def read_rank_states(folder: Path) -> list[dict[str, Any]]:
    """What the method had for itself on each rank that saved, in their order; empty if the method has no such state.

    Raises:
        ConfigError: A file cannot be read.
    """
    files = [rank_file(folder, rank) for rank in range(read_layout(folder).world_size)]
    return [read_file(path) for path in files if path.is_file()]


class Shard:
    """The optimizer state one rank wrote, memory-mapped; at ZeRO 0 the one state there is."""

    def __init__(self, folder: Path, layout: Layout, rank: int) -> None:
        self._layout = layout
        if layout.stage == 0:
            content = read_file(folder / _MODEL_FILE)
            self._module, self._optimizer = content["module"], content["optimizer"]
            return
        content = read_file(folder / f"zero_pp_rank_{rank}_{_OPTIMIZER_FILE}")["optimizer_state_dict"]
        self._masters = content["fp32_flat_groups" if layout.stage == 3 else "single_partition_of_fp32_groups"]
        self._optimizer = content["optimizer_state_dict" if layout.stage == 3 else "base_optimizer_state"]

    def vectors(self, group: int) -> dict[str, list[Tensor]]:
        """What the rank holds of a group (see `Layout.runs`) as flat tensors that follow each other, by name.

        `fp32` are the weights, every other name is one of the optimizer's.
        """
        masters, states = self._pieces(group)
        names = [name for name, value in states[0].items() if _is_vector(value)] if states else []
        found = {"fp32": [master.flatten() for master in masters]}
        for name in names:
            if all(_is_vector(state.get(name)) for state in states):
                found[name] = [state[name].flatten() for state in states]
        return found

    def scalars(self, group: int) -> dict[str, Any]:
        """What the optimizer keeps besides vectors; `step` is a number, wherever the kernel keeps it."""
        _, states = self._pieces(group)
        found = {name: value for state in states for name, value in state.items() if not _is_vector(value)}
        # DeepSpeed's FusedAdam advances the counter of the last parameter of a group only.
        counters = [state.get("step") for state in states] + [self._optimizer["param_groups"][group].get("step")]
        steps = [int(float(counter)) for counter in counters if counter is not None]
        return {**found, "step": max(steps)} if steps else found

    def _pieces(self, group: int) -> tuple[list[Tensor], list[dict[str, Any]]]:
        layout, state = self._layout, self._optimizer["state"]
        if layout.stage == 0:
            indices = self._optimizer["param_groups"][group]["params"]
            return [self._module[name] for name in layout.parameter_names[group]], [state.get(i, {}) for i in indices]
        if layout.stage < 3:
            return [self._masters[group]], [state.get(group, {})]
        begin, end = self._sub_groups(group)
        return self._masters[begin:end], [state.get(i, {}) for i in range(begin, end)]

    def _sub_groups(self, group: int) -> tuple[int, int]:
        """Which of ZeRO 3's flat sub-groups belong to a group: they follow each other in group order."""
        position = 0
        for index in range(group + 1):
            begin, wanted = position, sum(self._layout.shares(index))
            while wanted > 0:
                wanted -= self._masters[position].numel()
                position += 1
        return begin, position


class Joined:
    """Flat tensors that follow each other, addressed as one."""

    def __init__(self, parts: list[Tensor]) -> None:
        self._parts = parts
        self._ends = list(accumulate(part.numel() for part in parts))

    def copy_to(self, target: "Joined", offset: int, target_offset: int, length: int) -> None:
        """Copy `length` elements from `offset` here to `target_offset` there."""
        while length > 0:
            source, sink = self._from(offset), target._from(target_offset)
            count = min(length, source.numel(), sink.numel())
            sink[:count].copy_(source[:count])
            offset, target_offset, length = offset + count, target_offset + count, length - count

    def _from(self, offset: int) -> Tensor:
        index = bisect.bisect_right(self._ends, offset)
        return self._parts[index][offset - self._ends[index] :]


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The trained model of a checkpoint folder, from any ZeRO stage, without DeepSpeed, ranks or a GPU.

    Args:
        folder: A checkpoint, `checkpoints/step_<N>`.

    Returns:
        The method's whole state dict on the CPU, by name and in its order: trained parameters (the fp32 masters),
        frozen parameters and persistent buffers. Memory-mapped views of the files, not to be written to, except at
        ZeRO 3 on several ranks, where the parameters are put together in memory from one shard at a time.

    Raises:
        ConfigError: A file is missing or damaged, or holds more than tensors and plain values.
    """
    layout = read_layout(folder)
    if layout.stage < 3:
        return dict(read_file(folder / _MODEL_FILE)["module"])
    return _joined_weights(folder, layout)


def read_optimizer_state(folder: Path) -> tuple[dict[str, dict[str, Tensor]], list[dict[str, Any]]]:
    """The optimizer's state of a checkpoint folder, put together in memory from one shard at a time.

    Returns:
        Vectors by kind (`exp_avg`, ...) and parameter, in the parameters' shapes, and the scalars of each group.

    Raises:
        ConfigError: See `read_weights`.
    """
    layout = read_layout(folder)
    found: dict[str, dict[str, Tensor]] = {}
    scalars: list[dict[str, Any]] = []
    whole: list[dict[str, Tensor]] = [{} for _ in layout.parameter_names]
    for rank in range(layout.num_shards):
        shard = Shard(folder, layout, rank)
        for group, vectors in enumerate(whole):
            if rank == 0:
                scalars.append(shard.scalars(group))
            size = sum(layout.group_sizes(group))
            for kind, parts in shard.vectors(group).items():
                if kind == "fp32":
                    continue
                target = Joined([vectors.setdefault(kind, torch.zeros(size))])
                for begin, offset, length in layout.runs(group, rank):
                    Joined(parts).copy_to(target, offset, begin, length)
    for group, vectors in enumerate(whole):
        names = layout.parameter_names[group]
        for kind, vector in vectors.items():
            pieces = zip(names, vector.split(layout.group_sizes(group)), strict=True)
            found.setdefault(kind, {}).update({name: p.view(layout.parameter_shapes[name]) for name, p in pieces})
    return found, scalars


def _joined_weights(folder: Path, layout: Layout) -> dict[str, Tensor]:
    models = (read_file(folder / f"zero_pp_rank_{rank}_{_MODEL_FILE}") for rank in range(layout.world_size))
    whole = {name: torch.empty(math.prod(s)) for name, s in (layout.parameter_shapes | layout.frozen_shapes).items()}
    first = None
    for rank, model in enumerate(models):
        first = first or model
        for name, fragment in model["frozen_param_fragments"].items():
            begin = rank * fragment.numel()
            part = whole[name][begin : begin + fragment.numel()]
            part.copy_(fragment.flatten()[: part.numel()])
        for name, begin, piece in _weight_pieces(Shard(folder, layout, rank), layout, rank):
            whole[name][begin : begin + piece.numel()].copy_(piece)
    shapes = layout.parameter_shapes | layout.frozen_shapes
    found = {}
    for name, value in first["module"].items():
        own = first["shared_params"].get(name, name)
        found[name] = whole[own].view(shapes[own]) if own in shapes else value
    return found


def _weight_pieces(shard: Shard, layout: Layout, rank: int) -> Iterator[tuple[str, int, Tensor]]:
    """ZeRO 3: what a rank holds of each parameter, as (name, where in the flat parameter, values)."""
    for group, names in enumerate(layout.parameter_names):
        flats = iter(shard.vectors(group)["fp32"])
        flat = torch.empty(0)
        for name, size, share in zip(names, layout.group_sizes(group), layout.shares(group), strict=True):
            while flat.numel() == 0:
                flat = next(flats)
            piece, flat = flat[:share], flat[share:]
            begin = min(size, rank * share)
            yield name, begin, piece[: size - begin]


def _is_vector(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0
