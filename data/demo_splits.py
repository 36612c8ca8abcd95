"""Which picture of the built-in set is trained on and which is kept for evaluation."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from data.demo_captions import captions
from data.rng import keyed_hash

__all__ = ["HELD_OUT_TYPEFACE", "HELD_OUT_WORDS", "Glyph", "Splits", "split"]

# The only Times-like face with thousands of characters: another design than DejaVu's, while its bold and italic cuts,
# which are trained on, keep the test fair.
HELD_OUT_TYPEFACE = "STIXGeneral"
HELD_OUT_WORDS = 400
# A word seen in a single caption cannot be told apart from that caption's other words.
_MIN_CAPTIONS_PER_WORD = 3

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
        left_out: Reason -> number of glyphs that belong to no split.
    """

    train: list[Glyph]
    held_out_typeface: list[Glyph]
    held_out_words: list[Glyph]
    left_out: dict[str, int]


def split(pictures: Pictures, num_held_out_words: int = HELD_OUT_WORDS) -> Splits:
    """Splits the glyphs so that every evaluation picture has one right answer and was never trained on.

    Characters that look alike (Latin A, Greek Alpha) are often drawn identically, to the pixel. Such pictures stay in
    training, as such pairs do in any real data, but are left out of evaluation.

    Args:
        pictures: Typeface -> code point -> picture.
        num_held_out_words: Size of the held-out-words split; fewer if not enough characters qualify.
    """
    owners: dict[bytes, set[int]] = defaultdict(set)
    trained_faces = {typeface: glyphs for typeface, glyphs in pictures.items() if typeface != HELD_OUT_TYPEFACE}
    for glyphs in pictures.values():
        for code_point, picture in glyphs.items():
            owners[picture].add(code_point)
    lookalikes = {code_point for twins in owners.values() if len(twins) > 1 for code_point in twins}
    trainable = {code_point for glyphs in trained_faces.values() for code_point in glyphs}
    unseen = _choose_unseen(trainable, trainable - lookalikes, num_held_out_words)

    train: dict[tuple[int, bytes], Glyph] = {}
    words: dict[int, list[Glyph]] = defaultdict(list)
    for typeface, glyphs in trained_faces.items():
        for code_point, picture in glyphs.items():
            glyph = Glyph(code_point, typeface, picture)
            if code_point in unseen:
                words[code_point].append(glyph)
            else:
                train.setdefault((code_point, picture), glyph)
    trained_pictures = {picture for _, picture in train}
    held_out = [Glyph(*item) for item in _items(HELD_OUT_TYPEFACE, pictures)]
    trained_characters = [glyph for glyph in held_out if glyph.code_point in trainable - unseen]
    clear = [glyph for glyph in trained_characters if len(owners[glyph.picture]) == 1]
    evaluated = [glyph for glyph in clear if glyph.picture not in trained_pictures]
    drawn = sum(map(len, trained_faces.values())) - sum(map(len, words.values()))
    return Splits(
        train=list(train.values()),
        held_out_typeface=evaluated,
        held_out_words=[_choose_picture(glyphs) for _, glyphs in sorted(words.items())],
        left_out={
            "drawn identically by another trained typeface": drawn - len(train),
            "other pictures of held-out characters": sum(map(len, words.values())) - len(words),
            "held-out typeface: character is not trained on": len(held_out) - len(trained_characters),
            "held-out typeface: same picture as another character": len(trained_characters) - len(clear),
            "held-out typeface: same picture as in training": len(clear) - len(evaluated),
        },
    )


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


def _items(typeface: str, pictures: Pictures) -> Iterable[tuple[int, str, bytes]]:
    return ((code_point, typeface, picture) for code_point, picture in pictures.get(typeface, {}).items())


def _choose_picture(glyphs: list[Glyph]) -> Glyph:
    return min(glyphs, key=lambda glyph: keyed_hash("picture", glyph.code_point, glyph.typeface))
