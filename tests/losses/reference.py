"""Slow, dense float64 versions of the losses, written from their definitions and sharing no code with the package."""

import math

import torch
from torch import Tensor


def direction(rows: Tensor, columns: Tensor, scale: Tensor, masked: Tensor | None = None) -> Tensor:
    """Mean over rows i of -log(exp(s x_i.y_i) / sum_j exp(s x_i.y_j)); masked [B, B] entries leave the sum."""
    losses = []
    for i in range(rows.shape[0]):
        logits = scale * (columns * rows[i]).sum(1)
        others = logits if masked is None else logits[~masked[i]]
        losses.append(torch.logsumexp(others, 0) - logits[i])
    return torch.stack(losses).mean()


def info_nce(rows: Tensor, columns: Tensor, scale: Tensor, masked: Tensor | None = None) -> Tensor:
    """Both directions, averaged."""
    transposed = None if masked is None else masked.t()
    return (direction(rows, columns, scale, masked) + direction(columns, rows, scale, transposed)) / 2


def clip_terms(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """[V, K] symmetric InfoNCE of V image views and K text views of the whole batch."""
    return torch.stack([torch.stack([info_nce(image, text, scale) for text in texts]) for image in images])


def neighbour_terms(
    images: Tensor, neighbours: Tensor, scale: Tensor, *, symmetric: bool = False, slots: Tensor | None = None
) -> Tensor:
    """[V, K] losses of images against constant neighbours [K, B, d]; slots [K, B] mask repeated neighbours."""
    rows = []
    for image in images:
        row = []
        for k, columns in enumerate(neighbours):
            masked = None
            if slots is not None:
                masked = slots[k][:, None] == slots[k][None, :]
                masked = masked & ~torch.eye(len(image), dtype=torch.bool)
            row.append((info_nce if symmetric else direction)(image, columns, scale, masked))
        rows.append(torch.stack(row))
    return torch.stack(rows)


class ListQueue:
    """The neighbour queue as a list of rows, oldest first."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.rows: list[tuple[float, ...]] = []
        self.written = 0

    def enqueue(self, block: Tensor) -> None:
        self.rows = [*self.rows, *map(tuple, block.tolist())][-self.size :]
        self.written += len(block)

    @property
    def pointer(self) -> int:
        return self.written % self.size


def orthogonal_info_nce(batch: int, scale: float) -> float:
    """Loss when images equal their texts and all else is orthogonal: ln(1 + (B - 1) e^-s)."""
    return math.log1p((batch - 1) * math.exp(-scale))


def simclr(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Mean over both views of all samples of -log(exp(positive) / sum over all others but the anchor itself)."""
    rows = torch.cat([first, second])
    losses = []
    for i in range(len(rows)):
        logits = [(rows[i] * row).sum() / temperature for row in rows]
        others = torch.stack([logit for j, logit in enumerate(logits) if j != i])
        losses.append(torch.logsumexp(others, 0) - logits[(i + len(first)) % len(rows)])
    return torch.stack(losses).mean()


def sigmoid(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Sum over all pairs of log(1 + exp(-z (s x_i.y_j + b))), z = 1 for i = j and -1 elsewhere, over the batch."""
    total = images.new_zeros(())
    for i, image in enumerate(images):
        for j, text in enumerate(texts):
            logit = scale * (image * text).sum() + bias
            total = total + torch.logaddexp(torch.zeros_like(logit), -logit if i == j else logit).sum()
    return total / len(images)


def smoothed_info_nce(images: Tensor, texts: Tensor, scale: Tensor, smoothing: float) -> Tensor:
    """Both directions of cross-entropy with targets (1 - e) * one-hot + e / B, averaged."""
    targets = (1 - smoothing) * torch.eye(len(images), dtype=images.dtype) + smoothing / len(images)
    logits = scale * images @ texts.T
    return -((targets * logits.log_softmax(1)).sum() + (targets * logits.log_softmax(0)).sum()) / (2 * len(images))
