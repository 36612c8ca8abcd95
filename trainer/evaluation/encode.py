"""Embeddings of an evaluation set: every rank encodes its batches, all ranks get all of them.

Batches are cut the same way for any number of ranks, and each row is computed by one rank and added to zeros from the
others, so the embeddings do not depend on the number of ranks.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from data.captions.tokenizer import CaptionTokenizer
from trainer.evaluation.similarity import are_tokens
from trainer.methods.base import Method


class Encoder(Protocol):
    """What evaluation asks of a model: an engine in training, or a trained model by itself."""

    method: Method
    device: torch.device

    def __call__(self, phase: str, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Run one phase of the method's forward."""

    def evaluating(self) -> AbstractContextManager[None]:
        """Evaluation mode for the duration of a block."""


@torch.no_grad()
def encode_texts(encoder: Encoder, tokenizer: CaptionTokenizer, texts: list[str], batch_size: int) -> Tensor:
    """Unit-norm embeddings of all texts on every rank: [n, d], or tokens [n, T, d] up to the longest. Collective."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    encoded = [tokenizer.encode(text) for text in texts]
    longest = max((len(ids) for ids in encoded), default=0)
    embeddings = torch.zeros(0, encoder.method.model.embed_dim, device=encoder.device)
    begins = range(0, len(texts), batch_size)
    for round_begin in range(0, len(begins), world_size):
        index = round_begin + rank
        # A rank without a batch left repeats the first: under ZeRO 3 every forward needs all ranks.
        begin = begins[index] if index < len(begins) else 0
        inputs = _tokens(tokenizer, encoded[begin : begin + batch_size], encoder.device)
        rows = encoder("text", inputs)["embeddings"]
        if not len(embeddings):
            embeddings = rows.new_zeros(len(texts), *((longest,) if are_tokens(rows) else ()), rows.shape[-1])
        if index < len(begins):
            place = embeddings[begin : begin + batch_size]
            (place[:, : rows.shape[1]] if are_tokens(rows) else place).copy_(rows)
    dist.all_reduce(embeddings)
    return embeddings


@torch.no_grad()
def encode_images(
    encoder: Encoder, loader: Iterable[dict[str, Any]], num_samples: int, rounds: int, image_size: int
) -> Tensor:
    """Unit-norm embeddings of all images, on every rank: [num_samples, d], or tokens [num_samples, P, d]. Collective.

    Args:
        encoder: The engine or model.
        loader: This rank's batches, with `images` and their rows in `sample_index`.
        num_samples: Size of the whole set.
        rounds: Batches of the busiest rank; ranks with fewer run blanks, as ZeRO 3 needs equal numbers of forwards.
        image_size: Side of the images.
    """
    embeddings = torch.zeros(0, encoder.method.model.embed_dim, device=encoder.device)
    done = 0
    for batch in loader:
        images = batch["images"].to(encoder.device, non_blocking=True)
        rows = encoder("image", {"images": images})["embeddings"]
        if not done:
            embeddings = rows.new_zeros(num_samples, *rows.shape[1:])
        embeddings[batch["sample_index"].to(encoder.device)] = rows
        done += 1
    blank = torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8, device=encoder.device)
    for _ in range(rounds - done):
        rows = encoder("image", {"images": blank})["embeddings"]
        if not len(embeddings):
            embeddings = rows.new_zeros(num_samples, *rows.shape[1:])
    dist.all_reduce(embeddings)
    return embeddings


def _tokens(tokenizer: CaptionTokenizer, encoded: list[list[int]], device: torch.device) -> dict[str, Tensor]:
    lengths = np.array([len(ids) for ids in encoded])
    token_ids = np.full((len(encoded), lengths.max()), tokenizer.pad_id, dtype=np.int64)
    for row, ids in zip(token_ids, encoded, strict=True):
        row[: len(ids)] = ids
    return {
        "token_ids": torch.from_numpy(token_ids).to(device),
        "text_lengths": torch.from_numpy(lengths),
    }
