"""Picture files reduced to what decides their pixels, before a library parses them.

Metadata is where small files grow large: a parser that keeps every segment of a JPEG or every text chunk of a PNG needs
gigabytes and half a minute for a file of 64 MiB. Here the containers are walked once within bounds: the size is read,
the EXIF orientation too, and of JPEG and PNG only the parts that a decoder needs are handed on.
"""

from dataclasses import dataclass

from data.errors import BadSample

__all__ = ["ImageFile", "read_image_file"]

# Segments of a JPEG before its first scan, chunks of a PNG or WebP. Real files stay far below, also large ones with
# 8 KiB per chunk.
_MAX_PARTS = 50_000
# Progressive files have about ten; each one costs a pass over all coefficients.
_MAX_SCANS = 100
_ORIENTATION = 0x0112
_SHORT, _LONG = 3, 4

_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
_FRAME_HEADERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_TABLES = frozenset({0xC4, 0xCC, 0xDB, 0xDD})
_PROGRESSIVE = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
_STANDALONE = frozenset({0x01, *range(0xD0, 0xD9)})
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_PARTS = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})
# Told apart for a message that helps; none of them is ever parsed.
_OTHER_FORMATS = {
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"%!PS": "PostScript",
    b"\xc5\xd0\xd3\xc6": "PostScript",
    b"%PDF": "PDF",
    b"<svg": "SVG",
    b"\0\0\1\0": "ICO",
    b"8BPS": "Photoshop",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"<!DO": "HTML",
    b"<htm": "HTML",
    b"<?xm": "XML or SVG",
}


@dataclass(frozen=True)
class ImageFile:
    """A picture file whose structure has been read, but none of its pixels.

    Args:
        kind: "JPEG", "PNG" or "WEBP".
        size: (width, height) as stored.
        orientation: EXIF orientation, 1 to 8.
        data: The file, for JPEG and PNG without metadata.
    """

    kind: str
    size: tuple[int, int]
    orientation: int
    data: bytes


def read_image_file(data: bytes) -> ImageFile:
    """Reads the structure of a JPEG, PNG or WebP file.

    Args:
        data: The file's bytes, from an untrusted source.

    Raises:
        BadSample: Another format, or a structure no decoder would take.
    """
    if data.startswith(b"\xff\xd8\xff"):
        found = _read_jpeg(data)
    elif data.startswith(_PNG_SIGNATURE):
        found = _read_png(data)
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        found = _read_webp(data)
    else:
        raise BadSample(f"found {_describe(data)}, expected JPEG, PNG or WebP")
    if not all(found.size):
        raise BadSample(f"image of {found.size[0]} x {found.size[1]} pixels")
    return found


def _describe(data: bytes) -> str:
    start = data[:64].lstrip()
    name = next((name for magic, name in _OTHER_FORMATS.items() if start.startswith(magic)), None)
    if data[4:8] == b"ftyp":
        name = "AVIF, HEIF or video"
    return name or ("nothing" if not data else "bytes of no known format")


def _number(data: bytes, start: int, length: int, order: str = "big") -> int:
    piece = data[start : start + length]
    if len(piece) < length:
        raise BadSample("unreadable image header: the file ends inside it")
    return int.from_bytes(piece, order)


def _read_jpeg(data: bytes) -> ImageFile:
    kept, position, size, orientation = [b"\xff\xd8"], 2, None, None
    progressive, components = False, 0
    for _ in range(_MAX_PARTS):
        start = data.find(b"\xff", position)
        if start < 0:
            break
        while _number(data, start + 1, 1) == 0xFF:
            start += 1
        marker = data[start + 1]
        if marker in _STANDALONE or marker == 0:
            position = start + 2
            continue
        if marker == _END_OF_IMAGE:
            break
        if marker == _START_OF_SCAN:
            if size is None:
                break
            # Otherwise the first scan holds everything, and decoders stop behind it.
            if progressive or _number(data, start + 4, 1) < components:
                _check_scans(data, start)
            kept.append(data[start:])
            return ImageFile("JPEG", size, orientation or 1, b"".join(kept))
        end = start + 2 + max(2, _number(data, start + 2, 2))
        if marker in _FRAME_HEADERS:
            if size is not None:
                raise BadSample("unreadable image header: a JPEG with two frames")
            size = (_number(data, start + 7, 2), _number(data, start + 5, 2))
            progressive, components = marker in _PROGRESSIVE, _number(data, start + 9, 1)
        if marker == 0xE1 and orientation is None and data.startswith(b"Exif\0\0", start + 4):
            orientation = _exif_orientation(data[start + 10 : end])
        if (
            marker in _FRAME_HEADERS
            or marker in _TABLES
            # They tell the colour space.
            or (marker == 0xE0 and data.startswith(b"JFIF\0", start + 4))
            or (marker == 0xEE and data.startswith(b"Adobe", start + 4))
        ):
            kept.append(data[start:end])
        position = end
    else:
        raise BadSample(f"a JPEG with more than {_MAX_PARTS} segments")
    raise BadSample("unreadable image header: a JPEG without a picture in it")


