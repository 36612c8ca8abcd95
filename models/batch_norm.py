"""Batch normalisation with per-view and cross-rank statistics."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

BATCH_NORM_MODES = ("sync", "local")


class BatchNorm(nn.Module):
    """Batch normalisation over the batch, and optionally over the ranks, in at least fp32.

    The parameters and buffers carry the names of `torch.nn.BatchNorm2d`, so state dicts are interchangeable. Running
    statistics stay in fp32 when the module is cast to a half precision, and half-precision weights are widened for
    the arithmetic. On one rank, or with `sync=False`, this is `torch.nn.functional.batch_norm`.

    A forward that runs inside a backward pass is a recomputation by activation checkpointing (of any implementation):
    it normalises with the same batch statistics but leaves the running statistics alone, which the first forward has
    already updated. Every rank repeats the collective then, in the same order. Recomputations that run outside a
    backward pass, such as the second forward of a gradient cache, belong in `frozen_running_statistics`.

    Args:
        num_features: Number of channels C.
        sync: Take the statistics over all ranks of torch.distributed's default group when it is initialised: one
            all-reduce in the forward and one in the backward, whatever the number of views.
        eps: Added to the variance.
        momentum: Weight of a batch in the running statistics.
        zero_init_weight: Start from a gain of zero instead of one.
    """

    def __init__(
        self,
        num_features: int,
        *,
        sync: bool,
        eps: float = 1e-5,
        momentum: float = 0.1,
        zero_init_weight: bool = False,
    ):
        super().__init__()
        self.num_features = num_features
        self.sync = sync
        self.eps = eps
        self.momentum = momentum
        self.updates_running_statistics = True
        # A locked tower's layer keeps its statistics and normalises with them, in training too.
        self.locked = False
        self.weight = nn.Parameter(torch.zeros(num_features) if zero_init_weight else torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        # Explicitly fp32, because deepspeed.zero.Init makes torch.zeros return the training dtype.
        self.register_buffer("running_mean", torch.zeros(num_features).float())
        self.register_buffer("running_var", torch.ones(num_features).float())
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))

    def forward(self, x: Tensor, views: int = 1) -> Tensor:
        """Normalises each channel, per view: V views are as V sequential calls, in one.

        Args:
            x: [n, C] or [n, C, H, W], or with several views [V * n, C] or [V * n, C, H, W], one after the other, or
                [V, n, C], whose shape says how many they are.
            views: The number V of views that the first dimension holds.

        Returns:
            Tensor of the shape and dtype of `x`.

        Raises:
            ValueError: On another shape, or when training with a single value per channel on a single rank.
        """
        channel_dim = 2 if x.ndim == 3 else 1
        if x.ndim not in (2, 3, 4) or x.shape[channel_dim] != self.num_features:
            raise ValueError(
                f"BatchNorm got shape {tuple(x.shape)}; expected [n, C], [V, n, C] or [n, C, H, W] "
                f"with C = {self.num_features}"
            )
        if views != 1 and (x.ndim == 3 or views < 1 or x.shape[0] % views):
            raise ValueError(f"BatchNorm got shape {tuple(x.shape)}, whose first dimension is not {views} equal views")
        if x.ndim == 3:
            return self._normalise(x.flatten(0, 1), x.shape[0]).view(x.shape)
        return self._normalise(x, views)

    def train(self, mode: bool = True) -> "BatchNorm":
        """As `nn.Module.train`; a locked layer stays in evaluation mode."""
        return super().train(mode and not self.locked)

    def extra_repr(self) -> str:
        return f"{self.num_features}, sync={self.sync}, eps={self.eps}, momentum={self.momentum}"

    def _normalise(self, x: Tensor, views: int) -> Tensor:
        if self.training and self.sync and _world_size() > 1:
            return self._normalise_across_ranks(x, views)
        if not self.training or views == 1:
            return self._normalise_locally(x)
        return torch.cat([self._normalise_locally(part) for part in x.chunk(views)])

    def _normalise_locally(self, x: Tensor) -> Tensor:
        dtype = self.running_mean.dtype
        mean, var = self.running_mean, self.running_var
        if self.training and self._tracks_this_forward():
            self.num_batches_tracked.add_(1)
        elif self.training:
            # Not None: a recomputation must save as many tensors for the backward as the first forward did.
            mean, var = mean.clone(), var.clone()
        return F.batch_norm(
            x,
            mean,
            var,
            self.weight.to(dtype),
            self.bias.to(dtype),
            training=self.training,
            momentum=self.momentum,
            eps=self.eps,
        )

    def _normalise_across_ranks(self, x: Tensor, views: int) -> Tensor:
        x = _dense(x)
        mean, var, count = _global_statistics(x.detach(), views, self.eps)
        if self._tracks_this_forward():
            self._update_running_statistics(mean, var, count)
        dtype = mean.dtype
        return _SynchronisedNormalise.apply(
            x, self.weight.to(dtype), self.bias.to(dtype), mean, torch.rsqrt(var + self.eps), count, self.eps
        )

    @torch.no_grad()
    def _update_running_statistics(self, mean: Tensor, var: Tensor, count: Tensor) -> None:
        unbiased_var = var * (count / (count - 1).clamp(min=1)).to(var.dtype)
        for view_mean, view_var in zip(mean, unbiased_var, strict=True):
            self.running_mean.lerp_(view_mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(view_var.to(self.running_var.dtype), self.momentum)
        self.num_batches_tracked.add_(len(mean))

    def _tracks_this_forward(self) -> bool:
        # torch.utils.checkpoint tells recomputations apart by the same id: -1 means that no backward is running.
        return self.updates_running_statistics and torch._C._current_graph_task_id() == -1

    def _apply(self, fn, recurse: bool = True):
        before = self.running_mean, self.running_var
        super()._apply(fn, recurse)
        if self.running_mean.dtype.itemsize < 4:
            self.running_mean, self.running_var = (old.to(self.running_mean.device) for old in before)
        return self


@contextmanager
def frozen_running_statistics(module: nn.Module) -> Iterator[None]:
    """Keeps every `BatchNorm` of a module from updating its running statistics, for repeated forwards of one batch.

    Args:
        module: The module whose BatchNorm layers are to stay as they are; batch statistics are still used.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, BatchNorm)]
    before = [layer.updates_running_statistics for layer in layers]
    for layer in layers:
        layer.updates_running_statistics = False
    try:
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer.updates_running_statistics = value


