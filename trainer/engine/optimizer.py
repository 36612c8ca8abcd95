"""Parameter groups and the optimizer kernel."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from models.batch_norm import BatchNorm
from trainer.config.sections import OptimizerConfig
from trainer.errors import ConfigError
from trainer.methods.base import TrainingRule

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase, BatchNorm)


@dataclass(frozen=True)
class _Treatment:
    """What sets a group of parameters apart; None and True are the recipe's own."""

    last_step: int | None = None
    lr_factor: float = 1.0
    weight_decay: float | None = None
    decays: bool = True


def parameter_groups(module: nn.Module, config: OptimizerConfig, rules: Sequence[TrainingRule] = ()) -> list[dict]:
    """Two groups: decayed weights, and what `optimizer.no_decay` names; then those that rules set apart.

    Positional and class embeddings and the token table decay, as in DeCLIP's recipes. Groups carry the `last_step` and
    the `lr_factor` of their rule.
    """
    # Checkpoints tell groups by their order: these two come first, whatever the order of the parameters.
    groups: dict[_Treatment, list[nn.Parameter]] = {_Treatment(): [], _Treatment(decays=False): []}
    for path, owner in module.named_modules():
        treatment = _treatment(path, rules)
        for name, parameter in owner.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            group = treatment
            if treatment.weight_decay == 0.0 or _kind(owner, name, parameter) in config.no_decay:
                group = replace(treatment, weight_decay=None, decays=False)
            groups.setdefault(group, []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": _decay(treatment, config),
            "last_step": treatment.last_step,
            "lr_factor": treatment.lr_factor,
        }
        for treatment, parameters in groups.items()
        if parameters
    ]


def _treatment(path: str, rules: Sequence[TrainingRule]) -> _Treatment:
    found: dict[str, Any] = {}
    # From the outermost to the innermost; where two are of one module, the last.
    for rule in sorted((rule for rule in rules if rule.reaches(path)), key=lambda rule: len(rule.module)):
        fields = {name: getattr(rule, name) for name in ("last_step", "lr_factor", "weight_decay")}
        found |= {name: value for name, value in fields.items() if value is not None}
    return _Treatment(**found)


def _decay(treatment: _Treatment, config: OptimizerConfig) -> float:
    if not treatment.decays:
        return 0.0
    return config.weight_decay if treatment.weight_decay is None else treatment.weight_decay


def _kind(owner: nn.Module, name: str, parameter: nn.Parameter) -> str:
    """What a parameter is, in the words of `optimizer.no_decay`; `weights` for all the rest."""
    # ZeRO 3 may have cut it up by now, and keeps its size there.
    if getattr(parameter, "ds_numel", parameter.numel()) == 1:
        return "temperatures"
    if isinstance(owner, _NORMS):
        return "norms"
    if name == "in_proj_bias":
        return "attention_biases"
    return "biases" if name.endswith("bias") else "weights"


def kernel_name(config: OptimizerConfig, offload: bool) -> str:
    """What `optimizer.name: auto` means here: CPUAdam under offload, else torch's fused AdamW.

    The latter needs no compiler, resumes bitwise, and can be told on the device to leave a step out, so that no step
    waits for the host.
    """
    if config.name != "auto":
        return config.name
    return "cpu_adam" if offload else "adamw"


def build_optimizer(
    groups: list[dict], config: OptimizerConfig, device: torch.device, offload: bool
) -> torch.optim.Optimizer:
    """The optimizer over `groups`.

    Raises:
        ConfigError: The kernel cannot run here (no CUDA, no compiler, apex not installed, wrong under offload).
    """
    name = kernel_name(config, offload)
    adam = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    if offload and name not in ("cpu_adam", "adamw"):
        raise ConfigError(f"optimizer.name {name} cannot run with optimizer offload; use auto, cpu_adam or adamw")
    if name in ("fused_adam", "apex_fused_adam") and device.type != "cuda":
        raise ConfigError(f"optimizer.name {name} needs a CUDA device, this run is on {device.type}; use auto or adamw")
    if name == "adamw":
        return torch.optim.AdamW(groups, fused=True, **adam)
    if name == "sgd":
        return torch.optim.SGD(
            groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov and config.momentum > 0
        )
    return _compiled_kernel(name, groups, adam)


def _compiled_kernel(name: str, groups: list[dict], adam: dict) -> torch.optim.Optimizer:
    try:
        if name == "fused_adam":
            from deepspeed.ops.adam import FusedAdam

            return FusedAdam(groups, adam_w_mode=True, **adam)
        if name == "cpu_adam":
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            return DeepSpeedCPUAdam(groups, adamw_mode=True, **adam)
        from apex.optimizers import FusedAdam as ApexFusedAdam

        return ApexFusedAdam(groups, adam_w_mode=True, **adam)
    except (ImportError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        fix = (
            "build NVIDIA apex from source (the PyPI package of that name is unrelated), see docs/clusters.md"
            if name == "apex_fused_adam"
            else "DeepSpeed compiles it on first use, which needs a C++ compiler and ninja"
        )
        raise ConfigError(f"optimizer.name {name} is not available ({reason}): {fix}; or use adamw") from None


def optimizer_family(optimizer: torch.optim.Optimizer) -> str:
    """What state the optimizer keeps: checkpoints move between kernels of one family, not between families."""
    if not isinstance(optimizer, torch.optim.SGD):
        return "adam"
    return "sgd with momentum" if optimizer.param_groups[0]["momentum"] else "sgd without momentum"
