"""Pictures from anywhere: what is read, what is refused and why, what it costs, and that nothing else is parsed."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data.errors import BadSample
from data.images.decode import open_image
from data.images.image_file import read_image_file
from data.sample import EvalTransform
from tests.data import bad_files
from tests.data.bad_files import (
    encoded,
    exif_of_orientation,
    jpeg_segment,
    jpeg_with,
    odd_pictures,
    png_chunk,
    png_with,
    refused_pictures,
)

REFUSED = refused_pictures()
ODD = odd_pictures()


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(open_image(data).decode())


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_reason(name):
    data, words = REFUSED[name]
    with pytest.raises(BadSample) as caught:
        open_image(data).decode()
    assert words in caught.value.reason
    assert "\n" not in caught.value.reason


@pytest.mark.parametrize("name", ODD)
def test_odd_pictures_are_read(name):
    image = pixels(ODD[name])
    assert image.shape[2] == 3
    assert EvalTransform(32)(ODD[name]).shape == (3, 32, 32)
    if "apng" in name or "animated" in name:
        assert (image == (255, 0, 0)).all()
    elif name == "mpo":
        # The first of its pictures, and quick to shrink like any other JPEG.
        assert abs(image.astype(int) - (255, 0, 0)).max() <= 2
        assert open_image(ODD[name]).decode(shrink=4).size == (12, 8)
    elif name == "cmyk":
        assert abs(image.astype(int) - (255, 55, 255)).max() <= 2
    elif name.startswith("png_") and "x" not in name.removeprefix("png_itxt").removeprefix("png_text"):
        assert np.array_equal(image, pixels(encoded("PNG")))
    elif name in ("jpeg_exif", "jpeg_mpf", "jpeg_many_segments", "jpeg_icc"):
        assert np.array_equal(image, pixels(jpeg_with(b"")))
    elif name == "jpeg_and_video":
        assert np.array_equal(image, pixels(encoded("JPEG")))


@pytest.mark.parametrize("value", [*range(1, 9), 0, 9, 60_000])
@pytest.mark.parametrize("order", ["<", ">"])
def test_orientation_is_that_of_pillow(value, order):
    exif = exif_of_orientation(value, order)
    parsed = Image.Exif()
    parsed.load(exif)
    expected = parsed.get(0x0112, 1) if 1 <= parsed.get(0x0112, 1) <= 8 else 1
    for data in (
        jpeg_with(jpeg_segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0") + jpeg_segment(0xE1, b"Exif\0\0" + exif)),
        png_with(png_chunk(b"eXIf", exif)),
        encoded("WEBP", exif=exif),
        encoded("WEBP", exif=b"Exif\0\0" + exif),
    ):
        assert read_image_file(data).orientation == expected
        assert pixels(data).shape == ((48, 32, 3) if expected >= 5 else (32, 48, 3))


@settings(max_examples=200)
@given(st.binary(max_size=60))
def test_any_exif_gives_an_orientation(noise):
    for mark in (b"", b"II*\0", b"MM\0*", b"II*\0\x08\0\0\0\xff\xff", b"MM\0*\0\0\0\x08\0\x02\x01\x12\0\x04"):
        assert 1 <= read_image_file(png_with(png_chunk(b"eXIf", mark + noise))).orientation <= 8


def test_only_what_a_decoder_needs_is_handed_on():
    data = jpeg_with(
        jpeg_segment(0xE1, b"Exif\0\0secret") + jpeg_segment(0xFE, b"secret") + jpeg_segment(0xE2, b"secret")
    )
    assert b"secret" not in read_image_file(data).data
    assert (
        b"secret" not in read_image_file(png_with(png_chunk(b"tEXt", b"k\0secret"), png_chunk(b"zzZz", b"secret"))).data
    )
    # Of files without metadata nothing is changed.
    for kind in ("PNG", "WEBP"):
        assert read_image_file(encoded(kind)).data == encoded(kind)


def test_scans_are_counted_where_they_are():
    # What follows the picture may hold the same bytes by chance: a phone's motion photo is a JPEG and a video.
    for progressive in (False, True):
        assert pixels(encoded("JPEG", progressive=progressive) + b"\xff\xda" * 5000).shape == (32, 48, 3)
    assert pixels(bad_files.jpeg_of_scans(98)).shape == (64, 64, 3)
    # The mark of the end inside another segment is not the end.
    many = bad_files.jpeg_of_scans(120)
    second = many.index(b"\xff\xda", many.index(b"\xff\xda") + 2)
    hidden = many[:second] + jpeg_segment(0xFE, b"\xff\xd9") + many[second:]
    with pytest.raises(BadSample, match="more than 100 scans"):
        open_image(hidden).decode()


BASES = {
    "JPEG": encoded("JPEG"),
    "progressive": encoded("JPEG", progressive=True),
    "PNG": encoded("PNG"),
    "palette": encoded("PNG", Image.new("P", (16, 16), 3)),
    "WEBP": encoded("WEBP"),
    "animation": ODD["animated_webp"],
    "exif": ODD["jpeg_rotated"],
}


@settings(max_examples=400)
@given(st.data())
def test_damage_ends_in_a_picture_or_a_bad_sample(data):
    blob = bytearray(BASES[data.draw(st.sampled_from(sorted(BASES)))])
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(blob) - 1))
        kind = data.draw(st.sampled_from(["byte", "marker", "cut", "insert", "zeros"]))
        if kind == "byte":
            blob[at] = data.draw(st.integers(0, 255))
        elif kind == "marker":
            blob[at : at + 2] = bytes([0xFF, data.draw(st.integers(0, 255))])
        elif kind == "cut":
            del blob[at : at + data.draw(st.integers(1, 200))]
        elif kind == "insert":
            blob[at:at] = data.draw(st.binary(min_size=1, max_size=30))
        else:
            blob[at : at + 8] = bytes(8)
        if not blob:
            break
    try:
        image = open_image(bytes(blob), max_pixels=1 << 20).decode()
    except BadSample as bad:
        assert bad.reason.isprintable()
        return
    assert image.mode == "RGB"
    assert image.width * image.height <= 1 << 20


MEASURE = """
import json, sys
from data.images.decode import DEFAULT_MAX_PIXELS, open_image
from data.errors import BadSample
from PIL import Image
from tests.data.bad_files import encoded, exif_of_orientation, odd_pictures, png, refused_pictures