def check_batch_norm_mode(mode: str) -> bool:
    """Checks a batch-norm setting.

    Args:
        mode: "sync" or "local".

    Returns:
        Whether statistics are shared by the ranks.

    Raises:
        ValueError: On any other value.
    """
    if mode not in BATCH_NORM_MODES:
        raise ValueError(f"batch_norm {mode!r} is not known; use one of {', '.join(BATCH_NORM_MODES)}")
    return mode == "sync"


def _world_size() -> int:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return 1


def _reduced_dims(x: Tensor) -> list[int]:
    return [dim for dim in range(x.ndim) if dim != 1]


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (x.ndim - 2))


def _dense(x: Tensor) -> Tensor:
    """The CUDA kernels read packed memory, channels-first or channels-last; a part of the batch is packed as all is."""
    return x if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _local_mean_and_var(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if x.is_cuda:
        mean, inverse_std = torch.batch_norm_stats(x, eps)
        return mean.double(), (inverse_std.double().pow(-2) - eps).clamp(min=0)
    var, mean = torch.var_mean(x.to(_wide(x.dtype)), dim=_reduced_dims(x), correction=0)
    return mean.double(), var.double()


def _global_statistics(x: Tensor, views: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance over all ranks, [V, C] each, and the number of values behind each, [1]."""
    local = [_local_mean_and_var(part, eps) for part in x.chunk(views)]
    mean, var = (torch.stack(values) for values in zip(*local, strict=True))
    count = x.numel() // mean.numel()
    # Raw moments add up across ranks of unequal batch; float64 keeps the later E[x^2] - E[x]^2 accurate, which
    # float32 would lose for channels whose mean is far from zero.
    square_mean = var + mean.square()
    moments = torch.cat([mean.new_full((1,), count), count * mean.flatten(), count * square_mean.flatten()])
    torch.distributed.all_reduce(moments)
    total, sums, square_sums = moments.split([1, mean.numel(), mean.numel()])
    mean = sums.view_as(mean) / total
    var = (square_sums.view_as(mean) / total - mean.square()).clamp(min=0)
    dtype = _wide(x.dtype)
    return mean.to(dtype), var.to(dtype), total


class _SynchronisedNormalise(torch.autograd.Function):
    """Normalisation with given global statistics; the backward adds their dependence on every rank's input.

    The gradient of the input is that of the sum over ranks of their losses; gain and bias get this rank's part, to be
    averaged by the data-parallel engine like those of any other parameter. The rows of `mean` and `inverse_std`,
    [V, C], belong to the V equal parts of the batch.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inverse_std: Tensor, count: Tensor, eps: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, inverse_std, count)
        output = torch.empty_like(x)
        views = len(mean)
        for target, part, *statistics in zip(output.chunk(views), x.chunk(views), mean, inverse_std, strict=True):
            _normalise_into(target, part, weight, bias, *statistics, eps)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor):
        x, weight, mean, inverse_std, count = ctx.saved_tensors
        grad_output = _dense(grad_output) if x.is_cuda else grad_output.to(mean.dtype)
        views = len(mean)
        parts = list(zip(grad_output.chunk(views), x.chunk(views), mean, inverse_std, strict=True))
        reduced = zip(*[_reduce_gradient(*part, weight) for part in parts], strict=True)
        sum_grad, sum_grad_deviation, grad_weight, grad_bias = (torch.stack(values) for values in reduced)
        grad_weight, grad_bias = grad_weight.sum(0), grad_bias.sum(0)
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, grad_bias, None, None, None, None

        sums = torch.stack([sum_grad, sum_grad_deviation], dim=1)
        torch.distributed.all_reduce(sums)
        grad_x = [_input_gradient(*part, weight, *totals, count) for part, totals in zip(parts, sums, strict=True)]
        grad_x = grad_x[0] if views == 1 else torch.cat(grad_x)
        return grad_x, grad_weight, grad_bias, None, None, None, None


