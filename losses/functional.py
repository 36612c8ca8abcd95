"""Pure functions on feature tensors shared by the losses."""

import torch
from torch import Tensor


def at_least_fp32(values: Tensor) -> Tensor:
    """Half-precision values as float32; float32 and float64 unchanged."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


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
