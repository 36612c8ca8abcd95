"""Files as an attacker, or the web, would have them: pictures, captions and JSON that must do no harm."""

import io
import json
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

MIB = 1 << 20


def encoded(kind: str, image: Image.Image | None = None, **options) -> bytes:
    """A picture file; by default of 48 x 32 pixels of noise, so that cutting it anywhere hurts."""
    if image is None:
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, payload: bytes) -> bytes:
    """A PNG chunk with its length and checksum."""
    return struct.pack(">I", len(payload)) + kind + payload + struct.pack(">I", zlib.crc32(kind + payload))


def png(width: int, height: int, pixels: bytes = b"", *, colour: int = 2, depth: int = 8, before: bytes = b"") -> bytes:
    """A PNG that claims a size, whatever pixels it holds."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    body = header + before + png_chunk(b"IDAT", zlib.compress(pixels, 1)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def png_with(before: bytes, after: bytes = b"") -> bytes:
    """A good PNG with other chunks before and behind its pixels."""
    good = encoded("PNG")
    first, end = good.index(b"IDAT") - 4, good.index(b"IEND") - 4
    return good[:first] + before + good[first:end] + after + good[end:]


def jpeg_segment(marker: int, payload: bytes) -> bytes:
    """A JPEG segment."""
    return bytes([0xFF, marker]) + struct.pack(">H", len(payload) + 2) + payload


def jpeg_with(segments: bytes) -> bytes:
    """A good JPEG without JFIF, with other segments before its tables."""
    good = encoded("JPEG", quality=90)
    return good[:2] + segments + good[4 + struct.unpack(">H", good[4:6])[0] :]


def jpeg_of_size(width: int, height: int) -> bytes:
    """A JPEG whose frame claims a size."""
    good = bytearray(encoded("JPEG"))
    at = good.index(b"\xff\xc0") + 5
    good[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(good)


def jpeg_of_scans(count: int) -> bytes:
    """A progressive JPEG that repeats one of its scans."""
    good = encoded("JPEG", Image.new("L", (64, 64), 100), progressive=True)
    at = [place for place in range(len(good) - 1) if good[place : place + 2] == b"\xff\xda"]
    return good[: at[1]] + good[at[1] : at[2]] * count + b"\xff\xd9"


def webp_of_size(width: int, height: int) -> bytes:
    """An extended WebP whose canvas claims a size."""
    canvas = b"\x10\0\0\0" + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBP" + b"VP8X" + struct.pack("<I", 10) + canvas + encoded("WEBP", lossless=True)[12:]
    return b"RIFF" + struct.pack("<I", len(body)) + body


def overlapping_exif(size: int) -> bytes:
    """EXIF whose thousands of entries each point to all of it: parsed, it is the square of its size."""
    entries = min(60_000, (size - 14) // 12)
    table = [struct.pack("<HHII", number + 1000, 1, size - 8, 8) for number in range(entries)]
    return (b"II*\0" + struct.pack("<IH", 8, entries) + b"".join(table)).ljust(size, b"\0")


def exif_of_orientation(value: int, order: str = "<") -> bytes:
    """The smallest EXIF that says how a picture is turned."""
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return mark + struct.pack(f"{order}IHHHIHHI", 8, 1, 0x0112, 3, 1, value, 0, 0)


def tiff_of_size(width: int, height: int) -> bytes:
    """A TIFF header that claims a size."""
    tags = ((256, width), (257, height), (258, 8), (262, 1), (273, 8), (277, 1), (278, height), (279, 10))
    table = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + table + bytes(4)


def refused_pictures() -> dict[str, tuple[bytes, str]]:
    """Name -> (file, words of the reason). None of them may cost more than a little memory."""
    return {
        "png_60000x60000": (png(60_000, 60_000), "60000 x 60000 pixels is above the limit"),
        "png_2e9": (png(2**31 - 1, 2**31 - 1), "above the limit"),
        "png_no_pixels": (png(300, 300), "damaged image"),
        "png_zero": (png(0, 5), "0 x 5 pixels"),
        "png_chunks": (png_with(b"".join(png_chunk(b"tEXt", b"%06d\0" % n) for n in range(50_001))), "50000 chunks"),
        "png_idats": (png_with(b"", png_chunk(b"IDAT", b"") * 50_001), "50000 chunks"),
        "png_two_sizes": (png(9, 9) + png(8, 8)[8:], "damaged image"),
        "jpeg_65500x65500": (jpeg_of_size(65_500, 65_500), "above the limit"),
        "jpeg_zero": (jpeg_of_size(0, 9), "0 x 9 pixels"),
        "jpeg_segments": (jpeg_with(jpeg_segment(0xE5, b"") * 50_001), "50000 segments"),
        "jpeg_scans": (jpeg_of_scans(120), "more than 100 scans"),
        "jpeg_two_frames": (jpeg_with(jpeg_segment(0xC0, b"\x08\0\1\0\1\1\1\x11\0")), "two frames"),
        "webp_canvas": (webp_of_size(1 << 24, 255), "above the limit"),
        "webp_wrong_canvas": (webp_of_size(4000, 4000), "unreadable image header"),
        "gif": (encoded("GIF"), "found GIF"),
        "gif_65535": (b"GIF89a\xff\xff\xff\xff\x80\0\0" + bytes(50), "found GIF"),
        "tiff_60000": (tiff_of_size(60_000, 60_000), "found TIFF"),
        "bmp": (encoded("BMP"), "found BMP"),
        "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'><script>1</script></svg>", "found SVG"),
        "xml": (
            b"<?xml version='1.0'?><!DOCTYPE a [<!ENTITY b SYSTEM 'file:///etc/passwd'>]><svg/>",
            "found XML or SVG",
        ),
        "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(touch) system\n", "found PostScript"),
        "pdf": (b"%PDF-1.7\n", "found PDF"),
        "html": (b"<!DOCTYPE html><p>404", "found HTML"),
        "empty_riff": (b"RIFF\0\0\0\0WEBP", "without a picture"),
        "random": (bytes(range(256)) * 9, "no known format"),
        "cut_png": (encoded("PNG")[:900], "damaged image"),
        "cut_jpeg": (encoded("JPEG")[:900], "damaged image"),
        "cut_webp": (encoded("WEBP")[:300], "unreadable image header"),
    }


def odd_pictures() -> dict[str, bytes]:
    """Name -> file. All of them are read."""
    transparent = Image.new("P", (48, 32), 0)
    transparent.putpalette([0, 0, 0, 10, 20, 30])
    frames = [Image.new("RGB", (48, 32), colour) for colour in ("red", "blue")]
    animation = {"save_all": True, "append_images": frames[1:], "duration": 50}
    gray16 = Image.fromarray(np.linspace(0, 65535, 48 * 32).astype(np.uint16).reshape(32, 48))
    text = b"k\0\0" + zlib.compress(bytes(20 * MIB))
    return {
        "one_pixel": png(1, 1, b"\0abc"),
        "png_60000x1": png(60_000, 1, bytes(180_001)),
        "png_1x60000": png(1, 60_000, bytes(240_000)),
        "jpeg_60000x1": encoded("JPEG", Image.new("RGB", (60_000, 1))),
        "jpeg_1x60000": encoded("JPEG", Image.new("RGB", (1, 60_000))),
        "cmyk": encoded("JPEG", Image.new("CMYK", (48, 32), (0, 200, 0, 0))),
        "gray16": encoded("PNG", gray16),
        "rgb16": png(4, 4, b"".join(b"\0" + bytes(24) for _ in range(4)), depth=16),
        "palette_transparency": encoded("PNG", transparent, transparency=0),
        "la": encoded("PNG", Image.new("LA", (48, 32), (0, 128))),
        "rgba": encoded("PNG", Image.new("RGBA", (48, 32), (1, 2, 3, 4))),
        "rgba_webp": encoded("WEBP", Image.new("RGBA", (48, 32), (1, 2, 3, 4))),
        "apng": encoded("PNG", frames[0], **animation),
        "animated_webp": encoded("WEBP", frames[0], lossless=True, **animation),
        "mpo": encoded("MPO", frames[0], save_all=True, append_images=frames[1:]),
        "jpeg_rotated": jpeg_with(jpeg_segment(0xE1, b"Exif\0\0" + exif_of_orientation(6))),
        # Metadata that is a bomb to whoever reads it.
        "png_ztxt": png_with(b"".join(png_chunk(b"zTXt", text) for _ in range(8))),
        "png_itxt": png_with(png_chunk(b"iTXt", b"k\0\1\0\0\0" + text[3:])),
        "png_iccp": png_with(png_chunk(b"iCCP", text)),
        "png_exif": png_with(png_chunk(b"eXIf", overlapping_exif(2 * MIB))),
        "png_text_many": png_with(b"".join(png_chunk(b"tEXt", b"%06d\0" % n) for n in range(40_000))),
        "jpeg_exif": jpeg_with(jpeg_segment(0xE1, b"Exif\0\0" + overlapping_exif(65_000))),
        "jpeg_mpf": jpeg_with(jpeg_segment(0xE2, b"MPF\0" + overlapping_exif(65_000))),
        "jpeg_many_segments": jpeg_with(jpeg_segment(0xE5, bytes(100)) * 40_000),
        "jpeg_icc": jpeg_with(b"".join(jpeg_segment(0xE2, b"ICC_PROFILE\0\1\1" + bytes(65_000)) for _ in range(40))),
        "jpeg_and_video": encoded("JPEG") + b"\xff\xda" * 5000,
    }


def refused_texts() -> dict[str, tuple[dict[str, bytes], str]]:
    """Name -> (members beside a good picture, words of the reason)."""
    return {
        "latin1": ({"txt": "caf\u00e9".encode("latin1")}, "not UTF-8"),
        "utf16": ({"txt": "a cat".encode("utf-16")}, "not UTF-8"),
        "surrogate": ({"txt": b"a \xed\xa0\x80 cat"}, "not UTF-8"),
        "blank": ({"txt": " \t\n\u00a0\u3000".encode()}, "the caption is empty"),
        "nul": ({"txt": bytes(300)}, "no readable character"),
        "control": ({"txt": b"\x01\x02\x1b\x7f"}, "no readable character"),
        "large": ({"txt": b"cat " * 300_000}, "above the limit of 1048576"),
        "json_deep": ({"txt": b"cat", "json": b"[" * 100_000}, "not JSON"),
        "json_deep_object": ({"txt": b"cat", "json": b'{"a":' * 100_000}, "not JSON"),
        "json_number": ({"txt": b"cat", "json": b'{"a": ' + b"9" * 100_000 + b"}"}, "not JSON"),
        "json_list": ({"txt": b"cat", "json": b"[1, 2]"}, "holds a list"),
        "json_cut": ({"txt": b"cat", "json": b'{"captions": ["a"'}, "not JSON"),
        "json_latin1": ({"txt": b"cat", "json": b'{"a": "\xe9"}'}, "not JSON"),
        "json_large": ({"txt": b"cat", "json": b'{"a": "' + b"x" * (4 * MIB) + b'"}'}, "above the limit of 4194304"),
    }


def odd_texts() -> dict[str, dict[str, bytes]]:
    """Name -> members beside a good picture. All of them are read."""
    return {
        "100_kB": {"txt": b"cat " * 25_000},
        "one_word": {"txt": b"c" * 100_000},
        "bidi": {"txt": "a \u202egnihton\u202c cat \u200b\u2066x\u2069".encode()},
        "bom": {"txt": b"\xef\xbb\xbfa cat"},
        "nul_inside": {"txt": b"a\0cat\0"},
        "escape": {"txt": b"\x1b[31ma cat\x1b[0m"},
        "json_surrogate": {"json": b'{"captions": ["a \\ud800 cat"]}'},
        "json_infinite": {"txt": b"cat", "json": b'{"a": 1e400, "b": NaN, "c": -Infinity}'},
        "json_twice": {"txt": b"cat", "json": b'{"captions": ["dog"], "captions": []}'},
        "json_types": {"txt": b"cat", "json": b'{"captions": [1, null, {}, " "], "caption": 5, "key": "other"}'},
        "many_captions": {"json": json.dumps({"captions": ["a"] * 200_000}).encode()},
    }


# Names no key should have. They are only ever names: nothing of an archive is written to disk.
ODD_KEYS = (
    "/etc/cron.d/evil",
    "../../evil",
    "a/../../evil",
    "\x1b[2J\x07bell",
    "new\nline",
    "\u202egpj",
    "k" * 300,
    "a//b",
    "~",
)


def write_hostile_shard(path: Path, good: int = 24) -> dict[str, str]:
    """A shard of everything above between good samples, links and devices.

    Returns:
        Key of every bad sample -> words of its reason.
    """
    picture = encoded("JPEG")
    samples: list[tuple[str, dict[str, bytes]]] = []
    expected = {}
    for name, (data, words) in refused_pictures().items():
        samples.append((f"bad_{name}", {"jpg": data, "txt": b"a cat"}))
        expected[f"bad_{name}"] = words
    for name, (members, words) in refused_texts().items():
        samples.append((f"bad_{name}", {"jpg": picture, **members}))
        expected[f"bad_{name}"] = words
    samples += [(f"odd_{name}", {"jpg": data, "txt": b"a cat"}) for name, data in odd_pictures().items()]
    samples += [(f"odd_{name}", {"jpg": picture, **members}) for name, members in odd_texts().items()]
    samples += [(key, {"jpg": picture, "txt": b"a cat"}) for key in ODD_KEYS]
    samples += [(f"good_{number}", {"jpg": picture, "txt": b"a good cat"}) for number in range(good)]
    members = [(f"{key}.{extension}", data) for key, parts in samples for extension, data in parts.items()]
    # The members of a sample need not stand side by side.
    members.append(members.pop(0))
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        special = {"fifo": tarfile.FIFOTYPE, "disk": tarfile.BLKTYPE, "hard": tarfile.LNKTYPE, "soft": tarfile.SYMTYPE}
        for name, kind in special.items():
            info = tarfile.TarInfo(f"link_{name}.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    return expected
