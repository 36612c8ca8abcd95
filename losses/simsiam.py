"""SimSiam: image self-supervision from two views without negatives."""

import torch
from torch import Tensor

from losses.distributed import all_reduce_sum_, world_size
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

    Two all-reduces, so that the figure is the global batch's whatever the number of ranks.

    Args:
        features: [V, n, D], samples of V views on this rank, n equal on all ranks and W * n > 1; statistics are per
            view, then averaged.

    Returns:
        Scalar float32: about 1 / sqrt(D) when healthy, towards 0 when all samples share one direction.
    """
    unit = normalize(features).double()
    count = unit.shape[-2] * world_size()
    mean = all_reduce_sum_(unit.sum(dim=-2)) / count
    squares = all_reduce_sum_((unit - mean.unsqueeze(-2)).square().sum(dim=-2))
    return (squares / (count - 1)).sqrt().mean().float()
