"""State dicts of `ClipModel` to and from those of open_clip's CLIP.

Most tensors only change their prefix. The exceptions are listed in `_TENSORS`: open_clip holds the two projections as
matrices to multiply from the right, the patch embedding as a convolution, and logit scale and bias without a dimension.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor


class _Conversion(NamedTuple):
    ours: str
    theirs: str
    to_theirs: Callable[[Tensor], Tensor]
    to_ours: Callable[[Tensor], Tensor]


def _transpose(tensor: Tensor) -> Tensor:
    return tensor.t().contiguous()


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _linear_to_convolution(weight: Tensor) -> Tensor:
    patch_size = math.isqrt(weight.shape[1] // 3)
    return weight.unflatten(1, (3, patch_size, patch_size))


_TENSORS = (
    _Conversion("logit_scale.log_value", "logit_scale", lambda t: t.squeeze(0), lambda t: t.reshape(1)),
    _Conversion("logit_bias.value", "logit_bias", lambda t: t.squeeze(0), lambda t: t.reshape(1)),
    _Conversion(
        "image_tower.patch_embed.weight", "visual.conv1.weight", _linear_to_convolution, lambda t: t.flatten(1)
    ),
    _Conversion("image_tower.proj.weight", "visual.proj", _transpose, _transpose),
    _Conversion("text_tower.text_projection.weight", "text_projection", _transpose, _transpose),
)
# With a bias, and in timm towers, open_clip uses linear layers for the projections.
_TEXT_LINEAR = _Conversion("text_tower.text_projection.weight", "text_projection.weight", _same, _same)
_TIMM_PROJECTION = _Conversion("image_tower.proj.weight", "visual.head.proj.weight", _same, _same)

_TEXT_NAMES = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_projection.")


def to_open_clip(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames and reshapes the state dict of a `ClipModel` to that of the same open_clip.CLIP.

    Args:
        state_dict: From `ClipModel.state_dict()`; nothing else may be in it.

    Returns:
        A state dict that open_clip loads strictly; tensors share memory where their layout allows.

    Raises:
        ValueError: If a name is not one of a `ClipModel`.
    """
    special = {c.ours: (c.theirs, c.to_theirs) for c in _conversions(state_dict)}
    return _convert(state_dict, special, _rename_to_theirs, "ClipModel")


def from_open_clip(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames and reshapes the state dict of an open_clip.CLIP to that of the same `ClipModel`.

    Args:
        state_dict: From `open_clip.CLIP.state_dict()`; nothing else may be in it.

    Returns:
        A state dict that `ClipModel` loads strictly; tensors share memory where their layout allows.

    Raises:
        ValueError: If a name is not one of an open_clip.CLIP with a ViT, modified ResNet or timm image tower.
    """
    special = {c.theirs: (c.ours, c.to_ours) for c in _conversions(state_dict)}
    return _convert(state_dict, special, _rename_to_ours, "open_clip.CLIP")


def _conversions(state_dict: Mapping[str, Tensor]) -> list[_Conversion]:
    conversions = {c.ours: c for c in _TENSORS}
    if "visual.attnpool.c_proj.weight" in state_dict or "image_tower.attnpool.c_proj.weight" in state_dict:
        # The first stem convolution of a ResNet shares open_clip's name for the patch embedding.
        del conversions["image_tower.patch_embed.weight"]
    if "text_tower.text_projection.bias" in state_dict or "text_projection.bias" in state_dict:
        conversions[_TEXT_LINEAR.ours] = _TEXT_LINEAR
    if any(name.startswith(("image_tower.trunk.", "visual.trunk.")) for name in state_dict):
        conversions[_TIMM_PROJECTION.ours] = _TIMM_PROJECTION
    return list(conversions.values())


def _convert(
    state_dict: Mapping[str, Tensor],
    special: Mapping[str, tuple[str, Callable[[Tensor], Tensor]]],
    rename: Callable[[str], str | None],
    source: str,
) -> dict[str, Tensor]:
    converted, unknown = {}, []
    for name, tensor in state_dict.items():
        target, transform = special.get(name, (rename(name), _same))
        if target is None:
            unknown.append(name)
        else:
            converted[target] = transform(tensor)
    if unknown:
        raise ValueError(
            f"not the state dict of a {source}: {len(unknown)} unknown names, such as {', '.join(unknown[:3])}; "
            f"pass the state dict of the model alone"
        )
    return converted


def _rename_to_theirs(name: str) -> str | None:
    if name.startswith("image_tower."):
        return "visual." + name.removeprefix("image_tower.")
    stripped = name.removeprefix("text_tower.")
    return stripped if stripped != name and stripped.startswith(_TEXT_NAMES) else None


def _rename_to_ours(name: str) -> str | None:
    if name.startswith("visual."):
        return "image_tower." + name.removeprefix("visual.")
    return "text_tower." + name if name.startswith(_TEXT_NAMES) else None
