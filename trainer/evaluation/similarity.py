"""How embeddings are compared: one vector each by their cosine, tokens by late interaction.

Embeddings of one vector are [n, d]. Those made of tokens are [n, T, d], zero vectors being padding. Classes have one
embedding for all prompts, [C, d], or with tokens those of every prompt, [C, K, T, d]: a mean of tokens position by
position would mix words that have nothing to do with each other, so the scores are averaged instead.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from losses import late_interaction_scores
from losses.distributed import all_reduce_sum_, rank, world_size

# Of a rank's turn: a number that does not depend on the ranks, so that the scores do not either.
TOKEN_TILE_ROWS = 64


def are_tokens(embeddings: Tensor) -> bool:
    """Whether these embeddings (not those of classes) are made of tokens."""
    return embeddings.ndim == 3


def pairwise_scores(queries: Tensor, targets: Tensor) -> Tensor:
    """Scores [n, m] of queries for targets; with tokens, those of a query look for their matches in the target.

    Args:
        queries: [n, d] or [n, T, d] unit norm.
        targets: [m, d], [m, S, d], or classes.
    """
    if targets.ndim == 4:
        return sum(late_interaction_scores(queries, prompts) for prompts in targets.unbind(1)) / targets.shape[1]
    return late_interaction_scores(queries, targets) if are_tokens(queries) else queries @ targets.T


def class_scores(images: Tensor, classes: Tensor) -> Tensor:
    """Scores [n, C] of images for classes, equal on all ranks. With tokens collective: the work is spread.

    Args:
        images: [n, d] or [n, T, d] unit norm, the same on every rank.
        classes: [C, d] or [C, K, T, d], see `trainer.evaluation.zero_shot.class_embeddings`.
    """
    if not are_tokens(images):
        return pairwise_scores(images, classes)
    scores = images.new_zeros(len(images), len(classes))
    for begin in range(rank() * TOKEN_TILE_ROWS, len(images), world_size() * TOKEN_TILE_ROWS):
        rows = slice(begin, begin + TOKEN_TILE_ROWS)
        scores[rows] = pairwise_scores(images[rows], classes)
    return all_reduce_sum_(scores)


def joined(parts: list[Tensor]) -> Tensor:
    """Embeddings one after the other; those of tokens are padded to one length."""
    if parts[0].ndim > 2:
        longest = max(part.shape[-2] for part in parts)
        parts = [F.pad(part, (0, 0, 0, longest - part.shape[-2])) for part in parts]
    return torch.cat(parts)


def pooled(embeddings: Tensor) -> Tensor:
    """One unit vector [n, d] for each embedding: itself, or the direction of the mean of its tokens."""
    return F.normalize(embeddings.sum(dim=1), dim=-1) if are_tokens(embeddings) else embeddings
