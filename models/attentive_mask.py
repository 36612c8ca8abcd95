"""Which patches of an image its encoder looks at, and which to keep because of that.

Source: Yang et al. 2023, "Attentive Mask CLIP" (A-CLIP). The attention of the class token is averaged over all heads
and layers of an encoder that sees a whole crop, carried over to random views inside that crop, averaged over square
blocks of patches, and the blocks with the most of it stay. Nothing here is random, so a mask depends on the weights and
the sample alone.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.sequences import UniformSequences


class ClassAttention(NamedTuple):
    """`UniformSequences` whose first tokens' attention is also summed up, block of the transformer by block.

    Only that one row of scores is computed in the open, a 1/length of all; the attention itself stays fused.

    Args:
        count: Number of sequences n.
        length: Tokens of each.
        total: float32 [n, length], to which every block's attention, the mean over its heads, is added.
    """

    count: int
    length: int
    total: Tensor

    def attend(self, query: Tensor, key: Tensor, value: Tensor, rows: Tensor | None) -> Tensor:
        # With `rows` the last block asks for the first token of each sequence and no other.
        first = query if rows is not None else query.unflatten(0, (self.count, self.length))[:, 0]
        by_sequence = key.unflatten(0, (self.count, self.length))
        logits = torch.einsum("nhd,nlhd->nhl", first, by_sequence).float() * query.shape[-1] ** -0.5
        self.total.add_(logits.softmax(-1).mean(1))
        return UniformSequences(self.count, self.length).attend(query, key, value, rows)


def carry_over(scores: Tensor, crop_boxes: Tensor, points: int) -> Tensor:
    """Reads a map over one crop at the places of a regular grid in views of the same picture, bilinearly.

    Beyond the centres of the outermost cells the map goes on as it is there.

    Args:
        scores: float [n, G, G], one value per cell of the first crop.
        crop_boxes: [1 + V, n, 4], (left, top, right, bottom) of that crop and of V views, in pixels of the picture.
        points: P, the views are read at the centres of P x P cells.

    Returns:
        [V, n, P, P] in the dtype of `scores`.

    Source: Yang et al. 2023. Deviation: their code resizes the map to the crop's pixels and back again, which blurs it
    even where view and crop are the same.
    """
    around, views = crop_boxes[0], crop_boxes[1:]
    # Differences first, while they are whole numbers.
    offsets, sizes = (views[..., :2] - around[:, :2]).to(scores.dtype), (views[..., 2:] - views[..., :2])
    centres = (torch.arange(points, device=scores.device, dtype=scores.dtype) + 0.5) / points
    places = offsets[..., None] + sizes[..., None] * centres
    # [V, n, 2, P], from -1 to 1 over the crop.
    places = 2 * places / (around[:, 2:] - around[:, :2])[..., None] - 1
    x, y = places.unbind(2)
    num_views, count = x.shape[:2]
    grid = torch.stack([x[:, :, None, :].expand(-1, -1, points, -1), y[..., None].expand(-1, -1, -1, points)], dim=-1)
    maps = scores[:, None].expand(num_views, -1, -1, -1, -1).reshape(num_views * count, 1, *scores.shape[1:])
    read = F.grid_sample(maps, grid.flatten(0, 1), mode="bilinear", padding_mode="border", align_corners=False)
    return read.view(num_views, count, points, points)


def most_attended(scores: Tensor, num_kept: int) -> Tensor:
    """The blocks with the highest scores; of equal ones those that come first.

    Args:
        scores: [..., M, M], a score per block.
        num_kept: k, in [1, M * M].

    Returns:
        int64 [..., k], distinct, ascending; equal for equal scores on every device.
    """
    # A stable sort, because topk breaks ties as it likes.
    order = scores.flatten(-2).sort(dim=-1, descending=True, stable=True).indices
    return order[..., :num_kept].sort(dim=-1).values


def patches_of_blocks(blocks: Tensor, grid: int, side: int) -> Tensor:
    """All patches of some blocks.

    Args:
        blocks: int64 [..., k], row-major indices of blocks of `side` x `side` patches.
        grid: Patches along a side of the image, a multiple of `side`.
        side: Patches along a side of a block.

    Returns:
        int64 [..., k * side * side], row-major indices of patches, block by block.
    """
    row, column = blocks // (grid // side), blocks % (grid // side)
    first = (row * grid + column) * side
    within = torch.arange(side, device=blocks.device)
    return (first[..., None] + (within[:, None] * grid + within).flatten()).flatten(-2)
