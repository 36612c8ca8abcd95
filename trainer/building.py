"""From a configuration to a method: towers, heads and losses."""

import torch

from data.captions.tokenizer import CaptionTokenizer
from data.sample import has_masked
from models.registry import build_model
from trainer.config.sections import WEIGHT_SETTINGS, RunConfig
from trainer.errors import ConfigError
from trainer.methods import METHODS, Method, parse_method
from trainer.methods.rules import check_groups


def build_method(config: RunConfig, tokenizer: CaptionTokenizer) -> Method:
    """Towers, heads and losses of the recipe, randomly initialised from torch's generator.

    Raises:
        ConfigError: A model the registry cannot build, a method the data section cannot feed, or an optimizer group of
            a module that is not there.
    """
    try:
        model = build_model(vocab_size=tokenizer.vocab_size, **config.model.model_dump(exclude=WEIGHT_SETTINGS))
    except ValueError as error:
        raise ConfigError(f"model: {error}") from None
    name, settings = parse_method(config.method)
    communication_dtype = torch.bfloat16 if config.train.communication_dtype == "bf16" else None
    method = METHODS[name](model, settings, communication_dtype)
    if has_masked(method.text_views) and tokenizer.mask_id is None:
        raise ConfigError(
            f"method {name} masks captions, which needs a mask token: set data.mask_token true (or choose a "
            "data.tokenizer that has one), or method.w_tss 0"
        )
    check_groups(method, config.optimizer)
    return method
