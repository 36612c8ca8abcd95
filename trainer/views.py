"""From the names of a method's views to what is done to pictures and captions."""

import dataclasses
import difflib

from data.captions.tokenizer import CaptionTokenizer
from data.errors import DataError
from data.images.augment import AUGMENTATIONS, ImageAugmentation
from data.sample import SampleTransform
from trainer.config.sections import RunConfig
from trainer.errors import ConfigError
from trainer.methods.base import Method

_DEFAULT_AUGMENTATION = {"base": "clip", "augmented": "moco_v2"}


def augmentation(config: RunConfig, role: str) -> ImageAugmentation:
    """The augmentation a recipe gives to a view's name: `base`, `augmented`, or one that `data.augmentation` defines.

    Raises:
        ConfigError: Unknown name, preset, field or value.
    """
    default = _DEFAULT_AUGMENTATION.get(role)
    given = config.data.augmentation.get(role, default)
    if given is None:
        known = list(dict.fromkeys((*_DEFAULT_AUGMENTATION, *config.data.augmentation)))
        close = difflib.get_close_matches(role, known, n=1)
        hint = f"did you mean '{close[0]}'? " if close else ""
        preset = role if role in AUGMENTATIONS else "clip"
        raise ConfigError(
            f"method.image_views: unknown view '{role}': {hint}known: {', '.join(known)}; data.augmentation defines "
            f"others, as in {{{role}: {preset}}}"
        )
    fields = {"preset": given} if isinstance(given, str) else dict(given)
    preset = fields.pop("preset", default)
    if not isinstance(preset, str) or preset not in AUGMENTATIONS:
        what = "preset is missing" if preset is None else f"unknown preset '{preset}'"
        raise ConfigError(f"data.augmentation.{role}: {what}, use {', '.join(AUGMENTATIONS)}")
    known = {field.name for field in dataclasses.fields(ImageAugmentation)}
    for name in fields:
        if name not in known:
            raise ConfigError(f"data.augmentation.{role}: unknown field '{name}', known: {', '.join(sorted(known))}")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    try:
        return dataclasses.replace(AUGMENTATIONS[preset], **values)
    except DataError as error:
        raise ConfigError(f"data.augmentation.{role}: {error}") from None


def check_views(config: RunConfig) -> None:
    """Raises ConfigError for a view of the method, computed or not, whose name or augmentation is wrong."""
    for role in config.method["image_views"]:
        augmentation(config, role)


def unused_augmentations(config: RunConfig) -> list[str]:
    """Names that `data.augmentation` defines and no view of the method has."""
    used = {*_DEFAULT_AUGMENTATION, *config.method["image_views"]}
    return [name for name in config.data.augmentation if name not in used]


def sample_transform(config: RunConfig, method: Method, tokenizer: CaptionTokenizer) -> SampleTransform:
    """What the loader does to each sample.

    Raises:
        ConfigError, DataError: Views that the data section does not define, or that the method cannot use.
    """
    return SampleTransform(
        tokenizer,
        tuple(augmentation(config, role) for role in method.image_views),
        method.text_views,
        method.model.image_tower.image_size,
        method.context_size,
        mask_probability=config.method.get("mlm_probability", 0.15),
        synonyms_path=config.data.synonyms,
        max_image_pixels=config.data.max_image_pixels,
        max_caption_chars=config.data.max_caption_chars,
        caption=config.data.caption,
    )
