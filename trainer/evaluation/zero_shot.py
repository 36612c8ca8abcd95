"""Zero-shot classification with prompt ensembles in embedding space."""

import torch
from torch import Tensor

from data.tokenizer import CaptionTokenizer
from trainer.engine import Engine
from trainer.evaluation.encode import encode_texts

_TILE_ROWS = 4096


def class_embeddings(
    engine: Engine, tokenizer: CaptionTokenizer, class_names: list[str], templates: list[str], batch_size: int
) -> Tensor:
    """Unit-norm class embeddings [C, embed_dim]: the normalised mean over the templates' unit-norm embeddings."""
    prompts = [template.replace("{c}", name) for name in class_names for template in templates]
    embeddings = encode_texts(engine, tokenizer, prompts, batch_size)
    means = embeddings.view(len(class_names), len(templates), -1).mean(dim=1)
    return torch.nn.functional.normalize(means, dim=-1)


def zero_shot_figures(image_embeddings: Tensor, labels: Tensor, classes: Tensor) -> dict[str, float]:
    """Top-1, top-5 and mean per-class accuracy, in CLIP_benchmark's names.

    Args:
        image_embeddings: [N, d] unit norm.
        labels: int64 [N] in [0, C).
        classes: [C, d] unit-norm class embeddings.

    Returns:
        `acc1`, `acc5`, `mean_per_class_recall` in [0, 1]. Ties count as misses, so a collapsed model scores zero.
    """
    counts = torch.zeros(len(classes), 3, dtype=torch.int64, device=labels.device)
    for begin in range(0, len(labels), _TILE_ROWS):
        rows = slice(begin, begin + _TILE_ROWS)
        scores = image_embeddings[rows] @ classes.T
        target = scores.gather(1, labels[rows, None])
        better = (scores >= target).sum(dim=1) - 1
        counts.index_add_(0, labels[rows], torch.stack([torch.ones_like(better), better < 1, better < 5], dim=1))
    present = counts[counts[:, 0] > 0].double()
    total = present.sum(dim=0)
    return {
        "acc1": float(total[1] / total[0]),
        "acc5": float(total[2] / total[0]),
        "mean_per_class_recall": float((present[:, 1] / present[:, 0]).mean()),
    }
