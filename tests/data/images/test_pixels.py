"""Resize, hue and blur of the views beside independent implementations."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torchvision.transforms import v2

from data.images.pixels import gaussian_blur, resize_crop, turn_hue


def noise(width: int, height: int, seed: int = 0) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 4 + 2, width // 4 + 2, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("box", [(0, 0, 200, 150), (7, 3, 190, 149), (50, 60, 70, 75), (9, 9, 10, 150)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_resize_is_that_of_pillow(box, interpolation):
    image = Image.fromarray(noise(200, 150))
    filter_ = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[interpolation]
    expected = np.asarray(image.crop(box).resize((32, 32), filter_), dtype=int)
    found = resize_crop(np.asarray(image), box, 32, interpolation)
    assert found.dtype == np.uint8
    assert np.abs(found - expected).max() <= 3
    assert np.abs(found - expected).mean() < 0.2


@pytest.mark.parametrize("turn", [-0.5, -0.1, 0.0, 0.03, 0.5])
def test_hue_turns_as_on_float_hsv(turn):
    pixels = np.concatenate([noise(40, 40), np.full((2, 40, 3), 77, dtype=np.uint8), np.zeros((2, 40, 3), np.uint8)])
    expected = v2.functional.adjust_hue(torch.from_numpy(pixels).permute(2, 0, 1), turn).permute(1, 2, 0).numpy()
    found = turn_hue(pixels, turn)
    # torchvision truncates where we round.
    assert np.abs(found.astype(int) - expected).max() <= 1
    assert np.array_equal(found.max(axis=-1), pixels.max(axis=-1))
    assert turn or np.array_equal(found, pixels)


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0, 30.0])
def test_blur_is_a_gaussian_average(sigma):
    pixels = noise(24, 18)
    rows, columns = (np.arange(-200, 200 + side) for side in pixels.shape[:2])
    expected = pixels.astype(float)
    for axis, places in enumerate((rows, columns)):
        side = pixels.shape[axis]
        weights = np.exp(-0.5 * ((np.arange(side)[:, None] - places) / sigma) ** 2)
        weights /= weights.sum(axis=1, keepdims=True)
        expected = np.moveaxis(
            np.tensordot(weights, expected.take(places.clip(0, side - 1), axis=axis), (1, axis)), 0, axis
        )
    found = gaussian_blur(pixels, sigma)
    assert found.dtype == np.uint8
    # The tails beyond three standard deviations are left out.
    assert np.abs(found - expected).max() <= 1.5


def test_a_blur_that_is_left_out_would_change_nothing(monkeypatch):
    checkers = np.indices((16, 16)).sum(axis=0).astype(np.uint8) % 2 * 255
    sigmas = np.linspace(0.1, 0.4, 61)
    found = [gaussian_blur(checkers, sigma) for sigma in sigmas]
    monkeypatch.setattr("data.images.pixels._UNSEEN", 0.0)
    for sigma, blurred in zip(sigmas, found, strict=True):
        assert np.array_equal(blurred, gaussian_blur(checkers, sigma))
    assert sum(blurred is checkers for blurred in found) > 20


def test_blur_is_near_that_of_pillow():
    pixels = noise(64, 64)
    for sigma in (0.5, 1.0, 2.0):
        theirs = np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(sigma)), dtype=int)
        assert np.abs(gaussian_blur(pixels, sigma) - theirs).mean() < 1
