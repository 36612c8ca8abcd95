"""Weights to start from: of a whole model of another project, or of the backbones of timm and Hugging Face."""

import json
from pathlib import Path
from typing import Any

import torch

from models.clip import IMAGENET_MEAN, IMAGENET_STD, ClipModel
from models.hf_backbone import read_pixel_statistics
from models.hf_towers import HfImageTower, HfTextTower
from models.timm_tower import TimmTower
from models.weights.fitting import fit_state
from models.weights.foreign_layouts import convert, find_model
from models.weights.weight_files import read_weights
from trainer.config.sections import ModelConfig
from trainer.errors import ConfigError
from trainer.run_weights import RunWeights, read_run_weights

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_SHOWN = 6
# What the tensors do not show.
_UNSEEN = ("activation", "pixel_mean", "pixel_std")


def load_pretrained(config: ModelConfig, model: ClipModel) -> list[str]:
    """Fills a model with the weights its configuration names; one on the meta device is only compared with them.

    Args:
        config: The `model` section.
        model: Built from it.

    Returns:
        Lines for the log: what was loaded, adapted and left out. Empty if the configuration names no weights.

    Raises:
        ConfigError: Weights that cannot be read or do not fit, that were trained on other pixels or with another
            activation, or a locked tower without weights.
    """
    is_meta = model.logit_scale.log_value.is_meta
    try:
        if config.pretrained:
            return _load_model(config, model, is_meta)
        return _load_backbones(config, model, is_meta)
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"model.pretrained: {error}") from None


def _load_model(config: ModelConfig, model: ClipModel, is_meta: bool) -> list[str]:
    if config.image_pretrained or config.text_pretrained:
        raise ConfigError("model.pretrained fills both towers; leave out model.image_pretrained and text_pretrained")
    run = read_run_weights(Path(config.pretrained))
    tensors = read_weights(config.pretrained) if run is None else run.tensors
    layout, tensors, beside = find_model(tensors, config.pretrained_format)
    converted = convert(tensors, layout)
    try:
        state, notes = fit_state(model, converted.tensors)
    except ValueError as error:
        raise ConfigError(
            f"model.pretrained {config.pretrained} ({layout}) is another model than model.name {config.name}: {error}"
        ) from None
    if run is None:
        _check_companions(config, layout)
    else:
        _check_run(config, run)
    if not is_meta:
        model.load_state_dict(state)
    source = config.pretrained if run is None else f"{run.checkpoint}, {run.weights} weights"
    lines = [f"pretrained: {source} ({layout}): {len(state)} tensors {'fit' if is_meta else 'loaded'}"]
    left_out = converted.left_out + beside
    if left_out:
        shown = ", ".join(left_out[:_SHOWN]) + (", ..." if len(left_out) > _SHOWN else "")
        lines.append(f"pretrained: {len(left_out)} tensors left out, no part of the towers: {shown}")
    return lines + [f"pretrained: {note}" for note in [*notes, *([] if run is None else run.notes)]]


def _load_backbones(config: ModelConfig, model: ClipModel, is_meta: bool) -> list[str]:
    lines = []
    image_tower, text_tower = model.image_tower, model.text_tower
    if config.image_pretrained:
        if not isinstance(image_tower, HfImageTower | TimmTower):
            raise ConfigError(
                f"model.image_pretrained needs a model.name timm:<name> or hf:<name>, not {config.name}; "
                "weights of a whole model go into model.pretrained"
            )
        if isinstance(config.image_pretrained, str) and isinstance(image_tower, HfImageTower):
            raise ConfigError("model.image_pretrained with an hf: tower is true or false; the weights are its source's")
        _check_pixels(config, image_tower.expected_pixels(), config.name)
        if not is_meta and isinstance(image_tower, HfImageTower):
            image_tower.load_pretrained()
        elif not is_meta:
            image_tower.load_pretrained(config.image_pretrained if isinstance(config.image_pretrained, str) else None)
        lines.append(f"pretrained: image backbone of {config.name}")
    if config.text_pretrained:
        if not isinstance(text_tower, HfTextTower):
            raise ConfigError("model.text_pretrained needs a model.text_name hf:<name or folder>")
        if not is_meta:
            text_tower.load_pretrained()
        lines.append(f"pretrained: text backbone of {config.text_name}")
    for what, locked, loaded in (
        ("image", config.lock_image, config.image_pretrained),
        ("text", config.lock_text, config.text_pretrained),
    ):
        if locked and not loaded:
            raise ConfigError(
                f"model.lock_{what} would freeze a random tower; give its weights as model.pretrained or "
                f"model.{what}_pretrained"
            )
    return lines


def _check_run(config: ModelConfig, run: RunWeights) -> None:
    """Compares what the weights of a run do not say with the run's own settings."""
    given = ModelConfig(**{key: run.model[key] for key in ("name", *_UNSEEN) if key in run.model})
    source = str(run.checkpoint)
    _check_pixels(config, (given.pixel_mean, given.pixel_std), source)
    _check_activation(config, given.activation, source)


def _check_companions(config: ModelConfig, layout: str) -> None:
    """Compares what the weights alone do not say: the pixels and the activation they were trained with."""
    folder = Path(config.pretrained)
    folder = folder if folder.is_dir() else folder.parent
    pixels, activation = None, None
    if layout == "openai":
        pixels, activation = (CLIP_MEAN, CLIP_STD), "quick_gelu"
    elif layout in ("declip", "slip"):
        pixels, activation = (IMAGENET_MEAN, IMAGENET_STD), "quick_gelu"
    elif layout == "openclip" and (folder / "open_clip_config.json").is_file():
        described = _read_json(folder / "open_clip_config.json")
        given = described.get("preprocess_cfg", {})
        pixels = (given.get("mean", CLIP_MEAN), given.get("std", CLIP_STD))
        activation = "quick_gelu" if described.get("model_cfg", {}).get("quick_gelu") else "gelu"
    elif layout == "huggingface":
        pixels = read_pixel_statistics(str(folder))
        if not config.name.startswith("hf:"):
            activation = _read_json(folder / "config.json").get("text_config", {}).get("hidden_act", "quick_gelu")
    _check_pixels(config, pixels, config.pretrained)
    _check_activation(config, activation, config.pretrained)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _check_activation(config: ModelConfig, expected: str | None, source: str) -> None:
    if expected is not None and expected != config.activation:
        raise ConfigError(
            f"{source} was trained with {expected}, model.activation is {config.activation}; "
            f"set --model.activation {expected}"
        )


def _check_pixels(config: ModelConfig, expected: tuple | None, source: str) -> None:
    if expected is None:
        return
    mean, std = ([float(value) for value in values] for values in expected)
    given = torch.tensor([*config.pixel_mean, *config.pixel_std])
    if not torch.allclose(given, torch.tensor([*mean, *std]), atol=1e-3):
        raise ConfigError(
            f"{source} was trained on pixels of mean {mean} and standard deviation {std}; "
            f"set --model.pixel_mean '{mean}' --model.pixel_std '{std}'"
        )
