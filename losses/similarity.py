"""Symmetric InfoNCE on blocks of one global similarity matrix, without ever holding that matrix.

Numerics: every tile is shifted by its own row maxima for the row sums and by its own column maxima for the column
sums, so no sum can underflow at any logit scale. Column sums of tiles and ranks meet in float64 as exp(lse - scale),
whose exponent is at least -2 * scale for unit-length features: representable up to a logit scale of 350.

Two implementations of the work on one tile, chosen by the environment variable DECLIP_SIMILARITY: "torch" (the default
and the reference, any device), "triton" (fused kernels that keep logits on chip, and so neither need the slab budget
nor use it) and "auto": triton on NVIDIA GPUs where it is installed and takes the features' type, torch elsewhere. The
kernels become the default on CUDA once somebody has measured them faster there.
"""

import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
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
        slab_budget_bytes: Logits kept for the backward pass; tiles beyond it are computed again. The fused kernels
            keep none.
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


@functools.cache
def _triton_kernels() -> ModuleType | None:
    try:
        from losses import triton_similarity
    except ImportError:
        return None
    return triton_similarity


def _fused_kernels(features: Tensor) -> ModuleType | None:
    """The fused kernels if they are to be used for these features, None for torch."""
    choice = os.environ.get("DECLIP_SIMILARITY", "torch")
    if choice == "torch" or (choice == "auto" and not features.is_cuda):
        return None
    if choice not in ("auto", "triton"):
        raise ValueError(f"DECLIP_SIMILARITY is {choice!r}, expected auto, torch or triton")
    kernels = _triton_kernels()
    reason = "triton cannot be imported; pip install triton" if kernels is None else kernels.unsupported(features)
    if reason is None:
        return kernels
    if choice == "triton":
        raise ValueError(f"DECLIP_SIMILARITY=triton cannot be followed: {reason}; unset it to choose automatically")
    return None


