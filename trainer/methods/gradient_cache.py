"""Micro-batches smaller than a rank's share, with the whole global batch as negatives in every term.

Source: Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", 2021. Their two passes
are activation checkpointing with one micro-batch as the segment: the first forward keeps features only, the objective
runs once on all of them, and its one backward encodes each micro-batch again, under its own random state, when the
gradient of its features is there. So the engine sees one forward and one backward whatever the number of
micro-batches: gradients are reduced once, and ZeRO's bookkeeping of accumulation steps is never involved.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def encode_micro_batches(
    encode: Callable[[dict[str, Any]], dict[str, Tensor]], micro_batches: list[dict[str, Any]], dims: dict[str, int]
) -> dict[str, Tensor]:
    """Features of this rank's whole share, with the activations of one micro-batch at a time in memory.

    Args:
        encode: Micro-batch to named feature tensors.
        micro_batches: This rank's micro-batches in order, on the device.
        dims: Dimension along which a feature is joined, where it is not 0.

    Returns:
        The features of all micro-batches, joined; differentiable as if encoded in one piece.
    """
    if len(micro_batches) == 1:
        return encode(micro_batches[0])
    pieces = [checkpoint(encode, batch, use_reentrant=False) for batch in micro_batches]
    return {name: torch.cat([piece[name] for piece in pieces], dim=dims.get(name, 0)) for name in pieces[0]}
