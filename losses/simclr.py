"""SimCLR: two views of every image find each other among both views of the whole global batch."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from losses.distributed import all_gather_rows, rank
from losses.functional import exact_products, normalize

# Logits of one tile, in bytes.
_TILE_BYTES = 32 * 2**20


def simclr_loss(
    projections: Tensor,
    *,
    temperature: float = 0.1,
    communication_dtype: torch.dtype | None = None,
    tile_rows: int | None = None,
) -> Tensor:
    """Cross-entropy of each view's partner against the other 2B - 2 projections of the global batch, itself left out.

    Collectives for W > 1: one all-gather of the projections and one of 2B numbers, both in the forward. All ranks must
    pass the same shapes. Logits are made a tile at a time, in forward and backward, and never kept.

    Args:
        projections: [2, b, d] floating point, two views of this rank's b samples; normalised here in fp32.
        temperature: Divides the cosines; fixed, not learned.
        communication_dtype: Round unit-length projections to this type for the gather; own rows are rounded too, and
            the gradient passes straight through.
        tile_rows: Rows processed at a time; None chooses by B.

    Returns:
        Scalar float32 (float64 for float64 input), this rank's share: the mean over ranks of values and of gradients
        are those of the global batch.

    Raises:
        ValueError: The shape is another one, or the temperature is not positive.

    Source: Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations" (2020), equation 1;
    Mu et al. (SLIP, 2022).
    """
    if projections.dim() != 3 or projections.shape[0] != 2:
        raise ValueError(f"simclr_loss got projections {tuple(projections.shape)}, expected two views [2, b, d]")
    if not 0 < temperature < math.inf:
        raise ValueError(f"simclr_loss got temperature {temperature}, expected a positive number")
    unit = normalize(projections)
    travelling = unit.detach() if communication_dtype is None else unit.detach().to(communication_dtype)
    everyone = all_gather_rows(travelling).to(unit.dtype)
    columns = everyone.shape[1]
    rows = tile_rows or max(1, _TILE_BYTES // (2 * columns * everyone.element_size()))
    return _SimClr.apply(unit, everyone, 1.0 / temperature, rank() * unit.shape[1], rows)


class _SimClr(torch.autograd.Function):
    """The logits L of all 2B projections against each other are symmetric, and a rank has whole rows of them.

    Anchor j's softmax over L_jk pulls on its columns k: the gradient of z_i is the sum over j of (p_ij + p_ji) z_j,
    where p_ji = exp(L_ij - lse_j). So each rank needs only the log-sum-exp of all anchors to finish the gradient of its
    own rows: nothing is reduced in the backward.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, unit: Tensor, everyone: Tensor, scale: float, first_column: int, tile_rows: int
    ) -> Tensor:
        ctx.scale, ctx.first_column, ctx.tile_rows = scale, first_column, tile_rows
        ctx.shape = unit.shape
        lse = everyone.new_empty(unit.shape[:2])
        positive = everyone.new_empty(unit.shape[:2])
        with exact_products(everyone.device):
            for view, rows, logits, label in _tiles(everyone, unit.shape[1], scale, first_column, tile_rows):
                positive[view, rows] = logits.diagonal(label)
                lse[view, rows] = logits.logsumexp(1)
        ctx.save_for_backward(everyone, all_gather_rows(lse))
        return (lse.double() - positive.double()).mean().to(unit.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, weight: Tensor) -> tuple[Tensor | None, ...]:
        everyone, lse = ctx.saved_tensors
        grad = everyone.new_empty(ctx.shape)
        size, first = ctx.shape[1], ctx.first_column
        with exact_products(everyone.device):
            for view, rows, logits, label in _tiles(everyone, size, ctx.scale, first, ctx.tile_rows):
                own_lse = lse[view, first + rows.start : first + rows.stop]
                pull = (logits - own_lse[:, None]).exp_()
                pull += logits.sub_(lse.flatten()).exp_()
                pull.diagonal(label).sub_(2)
                torch.mm(pull, everyone.flatten(0, 1), out=grad[view, rows])
        # Over 2b, not over 2B: averaging over ranks supplies the other factor.
        return grad.mul_(weight * (ctx.scale / (2 * size))), None, None, None, None


def _tiles(
    everyone: Tensor, size: int, scale: float, first_column: int, tile_rows: int
) -> Iterator[tuple[int, slice, Tensor, int]]:
    """Yields (view, own rows, logits [t, 2B] with -inf for the anchor itself, column of the first positive)."""
    columns = everyone.shape[1]
    for view in (0, 1):
        for begin in range(0, size, tile_rows):
            rows = slice(begin, min(begin + tile_rows, size))
            start = first_column + begin
            # The gathered rows, one's own included: every rank must see the same, rounded values.
            anchors = everyone[view, start : first_column + rows.stop]
            logits = (anchors * scale) @ everyone.flatten(0, 1).t()
            logits.diagonal(view * columns + start).fill_(-math.inf)
            yield view, rows, logits, (1 - view) * columns + start
