"""Attention within each of many sequences whose tokens lie one after the other in a single tensor."""

import functools
import inspect
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

_HALF_PRECISIONS = (torch.float16, torch.bfloat16)
# The first CUDA devices with a flash kernel.
_MIN_CAPABILITY = (8, 0)
_MAX_HEAD_WIDTH = 256


class Sequences(Protocol):
    """Knows which tokens belong together and may see each other.

    A NamedTuple of integers and tensors, because the hooks of ZeRO-3 look into the inputs of every module.
    """

    def attend(self, query: Tensor, key: Tensor, value: Tensor, rows: Tensor | None) -> Tensor:
        """Scaled dot-product attention.

        Args:
            query: [N, heads, head_width], or [R, heads, head_width] with `rows`.
            key: [N, heads, head_width].
            value: [N, heads, head_width].
            rows: int64 [R], the distinct tokens that the queries belong to; None means all N in order.

        Returns:
            Tensor of the shape of `query`.
        """
        ...


class UniformSequences(NamedTuple):
    """Sequences of one length in which every token sees all tokens; `rows` names equally many of each, in order.

    Args:
        count: Number of sequences n.
        length: Tokens of each, so N = n * length.
        is_causal: Every token sees the tokens up to itself only; without `rows` then.
    """

    count: int
    length: int
    is_causal: bool = False

    def attend(self, query: Tensor, key: Tensor, value: Tensor, rows: Tensor | None) -> Tensor:
        return _attend(query, key, value, self.count, is_causal=self.is_causal)


class PackedSequences(NamedTuple):
    """Causal sequences of any lengths, shortest first, without padding.

    Args:
        groups: int64 [g, 2] on the CPU, (number of sequences, their length) for each length that occurs, ascending. A
            tensor, because a compiled graph would be specialised to the values of a tuple.
        max_length: The largest length.
        offsets: int32 [n + 1], where each sequence begins, and N.
        has_kernel: Half precisions have a kernel for unequal lengths on the device of `offsets`.
    """

    groups: Tensor
    max_length: int
    offsets: Tensor
    has_kernel: bool

    @classmethod
    def of(cls, lengths: Tensor, device: torch.device) -> "PackedSequences":
        """Describes sequences by their lengths.

        Args:
            lengths: int64 [n] >= 1 on the CPU, ascending.
            device: Where the tokens are.
        """
        values, counts = lengths.unique_consecutive(return_counts=True)
        offsets = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        return cls(
            groups=torch.stack([counts, values], dim=1),
            max_length=int(values[-1]),
            offsets=copy_to(offsets, device),
            has_kernel=has_unequal_length_kernel(device),
        )

    def attend(self, query: Tensor, key: Tensor, value: Tensor, rows: Tensor | None) -> Tensor:
        if rows is not None:
            # Queries nobody asked for cost less than a second form of causal attention would in code: the scores are
            # a hundredth of a block's arithmetic.
            query = torch.zeros_like(key).index_copy(0, rows, query)
        head_width = query.shape[-1]
        fits = query.dtype in _HALF_PRECISIONS and head_width % 8 == 0 and head_width <= _MAX_HEAD_WIDTH
        if self.has_kernel and fits:
            attended = _attend_unequal(query, key, value, self.offsets, self.max_length)
        else:
            attended = _attend_in_groups(query, key, value, self.groups)
        return attended if rows is None else attended.index_select(0, rows)


def has_unequal_length_kernel(device: torch.device) -> bool:
    """Whether this torch and this device have variable-length attention (for fp16 and bf16)."""
    if device.type != "cuda" or not torch.backends.cuda.is_flash_attention_available():
        return False
    if torch.cuda.get_device_capability(device) < _MIN_CAPABILITY:
        return False
    return _causal_option() is not None


@functools.cache
def _causal_option() -> tuple[str, Any] | None:
    """How this torch's variable-length attention is asked to be causal; None where it is missing or says neither."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    options = inspect.signature(varlen_attn).parameters
    return next((choice for choice in (("window_size", (-1, 0)), ("is_causal", True)) if choice[0] in options), None)


def copy_to(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies a CPU tensor to a device; a CUDA device gets it in stream order, without the host waiting."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _attend(query: Tensor, key: Tensor, value: Tensor, count: int, *, is_causal: bool) -> Tensor:
    """Attention within `count` sequences of one length."""
    by_sequence = (tokens.unflatten(0, (count, -1)).transpose(1, 2) for tokens in (query, key, value))
    return F.scaled_dot_product_attention(*by_sequence, is_causal=is_causal).transpose(1, 2).flatten(0, 1)


def _attend_unequal(query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, max_length: int) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    option, value_of_option = _causal_option()
    return varlen_attn(query, key, value, offsets, offsets, max_length, max_length, **{option: value_of_option})


# A compiled graph would be specialised to the number of groups, which changes from batch to batch.
@torch.compiler.disable
def _attend_in_groups(query: Tensor, key: Tensor, value: Tensor, groups: Tensor) -> Tensor:
    """Causal attention group by group: neighbouring sequences of one length need no padding and no copy."""
    counts, sizes = groups[:, 0].tolist(), groups.prod(dim=1).tolist()
    pieces = zip(query.split(sizes), key.split(sizes), value.split(sizes), counts, strict=True)
    return torch.cat([_attend(*tokens, count, is_causal=True) for *tokens, count in pieces])
