"""Fitting converted weights to a model: every tensor must find its place, and what is adapted is said."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from models.weights.positions import resize_positions

_IMAGE_POSITIONS = (
    "image_tower.positional_embedding",
    "image_tower.attnpool.positional_embedding",
    "image_tower.trunk.pos_embed",
)
_HF_POSITIONS = ("position_embeddings", "position_embedding.weight")
_TEXT_POSITIONS = "text_tower.positional_embedding"
_TOKENS = "text_tower.token_embedding.weight"
_LOGIT_BIAS = "logit_bias.value"
_NAMED = 4


def fit_state(model: nn.Module, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Adapts tensors to a model's sizes where that is well defined, and refuses all other differences.

    Image positions are interpolated to the model's grid; text positions beyond a shorter context are cut, which a
    causal tower does not notice; a vocabulary gains or loses DeCLIP's mask token. The logit bias, which changes no
    embedding, goes where the method has none, and keeps its start where the weights have none.

    Args:
        model: A `ClipModel`, on any device, meta included.
        tensors: Under its names.

    Returns:
        A state dict that the model loads strictly, and a line for each adaptation.

    Raises:
        ValueError: If tensors are missing, left over or of another shape.
    """
    own, tensors = model.state_dict(), dict(tensors)
    fitted, notes, reshaped = {}, [], []
    if _LOGIT_BIAS in tensors and _LOGIT_BIAS not in own:
        del tensors[_LOGIT_BIAS]
        notes.append("logit_bias left out: this method has none")
    elif _LOGIT_BIAS in own and _LOGIT_BIAS not in tensors:
        tensors[_LOGIT_BIAS] = own[_LOGIT_BIAS]
        notes.append("the weights have no logit_bias; it starts at method.logit_bias_init")
    for name, tensor in tensors.items():
        wanted = own.get(name)
        if wanted is None or wanted.shape == tensor.shape:
            fitted[name] = tensor
            continue
        try:
            fitted[name] = _adapt(name, tensor, wanted.shape)
            notes.append(f"{name} adapted from {list(tensor.shape)} to {list(wanted.shape)}")
        except ValueError:
            reshaped.append(f"{name} {list(tensor.shape)} instead of {list(wanted.shape)}")
    missing = [name for name in own if name not in tensors]
    unexpected = [name for name in tensors if name not in own]
    problems = [
        f"{label} {len(names)}: {', '.join(names[:_NAMED])}{', ...' if len(names) > _NAMED else ''}"
        for label, names in (("missing", missing), ("left over", unexpected), ("of another shape", reshaped))
        if names
    ]
    if problems:
        raise ValueError("; ".join(problems))
    return fitted, notes


def _adapt(name: str, tensor: Tensor, shape: torch.Size) -> Tensor:
    if tensor.ndim != len(shape) or tensor.shape[-1] != shape[-1]:
        raise ValueError
    is_table = name in _IMAGE_POSITIONS or (name.startswith("image_tower.backbone.") and name.endswith(_HF_POSITIONS))
    if is_table:
        return resize_positions(tensor.flatten(0, -2), math.prod(shape[:-1])).view(shape)
    if name == _TEXT_POSITIONS and len(tensor) > shape[0]:
        return tensor[: shape[0]].contiguous()
    # The mask token precedes the two others, which are last.
    if name == _TOKENS and shape[0] == len(tensor) + 1:
        return torch.cat([tensor[:-2], tensor.mean(dim=0, keepdim=True), tensor[-2:]])
    if name == _TOKENS and shape[0] == len(tensor) - 1:
        return without_mask_token(tensor)
    raise ValueError


def without_mask_token(tokens: Tensor) -> Tensor:
    """The token table of DeCLIP's vocabulary in the order of CLIP's: the third last row, the mask token, goes."""
    return torch.cat([tokens[:-3], tokens[-2:]])
