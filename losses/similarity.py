"""Symmetric InfoNCE on blocks of one global similarity matrix, without ever holding that matrix.

Numerics: no sum can underflow at any logit scale, see `losses.tiles`. Column sums of tiles and ranks meet in float64 as
exp(lse - scale), whose exponent is at least -2 * scale for unit-length features: representable up to a scale of 350.

Who does the work on a tile is chosen by the environment variable DECLIP_SIMILARITY: "torch" (the default and the
reference, any device), "triton" (fused kernels that keep logits on chip, and so neither need the slab budget nor use
it) and "auto": triton on NVIDIA GPUs where it is installed and takes the features' type, torch elsewhere. The kernels
become the default on CUDA once somebody has measured them faster there.
"""

import functools
import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from losses.distributed import all_reduce_sum_, reduce_scatter_rows
from losses.functional import exact_products
from losses.tiles import ExponentialTiles, FusedTiles, Plan, ShiftedTiles, Slab, Tiles, host_values


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


def _accumulate(slab: Slab, keep: Tensor) -> tuple[type[Tiles], Tensor, Tensor, Tensor]:
    """One pass over all tiles, filling `keep`.

    Returns what the tiles were, and in float64: complete log-sum-exp of rows [blocks, b], positives [blocks, b], and
    this rank's part of the column sums of exp(logit - scale) [symmetric blocks, B].
    """
    if slab.kernels is not None:
        return FusedTiles, *_tile_sums(slab, FusedTiles(slab, keep))
    if host_values(slab.logit_scale) is not None:
        tiles = ExponentialTiles(slab, keep)
        sums = row_lse, _, column_sum = _tile_sums(slab, tiles)
        if tiles.in_range(row_lse, column_sum):
            return ExponentialTiles, *sums
    return ShiftedTiles, *_tile_sums(slab, ShiftedTiles(slab, keep))


def _tile_sums(slab: Slab, tiles: Tiles) -> tuple[Tensor, Tensor, Tensor]:
    row_lse = slab.logit_scale.new_empty(len(slab.plan.blocks), slab.rows, dtype=torch.float64)
    positive = torch.empty_like(row_lse)
    column_sum = row_lse.new_zeros(slab.plan.num_symmetric, slab.columns)
    for block, number, rows in slab.tiles():
        row_lse[number, rows], positive[number, rows], tile_column_sum = tiles.sums(block, number, rows)
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
        slab = Slab(plan, image_features, logit_scale, slots, targets, _fused_kernels(image_features))
        keep = slab.keep_buffer() if any(ctx.needs_input_grad) else image_features.new_empty(0, slab.columns)
        with exact_products(image_features.device):
            ctx.tiles, row_lse, positive, column_sum = _accumulate(slab, keep)
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
        slab = Slab(ctx.plan, image_features, logit_scale, slots, tuple(targets), _fused_kernels(image_features))
        needs_image, needs_text, needs_scale = ctx.needs_input_grad[:3]
        with exact_products(image_features.device):
            grad_image, grad_text = _gradients(
                slab,
                ctx.tiles(slab, keep),
                weights,
                row_lse,
                column_lse,
                rows_needed=needs_image or needs_scale,
                text_needed=needs_text,
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
    slab: Slab,
    tiles: Tiles,
    weights: Tensor,
    row_lse: Tensor,
    column_lse: Tensor,
    *,
    rows_needed: bool,
    text_needed: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients, before the factor logit_scale, of this rank's image rows and of all text rows (its part)."""
    num_text, shape = slab.plan.num_text_views, slab.image_features.shape
    known_weights = host_values(weights)
    grad_image = row_lse.new_zeros(shape) if rows_needed else None
    grad_text = row_lse.new_zeros(num_text, slab.columns, shape[2]) if text_needed else None
    for block, number, rows in slab.tiles():
        if known_weights is not None and known_weights[number] == 0:
            continue
        tiles.add_gradients(
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
