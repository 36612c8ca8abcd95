"""Label smoothing of the contrastive softmax, without another look at the logits.

A smoothed target gives 1 - e to the positive and e / B to each of the B columns, so that a row's loss grows by
e * (its positive logit - the mean of its logits). Logits are linear in the features: their mean over a row is the
logit against the mean text, and over the whole matrix that of the two means. Both directions grow alike.
"""

import torch
from torch import Tensor

from losses.distributed import world_size
from losses.functional import exact_products


def smoothing_sums(image_features: Tensor, text_features: Tensor) -> Tensor:
    """This rank's part of what `smoothing_term` needs of all ranks, to travel as `extra_sums` of `contrastive_terms`.

    Args:
        image_features: [b, d], unit length.
        text_features: [b, d], likewise.

    Returns:
        float64 [2 d], without gradient.
    """
    return torch.cat([features.detach().sum(0, dtype=torch.float64) for features in (image_features, text_features)])


def smoothing_term(image_features: Tensor, text_features: Tensor, logit_scale: Tensor, sums: Tensor) -> Tensor:
    """What label smoothing adds to the symmetric InfoNCE of one pair of views, per unit of smoothing.

    Args:
        image_features: [b, d] float32 (or float64), unit length, this rank's samples.
        text_features: [b, d], likewise.
        logit_scale: One element, already exponentiated.
        sums: `smoothing_sums` of all ranks, added up.

    Returns:
        Scalar, this rank's share: the mean over ranks of values and gradients are those of the global batch. Times the
        smoothing e, and added to the InfoNCE, it is cross-entropy with targets (1 - e) * one-hot + e / B.

    Source: Szegedy et al., "Rethinking the Inception Architecture for Computer Vision" (2016), section 7; used by Jia
    et al. (ALIGN, 2021).
    """
    size = len(image_features)
    mean_image, mean_text = (sums / (size * world_size())).to(image_features.dtype).chunk(2)
    positive = (image_features * text_features).sum(1).mean()
    # The product of the global means, as a share: each factor's gradient comes from the ranks that own its rows.
    with exact_products(image_features.device):
        mean = image_features.mean(0) @ mean_text + mean_image @ text_features.mean(0) - mean_image @ mean_text
    return (logit_scale * (positive - mean)).squeeze()
