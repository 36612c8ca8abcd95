"""Triton kernels for tiles of the similarity matrix: logits live on chip only, forward and backward.

Checked so far: values and gradients in Triton's interpreter only, against float64 and the torch path, and that the
kernels compile for compute capability 8.0 within 99 KiB of shared memory. Nothing is known about their speed.

Determinism: no atomics. Every program of the forward kernel writes the maxima and sums of its own tile to a place of
its own, and torch reduces these partial results in a fixed order; in the gradient kernel every output element belongs
to one program, which walks the other side in order. Block sizes and splits follow from the shapes alone (no
autotuning), so equal inputs give equal bits, in a resumed run too.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Finite, so that a wholly masked column stays NaN-free; exp() of it is 0 at every logit scale.
_MASKED_LOGIT = tl.constexpr(-1e4)
_SUMS_BLOCK = 64
_GRADIENT_BLOCK = 32
# The gradient kernel holds [_GRADIENT_BLOCK, width] sums on chip; wider features recompute the logits per chunk.
_MAX_WIDTH_BLOCK = 512
# Programs wanted at least, lest a short slab leave most of a GPU idle: below it the other side is split up.
_MIN_PROGRAMS = 256


class Side(NamedTuple):
    """The rows or the columns of a tile.

    Attributes:
        features: [n, d] float32 or bfloat16, contiguous, unit length.
        lse: float32 [n], log-sum-exp over everything each element is classified against; None if it is not.
        slots: int64 [n], entries whose two sides have equal slots are masked, except positives; None masks nothing.
    """

    features: Tensor
    lse: Tensor | None
    slots: Tensor | None


def unsupported(features: Tensor) -> str | None:
    """Why the kernels cannot work on these features, None when they can.

    Args:
        features: Any of the tensors they would be given; all are alike in type and device.
    """
    if features.dtype not in (torch.float32, torch.bfloat16):
        return f"features are {features.dtype}, expected torch.float32 or torch.bfloat16"
    if triton.knobs.runtime.interpret:
        return None
    if not features.is_cuda or torch.version.hip is not None:
        return f"features are on {features.device.type}, expected an NVIDIA GPU or TRITON_INTERPRET=1"
    major, minor = torch.cuda.get_device_capability(features.device)
    return None if major >= 8 else f"the GPU has compute capability {major}.{minor}, expected at least 8.0"


def tile_sums(
    rows: Tensor,
    columns: Tensor,
    logit_scale: Tensor,
    label_offset: int,
    *,
    symmetric: bool,
    row_slots: Tensor | None = None,
    column_slots: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Softmax statistics of logits = logit_scale * rows @ columns.T, which are never in global memory.

    Args:
        rows: [t, d] float32 or bfloat16, contiguous, unit length.
        columns: [B, d], likewise.
        logit_scale: One float32 element on the same device.
        label_offset: The positive of row i is column label_offset + i, which exists for every row.
        symmetric: Whether column sums are wanted.
        row_slots: int64 [t]; entries with equal slots are masked, except positives. None masks nothing.
        column_slots: int64 [B], given together with `row_slots`.

    Returns:
        In float64: log-sum-exp of the rows [t], the positives' logits [t], and sums over the rows of
        exp(logit - logit_scale) [B] or None.
    """
    (num_rows, dim), num_columns = rows.shape, columns.shape[0]
    row_blocks, column_blocks = triton.cdiv(num_rows, _SUMS_BLOCK), triton.cdiv(num_columns, _SUMS_BLOCK)
    row_parts = logit_scale.new_empty(2, column_blocks, num_rows)
    column_parts = logit_scale.new_empty(2, row_blocks, num_columns) if symmetric else None
    positive = logit_scale.new_empty(num_rows)
    with torch.cuda.device_of(rows):
        _sums_kernel[(column_blocks, row_blocks)](
            rows,
            columns,
            row_slots,
            column_slots,
            logit_scale,
            row_parts,
            column_parts,
            positive,
            num_rows,
            num_columns,
            dim,
            label_offset,
            BLOCK=_SUMS_BLOCK,
            BLOCK_INNER=32,
            PRECISION=_dot_precision(rows),
            num_warps=4,
            num_stages=2,
            enable_fp_fusion=True,
        )
    peak, total = row_parts.double()
    row_lse = torch.logsumexp(peak + total.log(), 0)
    if column_parts is None:
        return row_lse, positive.double(), None
    peak, total = column_parts.double()
    return row_lse, positive.double(), (total * (peak - logit_scale.double()).exp()).sum(0)


