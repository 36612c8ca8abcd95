"""Micro-batches smaller than a rank's share, with the whole global batch as negatives in every term.

Source: Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", 2021. Features of all
micro-batches are computed without a graph, the objective runs once on them, and each micro-batch is encoded again
under its own random state with the feature gradients as upstream gradients: the exact full-batch gradient.
"""

from typing import Any

import torch
from torch import Tensor

from models.batch_norm import frozen_running_statistics
from trainer.engine import Engine


def cached_step(engine: Engine, micro_batches: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Forward and backward of one step over several micro-batches.

    Args:
        engine: The engine; its `step` is the caller's.
        micro_batches: This rank's micro-batches in order, on the device.

    Returns:
        The objective's terms, as from a single forward over the whole share.
    """
    states = []
    pieces = []
    with torch.no_grad():
        for batch in micro_batches:
            states.append(_random_state(engine.device))
            pieces.append(engine("encode", batch))
    dims = engine.method.feature_dims
    features = {name: torch.cat([p[name] for p in pieces], dim=dims.get(name, 0)) for name in pieces[0]}
    leaves = {name: value.requires_grad_() for name, value in features.items() if value.is_floating_point()}
    # The upstream gradients come back multiplied by the loss scale, which the second backward applies again.
    scale = engine.loss_scale()
    terms = engine("objective", features)
    engine.backward(terms["loss"], last=False)
    gradients = {
        name: (leaf.grad / scale).split([p[name].shape[dims.get(name, 0)] for p in pieces], dim=dims.get(name, 0))
        for name, leaf in leaves.items()
    }
    after = _random_state(engine.device)
    for index, batch in enumerate(micro_batches):
        _restore_random_state(states[index], engine.device)
        # Running statistics saw this micro-batch in the first pass.
        with frozen_running_statistics(engine.method):
            encoded = engine("encode", batch)
        surrogate = sum((encoded[name].float() * parts[index]).sum() for name, parts in gradients.items())
        engine.backward(surrogate, last=index == len(micro_batches) - 1)
    _restore_random_state(after, engine.device)
    return terms


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), cuda


def _restore_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
