"""The device of a rank, and what it multiplies fast."""

import os

import torch

from trainer.errors import ConfigError
from trainer.ranks.launch import Place


def select_device(requested: str, place: Place) -> torch.device:
    """The device of this rank: one GPU per local rank, or the CPU.

    Raises:
        ConfigError: CUDA was asked for and is not there, or there are more local ranks than GPUs.
    """
    device = _select_device(requested, place)
    # DeepSpeed picks its accelerator while it is imported.
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    if device.type == "cuda":
        # And its device by these, which count the node's ranks even where each sees one GPU alone.
        for name in {"LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"} & os.environ.keys():
            os.environ[name] = str(device.index)
    return device


def _select_device(requested: str, place: Place) -> torch.device:
    available = torch.cuda.is_available()
    if requested == "cuda" and not available:
        raise ConfigError("train.device is cuda but torch sees no GPU; use --train.device cpu or auto")
    if requested == "cpu" or not available:
        return torch.device("cpu")
    if _has_own_gpu(place):
        return torch.device("cuda", 0)
    if place.local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {place.local_rank} has no GPU: this node shows {torch.cuda.device_count()}; "
            "start one rank per GPU or use --train.device cpu"
        )
    return torch.device("cuda", place.local_rank)


def _has_own_gpu(place: Place) -> bool:
    # srun --gpus-per-task=1 and bound MPI tasks: each sees its own GPU alone, and calls it number 0.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    one = torch.cuda.device_count() == 1 and visible != "" and "," not in visible
    return one and place.launcher in ("srun", "mpirun")


def resolve_precision(requested: str, device: torch.device) -> str:
    """What is computed in: `auto` is bf16 where hardware multiplies it fast (CUDA >= 8.0, a CPU with AMX), else fp32.

    `tf32` is fp32 on devices without it.
    """
    has_tensor_cores = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if requested == "tf32":
        return "tf32" if has_tensor_cores else "fp32"
    if requested != "auto":
        return requested
    return "bf16" if has_tensor_cores or (device.type == "cpu" and torch.cpu._is_amx_tile_supported()) else "fp32"


def set_precision_of_products(precision: str, device: torch.device) -> None:
    """Let a GPU's products and convolutions of float32 round to TF32 under `tf32`, and under nothing else.

    torch's own defaults differ: convolutions round, products do not. Losses are exact either way
    (`losses.functional.exact_products`).
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