def add_gradient(out: Tensor, own: Side, others: Side, logit_scale: Tensor, factor: Tensor, label_offset: int) -> None:
    """Adds factor * G @ others.features to `out`, G being the gradient of the softmax losses in a tile's logits.

    G sums softmax - label over the directions whose log-sum-exp is given. Rows and columns may change places: the
    gradient of the columns is the same call with `own` and `others` swapped and the label offset negated.

    Args:
        out: [n, d] float32, contiguous.
        own: What `out` is the gradient of, before the factor logit_scale.
        others: The other side; with bfloat16 features, G is rounded to TF32 for its product.
        logit_scale: One float32 element on the same device.
        factor: One float32 element on the same device.
        label_offset: Entry (i, label_offset + i) is a positive, where there is such a column.
    """
    (num_own, dim), num_others = own.features.shape, others.features.shape[0]
    width_block = min(max(triton.next_power_of_2(dim), 16), _MAX_WIDTH_BLOCK)
    own_blocks, width_blocks = triton.cdiv(num_own, _GRADIENT_BLOCK), triton.cdiv(dim, width_block)
    others_blocks = triton.cdiv(num_others, _GRADIENT_BLOCK)
    blocks_per_split = triton.cdiv(others_blocks, triton.cdiv(_MIN_PROGRAMS, own_blocks * width_blocks))
    splits = triton.cdiv(others_blocks, blocks_per_split)
    parts = out[None] if splits == 1 else out.new_zeros(splits, num_own, dim)
    with torch.cuda.device_of(out):
        _gradient_kernel[(own_blocks, width_blocks, splits)](
            own.features,
            others.features,
            own.slots,
            others.slots,
            own.lse,
            others.lse,
            logit_scale,
            factor,
            parts,
            num_own,
            num_others,
            dim,
            label_offset,
            blocks_per_split * _GRADIENT_BLOCK,
            BLOCK=_GRADIENT_BLOCK,
            BLOCK_INNER=32,
            BLOCK_WIDTH=width_block,
            PRECISION=_dot_precision(own.features),
            num_warps=8,
            num_stages=1,
            enable_fp_fusion=True,
        )
    if splits > 1:
        out += parts.sum(0)


def _dot_precision(features: Tensor) -> str:
    """Precision of products of float32 tiles: that of torch's own, which is exact unless the user asked for TF32.

    Widened bfloat16 features lose nothing in TF32, and tensor cores can multiply them.
    """
    rounded = features.dtype == torch.bfloat16 or torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if rounded else "ieee"


