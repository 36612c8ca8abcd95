"""Captions of characters, made from their Unicode names."""

import re
import unicodedata

__all__ = ["captions"]

# Unicode's formal terms that people do not use, or that the standard itself lists as mistaken.
_EVERYDAY_NAMES = {
    "FULL STOP": "period",
    "SOLIDUS": "slash",
    "REVERSE SOLIDUS": "backslash",
    "LOW LINE": "underscore",
    "COMMERCIAL AT": "at sign",
    "NUMBER SIGN": "hash sign",
    "HYPHEN-MINUS": "hyphen",
    "CIRCUMFLEX ACCENT": "caret",
    "GRAVE ACCENT": "backtick",
    "VERTICAL LINE": "vertical bar",
    "PILCROW SIGN": "paragraph sign",
    "INTERROBANG": "question exclamation mark",
}
_DIRECTIONS = {"leftwards": "left", "rightwards": "right", "upwards": "up", "downwards": "down"}
_CASES = {"small": "lowercase", "capital": "uppercase"}
_CASED_LETTER = re.compile(
    r"(?P<script>latin|greek|cyrillic|armenian|georgian) (?P<case>small|capital) letter (?P<rest>.+)"
)
_NUMBER_SUFFIX = re.compile(r"-0?(?=\d)")
_BRAILLE_DOTS = re.compile(r"dots-(\d+)")


def captions(code_point: int) -> list[str]:
    """Describes a named character as a person would write it.

    Args:
        code_point: A character with a Unicode name.

    Returns:
        At least one lower-case caption. The first is the full name, different for every character; the others are
        everyday wordings, which may fit more than one character.
    """
    name = unicodedata.name(chr(code_point))
    full = _full_name(name)
    wordings = [full, " ".join(_DIRECTIONS.get(word, word) for word in full.split())]
    if name in _EVERYDAY_NAMES:
        wordings.append(_EVERYDAY_NAMES[name])
    letter = _CASED_LETTER.fullmatch(full)
    if letter:
        script, case, rest = letter["script"], _CASES[letter["case"]], letter["rest"]
        wordings.append(f"{case} {script} letter {rest}")
        if script == "latin":
            # Only Latin letters go by without their script: "capital letter a" means no other.
            wordings.append(f"{letter['case']} letter {rest}")
    return list(dict.fromkeys(wordings))


def _full_name(name: str) -> str:
    # "BRAILLE PATTERN DOTS-1245" and "DOMINO TILE HORIZONTAL-01-03" hide their numbers inside one word.
    text = name.lower().replace("vulgar fraction", "fraction")
    text = _BRAILLE_DOTS.sub(lambda dots: "dots " + " ".join(dots[1]), text)
    return _NUMBER_SUFFIX.sub(" ", text)
