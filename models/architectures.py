"""Named architectures and their sizes, without the classes that are built from them."""

import difflib
from dataclasses import dataclass

TIMM_PREFIX = "timm:"
HF_PREFIX = "hf:"
HEAD_WIDTH = 64


@dataclass(frozen=True)
class VitConfig:
    """Vision transformer with heads of width 64."""

    patch_size: int
    width: int
    layers: int


@dataclass(frozen=True)
class ResNetConfig:
    """Modified ResNet; `width` is the number of channels after the stem."""

    layers: tuple[int, int, int, int]
    width: int


@dataclass(frozen=True)
class TimmConfig:
    """Backbone by its timm name."""

    model_name: str


@dataclass(frozen=True)
class HfConfig:
    """Vision model by its Hugging Face name or folder."""

    source: str


@dataclass(frozen=True)
class TextConfig:
    """Text transformer with heads of width 64."""

    width: int = 512
    layers: int = 12


@dataclass(frozen=True)
class Architecture:
    """Sizes of a model.

    Args:
        image: Image tower.
        image_size: Side of the square input in pixels; None means the default of the timm or Hugging Face backbone.
        embed_dim: Width of the shared space.
        text: Text tower.
    """

    image: VitConfig | ResNetConfig | TimmConfig | HfConfig
    image_size: int | None = 224
    embed_dim: int = 512
    text: TextConfig = TextConfig()


_SMALL_TEXT = TextConfig(width=256, layers=4)
_NANO_TEXT = TextConfig(width=128, layers=4)
_PICO_TEXT = TextConfig(width=128, layers=2)
_FEMTO_TEXT = TextConfig(width=64, layers=2)

ARCHITECTURES: dict[str, Architecture] = {
    "vit_b32": Architecture(VitConfig(32, 768, 12)),
    "vit_b16": Architecture(VitConfig(16, 768, 12)),
    "vit_l14": Architecture(VitConfig(14, 1024, 24), embed_dim=768, text=TextConfig(768)),
    "vit_s16": Architecture(VitConfig(16, 384, 12)),
    "vit_s32": Architecture(VitConfig(32, 384, 12)),
    "vit_ti16": Architecture(VitConfig(16, 192, 12)),
    "rn50": Architecture(ResNetConfig((3, 4, 6, 3), 64), embed_dim=1024),
    "rn101": Architecture(ResNetConfig((3, 4, 23, 3), 64)),
    "rn50x4": Architecture(ResNetConfig((4, 6, 10, 6), 80), image_size=288, embed_dim=640, text=TextConfig(640)),
    "rn50x16": Architecture(ResNetConfig((6, 8, 18, 8), 96), image_size=384, embed_dim=768, text=TextConfig(768)),
    "rn50x64": Architecture(ResNetConfig((3, 15, 36, 10), 128), image_size=448, embed_dim=1024, text=TextConfig(1024)),
    "regnety_640": Architecture(TimmConfig("regnety_640"), embed_dim=1024),
    # For images of 32 or 64 pixels: name, patch size where there is one, image size.
    "vit_ti_p4_32": Architecture(VitConfig(4, 192, 6), image_size=32, embed_dim=256, text=_SMALL_TEXT),
    "vit_ti_p8_32": Architecture(VitConfig(8, 192, 6), image_size=32, embed_dim=256, text=_SMALL_TEXT),
    "vit_ti_p8_64": Architecture(VitConfig(8, 192, 6), image_size=64, embed_dim=256, text=_SMALL_TEXT),
    "vit_nano_p4_32": Architecture(VitConfig(4, 128, 4), image_size=32, embed_dim=128, text=_NANO_TEXT),
    "vit_nano_p8_32": Architecture(VitConfig(8, 128, 4), image_size=32, embed_dim=128, text=_NANO_TEXT),
    "vit_nano_p8_64": Architecture(VitConfig(8, 128, 4), image_size=64, embed_dim=128, text=_NANO_TEXT),
    "vit_pico_p8_32": Architecture(VitConfig(8, 128, 3), image_size=32, embed_dim=128, text=_PICO_TEXT),
    "vit_femto_p8_32": Architecture(VitConfig(8, 128, 2), image_size=32, embed_dim=128, text=_FEMTO_TEXT),
    "rn_pico_32": Architecture(ResNetConfig((1, 1, 1, 1), 16), image_size=32, embed_dim=128, text=_PICO_TEXT),
    "rn_femto_32": Architecture(ResNetConfig((1, 1, 1, 1), 16), image_size=32, embed_dim=128, text=_FEMTO_TEXT),
    "rn_nano_32": Architecture(ResNetConfig((1, 1, 1, 1), 16), image_size=32, embed_dim=128, text=_NANO_TEXT),
    "rn_nano_64": Architecture(ResNetConfig((1, 1, 1, 1), 16), image_size=64, embed_dim=128, text=_NANO_TEXT),
}


def list_architectures() -> list[str]:
    """Returns the names that `build_model` knows, besides "timm:<name>" and "hf:<name or folder>"."""
    return list(ARCHITECTURES)


def find_architecture(name: str) -> Architecture:
    """Looks up an architecture.

    Args:
        name: A key of `ARCHITECTURES`, or "timm:<name>" or "hf:<hub name or folder>" for a backbone of theirs with the
            default text tower.

    Returns:
        Its sizes.

    Raises:
        ValueError: On an unknown name.
    """
    if name.startswith(TIMM_PREFIX):
        return Architecture(TimmConfig(name.removeprefix(TIMM_PREFIX)), image_size=None)
    if name.startswith(HF_PREFIX):
        return Architecture(HfConfig(name.removeprefix(HF_PREFIX)), image_size=None)
    if name not in ARCHITECTURES:
        close = difflib.get_close_matches(name, ARCHITECTURES, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(close)}?" if close else f"use one of {', '.join(ARCHITECTURES)}"
        raise ValueError(
            f"unknown model {name!r}; {hint} (backbones of others: {TIMM_PREFIX}<name>, {HF_PREFIX}<name>)"
        )
    return ARCHITECTURES[name]
