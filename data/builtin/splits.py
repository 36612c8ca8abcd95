"""Which picture of the built-in set is trained on and which is kept for evaluation."""

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from data.builtin.captions import captions
from data.rng import keyed_hash

__all__ = ["HELD_OUT_TYPEFACE", "HELD_OUT_WORDS", "Glyph", "Splits", "split"]

# The only Times-like face with thousands of characters: another design than DejaVu's, while its bold and italic cuts,
# which are trained on, keep the test fair.
HELD_OUT_TYPEFACE = "STIXGeneral"
HELD_OUT_WORDS = 400
# A word seen in a single caption cannot be told apart from that caption's other words.
_MIN_CAPTIONS_PER_WORD = 3
# Styled letters that no typeface for text draws as its plain letters.
_OWN_SHAPES = frozenset(("SCRIPT", "FRAKTUR", "BLACK-LETTER", "DOUBLE-STRUCK"))

Pictures = Mapping[str, Mapping[int, bytes]]


class Glyph(NamedTuple):
    """One picture: a character as a typeface draws it."""

    code_point: int
    typeface: str
    picture: bytes


@dataclass(frozen=True)
class Splits:
    """The split of all glyphs.

    Attributes:
        train: Distinct (character, picture) pairs; no held-out typeface and no held-out character among them.
        held_out_typeface: Characters that are trained on, in the typeface that is not.
        held_out_words: Characters never trained on, one picture each, captioned with words that are all trained on.
        left_out: Split and reason -> number of glyphs left out for it.
    """

    train: list[Glyph]
    held_out_typeface: list[Glyph]
    held_out_words: list[Glyph]
    left_out: dict[str, int]


def split(pictures: Pictures, num_held_out_words: int = HELD_OUT_WORDS) -> Splits:
    """Splits the glyphs so that every evaluation picture has one right answer and was never trained on.

    Some characters look alike (Latin A, Greek Alpha): typefaces draw them identically, to the pixel. Training keeps
    them, as any real data set would; an evaluation set keeps at most one of each group.

    Args:
        pictures: Typeface -> code point -> picture.
        num_held_out_words: Size of the held-out-words set; fewer if not enough characters qualify.
    """
    trained_faces = {typeface: glyphs for typeface, glyphs in pictures.items() if typeface != HELD_OUT_TYPEFACE}
    trainable = {code_point for glyphs in trained_faces.values() for code_point in glyphs}
    lookalikes = _lookalikes(pictures)
    unseen = _choose_unseen(trainable, trainable - set(lookalikes), num_held_out_words)
    left_out: Counter[str] = Counter()

    train: dict[tuple[int, bytes], Glyph] = {}
    words: dict[int, list[Glyph]] = defaultdict(list)
    for glyph in _glyphs(trained_faces):
        if glyph.code_point in unseen:
            words[glyph.code_point].append(glyph)
        elif (glyph.code_point, glyph.picture) in train:
            left_out["training: drawn identically by another typeface"] += 1
        else:
            train[glyph.code_point, glyph.picture] = glyph

    trained_pictures = {picture for _, picture in train}
    evaluated: dict[int, Glyph] = {}
    for glyph in _glyphs({HELD_OUT_TYPEFACE: pictures.get(HELD_OUT_TYPEFACE, {})}):
        if glyph.code_point not in trainable or glyph.code_point in unseen:
            left_out["held-out typeface: character is not trained on"] += 1
        elif _is_typeface_in_disguise(glyph.code_point):
            left_out["held-out typeface: character is a bold, italic or sans-serif form of another"] += 1
        elif glyph.picture in trained_pictures:
            left_out["held-out typeface: picture also occurs in training"] += 1
        elif lookalikes.get(glyph.code_point, set()) & evaluated.keys():
            left_out["held-out typeface: looks like another evaluated character"] += 1
        else:
            evaluated[glyph.code_point] = glyph
    left_out["held-out words: further pictures of the characters"] = sum(len(glyphs) - 1 for glyphs in words.values())
    return Splits(
        train=list(train.values()),
        held_out_typeface=list(evaluated.values()),
        held_out_words=[_choose_picture(glyphs) for _, glyphs in sorted(words.items())],
        left_out=dict(left_out),
    )


def _lookalikes(pictures: Pictures) -> dict[int, set[int]]:
    """Character -> the others that have a picture in common with it, in the same or in two typefaces."""
    owners: dict[bytes, set[int]] = defaultdict(set)
    for glyph in _glyphs(pictures):
        owners[glyph.picture].add(glyph.code_point)
    same: dict[int, set[int]] = defaultdict(set)
    for group in owners.values():
        for code_point in group if len(group) > 1 else ():
            same[code_point] |= group - {code_point}
    return same


def _is_typeface_in_disguise(code_point: int) -> bool:
    """Whether it is a plain character in another style: "mathematical bold capital a" is trained on as Latin A, too."""
    character = chr(code_point)
    is_styled = unicodedata.decomposition(character).startswith("<font>")
    return is_styled and _OWN_SHAPES.isdisjoint(unicodedata.name(character).split())


def _choose_unseen(trainable: set[int], candidates: set[int], count: int) -> set[int]:
    """Takes characters in hashed order while every word of theirs stays well covered by the others."""
    uses = Counter(word for code_point in trainable for word in _words(code_point))
    chosen: set[int] = set()
    for code_point in sorted(candidates, key=lambda code_point: keyed_hash("held-out words", code_point)):
        if len(chosen) == count:
            break
        words = _words(code_point)
        if len(words) > 1 and all(uses[word] > _MIN_CAPTIONS_PER_WORD for word in words):
            chosen.add(code_point)
            uses.subtract(words)
    return chosen


def _words(code_point: int) -> set[str]:
    return set(captions(code_point)[0].split())


def _glyphs(pictures: Pictures) -> Iterator[Glyph]:
    for typeface, glyphs in pictures.items():
        for code_point, picture in glyphs.items():
            yield Glyph(code_point, typeface, picture)


def _choose_picture(glyphs: list[Glyph]) -> Glyph:
    return min(glyphs, key=lambda glyph: keyed_hash("picture", glyph.code_point, glyph.typeface))
