"""The global contrastive core: every CLIP-like term of a step from one gather of text features.

Each rank holds the rows of its own images against the texts of all ranks. Row softmaxes (image to text) are complete
there; column softmaxes (text to image) need only one sum per column over ranks. So image features never travel, and
the slab of similarities serves both directions.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from losses.distributed import all_gather_rows, rank
from losses.functional import check_precision
from losses.similarity import BlockLosses
from losses.tiles import Block, Plan

_SLAB_BUDGET_BYTES_CPU = 128 * 2**20
# Of all its memory rather than of what is free, so that ranks and resumed runs choose alike.
_SLAB_SHARE_ACCELERATOR = 1 / 40
# Below 256 rows a CPU's matrix product loses speed, above it only memory grows; an accelerator wants large kernels.
_MIN_TILE_ROWS = 256
_TILE_BYTES_ACCELERATOR = 64 * 2**20


@dataclass(frozen=True)
class ContrastiveTerms:
    """Unweighted losses of one micro-batch and what was exchanged to compute them.

    Attributes:
        clip: [V, K], block (v, k) is image view v against text view k; this rank's share.
        nns: [V, K], image view v against the neighbours of text view k; None without neighbours.
        gathered_text: [K, B, d] without gradient, all ranks' text features in rank order, as they travelled.
        gathered_slots: int64 [K, B], queue slots of all ranks' neighbours; None unless slots were gathered.
        extra_sums: float64 [k], the caller's numbers summed over ranks.
    """

    clip: Tensor
    nns: Tensor | None
    gathered_text: Tensor
    gathered_slots: Tensor | None
    extra_sums: Tensor


def contrastive_terms(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    *,
    queue_rows: Tensor | None = None,
    neighbour_slots: Tensor | None = None,
    neighbour_vectors: Tensor | None = None,
    neighbour_symmetric: bool = False,
    neighbour_mask_duplicates: bool = False,
    clip_pairs: Sequence[tuple[int, int]] | None = None,
    extra_sums: Tensor | None = None,
    communication_dtype: torch.dtype | None = None,
    slab_budget_bytes: int | None = None,
    tile_rows: int | None = None,
) -> ContrastiveTerms:
    """InfoNCE of all image views against all text views, and against their nearest neighbours, over the global batch.

    Every returned loss is this rank's share, scaled so that the mean over ranks of the shares is the global loss and
    the mean over ranks of the gradients (what data-parallel engines form) is its gradient, logit_scale included.
    The gradients arriving at `clip` and `nns` act as term weights and must be equal on all ranks.

    Collectives for W > 1, whatever V and K: one all-gather of text features, one of neighbour slots (if given), one
    all-reduce of B numbers per symmetric block, one reduce-scatter in backward. None on one rank. All ranks must
    pass the same shapes and options; b must be equal on all ranks.

    Args:
        image_features: [V, b, d] float32 (or float64), unit length, V views of this rank's b samples.
        text_features: [K, b, d], likewise for K text views.
        logit_scale: Scalar or [1] tensor in the same dtype, already exponentiated; exact up to about 350.
        queue_rows: [Q, d], this rank's replica of the neighbour queue; needs `neighbour_slots`.
        neighbour_slots: int64 [K, b], the slot of each text's neighbour. With `neighbour_vectors`, only identities
            for masking: equal exactly when two neighbours are the same.
        neighbour_vectors: [K, b, d], the neighbours themselves, for queues that differ between ranks: gathered
            instead of the slots.
        neighbour_symmetric: Add the direction from neighbour to image, averaged with the other.
        neighbour_mask_duplicates: Drop negatives that are the same neighbour as the row's positive.
        clip_pairs: The (v, k) to compute; the other entries of `clip` are 0 and cost nothing. None means all.
        extra_sums: [k], summed over ranks in float64 inside the all-reduce, for instance a count of masked tokens.
        communication_dtype: Round text features to this type for the gather; own rows are rounded too, so that all
            ranks see equal values, and the gradient passes straight through. Gradients are summed unrounded.
        slab_budget_bytes: Logits kept for the backward pass; what exceeds it is computed a second time. None: 128 MiB
            on a CPU, a fortieth of an accelerator's memory.
        tile_rows: Rows processed at a time; None chooses by device and B.

    Returns:
        The terms; `clip` and `nns` are differentiable in image_features, text_features and logit_scale (`nns` not
        in text_features: neighbours are constants).

    Raises:
        ValueError: Shapes, dtypes or the combination of neighbour arguments do not fit together.

    Source: Radford et al. (CLIP, 2021); Li et al. (DeCLIP, 2022), equations of L_MVS and L_NNS. Deviation: negatives
    and neighbours are those of the global batch.
    """
    _check_features(image_features, text_features, logit_scale)
    pairs = [(v, k) for v in range(image_features.shape[0]) for k in range(text_features.shape[0])]
    chosen = pairs if clip_pairs is None else _check_pairs(clip_pairs, pairs)
    gathered_text = _gather_text(text_features, communication_dtype)
    neighbours, gathered_slots = _gather_neighbours(
        text_features, queue_rows, neighbour_slots, neighbour_vectors, neighbour_mask_duplicates
    )
    # The symmetric blocks must come first; a neighbour block's columns follow those of the text views.
    blocks = [Block(v, k) for v, k in chosen]
    if neighbours is not None:
        masked = neighbour_mask_duplicates
        blocks += [Block(v, len(gathered_text) + k, neighbour_symmetric, k if masked else None) for v, k in pairs]
    if slab_budget_bytes is None:
        slab_budget_bytes = _default_slab_budget(text_features.device)
    plan = Plan(
        blocks=tuple(blocks),
        num_text_views=len(gathered_text),
        first_column=rank() * image_features.shape[1],
        tile_rows=tile_rows or _default_tile_rows(gathered_text),
        slab_budget_bytes=slab_budget_bytes,
    )
    extra_sums = logit_scale.new_empty(0) if extra_sums is None else extra_sums
    losses, extra_sums = BlockLosses.apply(
        image_features,
        text_features,
        logit_scale,
        plan,
        extra_sums.to(image_features.device, torch.float64),
        gathered_slots,
        *gathered_text.unbind(),
        *(() if neighbours is None else neighbours.unbind()),
    )
    shape = (image_features.shape[0], text_features.shape[0])
    return ContrastiveTerms(
        clip=_spread(losses[: len(chosen)], chosen, pairs).view(shape),
        nns=None if neighbours is None else losses[len(chosen) :].view(shape),
        gathered_text=gathered_text,
        gathered_slots=gathered_slots,
        extra_sums=extra_sums,
    )


def _check_features(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> None:
    image_shape, text_shape = tuple(image_features.shape), tuple(text_features.shape)
    if len(image_shape) != 3 or len(text_shape) != 3 or image_shape[1:] != text_shape[1:]:
        raise ValueError(
            f"contrastive_terms got image_features {image_shape} and text_features {text_shape}, "
            "expected [V, b, d] and [K, b, d]; add a leading view dimension of 1 for a single view"
        )
    check_precision(
        "contrastive_terms", image_features=image_features, text_features=text_features, logit_scale=logit_scale
    )
    if logit_scale.numel() != 1:
        raise ValueError(f"contrastive_terms got logit_scale of shape {tuple(logit_scale.shape)}, expected one element")


def _check_pairs(clip_pairs: Sequence[tuple[int, int]], pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    chosen = [(v, k) for v, k in clip_pairs]
    if not set(chosen) <= set(pairs) or len(set(chosen)) != len(chosen):
        raise ValueError(f"contrastive_terms got clip_pairs {chosen}, expected distinct entries of {pairs}")
    return chosen


def _spread(values: Tensor, chosen: list[tuple[int, int]], pairs: list[tuple[int, int]]) -> Tensor:
    """The chosen pairs' values at their places among all pairs, 0 elsewhere."""
    if chosen == pairs:
        return values
    # No index tensor: copying one to an accelerator would wait for its queue of work.
    computed = dict(zip(chosen, values.unbind(), strict=True))
    return torch.stack([computed.get(pair, values.new_zeros(())) for pair in pairs])


