"""A model folder that open_clip loads as `local-dir:`."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from data.captions.tokenizer import CaptionTokenizer, ClipTokenizer
from models.architectures import HEAD_WIDTH, ResNetConfig, VitConfig, find_architecture
from models.clip import ClipModel
from models.text import TextTransformer
from models.timm_tower import TimmTower
from models.weights.fitting import without_mask_token
from models.weights.open_clip_mapping import to_open_clip
from trainer.config.sections import RunConfig
from trainer.errors import ConfigError

_TOKENS = "text_tower.token_embedding.weight"


def write_openclip(model: ClipModel, tokenizer: CaptionTokenizer, config: RunConfig, out: Path) -> None:
    """Write `open_clip_config.json` and `open_clip_model.safetensors`.

    Raises:
        ConfigError: open_clip has no such model.
    """
    text_cfg = _text_config(model, tokenizer, config)
    vision_cfg = _vision_config(model, config)
    model_cfg = {
        "embed_dim": model.embed_dim,
        "quick_gelu": config.model.activation == "quick_gelu",
        "vision_cfg": vision_cfg,
        "text_cfg": text_cfg,
    }
    preprocess_cfg = {
        "mean": list(model.pixel_mean),
        "std": list(model.pixel_std),
        "interpolation": config.eval.interpolation,
        "resize_mode": "shortest",
    }
    if model.logit_bias is not None:
        # Without it open_clip has no place for the trained one.
        model_cfg["init_logit_bias"] = float(model.logit_bias())
    described = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}
    (out / "open_clip_config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    save_tensors(to_open_clip(stock_state(model, tokenizer)), out / "open_clip_model.safetensors")


def save_tensors(state: dict[str, Tensor], path: Path) -> None:
    """Write a state dict as safetensors."""
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path, {"format": "pt"})


def stock_state(model: ClipModel, tokenizer: ClipTokenizer) -> dict[str, Tensor]:
    """The state dict for stock CLIP's tokenizer: the row of DeCLIP's mask token, which shifts the others, goes."""
    state = dict(model.state_dict())
    if tokenizer.mask_token:
        state[_TOKENS] = without_mask_token(state[_TOKENS])
    return state


def check_clip_text(model: ClipModel, tokenizer: CaptionTokenizer, layout: str) -> None:
    """Refuse text towers and tokenizers that the CLIP classes of other libraries do not have.

    Raises:
        ConfigError: The text tower or the tokenizer is not CLIP's.
    """
    if isinstance(model.text_tower, TextTransformer) and isinstance(tokenizer, ClipTokenizer):
        return
    raise ConfigError(
        f"--to {layout} needs CLIP's text tower and tokenizer, this run has those of Hugging Face; "
        "use --to safetensors or onnx"
    )


def _text_config(model: ClipModel, tokenizer: CaptionTokenizer, config: RunConfig) -> dict[str, Any]:
    check_clip_text(model, tokenizer, "openclip")
    text = find_architecture(config.model.name).text
    sizes = {"width": text.width, "heads": text.width // HEAD_WIDTH, "layers": text.layers}
    vocab_size = tokenizer.vocab_size - int(tokenizer.mask_token)
    bias = {"proj_bias": True} if config.model.text_projection_bias else {}
    return {"context_length": tokenizer.context_length, "vocab_size": vocab_size, **sizes, **bias}


def _vision_config(model: ClipModel, config: RunConfig) -> dict[str, Any]:
    image, size = find_architecture(config.model.name).image, model.image_tower.image_size
    if isinstance(image, VitConfig):
        sizes = {"layers": image.layers, "width": image.width, "head_width": HEAD_WIDTH}
        return {"image_size": size, **sizes, "patch_size": image.patch_size}
    if isinstance(image, ResNetConfig):
        return {"image_size": size, "layers": list(image.layers), "width": image.width, "head_width": HEAD_WIDTH}
    if not isinstance(model.image_tower, TimmTower):
        raise ConfigError("--to openclip has no image towers of Hugging Face; use --to safetensors or onnx")
    _check_timm(model.image_tower, image.model_name)
    return {
        "image_size": size,
        "timm_model_name": image.model_name,
        "timm_model_pretrained": False,
        "timm_pool": "",
        "timm_proj": "linear",
    }


def _check_timm(tower: TimmTower, name: str) -> None:
    """open_clip builds a backbone at timm's own image size, and projects from its `num_features`."""
    native = tower.trunk.pretrained_cfg["input_size"][-1]
    if tower.has_fixed_size and tower.image_size != native:
        raise ConfigError(
            f"open_clip builds timm's {name} for images of {native} pixels only, this run has {tower.image_size}; "
            "use --to safetensors or onnx"
        )
    if tower.proj.in_features != tower.trunk.num_features:
        raise ConfigError(f"open_clip cannot project timm's {name}, whose head is wider; use --to safetensors or onnx")
