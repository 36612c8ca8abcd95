"""SigLIP: every image against every text of the global batch, each pair a binary classification of its own."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from losses.distributed import all_gather_rows, rank, reduce_scatter_rows
from losses.functional import check_precision, exact_products

# Logits of one tile, in bytes. There are two such buffers.
_TILE_BYTES = 32 * 2**20


def sigmoid_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    communication_dtype: torch.dtype | None = None,
    tile_rows: int | None = None,
) -> Tensor:
    """Sum over all pairs of the global batch of -log sigmoid(+-(logit_scale * x.y + logit_bias)), over B.

    No pair's loss depends on another pair, so a tile of logits gives its part of the loss and of all gradients at once:
    nothing of the B x B matrix is kept or made twice. Collectives for W > 1: one all-gather and one reduce-scatter of
    text features, both in the forward (no reduce-scatter if the texts need no gradient). All ranks must pass the same
    shapes.

    Args:
        image_features: [b, d] float32 (or float64), unit length, this rank's b samples.
        text_features: [b, d], likewise.
        logit_scale: One element in the same dtype, already exponentiated.
        logit_bias: One element.
        communication_dtype: Round text features to this type for the gather; own rows are rounded too, so that all
            ranks see equal values, and the gradient passes straight through. Gradients are summed unrounded.
        tile_rows: Rows processed at a time; None chooses by B.

    Returns:
        Scalar of the features' dtype, this rank's share: the mean over ranks of values and of gradients, those of scale
        and bias included, are those of the global batch.

    Raises:
        ValueError: Shapes or dtypes do not fit together.

    Source: Zhai et al., "Sigmoid Loss for Language Image Pre-Training" (2023), equation 1 and algorithm 1.
    """
    _check(image_features, text_features, logit_scale, logit_bias)
    travelling = text_features.detach()
    if communication_dtype is not None:
        travelling = travelling.to(communication_dtype)
    everyone = all_gather_rows(travelling[None])[0].to(text_features.dtype)
    rows = tile_rows or max(1, _TILE_BYTES // (len(everyone) * everyone.element_size()))
    return _Sigmoid.apply(image_features, text_features, logit_scale, logit_bias, everyone, rows)


class _Sigmoid(torch.autograd.Function):
    """Computes the gradients with the loss, so that one exponential pass over a tile serves both."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor,
        everyone: Tensor,
        tile_rows: int,
    ) -> Tensor:
        size, columns = len(image_features), len(everyone)
        needs_grad, needs_text = any(ctx.needs_input_grad[:4]), ctx.needs_input_grad[1]
        loss, bias_grad = everyone.new_zeros(2, dtype=torch.float64).unbind()
        image_grad = torch.empty_like(image_features) if needs_grad else None
        text_grad = torch.zeros_like(everyone) if needs_text else None
        work = everyone.new_empty(min(tile_rows, size), columns)
        with exact_products(everyone.device):
            for begin in range(0, size, tile_rows):
                images = image_features[begin : begin + tile_rows]
                scaled = images * logit_scale
                logits = torch.addmm(logit_bias, scaled, everyone.t(), out=work[: len(images)])
                positives = logits.diagonal(rank() * size + begin)
                # -log sigmoid(-l) for all; for positives it is -log sigmoid(l), which is less by l.
                loss += _softplus(logits).sum(1).sum(dtype=torch.float64) - positives.sum(dtype=torch.float64)
                if not needs_grad:
                    continue
                grad = logits.sigmoid_()
                positives.sub_(1)
                bias_grad += grad.sum(1).sum(dtype=torch.float64)
                torch.mm(grad, everyone, out=image_grad[begin : begin + tile_rows])
                if needs_text:
                    text_grad.addmm_(grad.t(), scaled)
        # Over b, not over B: averaging over ranks supplies the other factor.
        if needs_grad:
            ctx.save_for_backward(
                image_grad * (logit_scale / size),
                reduce_scatter_rows(text_grad[None])[0].div_(size) if needs_text else None,
                # A logit is scale * x.y + bias: its gradient contracted with x.y is x . (gradient of x before scale).
                _like((image_features * image_grad).sum(dtype=torch.float64) / size, logit_scale),
                _like(bias_grad / size, logit_bias),
            )
        return (loss / size).to(image_features.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, weight: Tensor) -> tuple[Tensor | None, ...]:
        pairs = zip(ctx.saved_tensors, ctx.needs_input_grad[:4], strict=True)
        return (*(weight * gradient if needed else None for gradient, needed in pairs), None, None)


def _softplus(logits: Tensor) -> Tensor:
    # Beyond the threshold torch takes the line, which is exact there in double precision too.
    return F.softplus(logits, threshold=40)


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    return value.to(parameter.dtype).reshape(parameter.shape)


def _check(image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> None:
    if image_features.dim() != 2 or image_features.shape != text_features.shape:
        raise ValueError(
            f"sigmoid_loss got image_features {tuple(image_features.shape)} and text_features "
            f"{tuple(text_features.shape)}, expected both [b, d]"
        )
    check_precision(
        "sigmoid_loss",
        image_features=image_features,
        text_features=text_features,
        logit_scale=logit_scale,
        logit_bias=logit_bias,
    )
    if logit_scale.numel() != 1 or logit_bias.numel() != 1:
        raise ValueError(
            f"sigmoid_loss got logit_scale {tuple(logit_scale.shape)} and logit_bias {tuple(logit_bias.shape)}, "
            "expected one element each"
        )