def _gather_text(text_features: Tensor, communication_dtype: torch.dtype | None) -> Tensor:
    travelling = text_features.detach()
    if communication_dtype is not None:
        travelling = travelling.to(communication_dtype)
    return all_gather_rows(travelling).to(text_features.dtype)


def _gather_neighbours(
    text_features: Tensor,
    queue_rows: Tensor | None,
    slots: Tensor | None,
    vectors: Tensor | None,
    mask_duplicates: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Neighbours of the global batch [K, B, d] and, where they were needed, their slots [K, B]."""
    if queue_rows is None and slots is None and vectors is None:
        return None, None
    if (queue_rows is None) == (vectors is None):
        raise ValueError("contrastive_terms expects either queue_rows with neighbour_slots, or neighbour_vectors")
    if slots is None and (queue_rows is not None or mask_duplicates):
        raise ValueError("contrastive_terms needs neighbour_slots for queue_rows and for neighbour_mask_duplicates")
    if slots is not None and slots.shape != text_features.shape[:2]:
        raise ValueError(
            f"contrastive_terms got neighbour_slots {tuple(slots.shape)}, expected {tuple(text_features.shape[:2])}"
        )
    gathered_slots = all_gather_rows(slots) if vectors is None or mask_duplicates else None
    if vectors is not None:
        return all_gather_rows(vectors.to(text_features.dtype)), gathered_slots
    return queue_rows.detach()[gathered_slots].to(text_features.dtype), gathered_slots


@functools.cache
def _default_slab_budget(device: torch.device) -> int:
    """Bytes of logits that are kept where nobody says how many."""
    if device.type == "cpu" or not torch.cuda.is_initialized():
        return _SLAB_BUDGET_BYTES_CPU
    return int(torch.cuda.get_device_properties(device).total_memory * _SLAB_SHARE_ACCELERATOR)


def _default_tile_rows(gathered_text: Tensor) -> int:
    if gathered_text.device.type == "cpu":
        return _MIN_TILE_ROWS
    return max(_MIN_TILE_ROWS, _TILE_BYTES_ACCELERATOR // (gathered_text.shape[1] * gathered_text.element_size()))
