"""Two-tower contrastive model."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

INITIAL_LOGIT_SCALE = 1 / 0.07


class TextOutput(NamedTuple):
    """Result of the text tower.

    Args:
        features: [n, embed_dim], not normalised.
        hidden_states: [n, T, width] after the final LayerNorm, or None if not asked for.
    """

    features: Tensor
    hidden_states: Tensor | None


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


class ClipModel(nn.Module):
    """Image tower, text tower and logit scale.

    All parameters belong to one of the three, whose forwards the encode methods call, so the methods can be used
    outside of `forward` at every ZeRO stage.

    Args:
        image_tower: Module from images [n, 3, H, W] to [n, embed_dim], with attributes `image_size`, `embed_dim` and
            `has_batch_norm`.
        text_tower: A `TextTransformer` of the same `embed_dim`.

    Source: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision".
    """

    def __init__(self, image_tower: nn.Module, text_tower: nn.Module):
        super().__init__()
        self.image_tower = image_tower
        self.text_tower = text_tower
        self.logit_scale = LogitScale()
        self.embed_dim = image_tower.embed_dim

    def encode_image(self, images: Tensor) -> Tensor:
        """Encodes images.

        Args:
            images: float [n, 3, H, W], normalised.

        Returns:
            [n, embed_dim] in the compute dtype, not normalised.
        """
        return self.image_tower(images)

    def encode_image_views(self, images: Tensor) -> Tensor:
        """Encodes several views in one pass, or in one pass per view if the tower has batch norm.

        Args:
            images: float [V, n, 3, H, W], normalised.

        Returns:
            [V, n, embed_dim] in the compute dtype, not normalised.
        """
        if self.image_tower.has_batch_norm:
            return torch.stack([self.image_tower(view) for view in images])
        return self.image_tower(images.flatten(0, 1)).unflatten(0, images.shape[:2])

    def encode_text(self, token_ids: Tensor, text_lengths: Tensor, *, with_hidden_states: bool = True) -> TextOutput:
        """Encodes captions.

        Args:
            token_ids: int64 [n, T], T <= context_length; what follows the end-of-text token has no effect.
            text_lengths: int64 [n], ids up to and including the end-of-text token.
            with_hidden_states: Also return the state at every position; without it the tower is cheaper.

        Returns:
            Features and, if asked for, hidden states, both in the compute dtype.
        """
        return TextOutput(*self.text_tower(token_ids, text_lengths, with_hidden_states))

    def forward(self, images: Tensor, token_ids: Tensor, text_lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns image features, text features (neither normalised) and the logit scale of one view of each."""
        text = self.encode_text(token_ids, text_lengths, with_hidden_states=False)
        return self.encode_image(images), text.features, self.logit_scale()
