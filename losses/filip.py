"""FILIP's loss: contrastive learning of two score matrices made of token similarities."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.distributed import rank, world_size
from losses.functional import check_precision, exact_products
from losses.late_interaction import DEFAULT_WINNERS_BUDGET_BYTES, Packing, TokenScores

_SELECTION_BYTES = 32 * 2**20


@dataclass(frozen=True)
class KeySelection:
    """Which tokens of a sample other samples are matched with. Queries are always all tokens.

    Attributes:
        count: How many of each image and of each caption; None means all. A caption with fewer tokens has them all.
        by: What ranks them. "own_pair": summed similarity to the tokens of the sample's own partner. "local_max": the
            largest similarity to any token of the other modality in the sample's group.
        group: Samples of a group, consecutive in the global batch, for "local_max"; None means those of a rank, so that
            what is selected depends on the number of ranks.
    """

    count: int | None = None
    by: Literal["own_pair", "local_max"] = "own_pair"
    group: int | None = None


def filip_loss(
    image_tokens: Tensor,
    text_tokens: Tensor,
    text_lengths: Tensor,
    logit_scale: Tensor,
    *,
    keys: KeySelection,
    max_text_length: int,
    communication_dtype: torch.dtype | None = None,
    winners_budget_bytes: int = DEFAULT_WINNERS_BUDGET_BYTES,
    tile_bytes: int | None = None,
) -> Tensor:
    """Cross-entropy of the token-wise scores over the global batch, from image to text and back, averaged.

    The value is this rank's share, scaled so that the mean over ranks of the shares is the global loss and the mean
    over ranks of the gradients is its gradient, logit_scale included.

    Collectives for W > 1: one all-gather of keys of both sides, one reduce-scatter in backward. None on one rank.
    Beside the gathered keys and their gradient, memory grows with the global batch only by the scores [b, B].

    Args:
        image_tokens: [b, P, d] float32 (or float64), unit length, of this rank's images; b equal on all ranks.
        text_tokens: [N, d], likewise, the tokens of this rank's captions one after the other, without padding.
        text_lengths: int64 [b] on the CPU, tokens of each caption, in [1, max_text_length].
        logit_scale: Scalar or [1], already exponentiated.
        keys: Which tokens are keys. Selected, they are constants of the selection: it has no gradient.
        max_text_length: Equal on all ranks: the places for the keys of a caption where all are keys.
        communication_dtype: Round keys to this type for the gather; own ones are rounded too, so that all ranks see
            equal values, and the gradient passes straight through. Gradients are summed unrounded.
        winners_budget_bytes: Positions of maxima kept for the backward pass; others are found a second time.
        tile_bytes: Token similarities held at a time; None chooses by device.

    Returns:
        Scalar in the tokens' dtype, differentiable in tokens and logit_scale.

    Raises:
        ValueError: Shapes or dtypes do not fit together, or the group does not divide this rank's samples.

    Source: Yao et al., "FILIP", ICLR 2022, equations 3 to 6 and section 3.1 on selection; `own_pair` is that of the
    released code of DeCLIP's authors (Cui et al., "Democratizing Contrastive Language-Image Pre-training", 2022).
    Deviation from that code: padding is neither a query nor a key.
    """
    _check(image_tokens, text_tokens, text_lengths, logit_scale, keys, max_text_length)
    samples, num_patches = image_tokens.shape[:2]
    image_packing = Packing.uniform(samples, num_patches, image_tokens.device)
    text_packing = Packing.of(text_lengths, text_tokens.device)
    image_keys, text_keys = _select(image_tokens, text_tokens, text_packing, keys, max_text_length)
    by_image, by_text = TokenScores.apply(
        image_tokens.flatten(0, 1),
        text_tokens,
        image_keys,
        text_keys,
        image_packing,
        text_packing,
        communication_dtype,
        winners_budget_bytes,
        tile_bytes,
    )
    labels = torch.arange(samples, device=by_image.device) + rank() * samples
    return sum(F.cross_entropy(logit_scale * scores, labels) for scores in (by_image, by_text)) / 2


def _check(
    image_tokens: Tensor,
    text_tokens: Tensor,
    text_lengths: Tensor,
    logit_scale: Tensor,
    keys: KeySelection,
    max_text_length: int,
) -> None:
    shapes = tuple(image_tokens.shape), tuple(text_tokens.shape), tuple(text_lengths.shape)
    fits = image_tokens.ndim == 3 and text_tokens.ndim == 2 and image_tokens.shape[2] == text_tokens.shape[1]
    if not fits or text_lengths.shape != image_tokens.shape[:1]:
        raise ValueError(
            f"filip_loss got image_tokens {shapes[0]}, text_tokens {shapes[1]}, text_lengths {shapes[2]}, "
            "expected [b, P, d], [N, d], [b]"
        )
    check_precision("filip_loss", image_tokens=image_tokens, text_tokens=text_tokens, logit_scale=logit_scale)
    counts = text_lengths.tolist()
    if min(counts) < 1 or max(counts) > max_text_length or sum(counts) != len(text_tokens):
        raise ValueError(
            f"filip_loss got text_lengths in [{min(counts)}, {max(counts)}] with sum {sum(counts)}, expected values in "
            f"[1, {max_text_length}] that add up to the {len(text_tokens)} text_tokens"
        )
    if keys.group is not None and len(counts) % keys.group:
        raise ValueError(
            f"filip_loss got a selection group of {keys.group} samples for {len(counts)} samples of a rank; "
            "it must divide them"
        )


def _select(
    image_tokens: Tensor, text_tokens: Tensor, packing: Packing, keys: KeySelection, max_text_length: int
) -> tuple[Tensor, Tensor]:
    """Keys [b, Ki, d] of images and [b, Kt, d] of captions; a caption with fewer repeats its best one."""
    longest = max(packing.counts)
    if keys.count is None:
        # Other ranks may have longer captions; alone, there is no reason to pad beyond the longest.
        index, _ = packing.padded_index(max_text_length if world_size() > 1 else longest)
        return image_tokens, F.embedding(index, text_tokens)
    num_texts = min(keys.count, max_text_length)
    index, real = packing.padded_index(max(longest, num_texts))
    rank_tokens = _by_own_pair if keys.by == "own_pair" else _by_local_max
    with torch.no_grad(), exact_products(image_tokens.device):
        image_values, text_values = rank_tokens(image_tokens, text_tokens, packing, index, keys.group)
        image_chosen = image_values.topk(min(keys.count, image_tokens.shape[1]), dim=1).indices
        text_values, text_chosen = text_values.masked_fill(~real, -torch.inf).topk(num_texts, dim=1)
        text_chosen = torch.where(text_values.isneginf(), text_chosen[:, :1], text_chosen)
    image_keys = image_tokens.take_along_dim(image_chosen[..., None], dim=1)
    return image_keys, F.embedding(index.take_along_dim(text_chosen, dim=1), text_tokens)


def _by_own_pair(
    image_tokens: Tensor, text_tokens: Tensor, packing: Packing, index: Tensor, _group: int | None
) -> tuple[Tensor, Tensor]:
    every = torch.arange(len(text_tokens), device=text_tokens.device)
    text_sums = F.embedding_bag(every, text_tokens, offsets=packing.offsets, mode="sum")
    image_values = torch.einsum("bpd,bd->bp", image_tokens, text_sums)
    text_values = (text_tokens * image_tokens.sum(dim=1)[packing.owners]).sum(dim=-1)
    return image_values, text_values[index]


def _by_local_max(
    image_tokens: Tensor, text_tokens: Tensor, packing: Packing, index: Tensor, group: int | None
) -> tuple[Tensor, Tensor]:
    samples, num_patches, _ = image_tokens.shape
    size = group or samples
    image_values = image_tokens.new_empty(samples, num_patches)
    text_values = text_tokens.new_full((len(text_tokens),), -torch.inf)
    begin = 0
    for first in range(0, samples, size):
        end = begin + sum(packing.counts[first : first + size])
        texts, best = text_tokens[begin:end], text_values[begin:end]
        images = image_tokens[first : first + size].flatten(0, 1)
        found = []
        for rows in images.split(max(1, _SELECTION_BYTES // (len(texts) * texts.element_size()))):
            similarities = rows @ texts.t()
            found.append(similarities.amax(dim=1))
            torch.maximum(best, similarities.amax(dim=0), out=best)
        image_values[first : first + size] = torch.cat(found).view(-1, num_patches)
        begin = end
    return image_values, text_values[index]
