"""Image-text retrieval with several captions per image, without the full score matrix."""

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.evaluation.similarity import TOKEN_TILE_ROWS, are_tokens, pairwise_scores

CUTOFFS = (1, 5, 10)
_TILE_ROWS = 1024


def retrieval_figures(image_embeddings: Tensor, text_embeddings: Tensor, owners: Tensor) -> dict[str, float]:
    """Recall at 1, 5 and 10 in both directions. Collective: rows are spread over the ranks.

    Args:
        image_embeddings: [N, d] or tokens [N, P, d], unit norm, the whole set, the same on every rank.
        text_embeddings: [M, d] or tokens [M, T, d], likewise. Tokens of the query look for their matches in the target.
        owners: int64 [M], the image each caption describes.

    Returns:
        `image_retrieval_recall@k` (text to image) and `text_retrieval_recall@k` (image to text), CLIP_benchmark's
        names. An image counts as found when any of its captions is among the first k. Ties count as misses.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    hits = torch.zeros(2, len(CUTOFFS), dtype=torch.int64, device=owners.device)
    size = TOKEN_TILE_ROWS if are_tokens(image_embeddings) else _TILE_ROWS
    for begin in range(rank * size, len(text_embeddings), world_size * size):
        rows = slice(begin, begin + size)
        scores = pairwise_scores(text_embeddings[rows], image_embeddings)
        best = scores.gather(1, owners[rows, None])
        hits[0] += _hits((scores >= best).sum(dim=1) - 1)
    for begin in range(rank * size, len(image_embeddings), world_size * size):
        rows = slice(begin, begin + size)
        scores = pairwise_scores(image_embeddings[rows], text_embeddings)
        images = torch.arange(begin, begin + len(scores), device=owners.device)
        own = owners[None, :] == images[:, None]
        best = scores.masked_fill(~own, -torch.inf).amax(dim=1, keepdim=True)
        hits[1] += _hits(((scores >= best) & ~own).sum(dim=1))
    dist.all_reduce(hits)
    totals = (len(text_embeddings), len(image_embeddings))
    names = ("image_retrieval_recall", "text_retrieval_recall")
    return {
        f"{name}@{k}": float(hits[side, i]) / totals[side]
        for side, name in enumerate(names)
        for i, k in enumerate(CUTOFFS)
    }


def _hits(better: Tensor) -> Tensor:
    return torch.stack([(better < k).sum() for k in CUTOFFS])
