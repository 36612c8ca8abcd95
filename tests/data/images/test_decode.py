"""Decoding of every kind of file a web crawl holds."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from data.errors import BadSample, DataError
from data.images.decode import DEFAULT_MAX_PIXELS, check_max_pixels, open_image


def encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def gradient(width: int = 40, height: int = 30) -> Image.Image:
    rows, columns = np.mgrid[0:height, 0:width]
    channels = [columns * 255 // max(1, width - 1), rows * 255 // max(1, height - 1), (rows + columns) * 2]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def decode(data: bytes, **options) -> Image.Image:
    image = open_image(data, **options).decode()
    assert image.mode == "RGB"
    return image


def pixel_difference(first: Image.Image, second: Image.Image) -> int:
    return int(np.abs(np.asarray(first, dtype=int) - np.asarray(second, dtype=int)).max())


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_lossless_formats_decode_exactly(kind, options):
    assert pixel_difference(decode(encode(gradient(), kind, **options)), gradient()) == 0


def test_one_pixel_image():
    assert decode(encode(Image.new("RGB", (1, 1), (9, 8, 7)), "PNG")).getpixel((0, 0)) == (9, 8, 7)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_modes_become_rgb(mode):
    kind = "JPEG" if mode in ("CMYK", "YCbCr") else "PNG"
    expected = gradient().convert(mode).convert("RGB")
    assert pixel_difference(decode(encode(gradient().convert(mode), kind, quality=95)), expected) <= 24


def test_sixteen_bit_gray_is_scaled_not_clipped():
    samples = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    image = decode(encode(Image.fromarray(samples), "PNG"))
    assert np.array_equal(np.asarray(image)[..., 0], (samples >> 8).astype(np.uint8))


def test_transparency_shows_white():
    clear_red = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert decode(encode(clear_red, "PNG")).getpixel((0, 0)) == (255, 255, 255)
    half_black = Image.new("LA", (4, 4), (0, 128))
    assert decode(encode(half_black, "PNG")).getpixel((0, 0)) == (127, 127, 127)
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.putpixel((1, 0), 1)
    image = decode(encode(palette, "PNG", transparency=0))
    assert [image.getpixel((0, 0)), image.getpixel((1, 0))] == [(255, 255, 255), (10, 20, 30)]
    keyed = Image.new("RGB", (4, 4), (1, 2, 3))
    assert decode(encode(keyed, "PNG", transparency=(1, 2, 3))).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_animation_gives_the_first_frame(kind):
    frames = [Image.new("RGB", (8, 8), color) for color in ((200, 0, 0), (0, 200, 0))]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], duration=50, **options)
    assert decode(data).getpixel((4, 4)) == (200, 0, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(gradient(), "JPEG", quality=95, exif=exif)
    encoded = open_image(data)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert encoded.size == expected.size == ((40, 30) if orientation < 5 else (30, 40))
    assert pixel_difference(encoded.decode(), expected) == 0


def test_jpeg_shrinks_while_decoding_and_other_formats_do_not():
    large = gradient(640, 480)
    jpeg = encode(large, "JPEG", quality=95)
    sizes = [open_image(jpeg).decode(shrink).size for shrink in (0.5, 1.9, 2.0, 3.9, 4.5, 100.0)]
    assert sizes == [(640, 480), (640, 480), (320, 240), (320, 240), (160, 120), (80, 60)]
    assert open_image(encode(large, "PNG")).decode(4.0).size == (640, 480)


def test_pixel_limit_is_checked_before_decoding():
    with pytest.raises(BadSample, match="40 x 30 pixels is above the limit of 1199"):
        open_image(encode(gradient(), "PNG"), max_pixels=1199)
    assert open_image(encode(gradient(), "PNG"), max_pixels=1200).size == (40, 30)


@pytest.mark.parametrize("size", [(10_000, 10_000), (60_000, 60_000), (2**31 - 1, 2**31 - 1)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs_are_bad_samples(size):
    with pytest.raises(BadSample):
        open_image(png_header(*size))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_truncated_files_are_bad_samples(kind):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encode(noise, kind)
    for share in (0.02, 0.1, 0.5, 0.9):
        with pytest.raises(BadSample):
            open_image(data[: int(len(data) * share)]).decode()


@pytest.mark.parametrize(
    "data", [b"", b"\x00", b"<html>not found</html>", b"\xff\xd8\xff", b"RIFF\x00\x00\x00\x00WEBP"]
)
def test_non_images_are_bad_samples(data):
    with pytest.raises(BadSample, match=r"\S"):
        open_image(data).decode()


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM", "ICO"])
def test_other_formats_are_refused(kind):
    with pytest.raises(BadSample, match=r"found .*, expected JPEG, PNG or WebP"):
        open_image(encode(gradient(), kind))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damaged_bytes_never_raise_anything_else(kind):
    data = encode(gradient(64, 64), kind)
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(data)
        for position in rng.integers(len(data), size=rng.integers(1, 20)):
            damaged[position] = rng.integers(256)
        try:
            decode(bytes(damaged), max_pixels=1_000_000)
        except BadSample as error:
            assert len(error.reason) <= 250
            assert "\n" not in error.reason


def test_limit_must_be_one_pillow_honours():
    check_max_pixels(DEFAULT_MAX_PIXELS)
    for limit in (0, 10**9):
        with pytest.raises(DataError, match=f"max_image_pixels is {limit}"):
            check_max_pixels(limit)
