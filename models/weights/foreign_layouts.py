"""Which project wrote a state dict, and its tensors under our names."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor

from models.weights.hugging_face_mapping import from_hugging_face, from_siglip
from models.weights.open_clip_mapping import from_open_clip
from models.weights.wrappers import by_holder

FORMATS = ("native", "openclip", "openai", "huggingface", "declip", "slip")
# Sizes that OpenAI's archives hold as tensors, and tables that are computed anew.
_NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "position_ids", "attn_mask")
_DECLIP_TEXT = ("encode_text.", "text_encoder.")
_CLIP_NAMES = ("visual.", "transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")
# SLIP's small vision transformer has 12 heads, every other of this width 6; the shapes do not tell.
_SLIP_SMALL_WIDTH = 384


class Converted(NamedTuple):
    """A state dict under our names.

    Args:
        tensors: By our names, where there are any.
        left_out: Names of the tensors that belong to other parts of the training code they come from.
    """

    tensors: dict[str, Tensor]
    left_out: list[str]


def detect_format(names: Iterable[str]) -> str:
    """Tells by its names which project wrote a state dict.

    Args:
        names: Of the tensors, without `module.`.

    Returns:
        One of `FORMATS`.

    Raises:
        ValueError: If it is none of theirs.
    """
    names = set(names)

    def has(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in names)

    if has("image_tower.") and has("text_tower."):
        return "native"
    if has("vision_model.") and has("text_model."):
        return "huggingface"
    if has("visual.") and any(has(prefix) for prefix in _DECLIP_TEXT):
        return "declip"
    if has("visual.") and "image_projection" in names:
        return "slip"
    if has("visual.") and {"token_embedding.weight", "text.token_embedding.weight"} & names:
        return "openai" if "input_resolution" in names else "openclip"
    example = ", ".join(sorted(names)[:3])
    raise ValueError(
        f"the weights are of no known project (they hold {example}, ...); known: {', '.join(FORMATS)}, with both towers"
    )


def find_model(state_dict: Mapping[str, Tensor], layout: str = "auto") -> tuple[str, dict[str, Tensor], list[str]]:
    """The model among the tensors of a file, which may keep it below a prefix beside heads and losses.

    Args:
        state_dict: Tensors by name.
        layout: One of `FORMATS`, or `auto` to tell it by the names.

    Returns:
        The layout, the model's tensors without the prefix, and the names of the others.

    Raises:
        ValueError: If it is of no known project, or there are several models.
    """
    found, problem = [], None
    whole = {name: name for name in state_dict}
    for prefix, names in (by_holder(state_dict) | {"": whole}).items():
        try:
            detected = detect_format(names)
        except ValueError as error:
            problem = error if not prefix else problem
            continue
        if layout in ("auto", detected):
            found.append((prefix, detected, names))
    if not found and layout == "auto":
        raise problem
    if len(found) > 1:
        shown = " and ".join(f"'{prefix}'" for prefix, _, _ in found)
        raise ValueError(f"the weights hold several models, below {shown}; save the one that is meant by itself")
    if not found:
        return layout, dict(state_dict), []
    _, detected, names = found[0]
    kept = set(names.values())
    beside = [name for name in state_dict if name not in kept]
    return detected, {short: state_dict[name] for short, name in names.items()}, beside


def convert(state_dict: Mapping[str, Tensor], layout: str) -> Converted:
    """Brings the tensors of another project under our names.

    Args:
        state_dict: Tensors by their names, without `module.`.
        layout: One of `FORMATS`.

    Returns:
        The tensors in fp32, and what is no part of the towers.

    Raises:
        ValueError: If it is a model whose computation our towers do not have.
    """
    state = {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in state_dict.items()
        if not name.endswith(_NO_WEIGHTS)
    }
    return {
        "native": lambda state: Converted(state, []),
        "openclip": _from_open_clip,
        "openai": _from_open_clip,
        "huggingface": _from_hugging_face,
        "declip": _from_declip,
        "slip": _from_slip,
    }[layout](state)


def _from_open_clip(state: dict[str, Tensor]) -> Converted:
    if "logit_bias" in state and "text.token_embedding.weight" in state:
        raise ValueError(
            "these open_clip weights are of a SigLIP model, whose text tower is not causal; import its Hugging Face "
            "form with model.name and model.text_name hf:<folder>"
        )
    if "text.token_embedding.weight" in state:
        state = {name.removeprefix("text."): tensor for name, tensor in state.items()}
    return Converted(from_open_clip(state), [])


def _from_hugging_face(state: dict[str, Tensor]) -> Converted:
    if not any(name.startswith("vision_model.head.") for name in state):
        return Converted(from_hugging_face(state), [])
    return Converted(from_siglip(state), [])


def _from_declip(state: dict[str, Tensor]) -> Converted:
    """DeCLIP's training code: CLIP's names, the text tower under a prefix of its own, and the heads beside them."""
    kept, left_out = {}, []
    for name, tensor in state.items():
        stripped = name
        for prefix in _DECLIP_TEXT:
            stripped = stripped.removeprefix(prefix)
        # Its ResNet carries a linear layer that its forward never reaches.
        if stripped == "logit_scale" or (stripped.startswith(_CLIP_NAMES) and not stripped.startswith("visual.fc.")):
            kept[stripped] = tensor
        else:
            left_out.append(name)
    return Converted(from_open_clip(kept), left_out)


def _from_slip(state: dict[str, Tensor]) -> Converted:
    """SLIP's code: a timm backbone without a prefix of its own, both projections as matrices, and the SimCLR head."""
    projection = state.pop("image_projection")
    if projection.shape[0] == _SLIP_SMALL_WIDTH:
        raise ValueError(
            "SLIP's small vision transformer has 12 heads, timm's has 6, so its weights would give other features; "
            "import the base or the large one"
        )
    left_out = [name for name in state if name.startswith("image_mlp.")]
    trunk = {f"image_tower.trunk.{n.removeprefix('visual.')}": t for n, t in state.items() if n.startswith("visual.")}
    text = {n: t for n, t in state.items() if not n.startswith(("visual.", "image_mlp."))}
    return Converted(
        {**trunk, "image_tower.proj.weight": projection.t().contiguous(), **from_open_clip(text)}, left_out
    )