def peak_kib(reset):
    if reset:
        open("/proc/self/clear_refs", "w").write("5")
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])

def measured(data, **options):
    before = peak_kib(True)
    try:
        open_image(data, **options).decode()
        outcome = "decoded"
    except BadSample as bad:
        outcome = bad.reason
    return outcome, len(data), (peak_kib(False) - before) / 1024

for kind in ("JPEG", "PNG", "WEBP"):
    open_image(encoded(kind)).decode()
cases = {name: data for name, (data, _) in refused_pictures().items()} | odd_pictures()
found = {name: measured(data) for name, data in cases.items()}
# The largest pictures a limit lets through, in the modes that need most copies.
side = 2048
flat = Image.new("RGBA", (side, side), (1, 2, 3, 4))
large = {
    "large_rgba": png(side, side, bytes((side * 4 + 1) * side), colour=6),
    "large_gray16": png(side, side, bytes((side * 2 + 1) * side), colour=0, depth=16),
    "large_webp": encoded("WEBP", flat),
    "large_turned": encoded("JPEG", flat.convert("RGB"), progressive=True, exif=b"Exif\\0\\0" + exif_of_orientation(6)),
}
found |= {name: measured(data, max_pixels=side * side) for name, data in large.items()}
json.dump(found, sys.stdout)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux' /proc")
def test_memory_stays_bounded():
    """No picture costs more than its own bytes a few times over, and the pixels that the limit allows."""
    root = Path(__file__).parents[3]
    result = subprocess.run(
        [sys.executable, "-c", MEASURE],
        # Memory that was freed goes back at once, so that one case cannot hide in what another has left.
        env={
            **os.environ,
            "PYTHONPATH": str(root),
            "MALLOC_MMAP_THRESHOLD_": "65536",
            "MALLOC_TRIM_THRESHOLD_": "65536",
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    found = json.load(io.StringIO(result.stdout))
    assert set(REFUSED) | set(ODD) <= set(found)
    for name, (outcome, size, peak_mib) in found.items():
        assert (outcome == "decoded") == (name not in REFUSED), (name, outcome)
        # 20 bytes a pixel: two canvases of an animation, the copy out of them, the picture, and it on white.
        allowed = 16 + 3 * size / 2**20 + (20 * 2048 * 2048 / 2**20 if name.startswith("large") else 0)
        assert peak_mib < allowed, (name, outcome, size, peak_mib)
