"""CLIP's text transformer."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.sequences import PackedSequences, UniformSequences, copy_to
from models.transformer import POSITIONAL_EMBEDDING_STD, Linear, Transformer, TransformerInit

TOKEN_EMBEDDING_STD = 0.02


class TextTransformer(nn.Module):
    """Text tower: causal transformer, final LayerNorm, projection of the state at the end-of-text token.

    Initial weights follow OpenAI's CLIP. The bias of the projection, which CLIP does not have, starts at zero;
    with `init` "declip" at torch's default, as in DeCLIP's released code.

    Args:
        vocab_size: Number of token ids.
        context_length: Longest caption in tokens.
        width: Width of the transformer.
        layers: Number of blocks.
        heads: Number of attention heads.
        embed_dim: Width of the output.
        projection_bias: Add a bias to the projection, as DeCLIP does.
        activation: Of the MLPs, "quick_gelu" or "gelu".
        init: "clip" or "declip".
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
        activation: str = "quick_gelu",
        init: str = "clip",
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
            init=TransformerInit.clip_text(width, layers),
            activation=activation,
            activation_checkpointing=activation_checkpointing,
        )
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = Linear(
            width, embed_dim, bias=projection_bias, weight_std=width**-0.5, zero_bias=init == "clip"
        )

    def forward(
        self, token_ids: Tensor, text_lengths: Tensor, state_rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Encodes captions; the work is proportional to the sum of their lengths.

        `text_lengths` and `state_rows` are read on the host, which has to know the shapes of the work. Given on an
        accelerator they are fetched, and the host waits for the device.

        Args:
            token_ids: int64 [n, T], T <= context_length, anything after the end-of-text token.
            text_lengths: int64 [n], ids up to and including the end-of-text token, in [1, T].
            state_rows: int64 [R], flat positions row * T + position before the caption's end whose states are wanted.

        Returns:
            Features [n, embed_dim], not normalised, and the states at `state_rows` after the final LayerNorm
            [R, width], or None.

        Raises:
            ValueError: If the shapes do not match, or a length, a row or T is out of range.
        """
        check_caption_shapes(token_ids, text_lengths, self.context_length)
        packed = pack_captions(text_lengths, state_rows, token_ids.shape[1], token_ids.device)
        x = self.token_embedding(token_ids.flatten()[packed.token_index])
        x = x + F.embedding(packed.positions, self.positional_embedding)
        states = self.ln_final(self.transformer(x, packed.sequences, packed.rows))
        states = states.index_select(0, packed.row_order)
        features = self.text_projection(states[: len(token_ids)])
        return features, None if state_rows is None else states[len(token_ids) :]

    def encode_padded(self, token_ids: Tensor, text_lengths: Tensor) -> Tensor:
        """Features as those of `forward`, by tensor operations of fixed shapes alone, for export.

        Args:
            token_ids: int64 [n, T], T <= context_length.
            text_lengths: int64 [n], on the device of the ids.

        Returns:
            [n, embed_dim], not normalised.
        """
        count, length = token_ids.shape
        x = self.token_embedding(token_ids) + self.positional_embedding[:length]
        x = self.transformer(x.flatten(0, 1), UniformSequences(count, length, is_causal=True)).unflatten(
            0, (-1, length)
        )
        return self.text_projection(self.ln_final(last_states(x, text_lengths)))

    def head_modules(self) -> list[nn.Module]:
        """What only the pooled features need."""
        return [self.text_projection]

    def lock_groups(self) -> list[list[nn.Module | nn.Parameter]]:
        """What can be frozen together, from the ids to the projection."""
        *blocks, last = self.transformer.resblocks
        embeddings = [self.token_embedding, self.positional_embedding]
        return [embeddings, *([block] for block in blocks), [last, self.ln_final], [self.text_projection]]


def last_states(states: Tensor, text_lengths: Tensor) -> Tensor:
    """States [n, width] of the last token of each caption, of states [n, T, width] and lengths int64 [n]."""
    last = (text_lengths - 1).view(-1, 1, 1).expand(-1, 1, states.shape[-1])
    return states.gather(1, last).squeeze(1)


def check_caption_shapes(token_ids: Tensor, text_lengths: Tensor, context_length: int) -> None:
    """Raises ValueError unless ids are [n, T] with T <= context_length, and lengths [n]."""
    if token_ids.ndim != 2 or text_lengths.shape != token_ids.shape[:1]:
        raise ValueError(
            f"token_ids {tuple(token_ids.shape)} and text_lengths {tuple(text_lengths.shape)} do not match; "
            f"expected [n, T] and [n]"
        )
    num_positions = token_ids.shape[1]
    if num_positions > context_length:
        raise ValueError(
            f"token_ids have {num_positions} positions, more than context_length {context_length}; "
            f"truncate the captions or build the model with a larger context_length"
        )


class TokenEmbedding(nn.Embedding):
    """Embedding table with CLIP's initial weights, set in its own constructor like those of `Linear`."""

    def __init__(self, vocab_size: int, width: int):
        super().__init__(vocab_size, width)
        nn.init.normal_(self.weight, std=TOKEN_EMBEDDING_STD)


class PackedCaptions(NamedTuple):
    """Captions without their padding, shortest first, as N tokens in a row.

    Args:
        sequences: Their layout for attention.
        token_index: int64 [N], where each token is in the flattened [n, T] ids.
        positions: int64 [N], its position in its caption.
        rows: int64 [R'], distinct tokens whose final state is used; None if all are, in order.
        row_order: int64 [n + R], which of `rows` is each caption's end-of-text token, then each asked-for state.
    """

    sequences: PackedSequences
    token_index: Tensor
    positions: Tensor
    rows: Tensor | None
    row_order: Tensor


# Shapes that depend on data: all of it happens on the host, and a compiled graph starts after it.
@torch.compiler.disable
def pack_captions(
    text_lengths: Tensor, state_rows: Tensor | None, num_positions: int, device: torch.device
) -> PackedCaptions:
    """Lays out the tokens of captions one after the other.

    Args:
        text_lengths: int64 [n], in [1, num_positions]; on the CPU, or the host waits.
        state_rows: int64 [R], flat positions row * num_positions + position; on the CPU, or the host waits. None
            means no states but those of the end-of-text tokens.
        num_positions: T of the padded ids.
        device: Where the ids are; a CUDA device is not waited for.

    Returns:
        The layout, its tensors on `device`.

    Raises:
        ValueError: If a length or a row is out of range.
    """
    text_lengths = text_lengths.cpu()
    check_lengths(text_lengths, num_positions)
    lengths, order = text_lengths.sort(stable=True)
    starts = lengths.cumsum(0) - lengths
    positions = torch.arange(int(lengths.sum())) - starts.repeat_interleave(lengths)
    token_index = order.repeat_interleave(lengths) * num_positions + positions
    start_of_caption = torch.empty_like(starts).index_copy(0, order, starts)
    used = start_of_caption + text_lengths - 1
    if state_rows is not None:
        caption, position = split_state_rows(state_rows.cpu(), text_lengths, num_positions)
        used = torch.cat([used, start_of_caption[caption] + position])
    rows, row_order = used.unique(return_inverse=True)
    rows = None if len(rows) == len(token_index) else copy_to(rows, device)
    token_index, positions, row_order = (copy_to(tensor, device) for tensor in (token_index, positions, row_order))
    return PackedCaptions(PackedSequences.of(lengths, device), token_index, positions, rows, row_order)


def caption_rows(text_lengths: Tensor, num_positions: int) -> Tensor:
    """Flat positions row * num_positions + position of all tokens of captions, in order, as `state_rows` names them.

    Args:
        text_lengths: int64 [n] on the CPU.
        num_positions: T of the padded ids.

    Returns:
        int64 [sum of the lengths].
    """
    inside = torch.arange(num_positions) < text_lengths[:, None]
    return inside.flatten().nonzero().squeeze(1)


def check_lengths(text_lengths: Tensor, num_positions: int) -> None:
    """Raises ValueError unless all lengths are in [1, num_positions]."""
    if text_lengths.min() < 1 or text_lengths.max() > num_positions:
        raise ValueError(
            f"text_lengths span [{text_lengths.min()}, {text_lengths.max()}]; expected values in "
            f"[1, {num_positions}], counting the end-of-text token"
        )


def split_state_rows(state_rows: Tensor, text_lengths: Tensor, num_positions: int) -> tuple[Tensor, Tensor]:
    """Caption and position of each flat position row * num_positions + position, all on the CPU.

    Raises:
        ValueError: If a row is not before its caption's end.
    """
    in_range = (state_rows >= 0) & (state_rows < len(text_lengths) * num_positions)
    if in_range.all():
        caption, position = state_rows // num_positions, state_rows % num_positions
        in_range = position < text_lengths[caption]
        if in_range.all():
            return caption, position
    raise ValueError(
        f"state_rows name {int(state_rows[~in_range][0])}, which is no token of a caption; expected "
        f"row * {num_positions} + position with position < text_lengths[row]"
    )
