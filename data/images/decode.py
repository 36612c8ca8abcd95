"""Safe decoding: untrusted bytes to an RGB picture, with limits checked before any pixel is decoded."""

import io

import numpy as np
from PIL import Image

from data.errors import BadSample, DataError, repeatable
from data.images.image_file import read_image_file

__all__ = ["DEFAULT_MAX_PIXELS", "EncodedImage", "check_max_pixels", "open_image", "shrink_factor"]

DEFAULT_MAX_PIXELS = 89_478_485
"""A quarter gibibyte of RGB, the size from which Pillow itself warns."""

_PILLOW_HARD_LIMIT = 2 * DEFAULT_MAX_PIXELS
_MAX_JPEG_SHRINK = 8
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TRANSPOSED_ORIENTATIONS = (5, 6, 7, 8)


class EncodedImage:
    """A picture whose header has been read and checked but whose pixels have not been decoded.

    Attributes:
        size: (width, height) after EXIF rotation, the coordinates of every crop box.
    """

    def __init__(self, image: Image.Image, orientation: int = 1):
        self._image = image
        self._orientation = orientation
        width, height = image.size
        self.size = (height, width) if self._orientation in _TRANSPOSED_ORIENTATIONS else (width, height)

    def decode(self, shrink: float = 1.0, keep_gray: bool = False) -> Image.Image:
        """Decodes to RGB: first frame, upright, transparency composited on white, 16 bits scaled to 8.

        Args:
            shrink: the result may be smaller than `size` by up to this factor. JPEG decodes 2, 4 or 8 times smaller at
                a fraction of the cost; other formats ignore it.
            keep_gray: return a picture that is stored as one opaque channel of 8 bits as such, in mode L.

        Raises:
            BadSample: truncated or damaged data.
        """
        try:
            factor = shrink_factor(shrink)
            if factor > 1 and self._image.format == "JPEG":
                width, height = self._image.size
                self._image.draft("RGB", (max(1, width // factor), max(1, height // factor)))
            self._image.load()
            # Colours first: a palette picture turned round would lose its transparency.
            gray = keep_gray and self._image.mode == "L" and "transparency" not in self._image.info
            image = self._image if gray else _to_rgb(self._image)
            return image.transpose(_UPRIGHT[self._orientation]) if self._orientation in _UPRIGHT else image
        except Exception as error:  # any parser error: see open_image
            raise BadSample(_reason("damaged image", error)) from error


def shrink_factor(shrink: float) -> int:
    """How many times smaller a JPEG is decoded along each side if it may be `shrink` times smaller: 1, 2, 4 or 8."""
    return min(_MAX_JPEG_SHRINK, 1 << (int(shrink).bit_length() - 1)) if shrink >= 2 else 1


def open_image(data: bytes, max_pixels: int = DEFAULT_MAX_PIXELS) -> EncodedImage:
    """Reads the header of a JPEG, PNG or WebP picture.

    Args:
        data: the file's bytes, from an untrusted source.
        max_pixels: pictures with more pixels are refused before decoding.

    Raises:
        BadSample: not a picture of these formats, or too large.
    """
    file = read_image_file(data)
    width, height = file.size
    if width * height > max_pixels:
        raise BadSample(f"image of {width} x {height} pixels is above the limit of {max_pixels} pixels")
    try:
        image = Image.open(io.BytesIO(file.data), formats=(file.kind,))
    except Exception as error:
        # Damaged files raise nearly every exception class out of the parsers; none of them may end a run of weeks.
        raise BadSample(_reason("unreadable image header", error)) from error
    if image.size != file.size:
        raise BadSample(f"unreadable image header: {image.size} and {file.size} pixels")
    return EncodedImage(image, file.orientation)


def check_max_pixels(max_pixels: int) -> None:
    """Raises DataError unless max_pixels is a limit that Pillow can honour."""
    if not 0 < max_pixels <= _PILLOW_HARD_LIMIT:
        raise DataError(
            f"max_image_pixels is {max_pixels}; expected 1 to {_PILLOW_HARD_LIMIT}, the most Pillow decodes"
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        # Pillow clips 16-bit samples at 255 instead of scaling them.
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        # Without a background the hidden colour under transparent pixels, often black, would show.
        layer = image if image.mode == "RGBA" else image.convert("RGBA")
        image = Image.new("RGB", layer.size, "white")
        image.paste(layer, mask=layer)
    return image.convert("RGB")


def _reason(what: str, error: Exception) -> str:
    return repeatable(f"{what}: {type(error).__name__}: {error}".splitlines()[0])[:200]
