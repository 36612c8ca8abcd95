"""How named architectures are built."""

from torch import nn

from models.architectures import (
    HEAD_WIDTH,
    HF_PREFIX,
    HfConfig,
    ResNetConfig,
    TextConfig,
    TimmConfig,
    VitConfig,
    find_architecture,
)
from models.batch_norm import check_batch_norm_mode
from models.clip import IMAGENET_MEAN, IMAGENET_STD, ClipModel
from models.hf_towers import HfImageTower, HfTextTower, ImagePooling, Projection, TextPooling
from models.locking import lock_tower
from models.resnet import EXPANSION, ModifiedResNet
from models.text import TextTransformer
from models.timm_tower import TimmTower
from models.vit import VisionTransformer


def build_model(
    name: str,
    *,
    vocab_size: int,
    text_name: str | None = None,
    context_length: int = 77,
    embed_dim: int | None = None,
    image_size: int | None = None,
    image_pooling: ImagePooling = "auto",
    text_pooling: TextPooling = "auto",
    image_projection: Projection = "linear",
    text_projection: Projection = "linear",
    text_projection_bias: bool = False,
    activation: str = "quick_gelu",
    init: str = "clip",
    pixel_mean: tuple[float, float, float] = IMAGENET_MEAN,
    pixel_std: tuple[float, float, float] = IMAGENET_STD,
    lock_image: bool = False,
    lock_image_unlocked_groups: int = 0,
    lock_text: bool = False,
    lock_text_unlocked_groups: int = 0,
    freeze_patch_embed: bool = False,
    activation_checkpointing: bool = False,
    patch_dropout: float = 0.0,
    batch_norm: str = "sync",
) -> ClipModel:
    """Builds a randomly initialised model, drawing from torch's generator.

    Args:
        name: A key of `ARCHITECTURES`, "timm:<name>", or "hf:<hub name or folder>".
        vocab_size: Number of token ids.
        text_name: "hf:<hub name or folder>" for a text tower of transformers; None means the architecture's own.
        context_length: Longest caption in tokens.
        embed_dim: Width of the shared space; None means the architecture's own.
        image_size: Side of the square input in pixels; None means the architecture's own.
        image_pooling: See `HfImageTower`; other towers have their own.
        text_pooling: See `HfTextTower`; other towers read the end-of-text token.
        image_projection: "none" leaves out the projection of an `HfImageTower`.
        text_projection: "none" leaves out the projection of an `HfTextTower`.
        text_projection_bias: Add a bias to the text projection, as DeCLIP does.
        activation: "quick_gelu" as CLIP, or "gelu", of the transformers written here.
        init: "clip", or "declip" for the random start of DeCLIP's released code: other spreads in a vision transformer,
            and a bias of the text projection that does not start at zero. Other towers start the same either way.
        pixel_mean: Mean of the channels of pixels in [0, 1].
        pixel_std: Their standard deviation.
        lock_image: Freeze the image tower, see `models.locking`.
        lock_image_unlocked_groups: How many of its last groups go on training.
        lock_text: Freeze the text tower.
        lock_text_unlocked_groups: How many of its last groups go on training.
        freeze_patch_embed: Leave the patch embedding of a vision transformer at its random start.
        activation_checkpointing: Recompute activations in the backward to save memory.
        patch_dropout: Fraction of the patches that a vision transformer leaves out in training, in [0, 1).
        batch_norm: "sync" for batch statistics over all ranks, "local" for those of one rank. No effect on towers
            without batch norm.

    Returns:
        The model in fp32.

    Raises:
        ValueError: On an unknown name, a size that does not fit, or a setting that a tower does not have.
    """
    architecture = find_architecture(name)
    embed_dim = embed_dim or architecture.embed_dim
    if init not in ("clip", "declip"):
        raise ValueError(f"init {init!r} is not known; use clip or declip")
    if init == "declip" and text_name is not None and not isinstance(architecture.image, VitConfig):
        raise ValueError("init declip has no effect on towers of timm or Hugging Face; leave it out")
    image_tower = _build_image_tower(
        architecture.image,
        freeze_patch_embed=freeze_patch_embed,
        patch_dropout=patch_dropout,
        activation=activation,
        init=init,
        pooling=image_pooling,
        projection=image_projection,
        sync_batch_norm=check_batch_norm_mode(batch_norm),
        image_size=image_size or architecture.image_size,
        embed_dim=embed_dim,
        activation_checkpointing=activation_checkpointing,
    )
    text_tower = _build_text_tower(
        text_name,
        architecture.text,
        pooling=text_pooling,
        projection=text_projection,
        projection_bias=text_projection_bias,
        activation=activation,
        init=init,
        vocab_size=vocab_size,
        context_length=context_length,
        embed_dim=embed_dim,
        activation_checkpointing=activation_checkpointing,
    )
    for locked, unlocked, what in (
        (lock_image, lock_image_unlocked_groups, "lock_image"),
        (lock_text, lock_text_unlocked_groups, "lock_text"),
    ):
        if unlocked and not locked:
            raise ValueError(f"{what}_unlocked_groups {unlocked} has no effect without {what}; set {what} true")
    if lock_image:
        lock_tower(image_tower, lock_image_unlocked_groups, "lock_image_unlocked_groups")
    if lock_text:
        lock_tower(text_tower, lock_text_unlocked_groups, "lock_text_unlocked_groups")
    return ClipModel(image_tower, text_tower, pixel_mean=pixel_mean, pixel_std=pixel_std)


