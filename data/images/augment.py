"""Random image views. Every random number comes from the generator that the caller keyed by sample and view."""

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from numbers import Real
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from data.errors import DataError
from data.images.decode import EncodedImage, shrink_factor
from data.images.pixels import gaussian_blur, resize_crop, turn_hue

__all__ = [
    "AUGMENTATIONS",
    "DECODE_MARGIN",
    "Box",
    "Cutter",
    "ImageAugmentation",
    "align",
    "eval_view",
    "planes",
    "random_views",
]

Box = tuple[int, int, int, int]

INTERPOLATIONS = ("bilinear", "bicubic")
# JPEG may be decoded smaller as long as every crop keeps this many times the output resolution; the proper filter does
# the rest.
DECODE_MARGIN = 1.5
_CROP_ATTEMPTS = 10


@dataclass(frozen=True)
class ImageAugmentation:
    """Parameters of one image view; the defaults take the centre square as it is.

    Order: random resized crop, rotation and shift, colour jitter (its four changes in random order), grayscale, blur,
    solarisation, flip. Colour factors and hue follow torchvision's ColorJitter.

    Args:
        crop_scale: Range of the crop's area as a share of the image, within (0, 1].
        crop_ratio: Range of the crop's width / height, drawn log-uniformly.
        interpolation: Filter of the resize.
        rotation: Largest rotation to either side, in degrees; corners are filled with the view's top-left colour.
        shift: Largest shift along each axis, as a share of the output size.
        brightness: Brightness factor is drawn from [1 - x, 1 + x]; likewise contrast and saturation.
        contrast: See brightness.
        saturation: See brightness.
        hue: Hue is turned by up to this share of the colour circle, 0 to 0.5.
        jitter_probability: Chance that the four colour changes are applied at all.
        grayscale_probability: Chance of dropping the colour.
        blur_probability: Chance of a Gaussian blur.
        blur_sigma: Range of its standard deviation in output pixels.
        solarize_probability: Chance that values from 128 on are inverted.
        flip_probability: Chance of a horizontal flip.

    Raises:
        DataError: A value out of its range.
    """

    crop_scale: tuple[float, float] = (1.0, 1.0)
    crop_ratio: tuple[float, float] = (1.0, 1.0)
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    rotation: float = 0.0
    shift: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    jitter_probability: float = 0.0
    grayscale_probability: float = 0.0
    blur_probability: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize_probability: float = 0.0
    flip_probability: float = 0.0

    def __post_init__(self) -> None:
        _check_range("crop_scale", self.crop_scale, 1.0)
        _check_range("crop_ratio", self.crop_ratio, math.inf)
        _check_range("blur_sigma", self.blur_sigma, math.inf)
        limits = {"rotation": 180.0, "hue": 0.5, "brightness": math.inf, "contrast": math.inf, "saturation": math.inf}
        changes = ("jitter", "grayscale", "blur", "solarize", "flip")
        shares = ("shift", *(f"{change}_probability" for change in changes))
        for name, limit in (limits | dict.fromkeys(shares, 1.0)).items():
            value = getattr(self, name)
            if not isinstance(value, Real) or not 0 <= value <= limit:
                raise DataError(f"image augmentation: {name} is {value}, expected a number from 0 to {limit:g}")
        if self.interpolation not in INTERPOLATIONS:
            expected = ", ".join(INTERPOLATIONS)
            raise DataError(f"image augmentation: interpolation is {self.interpolation!r}, expected one of {expected}")

    @property
    def distorts(self) -> bool:
        """Whether `distort` ever does anything."""
        probabilities = (
            self.jitter_probability,
            self.grayscale_probability,
            self.blur_probability,
            self.solarize_probability,
            self.flip_probability,
        )
        return any((self.rotation, self.shift, *probabilities))

    @property
    def moves_pixels(self) -> bool:
        """Whether `distort` may take a pixel to where the crop box does not say it is."""
        return any((self.rotation, self.shift, self.flip_probability))

    @cached_property
    def _log_ratio(self) -> tuple[float, float]:
        return tuple(np.log(self.crop_ratio).tolist())

    def crop_box(self, size: tuple[int, int], rng: np.random.Generator) -> Box:
        """Draws the crop (left, top, right, bottom) in a picture of size (width, height)."""
        width, height = size
        low, high = self._log_ratio
        for _ in range(_CROP_ATTEMPTS):
            area = width * height * _uniform(rng, *self.crop_scale)
            ratio = math.exp(_uniform(rng, low, high))
            crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < crop_width <= width and 0 < crop_height <= height:
                left = int(rng.integers(width - crop_width + 1))
                top = int(rng.integers(height - crop_height + 1))
                return left, top, left + crop_width, top + crop_height
        return _centre_box(size, self.crop_ratio)

    def distort(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """Applies everything after the crop to a picture of the output size, RGB or gray (L)."""
        image = self._move(image, rng)
        if self.jitter_probability and rng.random() < self.jitter_probability:
            image = self._jitter(image, rng)
        if self.grayscale_probability and rng.random() < self.grayscale_probability:
            image = image.convert("L").convert(image.mode)
        if self.blur_probability and rng.random() < self.blur_probability:
            image = _image(gaussian_blur(_pixels(image), _uniform(rng, *self.blur_sigma)))
        if self.solarize_probability and rng.random() < self.solarize_probability:
            image = ImageOps.solarize(image)
        if self.flip_probability and rng.random() < self.flip_probability:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return image

    def _move(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        if not self.rotation and not self.shift:
            return image
        angle = _uniform(rng, -self.rotation, self.rotation)
        width, height = image.size
        offset = (_uniform(rng, -self.shift, self.shift) * width, _uniform(rng, -self.shift, self.shift) * height)
        matrix, background = _turn(image.size, angle, offset), image.getpixel((0, 0))
        return image.transform(
            image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=background
        )

    def _jitter(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        amounts = (
            _factor(self.brightness, rng),
            _factor(self.contrast, rng),
            _factor(self.saturation, rng),
            _uniform(rng, -self.hue, self.hue),
        )
        for index in rng.permutation(len(amounts)).tolist():
            if amounts[index] != _NEUTRAL[index]:
                image = _CHANGES[index](image, amounts[index])
        return image


def random_views(
    encoded: EncodedImage,
    augmentations: tuple[ImageAugmentation, ...],
    generators: list[np.random.Generator],
    image_size: int,
) -> np.ndarray:
    """Decodes a picture once and draws all its views.

    Args:
        encoded: The checked picture.
        augmentations: One per view.
        generators: One keyed generator per view.
        image_size: Side of the square output in pixels.

    Returns:
        uint8 [V, 3, image_size, image_size].

    Raises:
        BadSample: Truncated or damaged picture.
    """
    pairs = list(zip(augmentations, generators, strict=True))
    boxes = [augmentation.crop_box(encoded.size, rng) for augmentation, rng in pairs]
    return Cutter(encoded, boxes, image_size).views(pairs)


class Cutter:
    """A picture decoded once, no larger than its crops need.

    Args:
        encoded: The checked picture.
        boxes: The crop of each view, in its own pixels.
        image_size: Side of the square views.

    Raises:
        BadSample: Truncated or damaged picture.
    """

    def __init__(self, encoded: EncodedImage, boxes: list[Box], image_size: int):
        smallest = min(min(right - left, bottom - top) for left, top, right, bottom in boxes)
        self._size, self._boxes, self._image_size = encoded.size, boxes, image_size
        self._factor = shrink_factor(smallest / (DECODE_MARGIN * image_size))
        # A gray picture is one plane until the end: what is done to it would do the same to three.
        image = encoded.decode(self._factor, keep_gray=True)
        self._pixels = _pixels(image)
        self._scale = self._factor if image.size != encoded.size else 1

    def aligned(self, box: Box) -> Box:
        """The pixels of the original picture that `cut` takes for a box."""
        return align(box, self._size, self._factor)

    def cut(self, box: Box, size: int, interpolation: str) -> np.ndarray:
        """Returns a box as uint8 [size, size, 3], or [size, size] of a gray picture."""
        box = self.aligned(box)
        if self._scale > 1:
            box = tuple(-(-edge // self._scale) for edge in box)
        return resize_crop(self._pixels, box, size, interpolation)

    def views(self, pairs: list[tuple[ImageAugmentation, np.random.Generator]]) -> np.ndarray:
        """Returns the crops as random views, uint8 [V, 3, image_size, image_size]; each has its pair."""
        views = np.empty((len(pairs), 3, self._image_size, self._image_size), dtype=np.uint8)
        for view, box, (augmentation, rng) in zip(views, self._boxes, pairs, strict=True):
            pixels = self.cut(box, self._image_size, augmentation.interpolation)
            if augmentation.distorts:
                pixels = _pixels(augmentation.distort(_image(pixels), rng))
            view[:] = planes(pixels)
        return views


def eval_view(image: Image.Image, image_size: int, resize_size: int, interpolation: str = "bicubic") -> np.ndarray:
    """Resizes the shorter side and crops the centre, in one step and without the enlarged intermediate.

    Args:
        image: RGB picture, fully decoded.
        image_size: Side of the square output in pixels.
        resize_size: What the shorter side is resized to, at least image_size.
        interpolation: "bilinear" or "bicubic".

    Returns:
        uint8 [3, image_size, image_size], torchvision's Resize and CenterCrop up to rounding.
    """
    width, height = image.size
    shorter = min(width, height)
    # torchvision truncates the longer side to whole pixels, so the two axes are scaled slightly differently.
    resized = (int(resize_size * width / shorter), int(resize_size * height / shorter))
    scales = (width / resized[0], height / resized[1])
    left, top = (round((side - image_size) / 2) for side in resized)
    box = (
        left * scales[0],
        top * scales[1],
        min(width, (left + image_size) * scales[0]),
        min(height, (top + image_size) * scales[1]),
    )
    view = image.resize((image_size, image_size), Image.Resampling[interpolation.upper()], box=box)
    return np.ascontiguousarray(np.asarray(view).transpose(2, 0, 1))


def align(box: Box, size: tuple[int, int], factor: int) -> Box:
    """The box with its edges on multiples of `factor`, or on the picture's own edge.

    Whether a picture is then decoded smaller or not, its crops are the same and consist of whole pixels.
    """
    if factor == 1:
        return box
    left, top, right, bottom = (round(edge / factor) * factor for edge in box)
    return left, top, min(right, size[0]), min(bottom, size[1])


def _centre_box(size: tuple[int, int], ratio: tuple[float, float]) -> Box:
    width, height = size
    crop_width = min(width, round(height * ratio[1]))
    crop_height = min(height, round(width / ratio[0]))
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return left, top, left + max(1, crop_width), top + max(1, crop_height)


def planes(pixels: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] as [3, H, W]; [H, W] as [1, H, W]."""
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


# Image.fromarray and np.asarray find out in many steps what is known here: mode L or RGB.


def _image(pixels: np.ndarray) -> Image.Image:
    mode = "L" if pixels.ndim == 2 else "RGB"
    return Image.frombuffer(mode, pixels.shape[1::-1], pixels.tobytes(), "raw", mode, 0, 1)


def _pixels(image: Image.Image) -> np.ndarray:
    width, height = image.size
    shape = (height, width) if image.mode == "L" else (height, width, 3)
    return np.frombuffer(image.tobytes(), dtype=np.uint8).reshape(shape)


def _turn(size: tuple[int, int], angle: float, offset: tuple[float, float]) -> tuple[float, ...]:
    """Where the pixels of a picture come from that is turned around its centre and moved, as Image.rotate has it."""
    radians = -math.radians(angle % 360.0)
    cos, sin = round(math.cos(radians), 15), round(math.sin(radians), 15)
    x, y = size[0] / 2, size[1] / 2
    left, up = -x - offset[0], -y - offset[1]
    return cos, sin, cos * left + sin * up + x, -sin, cos, -sin * left + cos * up + y


# Pillow's ImageEnhance in fewer steps, byte for byte.


@lru_cache(maxsize=64)
def _flat(mode: str, size: tuple[int, int], value: int) -> Image.Image:
    return Image.new(mode, size, (value,) * len(mode))


def _brightness(image: Image.Image, factor: float) -> Image.Image:
    return Image.blend(_flat(image.mode, image.size, 0), image, factor)


def _contrast(image: Image.Image, factor: float) -> Image.Image:
    gray = image if image.mode == "L" else image.convert("L")
    pixels = np.frombuffer(gray.tobytes(), dtype=np.uint8)
    mean = int(int(pixels.sum()) / len(pixels) + 0.5)
    return Image.blend(_flat(image.mode, image.size, mean), image, factor)


def _saturation(image: Image.Image, factor: float) -> Image.Image:
    return image if image.mode == "L" else Image.blend(image.convert("L").convert("RGB"), image, factor)


def _hue(image: Image.Image, turn: float) -> Image.Image:
    return image if image.mode == "L" else _image(turn_hue(_pixels(image), turn))


_CHANGES = (_brightness, _contrast, _saturation, _hue)
_NEUTRAL = (1.0, 1.0, 1.0, 0.0)


def _uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """As rng.uniform, whose preparations cost more than the draw."""
    return low + (high - low) * rng.random()


def _factor(strength: float, rng: np.random.Generator) -> float:
    return _uniform(rng, max(0.0, 1.0 - strength), 1.0 + strength)


def _check_range(name: str, value: tuple[float, float], limit: float) -> None:
    pair = isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(edge, Real) for edge in value)
    if not pair or not 0 < value[0] <= value[1] <= limit:
        raise DataError(f"image augmentation: {name} is {value}, expected (low, high), 0 < low <= high <= {limit:g}")


AUGMENTATIONS = {
    "none": ImageAugmentation(),
    # The single view of plain CLIP and SLIP's base view.
    "clip": ImageAugmentation(crop_scale=(0.5, 1.0), crop_ratio=(3 / 4, 4 / 3)),
    # Both views of DeCLIP, SLIP's two augmented views (Chen et al. 2020, MoCo v2).
    "moco_v2": ImageAugmentation(
        crop_scale=(0.2, 1.0),
        crop_ratio=(3 / 4, 4 / 3),
        interpolation="bilinear",
        brightness=0.4,
        contrast=0.4,
        saturation=0.4,
        hue=0.1,
        jitter_probability=0.8,
        grayscale_probability=0.2,
        blur_probability=0.5,
        flip_probability=0.5,
    ),
    # The two views of A-CLIP (Yang et al. 2023): no flip, as attention is carried over by the crop boxes.
    "aclip": ImageAugmentation(
        crop_scale=(0.5, 1.0),
        crop_ratio=(3 / 4, 4 / 3),
        interpolation="bilinear",
        brightness=0.4,
        contrast=0.4,
        saturation=0.2,
        hue=0.1,
        jitter_probability=0.8,
        grayscale_probability=0.2,
        blur_probability=0.1,
        solarize_probability=0.2,
    ),
    # Captions of symbols name colours, sides and directions: no flip, no hue, no grayscale, no strong crop or rotation.
    "glyph": ImageAugmentation(
        crop_scale=(0.85, 1.0),
        crop_ratio=(0.85, 1.18),
        rotation=8.0,
        shift=0.06,
        brightness=0.3,
        contrast=0.4,
        jitter_probability=0.8,
        blur_probability=0.3,
        blur_sigma=(0.1, 0.8),
    ),
}
