"""Pictures of named characters, drawn from the typefaces that matplotlib ships."""

import unicodedata
from collections.abc import Container
from pathlib import Path

from PIL import Image, ImageFont

__all__ = ["IMAGE_SIZE", "TYPEFACES", "render_typeface"]

IMAGE_SIZE = 32
TYPEFACES = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-BoldOblique",
    "DejaVuSans-Oblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSansMono-BoldOblique",
    "DejaVuSansMono-Oblique",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-BoldItalic",
    "DejaVuSerif-Italic",
    "STIXGeneral",
    "STIXGeneralBol",
    "STIXGeneralBolIta",
    "STIXGeneralItalic",
)
"""Faces with hundreds of named characters; the rest of matplotlib's are placeholders, private use or a few brackets."""

# At 26 px an ascender, a descender and the accents of capitals fit into 32 rows. All characters share one size and one
# baseline, because filling the frame would make o and O, comma and apostrophe, or 2 and superscript 2 the same picture.
_EM_SIZE = 26
_BASELINE = 24
_MARGIN = 1
# Categories C (control, private use, unassigned) and Z (spaces) have no picture; marks (M) are drawn off their base.
_SKIPPED_CATEGORIES = ("C", "Z", "M")


def render_typeface(typeface: str, code_points: Container[int] | None = None) -> dict[int, bytes]:
    """Draws every named character of a typeface.

    Args:
        typeface: One of `TYPEFACES`.
        code_points: Restricts the characters; None for all.

    Returns:
        Code point -> IMAGE_SIZE * IMAGE_SIZE gray bytes, row by row, dark on white; ascending, without empty pictures.
    """
    import matplotlib
    from fontTools.ttLib import TTFont

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{typeface}.ttf"
    with TTFont(path, lazy=True) as font:
        character_map = font.getBestCmap()
    pictures = {}
    pen = _Pen(path)
    for code_point in sorted(character_map):
        wanted = code_points is None or code_point in code_points
        if not wanted or character_map[code_point] == ".notdef" or not _is_drawable(chr(code_point)):
            continue
        picture = pen.draw(chr(code_point))
        if picture is not None:
            pictures[code_point] = picture
    return pictures


class _Pen:
    """Draws single characters of one font file, smaller than the common size only where they would not fit."""

    def __init__(self, path: Path):
        self._path = str(path)
        self._fonts: dict[int, ImageFont.FreeTypeFont] = {}

    def draw(self, character: str) -> bytes | None:
        size = _EM_SIZE
        room = IMAGE_SIZE - 2 * _MARGIN
        while True:
            mask, (_, top) = self._font(size).getmask2(character, mode="L", anchor="ls")
            width, height = mask.size
            if max(width, height) <= room or size == 1:
                break
            size = min(size - 1, size * room // max(width, height)) or 1
        if not width or not height or mask.getbbox() is None:
            return None
        picture = Image.new("L", (IMAGE_SIZE, IMAGE_SIZE), "white")
        row = min(max(_BASELINE + top, _MARGIN), IMAGE_SIZE - _MARGIN - height)
        picture.paste("black", ((IMAGE_SIZE - width) // 2, row), Image.frombytes("L", mask.size, bytes(mask)))
        return picture.tobytes()

    def _font(self, size: int) -> ImageFont.FreeTypeFont:
        if size not in self._fonts:
            # Basic layout is built into Pillow: the pictures do not depend on whether a text shaper is installed.
            self._fonts[size] = ImageFont.truetype(self._path, size, layout_engine=ImageFont.Layout.BASIC)
        return self._fonts[size]


def _is_drawable(character: str) -> bool:
    named = unicodedata.name(character, None) is not None
    return named and not unicodedata.category(character).startswith(_SKIPPED_CATEGORIES)
