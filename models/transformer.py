"""Pre-norm transformer, shared by the image and the text tower."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.sequences import Sequences

# Of CLIP's text tower, and of both of DeCLIP's.
POSITIONAL_EMBEDDING_STD = 0.01


class Linear(nn.Linear):
    """Linear layer that can be initialised from a normal distribution.

    It is initialised inside its own constructor, because under `deepspeed.zero.Init` the weight is already partitioned
    when the constructor of a parent module sees it.

    Args:
        in_features: Input width.
        out_features: Output width.
        bias: Add a bias.
        weight_std: Standard deviation of the initial weight; None keeps torch's default.
        zero_bias: Start from a bias of zero instead of torch's default.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        weight_std: float | None = None,
        zero_bias: bool = False,
    ):
        super().__init__(in_features, out_features, bias=bias)
        if weight_std is not None:
            nn.init.normal_(self.weight, std=weight_std)
        if bias and zero_bias:
            nn.init.zeros_(self.bias)


@dataclass(frozen=True)
class TransformerInit:
    """Standard deviations of the initial weights of every block.

    Args:
        attention_std: Packed query, key and value projection.
        residual_std: The two projections that write to the residual stream.
        hidden_std: First layer of the MLP.
    """

    attention_std: float
    residual_std: float
    hidden_std: float

    @classmethod
    def clip_text(cls, width: int, layers: int) -> "TransformerInit":
        """The scheme of CLIP's text tower for a given width and depth."""
        return cls(
            attention_std=width**-0.5,
            residual_std=width**-0.5 * (2 * layers) ** -0.5,
            hidden_std=(2 * width) ** -0.5,
        )


class Transformer(nn.Module):
    """A stack of residual attention blocks over the tokens of many sequences.

    Args:
        width: Width of the residual stream.
        layers: Number of blocks.
        heads: Number of attention heads.
        init: Initial weights; None means torch's defaults for nn.MultiheadAttention and nn.Linear, which CLIP keeps in
            its image tower.
        activation: Of the MLPs, a key of `ACTIVATIONS`.
        activation_checkpointing: Keep only the blocks' inputs during training and recompute the rest in the backward.
    """

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        *,
        init: TransformerInit | None = None,
        activation: str = "quick_gelu",
        activation_checkpointing: bool = False,
    ):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation {activation!r} is not known; use one of {', '.join(ACTIVATIONS)}")
        if width % heads:
            raise ValueError(f"width {width} is not divisible by heads {heads}; use heads = {max(1, width // 64)}")
        self.activation_checkpointing = activation_checkpointing
        self.resblocks = nn.ModuleList(
            ResidualAttentionBlock(width, heads, init=init, activation=activation) for _ in range(layers)
        )

    def forward(self, x: Tensor, sequences: Sequences, rows: Tensor | None = None) -> Tensor:
        """Runs all blocks.

        Args:
            x: [N, width], the tokens of all sequences.
            sequences: Which tokens attend to which.
            rows: int64 [R], distinct, the tokens that the caller goes on to use, or None for all of them. The last
                block then computes next to nothing that only other tokens need.

        Returns:
            [N, width], or [R, width] with `rows`.
        """
        *blocks, last = self.resblocks
        for block in blocks:
            x = self._run(block, x, sequences, None)
        return self._run(last, x, sequences, rows)

    def _run(self, block: nn.Module, x: Tensor, sequences: Sequences, rows: Tensor | None) -> Tensor:
        if self.activation_checkpointing and self.training and torch.is_grad_enabled():
            # Blocks draw no random numbers, so their generator state need not be kept.
            return checkpoint(block, x, sequences, rows, use_reentrant=False, preserve_rng_state=False)
        return block(x, sequences, rows)


class ResidualAttentionBlock(nn.Module):
    """Attention and MLP, each behind a LayerNorm and added to the residual stream."""

    def __init__(self, width: int, heads: int, *, init: TransformerInit | None, activation: str):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads, init=init)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, 4 * width, init=init, activation=activation)

    def forward(self, x: Tensor, sequences: Sequences, rows: Tensor | None = None) -> Tensor:
        attended = self.attn(self.ln_1(x), sequences, rows)
        if rows is not None:
            x = x.index_select(0, rows)
        x = x + attended
        return x + self.mlp(self.ln_2(x))


class Attention(nn.Module):
    """Multi-head self-attention with packed projections, the parameter layout of nn.MultiheadAttention."""

    def __init__(self, width: int, heads: int, *, init: TransformerInit | None):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = Linear(width, width, weight_std=init.residual_std if init else None, zero_bias=True)
        if init:
            nn.init.normal_(self.in_proj_weight, std=init.attention_std)
        else:
            nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, x: Tensor, sequences: Sequences, rows: Tensor | None = None) -> Tensor:
        """Attends to all tokens of `x` [N, width] from all of them, or from `rows` [R] only."""
        if rows is None:
            query, key, value = self._split_heads(F.linear(x, self.in_proj_weight, self.in_proj_bias), 3)
        else:
            width = x.shape[-1]
            weights = self.in_proj_weight.split([width, 2 * width])
            biases = self.in_proj_bias.split([width, 2 * width])
            (query,) = self._split_heads(F.linear(x.index_select(0, rows), weights[0], biases[0]), 1)
            key, value = self._split_heads(F.linear(x, weights[1], biases[1]), 2)
        return self.out_proj(sequences.attend(query, key, value, rows).flatten(1))

    def _split_heads(self, packed: Tensor, parts: int) -> tuple[Tensor, ...]:
        return packed.unflatten(-1, (parts, self.heads, -1)).unbind(1)


class Mlp(nn.Module):
    """Two linear layers around an activation."""

    def __init__(self, width: int, hidden: int, *, init: TransformerInit | None, activation: str):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.c_fc = Linear(width, hidden, weight_std=init.hidden_std if init else None)
        self.c_proj = Linear(hidden, width, weight_std=init.residual_std if init else None)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.activation(self.c_fc(x)))


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), CLIP's approximation of GELU.

    Args:
        x: Any shape.

    Returns:
        Tensor of the same shape.
    """
    # Through silu, autograd keeps one tensor of this size instead of the two of the textbook form.
    return F.silu(1.702 * x).mul_(1 / 1.702)


# CLIP and DeCLIP train with the first, most of open_clip's own models with the second.
ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}
