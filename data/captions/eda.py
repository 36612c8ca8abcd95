"""Easy data augmentation of captions: synonym replacement, word swap and word deletion."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from data.errors import DataError

__all__ = ["Eda", "load_synonyms"]

logger = logging.getLogger(__name__)

DELETION_PROBABILITY = 0.1
_MAX_TABLE_BYTES = 64 << 20
_PUNCTUATION = ".,;:!?\"'()[]{}"
_STOPWORD_LIST = """
    a about above after again all also am an and any are as at be because been before being below between both but by
    can could did do does doing down during each few for from further had has have having he her here hers him his how i
    if in into is it its just me more most my no nor not now of off on once only or other our out over own same she
    should so some such than that the their them then there these they this those through to too under until up very was
    we were what when where which while who whom why will with would you your
"""
_STOPWORDS = frozenset(_STOPWORD_LIST.split())


class Eda:
    """Applies one randomly chosen edit to a caption.

    With a synonym table three edits are equally likely: replace every occurrence of one word by one of its synonyms,
    swap two words, delete each word with probability 0.1. Without a table, swap and deletion take half each.

    Args:
        synonyms: word -> its synonyms, lower case; None for no table.

    Source paper: Wei and Zou 2019 (EDA); choice of edits and n = 1 from DeCLIP (Li et al. 2022). Deviations: a swap
    always draws two different positions, and punctuation around a replaced word is kept.
    """

    def __init__(self, synonyms: Mapping[str, Sequence[str]] | None = None):
        self.synonyms = dict(synonyms) if synonyms else {}
        if not self.synonyms:
            logger.info("no synonym table: text augmentation swaps or deletes words, half of the captions each")

    def __call__(self, caption: str, rng: np.random.Generator) -> str:
        """Returns the edited caption; captions of fewer than two words change only by a synonym.

        Args:
            caption: any string, split at whitespace.
            rng: keyed generator of this sample and view.
        """
        words = caption.split()
        if not words:
            return caption
        edits = (_delete, _swap, self._replace) if self.synonyms else (_delete, _swap)
        return " ".join(edits[rng.integers(len(edits))](words, rng))

    def _replace(self, words: list[str], rng: np.random.Generator) -> list[str]:
        cores = [word.strip(_PUNCTUATION).lower() for word in words]
        # dict, not set: the order of candidates must not depend on string hashing.
        candidates = [core for core in dict.fromkeys(cores) if core in self.synonyms and core not in _STOPWORDS]
        if not candidates:
            return words
        chosen = candidates[rng.integers(len(candidates))]
        synonyms = self.synonyms[chosen]
        synonym = synonyms[rng.integers(len(synonyms))]
        return [
            _keep_punctuation(word, synonym) if core == chosen else word
            for word, core in zip(words, cores, strict=True)
        ]


def load_synonyms(path: Path | str) -> dict[str, list[str]]:
    """Reads a synonym table.

    Args:
        path: `.json` with an object {"word": ["synonym", ...]}, or tab-separated text with one line per word: the word,
            then its synonyms. All is lower-cased; synonyms with anything but letters and spaces are left out.

    Raises:
        DataError: unreadable file, wrong structure, or no usable entry.
    """
    path = Path(path)
    expected = 'expected JSON {"word": ["synonym", ...]} or lines of tab-separated words'
    try:
        if path.stat().st_size > _MAX_TABLE_BYTES:
            raise ValueError(f"more than {_MAX_TABLE_BYTES} bytes")
        text = path.read_text(encoding="utf-8")
        rows = _json_rows(text) if path.suffix == ".json" else _tsv_rows(text)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"synonym table {path} cannot be read ({error}); {expected}") from error
    table: dict[str, list[str]] = {}
    for word, synonyms in rows:
        usable = [synonym for synonym in map(str.lower, synonyms) if synonym != word and _is_plain(synonym)]
        if usable:
            table.setdefault(word, []).extend(usable)
    if not table:
        raise DataError(f"synonym table {path} has no usable entry; {expected}")
    return {word: list(dict.fromkeys(synonyms)) for word, synonyms in table.items()}


def _json_rows(text: str) -> list[tuple[str, list[str]]]:
    table = json.loads(text)
    if not isinstance(table, dict) or not all(isinstance(synonyms, list) for synonyms in table.values()):
        raise ValueError("not an object of lists")
    return [(word.lower(), list(map(str, synonyms))) for word, synonyms in table.items()]


def _tsv_rows(text: str) -> list[tuple[str, list[str]]]:
    cells = ([cell.strip() for cell in line.split("\t")] for line in text.splitlines())
    return [(word.lower(), synonyms) for word, *synonyms in cells]


def _is_plain(synonym: str) -> bool:
    return synonym.replace(" ", "").isalpha()


def _keep_punctuation(word: str, synonym: str) -> str:
    start = len(word) - len(word.lstrip(_PUNCTUATION))
    end = len(word.rstrip(_PUNCTUATION))
    return word[:start] + synonym + word[end:]


def _swap(words: list[str], rng: np.random.Generator) -> list[str]:
    if len(words) < 2:
        return words
    first, second = rng.integers(len(words)), rng.integers(len(words) - 1)
    second += second >= first
    words[first], words[second] = words[second], words[first]
    return words


def _delete(words: list[str], rng: np.random.Generator) -> list[str]:
    if len(words) < 2:
        return words
    draws = rng.random(len(words)).tolist()
    kept = [word for word, draw in zip(words, draws, strict=True) if draw >= DELETION_PROBABILITY]
    return kept or [words[rng.integers(len(words))]]
