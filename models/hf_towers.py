"""Any vision or text model of Hugging Face's transformers as a tower."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbone import layer_groups, refuse_scalars, replace_batch_norms
from models.hf_backbone import (
    build_backbone,
    enable_activation_checkpointing,
    load_backbone,
    read_hf_config,
    read_pixel_statistics,
    unused_parameters,
)
from models.sequences import copy_to
from models.text import check_caption_shapes, check_lengths, last_states, split_state_rows
from models.transformer import Linear
from models.vit import check_image_shape

ImagePooling = Literal["auto", "cls", "mean", "pooler"]
TextPooling = Literal["auto", "cls", "mean", "last", "pooler"]
Projection = Literal["linear", "none"]
_DEFAULT_IMAGE_SIZE = 224
# Trained on captions padded to the full length, whose padding they see, and read through a head of their own.
_PADDED_TEXT = ("siglip_text_model", "siglip2_text_model")
# Read as open_clip reads them: the roberta family by mean, the others by their class token.
_TEXT_POOLING = {"bert": "cls", "distilbert": "cls", "electra": "cls", "deberta-v2": "cls", "albert": "cls"}


class HfImageTower(nn.Module):
    """Image tower made of a transformers vision model, pooled, and a bias-free projection.

    Parameters that do not reach the output (the mask token of a DINOv2) are frozen, and dropout is off.

    Args:
        source: Hub name, or a local folder with a config.json; only the configuration is read here.
        image_size: Side of the square input in pixels; None means the configuration's.
        embed_dim: Width of the output.
        pooling: "cls" the class token, "mean" the mean of the patches, "pooler" the model's own pooled output; "auto"
            the first of pooler, cls and mean that the model has.
        projection: "linear", or "none" where the pooled width is `embed_dim` itself.
        sync_batch_norm: Take batch statistics over all ranks.
        activation_checkpointing: Recompute the layers' activations in the backward.

    Raises:
        ValueError: If the source gives no vision model, or an option does not fit it.
    """

    takes_views = False
    has_patch_dropout = False
    has_tokens = False

    def __init__(
        self,
        source: str,
        *,
        image_size: int | None,
        embed_dim: int,
        pooling: ImagePooling = "auto",
        projection: Projection = "linear",
        sync_batch_norm: bool = True,
        activation_checkpointing: bool = False,
    ):
        super().__init__()
        config = read_hf_config(source, "vision")
        own_size = getattr(config, "image_size", None)
        if isinstance(own_size, list | tuple):
            own_size = own_size[0]
        self.source = source
        self.image_size = image_size or own_size or _DEFAULT_IMAGE_SIZE
        if own_size is not None:
            config.image_size = self.image_size
        self.embed_dim = embed_dim
        self._num_patches = (self.image_size // _patch_size(config)) ** 2
        keep_pooler = pooling == "pooler"
        self.pooling = pooling
        unused, pooled = unused_parameters(lambda: build_backbone(config, keep_pooler=keep_pooler), self._try)
        self.backbone = build_backbone(config, keep_pooler=keep_pooler)
        self.has_batch_norm = replace_batch_norms(self.backbone, sync_batch_norm) > 0
        refuse_scalars(self.backbone, f"'{source}'")
        for name in unused:
            self.backbone.get_parameter(name).requires_grad_(False)
        if activation_checkpointing:
            enable_activation_checkpointing(self.backbone, source)
        self.pooled_dim = pooled.shape[-1]
        self.proj = make_projection(projection, self.pooled_dim, embed_dim, "image_projection")

    def forward(self, images: Tensor, *, with_pooled: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Encodes images: one view per call where `has_batch_norm`, else any number of stacked views.

        Args:
            images: float [n, 3, image_size, image_size], normalised.
            with_pooled: Also return what the projection reads.

        Returns:
            [n, embed_dim], not normalised; with `with_pooled` a pair, the second [n, pooled_dim].

        Raises:
            ValueError: On images of another size.
        """
        check_image_shape(images, self.image_size)
        dtype = next(self.backbone.parameters()).dtype
        pooled = self._pool(self.backbone(pixel_values=images.to(dtype)))
        features = self.proj(pooled)
        return (features, pooled) if with_pooled else features

    def lock_groups(self) -> list[list[nn.Module | nn.Parameter]]:
        """What can be frozen together, from the pixels on; the projection is in none of them."""
        return layer_groups(self.backbone)

    def load_pretrained(self) -> None:
        """Loads the weights of the source; see `models.hf_backbone.load_backbone`."""
        load_backbone(self.backbone, self.source)

    def expected_pixels(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Mean and standard deviation of the pixels of the source's weights, where it says."""
        return read_pixel_statistics(self.source)

    def _try(self, twin: nn.Module) -> tuple[Tensor, Tensor]:
        output = twin(pixel_values=torch.zeros(2, 3, self.image_size, self.image_size))
        if self.pooling == "auto":
            has_class = any(name.endswith(("cls_token", "class_embedding")) for name, _ in twin.named_parameters())
            by_token = "cls" if has_class and not getattr(twin.config, "use_mean_pooling", False) else "mean"
            self.pooling = "pooler" if getattr(output, "pooler_output", None) is not None else by_token
        pooled = self._pool(output)
        return pooled, pooled

    def _pool(self, output) -> Tensor:
        if self.pooling == "pooler":
            pooled = getattr(output, "pooler_output", None)
            if pooled is None:
                raise ValueError(f"'{self.source}' has no pooled output of its own; use image_pooling cls or mean")
            return pooled.flatten(1)
        states = output.last_hidden_state
        if states.ndim == 4:
            return states.mean(dim=(2, 3))
        if self.pooling == "cls":
            return states[:, 0]
        # Class and register tokens come first; a hierarchical model has fewer positions than patches, and no others.
        return states[:, -self._num_patches :].mean(dim=1)


class HfTextTower(nn.Module):
    """Text tower made of a transformers text model, pooled, and a bias-free projection.

    Every caption costs as much as the longest in the batch. Parameters that do not reach the output are frozen, and
    dropout is off.

    Args:
        source: Hub name, or a local folder with a config.json; only the configuration is read here.
        vocab_size: Number of ids of the tokenizer.
        context_length: Longest caption in tokens.
        embed_dim: Width of the output.
        pooling: "cls" the first token, "mean" of all tokens of the caption, "last" its last token (end-of-text, where
            the tokenizer has one), "pooler" the model's own pooled output; "auto" what suits the architecture.
        projection: "linear", or "none" where the pooled width is `embed_dim` itself.
        activation_checkpointing: Recompute the layers' activations in the backward.

    Raises:
        ValueError: If the source gives no text model, or an option does not fit it.
    """

    def __init__(
        self,
        source: str,
        *,
        vocab_size: int,
        context_length: int,
        embed_dim: int,
        pooling: TextPooling = "auto",
        projection: Projection = "linear",
        activation_checkpointing: bool = False,
    ):
        super().__init__()
        config = read_hf_config(source, "text")
        self.source = source
        self.vocab_size = config.vocab_size
        self.context_length = context_length
        self.pooling = _text_pooling(config) if pooling == "auto" else pooling
        self.is_padded = config.model_type in _PADDED_TEXT
        pad_id = getattr(config, "pad_token_id", None)
        self.pad_id = pad_id if pad_id is not None and 0 <= pad_id < config.vocab_size else 0
        if vocab_size > config.vocab_size:
            raise ValueError(
                f"the tokenizer has {vocab_size} ids, the text model '{source}' only {config.vocab_size}; "
                f"use the tokenizer that belongs to it"
            )
        keep_pooler = self.pooling == "pooler"
        unused, pooled = unused_parameters(lambda: build_backbone(config, keep_pooler=keep_pooler), self._try)
        self.backbone = build_backbone(config, keep_pooler=keep_pooler)
        limit = _max_positions(self.backbone)
        if limit is not None and context_length > limit:
            raise ValueError(f"context_length {context_length} is more than the {limit} positions of '{source}'")
        refuse_scalars(self.backbone, f"'{source}'")
        for name in unused:
            self.backbone.get_parameter(name).requires_grad_(False)
        if activation_checkpointing:
            enable_activation_checkpointing(self.backbone, source)
        self.width = getattr(config, "hidden_size", None) or pooled.shape[-1]
        self.proj = make_projection(projection, pooled.shape[-1], embed_dim, "text_projection")

    def forward(
        self, token_ids: Tensor, text_lengths: Tensor, state_rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Encodes captions; see `models.text.TextTransformer.forward`, whose contract this is.

        Args:
            token_ids: int64 [n, T], T <= context_length; what follows a caption has no effect.
            text_lengths: int64 [n], ids of each caption, in [1, T]; on the CPU, or the host waits.
            state_rows: int64 [R], flat positions row * T + position before the caption's end whose states are wanted.

        Returns:
            Features [n, embed_dim], not normalised, and the last hidden states at `state_rows` [R, width], or None.

        Raises:
            ValueError: If the shapes do not match, or a length, a row or T is out of range.
        """
        check_caption_shapes(token_ids, text_lengths, self.context_length)
        text_lengths, num_positions = text_lengths.cpu(), token_ids.shape[1]
        check_lengths(text_lengths, num_positions)
        rows = None
        if state_rows is not None:
            rows = torch.stack(split_state_rows(state_rows.cpu(), text_lengths, num_positions))
        lengths = copy_to(text_lengths, token_ids.device)
        features, states = self._encode(token_ids[:, : int(text_lengths.max())], lengths)
        if rows is None:
            return features, None
        caption, position = copy_to(rows, token_ids.device)
        return features, states[caption, position]

    def encode_padded(self, token_ids: Tensor, text_lengths: Tensor) -> Tensor:
        """Features as those of `forward`, by tensor operations of fixed shapes alone, for export.

        Args:
            token_ids: int64 [n, T], T <= context_length.
            text_lengths: int64 [n], on the device of the ids.

        Returns:
            [n, embed_dim], not normalised.
        """
        return self._encode(token_ids, text_lengths)[0]

    def head_modules(self) -> list[nn.Module]:
        """What only the pooled features need."""
        return [self.proj]

    def lock_groups(self) -> list[list[nn.Module | nn.Parameter]]:
        """What can be frozen together, from the ids on; the projection is in none of them."""
        return layer_groups(self.backbone)

    def load_pretrained(self) -> None:
        """Loads the weights of the source; see `models.hf_backbone.load_backbone`."""
        load_backbone(self.backbone, self.source)

    def _encode(self, token_ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        if self.is_padded:
            token_ids = F.pad(token_ids, (0, self.context_length - token_ids.shape[1]))
        inside = torch.arange(token_ids.shape[1], device=token_ids.device) < lengths[:, None]
        token_ids = token_ids.masked_fill(~inside, self.pad_id)
        output = self.backbone(input_ids=token_ids, attention_mask=None if self.is_padded else inside.long())
        return self.proj(self._pool(output, lengths, inside)), output.last_hidden_state

    def _try(self, twin: nn.Module) -> tuple[Tensor, Tensor]:
        length = self.context_length if self.is_padded else 2
        ids = torch.ones(2, length, dtype=torch.long)
        output = twin(input_ids=ids)
        pooled = self._pool(output, torch.full((2,), length), torch.ones_like(ids, dtype=torch.bool))
        return pooled, pooled

    def _pool(self, output, lengths: Tensor, inside: Tensor) -> Tensor:
        if self.pooling == "pooler":
            if getattr(output, "pooler_output", None) is None:
                raise ValueError(f"'{self.source}' has no pooled output of its own; use text_pooling cls, mean or last")
            return output.pooler_output
        states = output.last_hidden_state
        if self.pooling == "cls":
            return states[:, 0]
        if self.pooling == "mean":
            weights = inside[..., None].to(states.dtype)
            return (states * weights).sum(dim=1) / weights.sum(dim=1)
        return last_states(states, lengths)


def make_projection(projection: Projection, width: int, embed_dim: int, what: str) -> nn.Module:
    """The bias-free map from a pooled state to the shared space, or nothing.

    Raises:
        ValueError: If nothing is asked for and the widths differ.
    """
    if projection == "linear":
        return Linear(width, embed_dim, bias=False, weight_std=width**-0.5)
    if width != embed_dim:
        raise ValueError(f"{what} none needs embed_dim {width}, the width of this tower; embed_dim is {embed_dim}")
    return nn.Identity()


def _patch_size(config) -> int:
    size = getattr(config, "patch_size", None) or 1
    return size[0] if isinstance(size, list | tuple) else size


def _text_pooling(config) -> str:
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    kind = config.model_type
    if kind in _PADDED_TEXT:
        return "pooler"
    if kind.startswith("clip"):
        return "last"
    causal = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return "last" if causal else _TEXT_POOLING.get(kind, "mean")


def _max_positions(backbone: nn.Module) -> int | None:
    """Longest sequence of a model with a table of positions; some begin to count after the padding id."""
    for name, module in backbone.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.num_embeddings - module.padding_idx - 1
    return getattr(backbone.config, "max_position_embeddings", None)
