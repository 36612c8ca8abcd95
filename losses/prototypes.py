"""Prototypes: features classified to the clusters of their partner modality."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from losses.functional import at_least_fp32, exact_products

# Logits of one chunk of rows against all prototypes, in bytes; what is kept for the backward pass is of the features'
# size.
_CHUNK_BYTES = 128 * 2**20


def prototype_loss(
    features: Tensor,
    prototypes: Tensor,
    scale: Tensor,
    labels: Tensor,
    *,
    members: Tensor,
    teacher: Tensor | None = None,
    target_temperature: float = 0.0,
) -> Tensor:
    """Cross entropy of features against prototypes, with hard labels or the soft targets of a teacher.

    logits_i = scale * features_i . prototypes; targets_i = softmax(teacher[labels_i] . teacher / target_temperature),
    or one-hot at labels_i. Prototypes without members take part in neither. Computed a chunk of rows at a time, with
    its gradient, so that no matrix of all rows against all prototypes is kept. Local: no collective.

    Args:
        features: [b, p] float, this rank's rows.
        prototypes: [K, p], constants.
        scale: Scalar or [1], exponentiated.
        labels: int [b] in [0, K), or -1 for a row that has none and counts as a loss of 0.
        members: bool [K], prototypes that stand for at least one sample; labels name such ones only.
        teacher: [K, d], constants whose similarities are the targets; None for hard labels.
        target_temperature: Of the targets; 0 or less for hard labels.

    Returns:
        Scalar, at least float32: the mean over the b rows. The mean over ranks is the loss of the global batch.
        Differentiable in `features` and `scale`.

    Source: Chen et al., "Prototypical Contrastive Language Image Pretraining", 2022.
    """
    if target_temperature <= 0:
        teacher = None
    return _PrototypeLoss.apply(features, scale, prototypes, labels, members, teacher, target_temperature)


class _PrototypeLoss(torch.autograd.Function):
    """The loss together with its gradients, which are cheap while a chunk of logits is there."""

    @staticmethod
    def forward(
        ctx,
        features: Tensor,
        scale: Tensor,
        prototypes: Tensor,
        labels: Tensor,
        members: Tensor,
        teacher: Tensor | None,
        target_temperature: float,
    ) -> Tensor:
        rows = at_least_fp32(features)
        prototypes = prototypes.to(rows.dtype)
        factor = scale.to(rows.dtype).reshape(())
        excluded = torch.zeros(len(members), dtype=rows.dtype, device=rows.device).masked_fill_(~members, -torch.inf)
        loss, scale_gradient = rows.new_zeros(()), rows.new_zeros(())
        gradient = torch.empty_like(rows)
        chunk = max(1, _CHUNK_BYTES // (rows.element_size() * len(prototypes)))
        with exact_products(rows.device):
            for start in range(0, len(rows), chunk):
                part = slice(start, start + chunk)
                counted = (labels[part] >= 0).unsqueeze(1)
                own = labels[part].long().clamp(min=0)
                similarity = rows[part] @ prototypes.t()
                log_probability = torch.log_softmax(similarity * factor + excluded, dim=1)
                if teacher is None:
                    losses = -log_probability.gather(1, own.unsqueeze(1))
                    difference = log_probability.exp_().scatter_add_(1, own.unsqueeze(1), -torch.ones_like(losses))
                else:
                    targets = _targets(teacher.to(rows.dtype), own, target_temperature, excluded)
                    # 0 times -inf, where neither has any probability, is no loss.
                    losses = -(targets * log_probability.masked_fill(excluded < 0, 0.0)).sum(1, keepdim=True)
                    difference = log_probability.exp_().sub_(targets)
                # Not a product with the mask: a row without a label may be anything.
                difference = difference.masked_fill_(~counted, 0.0)
                loss += losses.masked_fill(~counted, 0.0).sum()
                scale_gradient += (difference * similarity).masked_fill_(~counted, 0.0).sum()
                gradient[part] = (difference @ prototypes) * factor
        ctx.save_for_backward(gradient / len(rows), scale_gradient / len(rows), features, scale)
        return loss / len(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor):
        gradient, scale_gradient, features, scale = ctx.saved_tensors
        return (
            (gradient * grad_loss).to(features.dtype),
            (scale_gradient * grad_loss).to(scale.dtype).reshape(scale.shape),
            *(None,) * 5,
        )


def _targets(teacher: Tensor, labels: Tensor, temperature: float, excluded: Tensor) -> Tensor:
    similarity = teacher[labels] @ teacher.t()
    return torch.softmax(similarity.div_(temperature).add_(excluded), dim=1)
