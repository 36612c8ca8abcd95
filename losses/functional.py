"""Pure functions on feature tensors shared by the losses."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Products in the precision of their inputs: without autocast and, on a GPU, without TF32.

    Either rounds the similarity of two unit vectors in its third decimal, which a temperature then multiplies by up to
    100.
    """
    with torch.autocast(device.type, enabled=False):
        if device.type != "cuda":
            yield
            return
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


def at_least_fp32(values: Tensor) -> Tensor:
    """Half-precision values as float32; float32 and float64 unchanged."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def check_precision(function: str, **tensors: Tensor) -> None:
    """Refuses a loss's inputs unless all are float32 or all float64.

    Args:
        function: The loss's name, for the message.
        **tensors: Its inputs by name.

    Raises:
        ValueError: Other or different dtypes.
    """
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) != 1 or not dtypes <= {torch.float32, torch.float64}:
        given = ", ".join(f"{name} in {str(tensor.dtype).removeprefix('torch.')}" for name, tensor in tensors.items())
        raise ValueError(f"{function} got {given}, expected float32 for all; pass features through normalize()")


def normalize(features: Tensor, eps: float = 1e-6) -> Tensor:
    """Scales each vector of the last dimension to unit length in float32, whatever precision it arrives in.

    Args:
        features: [..., D] floating point.
        eps: Shorter vectors are divided by this length instead, so that a zero vector has a finite gradient.

    Returns:
        [..., D] float32 (float64 for float64 input).
    """
    features = at_least_fp32(features)
    return features / torch.linalg.vector_norm(features, dim=-1, keepdim=True).clamp_min(eps)
