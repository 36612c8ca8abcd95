"""A model folder that transformers loads as CLIPModel and CLIPProcessor."""

from pathlib import Path

import torch
from PIL.Image import Resampling

from data.captions.tokenizer import CaptionTokenizer, ClipTokenizer
from models.architectures import HEAD_WIDTH, VitConfig, find_architecture
from models.clip import ClipModel
from models.weights.hugging_face_mapping import to_hugging_face
from trainer.config.sections import RunConfig
from trainer.errors import ConfigError
from trainer.export.openclip import check_clip_text, stock_state


def write_huggingface(model: ClipModel, tokenizer: CaptionTokenizer, config: RunConfig, out: Path) -> None:
    """Write the model, its tokenizer and its image processor.

    Raises:
        ConfigError: transformers' CLIPModel is another architecture.
    """
    import transformers

    architecture = find_architecture(config.model.name)
    if not isinstance(architecture.image, VitConfig):
        raise ConfigError(
            f"transformers has no CLIP class with the image tower of {config.model.name}; use --to openclip"
        )
    check_clip_text(model, tokenizer, "huggingface")
    if config.model.text_projection_bias:
        raise ConfigError("transformers' CLIPModel has no bias in its text projection, this run has; use --to openclip")
    if model.logit_bias is not None:
        raise ConfigError(
            f"transformers' CLIPModel has no logit bias, which {config.method['name']} trains; use --to openclip"
        )
    described = _describe(model, tokenizer, config)
    with torch.device("meta"):
        target = transformers.CLIPModel(described)
    target.load_state_dict(to_hugging_face(stock_state(model, tokenizer)), assign=True)
    transformers.utils.logging.disable_progress_bar()
    target.save_pretrained(out)
    _write_processor(model, tokenizer, config, out)


def _describe(model: ClipModel, tokenizer: ClipTokenizer, config: RunConfig):
    import transformers

    architecture = find_architecture(config.model.name)
    image, text = architecture.image, architecture.text
    end = tokenizer.eot_id - int(tokenizer.mask_token)
    special = {"bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}
    common = {"hidden_act": config.model.activation, "projection_dim": model.embed_dim}
    return transformers.CLIPConfig(
        text_config={
            "vocab_size": end + 1,
            "max_position_embeddings": tokenizer.context_length,
            **_sizes(text.width, text.layers),
            **special,
            **common,
        },
        vision_config={
            "image_size": model.image_tower.image_size,
            "patch_size": image.patch_size,
            **_sizes(image.width, image.layers),
            **common,
        },
        projection_dim=model.embed_dim,
        logit_scale_init_value=float(model.logit_scale.log_value),
    )


def _sizes(width: int, layers: int) -> dict[str, int]:
    heads = width // HEAD_WIDTH
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


def _write_processor(model: ClipModel, tokenizer: ClipTokenizer, config: RunConfig, out: Path) -> None:
    import transformers

    vocabulary, merges = tokenizer.published_files()
    theirs = transformers.CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=tokenizer.context_length)
    side = model.image_tower.image_size
    images = transformers.CLIPImageProcessor(
        size={"shortest_edge": config.eval.resize_size or side},
        crop_size={"height": side, "width": side},
        resample=Resampling[config.eval.interpolation.upper()],
        image_mean=list(model.pixel_mean),
        image_std=list(model.pixel_std),
    )
    transformers.CLIPProcessor(images, theirs).save_pretrained(out)
    # Where versions before 5, and everything that reads images alone, look for it.
    images.save_pretrained(out)