def _build_text_tower(
    name: str | None,
    config: TextConfig,
    *,
    pooling: TextPooling,
    projection: Projection,
    projection_bias: bool,
    activation: str,
    init: str,
    **common,
) -> nn.Module:
    if name is None:
        if pooling != "auto" or projection != "linear":
            raise ValueError(
                f"text_pooling {pooling} and text_projection {projection} need a text_name {HF_PREFIX}<name>"
            )
        return TextTransformer(
            width=config.width,
            layers=config.layers,
            heads=config.width // HEAD_WIDTH,
            projection_bias=projection_bias,
            activation=activation,
            init=init,
            **common,
        )
    if not name.startswith(HF_PREFIX):
        raise ValueError(f"text_name {name!r} is not known; use {HF_PREFIX}<hub name or folder>, or leave it out")
    if projection_bias:
        raise ValueError("text_projection_bias is for the text tower of CLIP; turn it off with a text_name")
    return HfTextTower(name.removeprefix(HF_PREFIX), pooling=pooling, projection=projection, **common)


def _build_image_tower(
    config: VitConfig | ResNetConfig | TimmConfig | HfConfig,
    *,
    freeze_patch_embed: bool,
    patch_dropout: float,
    activation: str,
    init: str,
    pooling: ImagePooling,
    projection: Projection,
    sync_batch_norm: bool,
    **common,
) -> nn.Module:
    if not isinstance(config, HfConfig) and (pooling != "auto" or projection != "linear"):
        raise ValueError(f"image_pooling {pooling} and image_projection {projection} need a name {HF_PREFIX}<name>")
    if isinstance(config, VitConfig):
        return VisionTransformer(
            patch_size=config.patch_size,
            width=config.width,
            layers=config.layers,
            heads=config.width // HEAD_WIDTH,
            freeze_patch_embed=freeze_patch_embed,
            patch_dropout=patch_dropout,
            activation=activation,
            init=init,
            **common,
        )
    if freeze_patch_embed or patch_dropout:
        raise ValueError(
            f"freeze_patch_embed={freeze_patch_embed} and patch_dropout={patch_dropout} need one of the vit_* models; "
            f"turn them off for other image towers"
        )
    if isinstance(config, TimmConfig):
        return TimmTower(config.model_name, sync_batch_norm=sync_batch_norm, **common)
    if isinstance(config, HfConfig):
        return HfImageTower(
            config.source, pooling=pooling, projection=projection, sync_batch_norm=sync_batch_norm, **common
        )
    heads = config.width * 8 * EXPANSION // HEAD_WIDTH
    return ModifiedResNet(
        layers=config.layers, width=config.width, heads=heads, sync_batch_norm=sync_batch_norm, **common
    )
