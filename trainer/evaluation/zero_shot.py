"""Zero-shot classification with prompt ensembles: of embeddings, or with tokens of scores."""

import torch
from torch import Tensor

from data.captions.tokenizer import CaptionTokenizer
from trainer.evaluation.encode import Encoder, encode_texts
from trainer.evaluation.similarity import are_tokens, class_scores

# Scores of so many images are in memory at a time.
_TILE_ROWS = 4096


def class_embeddings(
    encoder: Encoder, tokenizer: CaptionTokenizer, class_names: list[str], templates: list[str], batch_size: int
) -> Tensor:
    """Class embeddings [C, d]: the normalised mean over the templates' unit-norm embeddings. Collective.

    With tokens all prompts are kept, [C, templates, T, d], see `trainer.evaluation.similarity`.
    """
    prompts = [template.replace("{c}", name) for name in class_names for template in templates]
    embeddings = encode_texts(encoder, tokenizer, prompts, batch_size)
    if are_tokens(embeddings):
        return embeddings.unflatten(0, (len(class_names), len(templates)))
    means = embeddings.view(len(class_names), len(templates), -1).mean(dim=1)
    return torch.nn.functional.normalize(means, dim=-1)


def zero_shot_ranks(image_embeddings: Tensor, labels: Tensor, classes: Tensor) -> Tensor:
    """How many other classes score at least as high as the right one, int64 [N]; 0 is a top-1 hit.

    Args:
        image_embeddings: [N, d] or [N, T, d] unit norm.
        labels: int64 [N] in [0, C).
        classes: From `class_embeddings`.
    """
    parts = zip(image_embeddings.split(_TILE_ROWS), labels.split(_TILE_ROWS), strict=True)
    return torch.cat([labels[:0], *(score_ranks(class_scores(images, classes), own) for images, own in parts)])


def classification_figures(ranks: Tensor, labels: Tensor) -> dict[str, float]:
    """Top-1, top-5 and mean per-class accuracy, in CLIP_benchmark's names.

    Args:
        ranks: int64 [N], as `zero_shot_ranks`: ties count as misses, so a collapsed model scores zero.
        labels: int64 [N].

    Returns:
        `acc1`, `acc5`, `mean_per_class_recall` in [0, 1].
    """
    found = ranks < 1
    seen = torch.bincount(labels)
    hits = torch.bincount(labels[found], minlength=len(seen))
    present = seen > 0
    return {
        "acc1": float(found.double().mean()),
        "acc5": float((ranks < 5).double().mean()),
        "mean_per_class_recall": float((hits[present].double() / seen[present]).mean()),
    }


def score_ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """As `zero_shot_ranks`, of scores [N, C]."""
    target = scores.gather(1, labels[:, None])
    return (scores >= target).sum(dim=1) - 1
