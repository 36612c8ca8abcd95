"""CLIP's byte-level BPE tokenizer, offline, with the stock or the DeCLIP id convention."""

import gzip
import hashlib
import html
import importlib.util
import json
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import ftfy
import numpy as np
import regex
from tokenizers import models

from data.errors import DataError

__all__ = ["CaptionTokenizer", "ClipTokenizer"]

_MERGES_FILE = "bpe_simple_vocab_16e6.txt.gz"
_NUM_MERGES = 48_894
_END_OF_WORD = "</w>"
# CLIP's pre-tokenizer, run by the `regex` package because the Rust library's engine follows other Unicode tables.
_WORD = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)
# Captions repeat their words, so a plain dict answers nearly every lookup. The bounds stop hostile captions from
# growing it.
_CACHE_WORDS = 200_000
_CACHE_WORD_CHARS = 40


class CaptionTokenizer(Protocol):
    """What the loader, the evaluation and checkpoints ask of a tokenizer.

    Attributes:
        context_length: Longest id sequence it returns.
        vocab_size: Ids are below it.
        pad_id: Fills the batch after each caption.
        mask_id: Mask token, or None.
        text_ids: Ids that may be masked or drawn instead of others, int64; None means all below the mask id.
        hash: Hex digest of everything that decides the ids.
    """

    context_length: int
    vocab_size: int
    pad_id: int
    mask_id: int | None
    text_ids: np.ndarray | None
    hash: str

    def encode(self, text: str) -> list[int]:
        """Ids of one caption, special tokens included, at least one."""
        ...


class ClipTokenizer:
    """Turns captions into CLIP token ids.

    Ids equal `open_clip.SimpleTokenizer`'s, except that a caption spelling out a special token (`<end_of_text>`) is
    ordinary text: special ids appear only where the trainer puts them, so the one EOT is always the last id.

    Args:
        mask_token: False for stock CLIP (49,408 ids: SOT 49406, EOT 49407); True for DeCLIP, which inserts the mask
            token before them (49,409 ids: mask 49406, SOT 49407, EOT 49408). Weights of the two do not mix.
        context_length: longest id sequence including SOT and EOT, at least 3.
        merges_path: gzipped merges file; by default the one inside the installed open_clip package.

    Raises:
        DataError: no merges file, or a context_length that leaves no room for text.

    Source paper: Radford et al. 2021 (CLIP), section 2.4; Li et al. 2022 (DeCLIP) for the mask token.
    """

    pad_id = 0
    text_ids = None

    def __init__(self, mask_token: bool = False, context_length: int = 77, merges_path: Path | str | None = None):
        if context_length < 3:
            raise DataError(f"context_length is {context_length}; it must be at least 3 to hold SOT, one token and EOT")
        self.mask_token = mask_token
        self.context_length = context_length
        self.merges_path = Path(merges_path) if merges_path is not None else _installed_merges()
        self._byte_symbols = _byte_symbols()
        merges = _read_merges(self.merges_path)
        single = list(self._byte_symbols.values())
        symbols = [*single, *(symbol + _END_OF_WORD for symbol in single), *map("".join, merges)]
        vocabulary = {symbol: index for index, symbol in enumerate(symbols)}
        self._bpe = models.BPE(vocabulary, merges, end_of_word_suffix=_END_OF_WORD, cache_capacity=0)
        self._symbols = symbols
        self._word_ids: dict[str, tuple[int, ...]] = {}
        first_special = len(symbols)
        self.mask_id = first_special if mask_token else None
        self.sot_id = first_special + int(mask_token)
        self.eot_id = self.sot_id + 1
        self.vocab_size = self.eot_id + 1

    def encode(self, text: str) -> list[int]:
        """Encodes one caption.

        Args:
            text: any string; NUL bytes, lone surrogates and broken encodings are cleaned as ftfy does.

        Returns:
            SOT, at most context_length - 2 text ids, EOT.
        """
        room = self.context_length - 2
        ids: list[int] = []
        for word in _WORD.finditer(_clean(text)):
            ids.extend(self._encode_word(word.group()))
            if len(ids) >= room:
                break
        return [self.sot_id, *ids[:room], self.eot_id]

    def published_files(self) -> tuple[dict[str, int], list[tuple[str, str]]]:
        """Vocabulary (stock CLIP's, without the mask token) and merges, as other libraries' tokenizers read them."""
        symbols = [*self._symbols, "<|startoftext|>", "<|endoftext|>"]
        return {symbol: index for index, symbol in enumerate(symbols)}, _read_merges(self.merges_path)

    def decode(self, ids: list[int]) -> str:
        """Returns the text of ids, special ids left out; broken UTF-8 sequences become U+FFFD."""
        text_ids = (index for index in ids if index < len(self._symbols))
        symbols = "".join(self._symbols[index] for index in text_ids).replace(_END_OF_WORD, " ")
        to_byte = {symbol: byte for byte, symbol in self._byte_symbols.items()}
        to_byte[" "] = ord(" ")
        return bytes(to_byte[symbol] for symbol in symbols).decode("utf-8", errors="replace").strip()

    @cached_property
    def hash(self) -> str:
        """Hex digest of everything that decides the ids: vocabulary, merges, special ids and context length."""
        specials = {"mask": self.mask_id, "sot": self.sot_id, "eot": self.eot_id, "pad": self.pad_id}
        described = json.dumps([self._symbols, specials, self.context_length])
        return hashlib.blake2b(described.encode(), digest_size=16).hexdigest()

    def _encode_word(self, word: str) -> tuple[int, ...]:
        ids = self._word_ids.get(word)
        if ids is None:
            symbols = word.encode("utf-8", errors="replace").decode("latin-1").translate(self._byte_symbols)
            ids = tuple(token.id for token in self._bpe.tokenize(symbols))
            if len(word) <= _CACHE_WORD_CHARS and len(self._word_ids) < _CACHE_WORDS:
                self._word_ids[word] = ids
        return ids

    def __reduce__(self) -> tuple[Any, ...]:
        # Spawned workers rebuild from the merges file: smaller and faster than pickling the vocabulary.
        return type(self), (self.mask_token, self.context_length, self.merges_path)


def _clean(text: str) -> str:
    # ftfy and the entity decoder cannot change printable ASCII without "&", which is what most captions are.
    if not (text.isascii() and text.isprintable() and "&" not in text):
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


def _byte_symbols() -> dict[int, str]:
    """One printable stand-in for each byte, in vocabulary order: printable Latin-1 first, as itself."""
    symbols = {byte: chr(byte) for byte in (*range(33, 127), *range(161, 173), *range(174, 256))}
    others = [byte for byte in range(256) if byte not in symbols]
    return symbols | {byte: chr(256 + index) for index, byte in enumerate(others)}


def _read_merges(path: Path) -> list[tuple[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        next(lines)
        merges = [tuple(line.split()) for line, _ in zip(lines, range(_NUM_MERGES), strict=False)]
    if len(merges) != _NUM_MERGES or any(len(merge) != 2 for merge in merges):
        raise DataError(f"{path} is not CLIP's merges file: expected a header and {_NUM_MERGES} lines of two symbols")
    return merges


def _installed_merges() -> Path:
    # find_spec locates the package without running it: importing open_clip takes seconds and pulls in every model.
    spec = importlib.util.find_spec("open_clip")
    path = Path(spec.origin).parent / _MERGES_FILE if spec and spec.origin else None
    if path is None or not path.is_file():
        raise DataError(
            f"CLIP's merges file {_MERGES_FILE} was not found: pip install open_clip_torch or give merges_path"
        )
    return path
