"""Two-tower contrastive model."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

INITIAL_LOGIT_SCALE = 1 / 0.07
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class TextOutput(NamedTuple):
    """Result of the text tower.

    Args:
        features: [n, embed_dim], not normalised.
        states: [R, width] after the final LayerNorm at the positions asked for, or None if none were.
    """

    features: Tensor
    states: Tensor | None


class LogitScale(nn.Module):
    """Learned scale of the logits, the inverse temperature, stored as its logarithm.

    The parameter has one dimension because DeepSpeed cannot hold 0-dim parameters, and is read by this forward only
    because ZeRO-3 gathers a parameter for the forward of the module that owns it. It is not clamped here: a clamp in
    the forward has no gradient at the bound, so the trainer projects `log_value` after each step instead.

    Args:
        initial_value: Scale at the start, not its logarithm.
    """

    def __init__(self, initial_value: float = INITIAL_LOGIT_SCALE):
        super().__init__()
        self.log_value = nn.Parameter(torch.full((1,), math.log(initial_value), dtype=torch.float32))

    def forward(self) -> Tensor:
        """Returns the scale, float32 [1], outside of autocast's reach."""
        return self.log_value.float().exp()


class LogitBias(nn.Module):
    """Learned bias of all logits, for losses that classify each pair by itself; of one dimension as `LogitScale`.

    Args:
        initial_value: Bias at the start.

    Source: Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training".
    """

    def __init__(self, initial_value: float):
        super().__init__()
        self.value = nn.Parameter(torch.full((1,), float(initial_value), dtype=torch.float32))

    def forward(self) -> Tensor:
        """Returns the bias, float32 [1], outside of autocast's reach."""
        return self.value.float()


class ClipModel(nn.Module):
    """Image tower, text tower, logit scale and, where the method that trains it has one, logit bias.

    All parameters belong to one of them, whose forwards the encode methods call, so the methods can be used
    outside of `forward` at every ZeRO stage.

    Args:
        image_tower: Module from images [n, 3, H, W] to [n, embed_dim], with attributes `image_size`, `embed_dim`,
            `pooled_dim`, `has_batch_norm`, `takes_views` and `has_patch_dropout`; with the last, its forward also takes
            keys int64 [n]. One that `takes_views` is told how many `views` its images are, which follow each other in
            equal parts, so that its batch norms keep them apart; another `has_batch_norm` gets one view per call. Asked
            `with_pooled`, it also returns [n, pooled_dim], what its projection reads. One that `has_tokens` also knows
            `with_tokens`, `num_tokens` (in training), `token_dim` and `head_modules`.
        text_tower: A `TextTransformer` of the same `embed_dim`, or a module with its forward and sizes.
        pixel_mean: What is subtracted from the channels of pixels in [0, 1] before the image tower.
        pixel_std: What they are divided by then.

    Source: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision".
    """

    def __init__(
        self,
        image_tower: nn.Module,
        text_tower: nn.Module,
        *,
        pixel_mean: tuple[float, float, float] = IMAGENET_MEAN,
        pixel_std: tuple[float, float, float] = IMAGENET_STD,
    ):
        super().__init__()
        self.pixel_mean = tuple(pixel_mean)
        self.pixel_std = tuple(pixel_std)
        self.image_tower = image_tower
        self.text_tower = text_tower
        self.logit_scale = LogitScale()
        self.logit_bias: LogitBias | None = None
        self.embed_dim = image_tower.embed_dim

    def encode_image(self, images: Tensor, dropout_keys: Tensor | None = None) -> Tensor:
        """Encodes images.

        Args:
            images: float [n, 3, H, W], normalised.
            dropout_keys: int64 [n], which decide the patches that patch dropout keeps of each image in training; not
                used by a tower without it.

        Returns:
            [n, embed_dim] in the compute dtype, not normalised.
        """
        return self._run_image_tower(images, dropout_keys)

    def encode_image_views(self, images: Tensor, dropout_keys: Tensor | None = None) -> Tensor:
        """Encodes several views in one pass, or in one pass per view if the tower's batch norms cannot tell them apart.

        Args:
            images: float [V, n, 3, H, W], normalised.
            dropout_keys: int64 [V, n], see `encode_image`.

        Returns:
            [V, n, embed_dim] in the compute dtype, not normalised.
        """
        return self._run_on_views(images, dropout_keys)[0]

    def encode_pooled_image_views(self, images: Tensor, dropout_keys: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As `encode_image_views`, and what the tower's projection read, for heads on the backbone.

        Returns:
            [V, n, embed_dim] and [V, n, pooled_dim], both in the compute dtype.
        """
        features, pooled = self._run_on_views(images, dropout_keys, with_pooled=True)
        return features, pooled

    def encode_image_tokens(self, images: Tensor, dropout_keys: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As `encode_image`, and what the tower knows of parts of the images; for towers that have it.

        Returns:
            [n, embed_dim] and [n, P, token_dim], both in the compute dtype, not normalised.
        """
        features, tokens = self._run_image_tower(images, dropout_keys, with_tokens=True)
        return features, tokens

    def encode_text(self, token_ids: Tensor, text_lengths: Tensor, *, state_rows: Tensor | None = None) -> TextOutput:
        """Encodes captions.

        Args:
            token_ids: int64 [n, T], T <= context_length; what follows the end-of-text token has no effect.
            text_lengths: int64 [n], ids up to and including the end-of-text token; on the CPU, whatever the device.
            state_rows: int64 [R], flat positions row * T + position whose states are wanted, on the CPU like the
                lengths.

        Returns:
            Features and, if asked for, states, both in the compute dtype.
        """
        return TextOutput(*self.text_tower(token_ids, text_lengths, state_rows))

    def forward(
        self, images: Tensor, token_ids: Tensor, text_lengths: Tensor, dropout_keys: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns image features, text features (neither normalised) and the logit scale of one view of each."""
        text = self.encode_text(token_ids, text_lengths)
        return self.encode_image(images, dropout_keys), text.features, self.logit_scale()

    def _run_image_tower(self, images: Tensor, dropout_keys: Tensor | None, **options: int):
        if not self.image_tower.has_patch_dropout:
            return self.image_tower(images, **options)
        return self.image_tower(images, dropout_keys, **options)

    def _run_on_views(self, images: Tensor, dropout_keys: Tensor | None, **options: int) -> list[Tensor]:
        """What the image tower returns, each tensor by view."""
        tower = self.image_tower
        if tower.has_batch_norm and not tower.takes_views:
            outputs = [_as_tuple(self._run_image_tower(view, None, **options)) for view in images]
            return [torch.stack(views) for views in zip(*outputs, strict=True)]
        if tower.takes_views:
            options["views"] = len(images)
        keys = None if dropout_keys is None else dropout_keys.flatten()
        output = _as_tuple(self._run_image_tower(images.flatten(0, 1), keys, **options))
        return [tensor.unflatten(0, images.shape[:2]) for tensor in output]


def _as_tuple(output: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)
