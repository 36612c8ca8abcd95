"""The work on one tile of a similarity matrix, three ways: with one exponential per logit, with two, or fused.

`ExponentialTiles` turns logits into E = exp(logit - shift) once: row sums, column sums and, through one factor per row
and one per column, the gradient softmax_row + softmax_col = E * (a_i + b_j) all come from it. The shift is common to
the whole matrix, so that a row or column far below it would vanish: `in_range` tells. `ShiftedTiles` lose nothing at
any logit scale: each tile is shifted by its own row maxima for the row sums and by its own column maxima for the column
sums. `FusedTiles` call the Triton kernels.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

# Masked entries take this finite value: -inf would turn a wholly masked column of a tile into NaN.
_MASKED_LOGIT = -1e4
# Logits reach at most _TOP above the shift, and no log-sum-exp may be further than _RANGE from it. Single precision
# spans 87 either way: above, there is room for the sum of e^17 terms and for factors of e^-17; below, for every term
# that counts beside a sum at the limit.
_TOP, _RANGE = 60.0, 70.0


def host_values(values: Tensor) -> list[Any] | None:
    """The numbers in a tensor on the CPU; None on an accelerator, where looking would stall its queue of work."""
    return values.tolist() if values.device.type == "cpu" else None


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


class Slab:
    """This rank's rows of all blocks, [b, B] each, visited one tile at a time."""

    def __init__(
        self,
        plan: Plan,
        image_features: Tensor,
        logit_scale: Tensor,
        slots: Tensor | None,
        targets: tuple[Tensor, ...],
        kernels: ModuleType | None,
    ) -> None:
        self.kernels = kernels
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


class _BufferedTiles:
    """What the torch operations share: logits of a tile in a buffer, which is kept for the backward if it fits."""

    def __init__(self, slab: Slab, keep: Tensor) -> None:
        self._slab = slab
        self._keep = keep

    @functools.cached_property
    def _work(self) -> Tensor:
        return self._new_buffer()

    @functools.cached_property
    def _scratch(self) -> Tensor:
        return self._new_buffer()

    def _new_buffer(self) -> Tensor:
        slab = self._slab
        return slab.image_features.new_empty(min(slab.plan.tile_rows, slab.rows), slab.columns)

    def _kept(self, number: int, rows: slice) -> Tensor | None:
        """The tile's place among those kept, None for a tile that does not fit whole."""
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

    def _add_products(
        self, grad: Tensor, block: Block, rows: slice, grad_rows: Tensor | None, grad_columns: Tensor | None
    ) -> None:
        row_features, column_features = self._slab.operands(block, rows)
        if grad_rows is not None:
            grad_rows.addmm_(grad, column_features)
        if grad_columns is not None:
            grad_columns.addmm_(grad.t(), row_features)


class ShiftedTiles(_BufferedTiles):
    """Logits, shifted anew for every sum: exact at any scale. Kept tiles hold logits."""

    def sums(self, block: Block, number: int, rows: slice) -> tuple[Tensor, Tensor, Tensor | None]:
        """Float64: log-sum-exp of rows, positives, column sums of exp(logit - scale) where the block needs them."""
        kept = self._kept(number, rows)
        logits = self._logits(block, rows, out=self._work if kept is None else kept)
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
        self._add_products(grad, block, rows, grad_rows, grad_columns)


class ExponentialTiles(_BufferedTiles):
    """One exponential per logit and no second buffer in the forward. Kept tiles hold exponentials.

    For the CPU, where `in_range` may look at values.
    """

    def __init__(self, slab: Slab, keep: Tensor) -> None:
        super().__init__(slab, keep)
        (scale,) = host_values(slab.logit_scale.detach().reshape(1))
        # Unit-length features bound logits by the scale.
        self._shift = max(scale - _TOP, 0.0)

    def in_range(self, row_lse: Tensor, column_sum: Tensor) -> bool:
        """Whether the sums of all rows and of all columns over this rank's rows have lost nothing.

        Args:
            row_lse: As `sums` returned them.
            column_sum: Column sums added over tiles.
        """
        column_lse = column_sum.log() + self._slab.logit_scale.double()
        distances = torch.cat([row_lse.flatten(), column_lse.flatten()]).sub_(self._shift).abs_()
        # NaN compares false.
        return bool(host_values((distances <= _RANGE).all()))

    def sums(self, block: Block, number: int, rows: slice) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `ShiftedTiles.sums`."""
        kept = self._kept(number, rows)
        logits = self._logits(block, rows, out=self._work if kept is None else kept)
        positive = self._positives(logits, rows).to(torch.float64, copy=True)
        exponentials = self._exponentiate(logits)
        row_lse = exponentials.sum(1).double().log_().add_(self._shift)
        if not block.symmetric:
            return row_lse, positive, None
        return row_lse, positive, exponentials.sum(0).double() * (self._shift - self._slab.logit_scale.double()).exp()

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
        """As `ShiftedTiles.add_gradients`."""
        exponentials = self._kept(number, rows)
        if exponentials is None:
            exponentials = self._exponentiate(self._logits(block, rows, out=self._scratch))
        by_row = (self._shift - row_lse).exp_() * factor
        grad = torch.mul(exponentials, by_row[:, None], out=self._work[: rows.stop - rows.start])
        if column_lse is not None:
            grad.addcmul_(exponentials, (self._shift - column_lse).exp_() * factor)
        self._positives(grad, rows).sub_(factor if column_lse is None else 2 * factor)
        self._add_products(grad, block, rows, grad_rows, grad_columns)

    def _exponentiate(self, logits: Tensor) -> Tensor:
        return (logits.sub_(self._shift) if self._shift else logits).exp_()


class FusedTiles:
    """The same work by kernels that never write logits to memory."""

    def __init__(self, slab: Slab, _keep: Tensor) -> None:
        self._slab = slab

    def sums(self, block: Block, number: int, rows: slice) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `ShiftedTiles.sums`."""
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
        """As `ShiftedTiles.add_gradients`."""
        slab, kernels, label = self._slab, self._slab.kernels, self._slab.first_label(rows)
        row_features, column_features = slab.operands(block, rows)
        row_slots, column_slots = slab.masking_slots(block, rows)
        by_row = kernels.Side(row_features, row_lse, row_slots)
        by_column = kernels.Side(column_features, column_lse, column_slots)
        if grad_rows is not None:
            kernels.add_gradient(grad_rows, by_row, by_column, slab.logit_scale, factor, label)
        if grad_columns is not None:
            kernels.add_gradient(grad_columns, by_column, by_row, slab.logit_scale, factor, -label)


def _shifted_exp_sum(logits: Tensor, dim: int, scratch: Tensor) -> tuple[Tensor, Tensor]:
    peak = logits.amax(dim, keepdim=True)
    total = torch.sub(logits, peak, out=scratch).exp_().sum(dim)
    return peak.squeeze(dim).double(), total.double()


Tiles = ExponentialTiles | ShiftedTiles | FusedTiles