def _normalise_into(
    target: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inverse_std: Tensor, eps: float
) -> None:
    if x.is_cuda:
        torch.batch_norm_elemt(x, weight, bias, mean, inverse_std, eps, out=target)
        return
    gain = _per_channel(weight * inverse_std, x)
    target.copy_((x - _per_channel(mean, x)) * gain + _per_channel(bias, x))


def _reduce_gradient(
    grad_output: Tensor, x: Tensor, mean: Tensor, inverse_std: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums of dy and of dy * (x - mean) over this rank's part of a view, and the gradients of gain and bias."""
    if x.is_cuda:
        return torch.batch_norm_backward_reduce(grad_output, x, mean, inverse_std, weight, True, True, True)
    sum_grad = grad_output.sum(_reduced_dims(x))
    sum_grad_deviation = (grad_output * (x - _per_channel(mean, x))).sum(_reduced_dims(x))
    return sum_grad, sum_grad_deviation, sum_grad_deviation * inverse_std, sum_grad


def _input_gradient(
    grad_output: Tensor,
    x: Tensor,
    mean: Tensor,
    inverse_std: Tensor,
    weight: Tensor,
    sum_grad: Tensor,
    sum_grad_deviation: Tensor,
    count: Tensor,
) -> Tensor:
    if x.is_cuda:
        return torch.batch_norm_backward_elemt(
            grad_output, x, mean, inverse_std, weight, sum_grad, sum_grad_deviation, count.to(torch.int32)
        )
    shared = sum_grad / count.to(mean.dtype)
    slope = sum_grad_deviation * inverse_std.square() / count.to(mean.dtype)
    correction = _per_channel(shared, x) + (x - _per_channel(mean, x)) * _per_channel(slope, x)
    return ((grad_output - correction) * _per_channel(weight * inverse_std, x)).to(x.dtype)
