"""State dicts of `ClipModel` to and from those of transformers' CLIPModel, and from those of SiglipModel.

A CLIPModel is CLIP's own architecture and becomes our transformers; the three parts of each packed attention
projection are separate layers there. A SiglipModel becomes a model of two `hf:` towers, which hold its tensors as
they are.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_LAYER = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
_LAYER |= {"attn.out_proj": "self_attn.out_proj"}
_TOWERS = {
    "image_tower": (
        "vision_model",
        {
            "class_embedding": "embeddings.class_embedding",
            "patch_embed.weight": "embeddings.patch_embedding.weight",
            "positional_embedding": "embeddings.position_embedding.weight",
            "ln_pre.weight": "pre_layrnorm.weight",
            "ln_pre.bias": "pre_layrnorm.bias",
            "ln_post.weight": "post_layernorm.weight",
            "ln_post.bias": "post_layernorm.bias",
        },
    ),
    "text_tower": (
        "text_model",
        {
            "token_embedding.weight": "embeddings.token_embedding.weight",
            "positional_embedding": "embeddings.position_embedding.weight",
            "ln_final.weight": "final_layer_norm.weight",
            "ln_final.bias": "final_layer_norm.bias",
        },
    ),
}
_ALONE = {
    "image_tower.proj.weight": "visual_projection.weight",
    "text_tower.text_projection.weight": "text_projection.weight",
    "logit_scale.log_value": "logit_scale",
}
_SIGLIP_ALONE = {"logit_scale": "logit_scale.log_value", "logit_bias": "logit_bias.value"}
_ATTENTION = ("q_proj", "k_proj", "v_proj")


def to_hugging_face(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames and reshapes the state dict of a `ClipModel` to that of the same transformers.CLIPModel.

    Args:
        state_dict: From `ClipModel.state_dict()` with a vision transformer and CLIP's text transformer.

    Returns:
        A state dict that CLIPModel loads strictly; tensors share memory where their layout allows.

    Raises:
        ValueError: If a name has no place there (a ResNet, a timm tower, a bias of the text projection).
    """
    converted, unknown = {}, []
    for name, tensor in state_dict.items():
        target = _to_theirs(name)
        if target is None:
            unknown.append(name)
        elif target.endswith((".packed_weight", ".packed_bias")):
            prefix, kind = target.rsplit(".packed_", 1)
            for part, value in zip(_ATTENTION, tensor.chunk(3), strict=True):
                converted[f"{prefix}.{part}.{kind}"] = value.contiguous()
        elif target.endswith("patch_embedding.weight"):
            side = round((tensor.shape[1] // 3) ** 0.5)
            converted[target] = tensor.unflatten(1, (3, side, side))
        else:
            converted[target] = tensor.squeeze(0) if target == "logit_scale" else tensor
    if unknown:
        raise ValueError(
            f"{len(unknown)} tensors, such as {', '.join(unknown[:3])}, have no place in a Hugging Face CLIPModel, "
            f"which has a vision transformer and projections without bias"
        )
    return converted


def from_hugging_face(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames and reshapes the state dict of a transformers.CLIPModel to that of the same `ClipModel`.

    Args:
        state_dict: From `CLIPModel.state_dict()`, without buffers of position ids.

    Returns:
        A state dict that `ClipModel` loads strictly; unknown names are kept as they are.
    """
    converted: dict[str, Tensor] = {}
    packed: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state_dict.items():
        part = re.fullmatch(r"(.+)\.([qkv]_proj)\.(weight|bias)", name)
        if part:
            packed.setdefault(f"{part[1]}.packed_{part[3]}", {})[part[2]] = tensor
            continue
        target = _to_ours(name)
        if target == "image_tower.patch_embed.weight":
            tensor = tensor.flatten(1)
        converted[target] = tensor.reshape(1) if target == "logit_scale.log_value" else tensor
    for name, parts in packed.items():
        converted[_to_ours(name)] = torch.cat([parts[part] for part in _ATTENTION])
    return converted


def from_siglip(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames the state dict of a transformers.SiglipModel to that of a `ClipModel` of two `hf:` towers."""
    converted = {}
    for name, tensor in state_dict.items():
        for ours, (theirs, _) in _TOWERS.items():
            name = re.sub(f"^{theirs}\\.", f"{ours}.backbone.", name)
        converted[_SIGLIP_ALONE.get(name, name)] = tensor
    return converted


def _to_theirs(name: str) -> str | None:
    if name in _ALONE:
        return _ALONE[name]
    tower, _, rest = name.partition(".")
    if tower not in _TOWERS:
        return None
    prefix, names = _TOWERS[tower]
    if rest in names:
        return f"{prefix}.{names[rest]}"
    layer = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", rest)
    if layer is None:
        return None
    prefix = f"{prefix}.encoder.layers.{layer[1]}"
    if layer[2] in ("attn.in_proj_weight", "attn.in_proj_bias"):
        return f"{prefix}.self_attn.packed_{layer[2].rsplit('_', 1)[1]}"
    module, _, kind = layer[2].rpartition(".")
    return f"{prefix}.{_LAYER[module]}.{kind}" if module in _LAYER else None


def _to_ours(name: str) -> str:
    alone = {theirs: ours for ours, theirs in _ALONE.items()}
    if name in alone:
        return alone[name]
    for ours, (prefix, names) in _TOWERS.items():
        if not name.startswith(f"{prefix}."):
            continue
        rest = name.removeprefix(f"{prefix}.")
        for mine, theirs in names.items():
            if rest == theirs:
                return f"{ours}.{mine}"
        layer = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(\w+)", rest)
        if layer is None:
            return name
        block = f"{ours}.transformer.resblocks.{layer[1]}"
        if layer[3].startswith("packed_"):
            return f"{block}.attn.in_proj_{layer[3].removeprefix('packed_')}"
        module = next((mine for mine, theirs in _LAYER.items() if theirs == layer[2]), None)
        return name if module is None else f"{block}.{module}.{layer[3]}"
    return name
