"""CLIP's text transformer."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.transformer import Linear, Transformer, TransformerInit, take_positions

TOKEN_EMBEDDING_STD = 0.02
POSITIONAL_EMBEDDING_STD = 0.01


class TextTransformer(nn.Module):
    """Text tower: causal transformer, final LayerNorm, projection of the state at the end-of-text token.

    Initial weights follow OpenAI's CLIP. The bias of the projection, which CLIP does not have, starts at zero.

    Args:
        vocab_size: Number of token ids.
        context_length: Longest caption in tokens.
        width: Width of the transformer.
        layers: Number of blocks.
        heads: Number of attention heads.
        embed_dim: Width of the output.
        projection_bias: Add a bias to the projection, as DeCLIP does.
        activation_checkpointing: Recompute the blocks' activations in the backward.

    Source: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision"; projection
    bias: Li et al. 2021, "Supervision Exists Everywhere".
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        context_length: int,
        width: int,
        layers: int,
        heads: int,
        embed_dim: int,
        projection_bias: bool = False,
        activation_checkpointing: bool = False,
    ):
        super().__init__()
        self.vocab_size = vocab_size
        self.context_length = context_length
        self.width = width
        self.token_embedding = TokenEmbedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(POSITIONAL_EMBEDDING_STD * torch.randn(context_length, width))
        self.transformer = Transformer(
            width,
            layers,
            heads,
            causal=True,
            init=TransformerInit.clip_text(width, layers),
            activation_checkpointing=activation_checkpointing,
        )
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = Linear(
            width, embed_dim, bias=projection_bias, weight_std=width**-0.5, zero_bias=projection_bias
        )

    def forward(
        self, token_ids: Tensor, text_lengths: Tensor, with_hidden_states: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Encodes captions.

        Nothing is computed past the longest caption when `text_lengths` is on the CPU. On an accelerator, reading it
        would stall the stream, so there the caller trims.

        Args:
            token_ids: int64 [n, T], T <= context_length, anything after the end-of-text token.
            text_lengths: int64 [n], ids up to and including the end-of-text token, in [1, T].
            with_hidden_states: Also return the state at every position; without it the last block is cheaper.

        Returns:
            Features [n, embed_dim], not normalised, and the states after the final LayerNorm [n, T, width], zero
            beyond the longest caption where it was trimmed, or None.

        Raises:
            ValueError: If the shapes do not match, or a length or T is out of range.
        """
        self._check_arguments(token_ids, text_lengths)
        num_positions = token_ids.shape[1]
        if text_lengths.device.type == "cpu":
            token_ids = token_ids[:, : int(text_lengths.max())]
        num_kept = token_ids.shape[1]
        eot_positions = (text_lengths - 1).to(token_ids.device)
        x = self.token_embedding(token_ids) + self.positional_embedding[:num_kept]
        if not with_hidden_states:
            return self.text_projection(self.ln_final(self.transformer(x, eot_positions)[:, 0])), None
        hidden_states = self.ln_final(self.transformer(x))
        features = self.text_projection(take_positions(hidden_states, eot_positions)[:, 0])
        return features, F.pad(hidden_states, (0, 0, 0, num_positions - num_kept))

    def _check_arguments(self, token_ids: Tensor, text_lengths: Tensor) -> None:
        if token_ids.ndim != 2 or text_lengths.shape != token_ids.shape[:1]:
            raise ValueError(
                f"token_ids {tuple(token_ids.shape)} and text_lengths {tuple(text_lengths.shape)} do not match; "
                f"expected [n, T] and [n]"
            )
        num_positions = token_ids.shape[1]
        if num_positions > self.context_length:
            raise ValueError(
                f"token_ids have {num_positions} positions, more than context_length {self.context_length}; "
                f"truncate the captions or build the model with a larger context_length"
            )
        if text_lengths.device.type == "cpu" and (text_lengths.min() < 1 or text_lengths.max() > num_positions):
            raise ValueError(
                f"text_lengths span [{text_lengths.min()}, {text_lengths.max()}]; expected values in "
                f"[1, {num_positions}], counting the end-of-text token"
            )


class TokenEmbedding(nn.Embedding):
    """Embedding table with CLIP's initial weights, set in its own constructor like those of `Linear`."""

    def __init__(self, vocab_size: int, width: int):
        super().__init__(vocab_size, width)
        nn.init.normal_(self.weight, std=TOKEN_EMBEDDING_STD)
