"""BYOL: predict from each view what a slower copy of the network makes of the image."""

from torch import Tensor

from losses.functional import normalize


def byol_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    """Squared distance of unit vectors, 2 - 2 cos, between each view's prediction and the teacher's projection.

    Args:
        predictions: [V, n, D] floating point, V views of this rank's n samples; normalised here in fp32.
        targets: [n, D], the teacher's; constants.

    Returns:
        Scalar in [0, 4], float32, the mean over views and this rank's samples; the mean over ranks is the global loss.

    Raises:
        ValueError: The shapes do not fit together.

    Source: Grill et al., "Bootstrap your own latent" (2020), equation 2; Yang et al., "Attentive Mask CLIP" (2023).
    """
    if predictions.dim() != 3 or predictions.shape[1:] != targets.shape:
        raise ValueError(
            f"byol_loss got predictions {tuple(predictions.shape)} and targets {tuple(targets.shape)}, "
            "expected [V, n, D] and [n, D]; stack the views along the first dimension"
        )
    cosines = (normalize(predictions) * normalize(targets.detach())).sum(-1)
    return 2.0 - 2.0 * cosines.mean()
