"""SimSiam: image self-supervision from two views without negatives."""

import torch
from torch import Tensor

from losses.functional import normalize


def simsiam_loss(projections: Tensor, predictions: Tensor) -> Tensor:
    """Negative cosine between each view's prediction and the other view's projection, whose gradient is stopped.

    Args:
        projections: [2, n, D], the projector's output for two views of n images.
        predictions: [2, n, D], the predictor's output on the same views.

    Returns:
        Scalar in [-1, 1], float32, the mean over this rank's n samples; the mean over ranks is the global loss.
        -1 is a perfect match, but also what a collapsed projector reaches: watch `feature_std`.

    Raises:
        ValueError: The two tensors differ in shape or do not hold two views.

    Source: Chen and He, "Exploring Simple Siamese Representation Learning" (2021), equations 1-4.
    """
    if projections.shape != predictions.shape or projections.dim() != 3 or projections.shape[0] != 2:
        raise ValueError(
            f"simsiam_loss got projections {tuple(projections.shape)} and predictions {tuple(predictions.shape)}, "
            "expected both [2, n, D]; stack the two views along the first dimension"
        )
    targets = normalize(projections.detach()).flip(0)
    return -(normalize(predictions) * targets).sum(-1).mean()


@torch.no_grad()
def feature_std(features: Tensor) -> Tensor:
    """Mean over dimensions of the standard deviation of unit-length features: a detector of collapse.

    Args:
        features: [V, n, D], n > 1 samples of V views; statistics are per view, then averaged.

    Returns:
        Scalar float32: about 1 / sqrt(D) when healthy, towards 0 when all samples share one direction.
    """
    return normalize(features).std(dim=-2).mean()
