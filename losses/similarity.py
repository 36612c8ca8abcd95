"""Symmetric InfoNCE on blocks of one global similarity matrix, without ever holding that matrix.

Numerics: every tile is shifted by its own row maxima for the row sums and by its own column maxima for the column
sums, so no sum can underflow at any logit scale. Column sums of tiles and ranks meet in float64 as exp(lse - scale),
whose exponent is at least -2 * scale for unit-length features: representable up to a logit scale of 350.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from losses.distributed import all_reduce_sum_, reduce_scatter_rows

# Masked entries take this finite value: -inf would turn a wholly masked column of a tile into NaN.
_MASKED_LOGIT = -1e4


@dataclass(frozen=True)
class Block:
    """One similarity matrix: the rows of an image view against the columns of a target set.

    Attributes:
        image: Index of the image view.
        target: Index of the target set; the first sets are the text views.
        symmetric: Whether columns are classified as well as rows.
        neighbours: Index into the neighbour slots whose repetitions are masked; None masks nothing.
    """

    image: int
    target: int
    symmetric: bool = True
    neighbours: int | None = None


@dataclass(frozen=True)
class Plan:
    """What to compute and within which memory.

    Attributes:
        blocks: The similarity matrices, each a loss of its own; symmetric ones come first.
        num_text_views: How many of the target sets are text views, which receive a gradient.
        first_column: Column of this rank's first row's positive, rank * b.
        tile_rows: Rows of one block processed at a time.
        slab_budget_bytes: Logits kept for the backward pass; tiles beyond it are computed again.
    """

    blocks: tuple[Block, ...]
    num_text_views: int
    first_column: int
    tile_rows: int
    slab_budget_bytes: int

    @property
    def num_symmetric(self) -> int:
        """Number of blocks that need column sums."""
        return sum(block.symmetric for block in self.blocks)


class _Slab:
    """This rank's rows of all blocks, [b, B] each, produced one tile at a time."""

    def __init__(
        self, plan: Plan, image_features: Tensor, logit_scale: Tensor, slots: Tensor | None, targets: tuple[Tensor, ...]
    ) -> None:
        self.plan = plan
        self.image_features = image_features
        self.logit_scale = logit_scale
        self.slots = slots
        self.targets = targets
        self.rows = image_features.shape[1]
        self.columns = targets[0].shape[0]

    def tiles(self) -> Iterator[tuple[Block, int, slice]]:
        """Yields (block, number of the block, rows) for every tile, always in the same order."""
        for number, block in enumerate(self.plan.blocks):
            for start in range(0, self.rows, self.plan.tile_rows):
                yield block, number, slice(start, min(start + self.plan.tile_rows, self.rows))

    def buffer(self) -> Tensor:
        """Uninitialised room for the largest tile."""
        return self.image_features.new_empty(min(self.plan.tile_rows, self.rows), self.columns)

    def keep_buffer(self) -> Tensor:
        """Uninitialised room for as many rows, counted over all blocks, as the budget allows."""
        row_bytes = self.columns * self.image_features.element_size()
        rows = min(self.rows * len(self.plan.blocks), self.plan.slab_budget_bytes // row_bytes)
        return self.image_features.new_empty(rows, self.columns)

    def kept(self, number: int, rows: slice, keep: Tensor) -> Tensor | None:
        """The tile's place in `keep`, None for a tile that does not fit whole."""
        start, stop = number * self.rows + rows.start, number * self.rows + rows.stop
        return keep[start:stop] if stop <= keep.shape[0] else None

    def logits(self, block: Block, rows: slice, out: Tensor) -> Tensor:
        """Writes the tile's scaled similarities to `out`."""
        torch.mm(self.image_features[block.image, rows] * self.logit_scale, self.targets[block.target].t(), out=out)
        if block.neighbours is not None:
            slots = self.slots[block.neighbours]
            own = slots[self.plan.first_column + rows.start : self.plan.first_column + rows.stop]
            repeated = own[:, None] == slots
            self.positives(repeated, rows).fill_(False)
            out.masked_fill_(repeated, _MASKED_LOGIT)
        return out

    def positives(self, tile: Tensor, rows: slice) -> Tensor:
        """View of a tile's entries at (row, label)."""
        return tile.diagonal(offset=self.plan.first_column + rows.start)


def _shifted_exp_sum(logits: Tensor, dim: int, scratch: Tensor) -> tuple[Tensor, Tensor]:
    peak = logits.amax(dim, keepdim=True)
    total = torch.sub(logits, peak, out=scratch).exp_().sum(dim)
    return peak.squeeze(dim).double(), total.double()


def _accumulate(slab: _Slab, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One pass over all tiles, filling `keep`.

    Returns float64: complete log-sum-exp of rows [blocks, b], positives [blocks, b], and this rank's part of the
    column sums of exp(logit - scale) [symmetric blocks, B].
    """
    like = slab.image_features
    row_lse = like.new_empty(len(slab.plan.blocks), slab.rows, dtype=torch.float64)
    positive = torch.empty_like(row_lse)
    column_sum = like.new_zeros(slab.plan.num_symmetric, slab.columns, dtype=torch.float64)
    scale = slab.logit_scale.double()
    work, scratch = None, slab.buffer()
    for block, number, rows in slab.tiles():
        height = rows.stop - rows.start
        out = slab.kept(number, rows, keep)
        if out is None:
            work = slab.buffer() if work is None else work
            out = work[:height]
        logits = slab.logits(block, rows, out)
        peak, total = _shifted_exp_sum(logits, 1, scratch[:height])
        row_lse[number, rows] = peak + total.log()
        positive[number, rows] = slab.positives(logits, rows).double()
        if block.symmetric:
            peak, total = _shifted_exp_sum(logits, 0, scratch[:height])
            column_sum[number] += total * (peak - scale).exp()
    return row_lse, positive, column_sum


class BlockLosses(torch.autograd.Function):
    """Loss of every block as this rank's share: the mean over ranks of values and of gradients are the true ones."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        plan: Plan,
        extra_sums: Tensor,
        slots: Tensor | None,
        *targets: Tensor,
    ) -> tuple[Tensor, Tensor]:
        slab = _Slab(plan, image_features, logit_scale, slots, targets)
        keep = slab.keep_buffer() if any(ctx.needs_input_grad) else image_features.new_empty(0, slab.columns)
        with torch.autocast(image_features.device.type, enabled=False):
            row_lse, positive, column_sum = _accumulate(slab, keep)
        packed = all_reduce_sum_(torch.cat([column_sum.flatten(), extra_sums]))
        reduced, extra = packed.split([column_sum.numel(), extra_sums.numel()])
        column_lse = reduced.view_as(column_sum).log() + logit_scale.double()

        losses = (row_lse - positive).mean(1)
        own_columns = column_lse[:, plan.first_column : plan.first_column + slab.rows]
        both = slice(plan.num_symmetric)
        losses[both] = (losses[both] + (own_columns - positive[both]).mean(1)) / 2

        dtype = image_features.dtype
        ctx.plan = plan
        ctx.save_for_backward(
            image_features, logit_scale, slots, row_lse.to(dtype), column_lse.to(dtype), keep, *targets
        )
        extra = extra.clone()
        ctx.mark_non_differentiable(extra)
        return losses.to(dtype), extra

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, weights: Tensor, _extra: Tensor | None) -> tuple[Any, ...]:
        image_features, logit_scale, slots, row_lse, column_lse, keep, *targets = ctx.saved_tensors
        slab = _Slab(ctx.plan, image_features, logit_scale, slots, tuple(targets))
        needs_image, needs_text, needs_scale = ctx.needs_input_grad[:3]
        with torch.autocast(image_features.device.type, enabled=False):
            grad_image, grad_text = _gradients(
                slab, weights, row_lse, column_lse, keep, rows_needed=needs_image or needs_scale, text_needed=needs_text
            )
            grad_scale = _scale_gradient(image_features, grad_image, logit_scale) if needs_scale else None
        if needs_image:
            grad_image.mul_(logit_scale)
        if needs_text:
            grad_text = reduce_scatter_rows(grad_text.mul_(logit_scale))
        return (grad_image if needs_image else None, grad_text, grad_scale, *[None] * (3 + len(targets)))


