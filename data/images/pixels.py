"""Pixel operations of the image views where Pillow's cost the most; `benchmarks.views` measures both.

Results do not depend on the processor: the resize is integer arithmetic, and the others are element-wise fp32.
"""

import math
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

__all__ = ["gaussian_blur", "resize_crop", "turn_hue"]

# Of the Gaussian's mass 0.3 % lies beyond.
_BLUR_SIGMAS = 3.0
# A pixel that rows and columns together change by less is rounded to what it was.
_PASSES, _UNSEEN = 2, 0.49


def resize_crop(pixels: np.ndarray, box: tuple[int, int, int, int], size: int, interpolation: str) -> np.ndarray:
    """Cuts out a box and resizes it with an antialiasing filter, in step with Pillow's `resize`.

    Args:
        pixels: uint8 [H, W, 3] or [H, W], a picture.
        box: (left, top, right, bottom) in whole pixels, not empty.
        size: Side of the square output.
        interpolation: "bilinear" or "bicubic".

    Returns:
        uint8 [size, size, 3] or [size, size].
    """
    left, top, right, bottom = box
    # A copy, because torch does not take read-only memory. Interleaved channels are what its 8-bit kernel is made for.
    crop = pixels[top:bottom, left:right].copy()
    planes = crop[None, None] if crop.ndim == 2 else crop.transpose(2, 0, 1)[None]
    resized = F.interpolate(torch.from_numpy(planes), (size, size), mode=interpolation, antialias=True).numpy()[0]
    return resized[0] if crop.ndim == 2 else resized.transpose(1, 2, 0)


def turn_hue(pixels: np.ndarray, turn: float) -> np.ndarray:
    """Turns the hue and keeps value and saturation, rounding once.

    Args:
        pixels: uint8 [H, W, 3].
        turn: Share of the colour circle, -0.5 to 0.5.

    Returns:
        uint8 [H, W, 3].
    """
    red, green, blue = planes = np.ascontiguousarray(pixels.transpose(2, 0, 1)).astype(np.float32)
    value = planes.max(axis=0)
    chroma = value - planes.min(axis=0)
    scale = 1 / np.maximum(chroma, 1)
    in_green = np.where(value == green, 2 + (blue - red) * scale, 4 + (red - green) * scale)
    hue = np.where(value == red, (green - blue) * scale, in_green) + np.float32(6 * turn)
    turned = np.empty_like(pixels)
    # Each channel is the value less what the distance of the hue from the channel's own sector takes of the chroma.
    for channel, sector in enumerate((5, 3, 1)):
        place = hue + np.float32(sector)
        place -= 6 * np.floor(place * np.float32(1 / 6))
        taken = np.clip(np.minimum(place, 4 - place), 0, 1) * chroma
        turned[..., channel] = np.rint(value - taken)
    return turned


def gaussian_blur(pixels: np.ndarray, sigma: float) -> np.ndarray:
    """Blurs with a Gaussian, beyond the edges of which the outermost pixels go on.

    Args:
        pixels: uint8 [H, W, 3] or [H, W].
        sigma: Standard deviation in pixels, above 0.

    Returns:
        uint8, of the same shape.
    """
    radius = math.ceil(_BLUR_SIGMAS * sigma)
    weights = np.exp(-0.5 * (np.arange(radius + 1) / sigma) ** 2)
    weights = (weights / (2 * weights.sum() - weights[0])).astype(np.float32)
    if (1 - weights[0]) * _PASSES * 255 < _UNSEEN:
        return pixels
    height, width = pixels.shape[:2]
    rows = _convolve(pixels.astype(np.float32)[_beyond_edges(height, radius)], weights, height)
    columns = _convolve(rows.swapaxes(0, 1)[_beyond_edges(width, radius)], weights, width)
    return np.rint(columns).swapaxes(0, 1).astype(np.uint8)


@lru_cache(maxsize=64)
def _beyond_edges(length: int, radius: int) -> np.ndarray:
    """Places along an axis, the outermost ones repeated."""
    return np.clip(np.arange(-radius, length + radius), 0, length - 1)


def _convolve(padded: np.ndarray, weights: np.ndarray, length: int) -> np.ndarray:
    """Sums shifted copies along axis 0: for a few taps cheaper than any general convolution."""
    radius = len(weights) - 1
    total = weights[0] * padded[radius : radius + length]
    for offset in range(1, radius + 1):
        before, after = radius - offset, radius + offset
        total += weights[offset] * (padded[before : before + length] + padded[after : after + length])
    return total
