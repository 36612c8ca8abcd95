"""A moving average of a module that takes part in the forward: the teacher of a method.

It is a copy whose parameters have become buffers. So every rank holds it whole, in fp32, and can run it in any
micro-batch at any ZeRO stage without a collective; the optimizer and the reduction of gradients never see it; and
checkpoints, the comparison of replicas and the broadcast at the start treat it like any other buffer. It costs 4 bytes
per weight and rank. The average of `trainer.engine.ema` cannot serve here: it lies beside the optimizer's moments, cut
up at ZeRO 1 to 3, and would have to be put together before each step's first micro-batch.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

# fp32 elements put together at a time at ZeRO 3: 64 MiB beyond what is held anyway.
_CHUNK = 1 << 24


def teacher_of(module: nn.Module) -> nn.Module:
    """A copy of a module as it is now, with buffers in place of parameters, under the same names."""
    teacher = copy.deepcopy(module)
    for part in teacher.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, parameter.detach())
    return teacher


@torch.no_grad()
def update_teacher(teacher: nn.Module, module: nn.Module, momentum: float) -> None:
    """teacher = momentum * teacher + (1 - momentum) * module, for all parameters of the module.

    Its own buffers, such as running statistics, are left alone. Collective at ZeRO 3, where it gathers the weights;
    elsewhere all ranks hold the same already.

    Args:
        teacher: From `teacher_of(module)`.
        module: As it is between two steps.
        momentum: In [0, 1]; 0 copies.
    """
    averages = dict(teacher.named_buffers())
    for names, parameters in _chunks(module):
        with _whole(parameters):
            weights = [parameter.detach() for parameter in parameters]
            torch._foreach_lerp_([averages[name] for name in names], weights, 1.0 - momentum)


def cosine_momentum(step: int, steps: int, base: float) -> float:
    """The momentum at the start of a step: from `base`, in half a cosine, to 1 after the last one.

    Args:
        step: 1 to `steps`.
        steps: Length of the run.
        base: Momentum at the first step.

    Source: Grill et al. 2020, "Bootstrap your own latent", section 3.2.
    """
    return 1.0 - (1.0 - base) * (1.0 + math.cos(math.pi * (step - 1) / steps)) / 2.0


def _chunks(module: nn.Module) -> Iterator[tuple[list[str], list[nn.Parameter]]]:
    names: list[str] = []
    parameters: list[nn.Parameter] = []
    size = 0
    for name, parameter in module.named_parameters():
        if names and size + _numel(parameter) > _CHUNK:
            yield names, parameters
            names, parameters, size = [], [], 0
        names.append(name)
        parameters.append(parameter)
        size += _numel(parameter)
    yield names, parameters


def _numel(parameter: nn.Parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())


@contextmanager
def _whole(parameters: list[nn.Parameter]) -> Iterator[None]:
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters):
        yield
