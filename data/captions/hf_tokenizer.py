"""Tokenizers of Hugging Face's hub behind the interface of `ClipTokenizer`."""

import hashlib
from functools import cached_property
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from data.errors import DataError

__all__ = ["HfTokenizer"]


class HfTokenizer:
    """Turns captions into the ids of a transformers tokenizer.

    Special tokens are put where the tokenizer puts them; one that has an end-of-text token and does not end captions
    with it (GPT-2, Llama) gets it at the end. A caption is never empty.

    Args:
        source: Hub name, or a local folder with the tokenizer's files.
        context_length: Longest id sequence, special tokens included.
        state: What `source` was read to in another process; see `__reduce__`.

    Raises:
        DataError: No such tokenizer, one that needs code from the hub or has no fast form, or no room for text.
    """

    def __init__(self, source: str, context_length: int = 77, state: dict[str, Any] | None = None):
        self.source = source
        self.context_length = context_length
        self._state = state or _read(source)
        self._tokenizer = Tokenizer.from_str(self._state["tokenizer"])
        # Captions are padded by the collate function, which knows the whole batch.
        self._tokenizer.no_padding()
        self.pad_id: int = self._state["pad_id"]
        self.mask_id: int | None = self._state["mask_id"]
        self.eot_id: int | None = self._state["eot_id"]
        self.special_ids: tuple[int, ...] = tuple(self._state["special_ids"])
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        empty = self._tokenizer.encode("").ids
        self._appends_end = self.eot_id is not None and (not empty or empty[-1] != self.eot_id)
        added = len(empty) + self._appends_end
        if context_length < added + 1:
            raise DataError(
                f"context_length is {context_length}; '{source}' needs {added + 1} for its special tokens and one more"
            )
        self._tokenizer.enable_truncation(context_length - self._appends_end)

    def encode(self, text: str) -> list[int]:
        """Encodes one caption into at most context_length ids, special tokens included."""
        # Lone surrogates have no UTF-8 form, and the Rust side accepts nothing else.
        ids = self._tokenizer.encode(text.encode("utf-8", errors="replace").decode("utf-8")).ids
        if self._appends_end:
            ids.append(self.eot_id)
        return ids or [self.pad_id]

    def decode(self, ids: list[int]) -> str:
        """Returns the text of ids, special tokens left out."""
        return self._tokenizer.decode(ids, skip_special_tokens=True).strip()

    @cached_property
    def text_ids(self) -> np.ndarray:
        """The ids of text, int64, ascending: all but the special ones."""
        return np.setdiff1d(np.arange(self.vocab_size), self.special_ids)

    @cached_property
    def hash(self) -> str:
        """Hex digest of everything that decides the ids."""
        described = repr((self._state["tokenizer"], self.pad_id, self.mask_id, self.eot_id, self.context_length))
        return hashlib.blake2b(described.encode(), digest_size=16).hexdigest()

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker gets the tokenizer as read, and needs neither the hub nor the seconds that transformers takes.
        return type(self), (self.source, self.context_length, self._state)


def _read(source: str) -> dict[str, Any]:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"'{source}' gives no tokenizer ({reason}); give a hub name or a folder with tokenizer files as "
            "data.tokenizer hf:<name or folder>, or use data.tokenizer clip"
        ) from None
    if not tokenizer.is_fast:
        raise DataError(f"the tokenizer of '{source}' has no fast form (tokenizer.json); convert it or use another")
    pad_id = tokenizer.pad_token_id
    return {
        "tokenizer": tokenizer.backend_tokenizer.to_str(),
        "pad_id": 0 if pad_id is None else pad_id,
        "mask_id": tokenizer.mask_token_id,
        "eot_id": tokenizer.eos_token_id,
        "special_ids": sorted(tokenizer.all_special_ids),
    }
