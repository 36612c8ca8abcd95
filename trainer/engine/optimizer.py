"""Parameter groups and the optimizer kernel."""

from collections.abc import Sequence

import torch
from torch import nn

from models.batch_norm import BatchNorm
from trainer.config.sections import OptimizerConfig
from trainer.errors import ConfigError
from trainer.methods.base import TrainingRule

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase, BatchNorm)
_NO_RULE = TrainingRule("")


def parameter_groups(module: nn.Module, weight_decay: float, rules: Sequence[TrainingRule] = ()) -> list[dict]:
    """Two groups: decayed weights, and everything that must not decay (norms, biases, temperatures).

    Positional and class embeddings and the token table decay, as in DeCLIP's recipes. Temperatures share the second
    group because a group of one element cannot be partitioned over ranks. Modules whose rule has a `last_step`, which
    their groups carry, have two more.
    """
    groups: dict[tuple[int | None, bool], list[nn.Parameter]] = {(None, True): [], (None, False): []}
    for path, owner in module.named_modules():
        rule = next((rule for rule in rules if f"{path}.".startswith(f"{rule.module}.")), _NO_RULE)
        for name, parameter in owner.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            exempt = isinstance(owner, _NORMS) or name.endswith("bias") or parameter.numel() == 1
            decays = rule.weight_decay and not exempt
            groups.setdefault((rule.last_step, decays), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": weight_decay if decays else 0.0, "last_step": last_step}
        for (last_step, decays), parameters in groups.items()
        if parameters
    ]


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