def _check_scans(data: bytes, start: int) -> None:
    if data.count(b"\xff\xda", start) <= _MAX_SCANS:
        return
    # Entropy-coded data holds no such pair, other segments and what follows the picture may: count exactly.
    scans = 0
    while start >= 0 and start + 4 <= len(data):
        marker = data[start + 1]
        if marker == _END_OF_IMAGE:
            return
        if marker == 0 or marker == 0xFF or marker in _STANDALONE:
            start = data.find(b"\xff", start + (1 if marker == 0xFF else 2))
            continue
        scans += marker == _START_OF_SCAN
        if scans > _MAX_SCANS:
            raise BadSample(f"a JPEG with more than {_MAX_SCANS} scans")
        start = data.find(b"\xff", start + 2 + max(2, _number(data, start + 2, 2)))


def _read_png(data: bytes) -> ImageFile:
    if data[12:16] != b"IHDR":
        raise BadSample("unreadable image header: a PNG without its header")
    size = (_number(data, 16, 4), _number(data, 20, 4))
    kept, position, orientation = [_PNG_SIGNATURE], len(_PNG_SIGNATURE), 1
    for _ in range(_MAX_PARTS):
        if position + 12 > len(data):
            # The decoder says how much is missing.
            return ImageFile("PNG", size, orientation, b"".join(kept))
        end = position + 12 + int.from_bytes(data[position : position + 4], "big")
        kind = data[position + 4 : position + 8]
        if kind in _PNG_PARTS:
            kept.append(data[position:end])
        elif kind == b"eXIf":
            orientation = _exif_orientation(data[position + 8 : end - 4])
        if kind == b"IEND":
            return ImageFile("PNG", size, orientation, b"".join(kept))
        position = end
    raise BadSample(f"a PNG with more than {_MAX_PARTS} chunks")


def _read_webp(data: bytes) -> ImageFile:
    kind, orientation = data[12:16], 1
    if kind == b"VP8X":
        size = (_number(data, 24, 3, "little") + 1, _number(data, 27, 3, "little") + 1)
        position = 12
        for _ in range(_MAX_PARTS):
            if position + 8 > len(data):
                break
            length = int.from_bytes(data[position + 4 : position + 8], "little")
            if data[position : position + 4] == b"EXIF":
                exif = data[position + 8 : position + 8 + length]
                orientation = _exif_orientation(exif.removeprefix(b"Exif\0\0"))
            position += 8 + length + length % 2
        else:
            raise BadSample(f"a WebP with more than {_MAX_PARTS} chunks")
    elif kind == b"VP8L":
        bits = _number(data, 21, 4, "little")
        size = ((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
    elif kind == b"VP8 ":
        size = (_number(data, 26, 2, "little") & 0x3FFF, _number(data, 28, 2, "little") & 0x3FFF)
    else:
        raise BadSample("unreadable image header: a WebP without a picture in it")
    return ImageFile("WEBP", size, orientation, data)


def _exif_orientation(exif: bytes) -> int:
    """Orientation in the first directory of an EXIF block; 1 where there is none, or no sense in it."""
    order = {b"II": "little", b"MM": "big"}.get(exif[:2])
    if order is None:
        return 1
    start = int.from_bytes(exif[4:8], order)
    entries = int.from_bytes(exif[start : start + 2], order)
    for entry in range(start + 2, min(start + 2 + 12 * entries, len(exif) - 11), 12):
        if int.from_bytes(exif[entry : entry + 2], order) == _ORIENTATION:
            width = {_SHORT: 2, _LONG: 4}.get(int.from_bytes(exif[entry + 2 : entry + 4], order), 0)
            value = int.from_bytes(exif[entry + 8 : entry + 8 + width], order)
            return value if 1 <= value <= 8 else 1
    return 1