def _scale_gradient(image_features: Tensor, grad_image: Tensor, logit_scale: Tensor) -> Tensor:
    # A logit is scale * x.y: its gradient contracted with x.y is x . (gradient of x before the factor scale).
    per_row = torch.einsum("vbd,vbd->vb", image_features, grad_image)
    return per_row.sum(dtype=torch.float64).to(logit_scale.dtype).reshape(logit_scale.shape)


def _gradients(
    slab: _Slab,
    weights: Tensor,
    row_lse: Tensor,
    column_lse: Tensor,
    keep: Tensor,
    *,
    rows_needed: bool,
    text_needed: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients, before the factor logit_scale, of this rank's image rows and of all text rows (its part)."""
    like, num_text = slab.image_features, slab.plan.num_text_views
    grad_image = torch.zeros_like(like) if rows_needed else None
    grad_text = like.new_zeros(num_text, slab.columns, like.shape[2]) if text_needed else None
    work, scratch = slab.buffer(), slab.buffer()
    for block, number, rows in slab.tiles():
        # Looking at a weight on an accelerator would stall its queue of work.
        if weights.device.type == "cpu" and weights[number] == 0:
            continue
        height = rows.stop - rows.start
        logits = slab.kept(number, rows, keep)
        if logits is None:
            logits = slab.logits(block, rows, out=scratch[:height])
        grad = torch.sub(logits, row_lse[number, rows, None], out=work[:height]).exp_()
        if block.symmetric:
            grad += torch.sub(logits, column_lse[number], out=scratch[:height]).exp_()
        directions = 2 if block.symmetric else 1
        slab.positives(grad, rows).sub_(directions)
        # Over b, not over the global batch: averaging over ranks supplies the other factor.
        grad *= weights[number] / (directions * slab.rows)
        if rows_needed:
            grad_image[block.image, rows].addmm_(grad, slab.targets[block.target])
        if text_needed and block.target < num_text:
            grad_text[block.target].addmm_(grad.t(), like[block.image, rows])
    return grad_image, grad_text