@triton.jit
def _load_block(features, rows, num_rows, inner, dim):
    """Features in float32, 0 outside the matrix."""
    # 64-bit: a gathered batch of wide features can pass 2^31 elements.
    offsets = rows.to(tl.int64)[:, None] * dim + inner[None, :]
    inside = (rows < num_rows)[:, None] & (inner < dim)[None, :]
    return tl.load(features + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _tile_logits(
    own_features,
    others_features,
    own_slots,
    others_slots,
    logit_scale,
    own,
    others,
    num_own,
    num_others,
    dim,
    label_offset,
    BLOCK: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Logits of one tile, and which of them are positives; entries outside the matrix are finite."""
    logits = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, dim, BLOCK_INNER):
        inner = start + tl.arange(0, BLOCK_INNER)
        left = _load_block(own_features, own, num_own, inner, dim)
        right = _load_block(others_features, others, num_others, inner, dim)
        logits = tl.dot(left, tl.trans(right), logits, input_precision=PRECISION)
    logits *= tl.load(logit_scale)
    positive = (own + label_offset)[:, None] == others[None, :]
    if own_slots is not None:
        left = tl.load(own_slots + own, mask=own < num_own, other=0)
        right = tl.load(others_slots + others, mask=others < num_others, other=0)
        repeated = (left[:, None] == right[None, :]) & (positive == 0)
        logits = tl.where(repeated, _MASKED_LOGIT, logits)
    return logits, positive


@triton.jit
def _sums_kernel(
    row_features,
    column_features,
    row_slots,
    column_slots,
    logit_scale,
    row_parts,
    column_parts,
    positives,
    num_rows,
    num_columns,
    dim,
    label_offset,
    BLOCK: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile: maxima and shifted exponential sums of its rows and columns, and its positives."""
    column_block, row_block = tl.program_id(0), tl.program_id(1)
    rows, columns = row_block * BLOCK + tl.arange(0, BLOCK), column_block * BLOCK + tl.arange(0, BLOCK)
    logits, positive = _tile_logits(
        row_features,
        column_features,
        row_slots,
        column_slots,
        logit_scale,
        rows,
        columns,
        num_rows,
        num_columns,
        dim,
        label_offset,
        BLOCK,
        BLOCK_INNER,
        PRECISION,
    )
    inside = tl.where((columns < num_columns)[None, :], logits, float("-inf"))
    peak = tl.max(inside, 1)
    place = row_parts + column_block.to(tl.int64) * num_rows + rows
    tl.store(place, peak, mask=rows < num_rows)
    second = tl.num_programs(0).to(tl.int64) * num_rows
    tl.store(place + second, tl.sum(tl.exp(inside - peak[:, None]), 1), mask=rows < num_rows)

    if column_parts is not None:
        inside = tl.where((rows < num_rows)[:, None], logits, float("-inf"))
        peak = tl.max(inside, 0)
        place = column_parts + row_block.to(tl.int64) * num_columns + columns
        tl.store(place, peak, mask=columns < num_columns)
        second = tl.num_programs(1).to(tl.int64) * num_columns
        tl.store(place + second, tl.sum(tl.exp(inside - peak[None, :]), 0), mask=columns < num_columns)

    # A row's label lies in exactly one tile, so that each positive is written once.
    here = (rows < num_rows) & ((rows + label_offset) // BLOCK == column_block)
    tl.store(positives + rows, tl.sum(tl.where(positive, logits, 0.0), 1), mask=here)


@triton.jit
def _gradient_kernel(
    own_features,
    others_features,
    own_slots,
    others_slots,
    own_lse,
    others_lse,
    logit_scale,
    factor,
    parts,
    num_own,
    num_others,
    dim,
    label_offset,
    split_size,
    BLOCK: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of one block of own rows, one chunk of their width, from one range of the other side."""
    own = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    width = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    first = tl.program_id(2) * split_size
    gradient = tl.zeros((BLOCK, BLOCK_WIDTH), tl.float32)
    for start in range(first, tl.minimum(first + split_size, num_others), BLOCK):
        others = start + tl.arange(0, BLOCK)
        logits, positive = _tile_logits(
            own_features,
            others_features,
            own_slots,
            others_slots,
            logit_scale,
            own,
            others,
            num_own,
            num_others,
            dim,
            label_offset,
            BLOCK,
            BLOCK_INNER,
            PRECISION,
        )
        weights = tl.zeros((BLOCK, BLOCK), tl.float32)
        if own_lse is not None:
            lse = tl.load(own_lse + own, mask=own < num_own, other=0.0)
            weights += tl.exp(logits - lse[:, None]) - tl.where(positive, 1.0, 0.0)
        if others_lse is not None:
            lse = tl.load(others_lse + others, mask=others < num_others, other=0.0)
            weights += tl.exp(logits - lse[None, :]) - tl.where(positive, 1.0, 0.0)
        # Outside the matrix the exponentials may be infinite, and infinity times a feature of 0 is NaN.
        weights = tl.where((others < num_others)[None, :], weights, 0.0)
        values = _load_block(others_features, others, num_others, width, dim)
        gradient = tl.dot(weights, values, gradient, input_precision=PRECISION)
    offsets = tl.program_id(2).to(tl.int64) * num_own * dim + own.to(tl.int64)[:, None] * dim + width[None, :]
    inside = (own < num_own)[:, None] & (width < dim)[None, :]
    before = tl.load(parts + offsets, mask=inside, other=0.0)
    tl.store(parts + offsets, before + gradient * tl.load(factor), mask=inside)