class _Slab:
    """This rank's rows of all blocks, [b, B] each, visited one tile at a time."""

    def __init__(
        self, plan: Plan, image_features: Tensor, logit_scale: Tensor, slots: Tensor | None, targets: tuple[Tensor, ...]
    ) -> None:
        self.kernels = _fused_kernels(image_features)
        # Torch products want one type for all operands; the kernels read half precision and compute in single.
        dtype = logit_scale.dtype if self.kernels is None else image_features.dtype
        self.plan = plan
        self.image_features = image_features.to(dtype).contiguous()
        self.logit_scale = logit_scale
        self.slots = slots
        self.targets = tuple(target.to(dtype).contiguous() for target in targets)
        self.rows = image_features.shape[1]
        self.columns = targets[0].shape[0]

    def tiles(self) -> Iterator[tuple[Block, int, slice]]:
        """Yields (block, number of the block, rows) for every tile, always in the same order."""
        for number, block in enumerate(self.plan.blocks):
            for start in range(0, self.rows, self.plan.tile_rows):
                yield block, number, slice(start, min(start + self.plan.tile_rows, self.rows))

    def operands(self, block: Block, rows: slice) -> tuple[Tensor, Tensor]:
        """Features of the tile's rows and columns."""
        return self.image_features[block.image, rows], self.targets[block.target]

    def first_label(self, rows: slice) -> int:
        """Column of the positive of the tile's first row."""
        return self.plan.first_column + rows.start

    def masking_slots(self, block: Block, rows: slice) -> tuple[Tensor | None, Tensor | None]:
        """Neighbour slots of the tile's rows and columns; None where repetitions are not masked."""
        if block.neighbours is None:
            return None, None
        slots, start = self.slots[block.neighbours], self.first_label(rows)
        return slots[start : start + rows.stop - rows.start], slots

    def keep_buffer(self) -> Tensor:
        """Uninitialised room for as many rows, counted over all blocks, as the budget allows."""
        row_bytes = self.columns * self.image_features.element_size()
        rows = min(self.rows * len(self.plan.blocks), self.plan.slab_budget_bytes // row_bytes)
        return self.image_features.new_empty(rows if self.kernels is None else 0, self.columns)


class _TorchTiles:
    """The work on tiles by torch operations on logits in buffers."""

    def __init__(self, slab: _Slab, keep: Tensor) -> None:
        self._slab = slab
        self._keep = keep

    def sums(self, block: Block, number: int, rows: slice) -> tuple[Tensor, Tensor, Tensor | None]:
        """Float64: log-sum-exp of rows, positives, column sums of exp(logit - scale) where the block needs them."""
        logits = self._kept(number, rows)
        logits = self._logits(block, rows, out=self._work if logits is None else logits)
        scratch = self._scratch[: logits.shape[0]]
        peak, total = _shifted_exp_sum(logits, 1, scratch)
        row_lse, positive = peak + total.log(), self._positives(logits, rows).double()
        if not block.symmetric:
            return row_lse, positive, None
        peak, total = _shifted_exp_sum(logits, 0, scratch)
        return row_lse, positive, total * (peak - self._slab.logit_scale.double()).exp()

    def add_gradients(
        self,
        block: Block,
        number: int,
        rows: slice,
        *,
        factor: Tensor,
        row_lse: Tensor,
        column_lse: Tensor | None,
        grad_rows: Tensor | None,
        grad_columns: Tensor | None,
    ) -> None:
        """Adds factor * the tile's part of the gradients, before logit_scale, to those that are given."""
        height = rows.stop - rows.start
        logits = self._kept(number, rows)
        if logits is None:
            logits = self._logits(block, rows, out=self._scratch)
        grad = torch.sub(logits, row_lse[:, None], out=self._work[:height]).exp_()
        if column_lse is not None:
            grad += torch.sub(logits, column_lse, out=self._scratch[:height]).exp_()
        self._positives(grad, rows).sub_(1 if column_lse is None else 2)
        grad *= factor
        row_features, column_features = self._slab.operands(block, rows)
        if grad_rows is not None:
            grad_rows.addmm_(grad, column_features)
        if grad_columns is not None:
            grad_columns.addmm_(grad.t(), row_features)

    @functools.cached_property
    def _work(self) -> Tensor:
        slab = self._slab
        return slab.image_features.new_empty(min(slab.plan.tile_rows, slab.rows), slab.columns)

    @functools.cached_property
    def _scratch(self) -> Tensor:
        slab = self._slab
        return slab.image_features.new_empty(min(slab.plan.tile_rows, slab.rows), slab.columns)

    def _kept(self, number: int, rows: slice) -> Tensor | None:
        """The tile's place among kept logits, None for a tile that does not fit whole."""
        start, stop = number * self._slab.rows + rows.start, number * self._slab.rows + rows.stop
        return self._keep[start:stop] if stop <= self._keep.shape[0] else None

    def _logits(self, block: Block, rows: slice, out: Tensor) -> Tensor:
        """Writes the tile's scaled similarities to the first rows of `out` and returns these."""
        row_features, column_features = self._slab.operands(block, rows)
        logits = out[: row_features.shape[0]]
        torch.mm(row_features * self._slab.logit_scale, column_features.t(), out=logits)
        row_slots, column_slots = self._slab.masking_slots(block, rows)
        if row_slots is not None:
            repeated = row_slots[:, None] == column_slots
            self._positives(repeated, rows).fill_(False)
            logits.masked_fill_(repeated, _MASKED_LOGIT)
        return logits

    def _positives(self, tile: Tensor, rows: slice) -> Tensor:
        """View of a tile's entries at (row, label)."""
        return tile.diagonal(offset=self._slab.first_label(rows))


class _FusedTiles:
    """The same work by kernels that never write logits to memory."""

    def __init__(self, slab: _Slab) -> None:
        self._slab = slab

    def sums(self, block: Block, number: int, rows: slice) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `_TorchTiles.sums`."""
        slab = self._slab
        row_slots, column_slots = slab.masking_slots(block, rows)
        return slab.kernels.tile_sums(
            *slab.operands(block, rows),
            slab.logit_scale,
            slab.first_label(rows),
            symmetric=block.symmetric,
            row_slots=row_slots,
            column_slots=column_slots,
        )

    def add_gradients(
        self,
        block: Block,
        number: int,
        rows: slice,
        *,
        factor: Tensor,
        row_lse: Tensor,
        column_lse: Tensor | None,
        grad_rows: Tensor | None,
        grad_columns: Tensor | None,
    ) -> None:
        """As `_TorchTiles.add_gradients`."""
        slab, kernels, label = self._slab, self._slab.kernels, self._slab.first_label(rows)
        row_features, column_features = slab.operands(block, rows)
        row_slots, column_slots = slab.masking_slots(block, rows)
        by_row = kernels.Side(row_features, row_lse, row_slots)
        by_column = kernels.Side(column_features, column_lse, column_slots)
        if grad_rows is not None:
            kernels.add_gradient(grad_rows, by_row, by_column, slab.logit_scale, factor, label)
        if grad_columns is not None:
            kernels.add_gradient(grad_columns, by_column, by_row, slab.logit_scale, factor, -label)


def _tile_work(slab: _Slab, keep: Tensor) -> _TorchTiles | _FusedTiles:
    return _TorchTiles(slab, keep) if slab.kernels is None else _FusedTiles(slab)


def _shifted_exp_sum(logits: Tensor, dim: int, scratch: Tensor) -> tuple[Tensor, Tensor]:
    peak = logits.amax(dim, keepdim=True)
    total = torch.sub(logits, peak, out=scratch).exp_().sum(dim)
    return peak.squeeze(dim).double(), total.double()


def _accumulate(slab: _Slab, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One pass over all tiles, filling `keep`.

    Returns float64: complete log-sum-exp of rows [blocks, b], positives [blocks, b], and this rank's part of the
    column sums of exp(logit - scale) [symmetric blocks, B].
    """
    work = _tile_work(slab, keep)
    row_lse = keep.new_empty(len(slab.plan.blocks), slab.rows, dtype=torch.float64)
    positive = torch.empty_like(row_lse)
    column_sum = keep.new_zeros(slab.plan.num_symmetric, slab.columns, dtype=torch.float64)
    for block, number, rows in slab.tiles():
        row_lse[number, rows], positive[number, rows], tile_column_sum = work.sums(block, number, rows)
        if tile_column_sum is not None:
            column_sum[number] += tile_column_sum
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

        # Not the features' type: losses and statistics of half-precision features are single precision.
        dtype = logit_scale.dtype
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
            grad_image = grad_image.mul_(logit_scale).to(image_features.dtype)
        if needs_text:
            grad_text = reduce_scatter_rows(grad_text.mul_(logit_scale)).to(image_features.dtype)
        return (grad_image if needs_image else None, grad_text, grad_scale, *[None] * (3 + len(targets)))


def _scale_gradient(image_features: Tensor, grad_image: Tensor, logit_scale: Tensor) -> Tensor:
    # A logit is scale * x.y: its gradient contracted with x.y is x . (gradient of x before the factor scale).
    per_row = torch.einsum("vbd,vbd->vb", image_features.to(grad_image.dtype), grad_image)
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
    work, num_text, shape = _tile_work(slab, keep), slab.plan.num_text_views, slab.image_features.shape
    grad_image = row_lse.new_zeros(shape) if rows_needed else None
    grad_text = row_lse.new_zeros(num_text, slab.columns, shape[2]) if text_needed else None
    for block, number, rows in slab.tiles():
        # Looking at a weight on an accelerator would stall its queue of work.
        if weights.device.type == "cpu" and weights[number] == 0:
            continue
        work.add_gradients(
            block,
            number,
            rows,
            # Over b, not over the global batch: averaging over ranks supplies the other factor.
            factor=weights[number] / ((2 if block.symmetric else 1) * slab.rows),
            row_lse=row_lse[number, rows],
            column_lse=column_lse[number] if block.symmetric else None,
            grad_rows=grad_image[block.image, rows] if rows_needed else None,
            grad_columns=grad_text[block.target] if text_needed and block.target < num_text else None,
        )
    return grad_image, grad_text
