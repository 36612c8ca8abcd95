"""Position tables for images of another size."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def resize_positions(positions: Tensor, count: int) -> Tensor:
    """Interpolates a table of patch positions on a square grid to another grid; class positions stay as they are.

    Args:
        positions: float [k + g * g, width], k = 0, 1 or more positions that belong to no patch, then the patches.
        count: Positions wanted, k + h * h with the same k.

    Returns:
        Tensor of the same dtype, [count, width]; the same tensor if nothing changes.

    Raises:
        ValueError: If no k makes both grids square.

    Source: Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words", section 3.2; bicubic with antialiasing as in
    open_clip.
    """
    if len(positions) == count:
        return positions
    prefix = next((k for k in range(9) if _is_square(len(positions) - k) and _is_square(count - k)), None)
    if prefix is None:
        raise ValueError(f"{len(positions)} positions cannot be interpolated to {count}: the grids are not square")
    old, new = math.isqrt(len(positions) - prefix), math.isqrt(count - prefix)
    grid = positions[prefix:].float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", antialias=True, align_corners=False)
    patches = grid.permute(0, 2, 3, 1).reshape(new * new, -1).to(positions.dtype)
    return torch.cat([positions[:prefix], patches])


def _is_square(number: int) -> bool:
    return number > 0 and math.isqrt(number) ** 2 == number
