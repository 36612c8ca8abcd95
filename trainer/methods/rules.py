"""Which parameters are trained unlike the rest: what the recipe says, and what the method needs."""

import difflib

from trainer.config.sections import OptimizerConfig
from trainer.errors import ConfigError
from trainer.methods.base import Method, TrainingRule


def check_groups(method: Method, config: OptimizerConfig) -> None:
    """Hold `optimizer.groups` against the method.

    Raises:
        ConfigError: A group of a module that the method does not have, or that has no parameters to train.
    """
    modules = {name: module for name, module in method.named_modules() if name}
    for name in config.groups:
        if name not in modules:
            close = difflib.get_close_matches(name, modules, n=1)
            hint = f"did you mean '{close[0]}'?" if close else "names are such as model.logit_scale"
            raise ConfigError(f"optimizer.groups: the method has no module {name!r}: {hint}")
        if not any(parameter.requires_grad for parameter in modules[name].parameters()):
            raise ConfigError(f"optimizer.groups: '{name}' has no parameters that are trained; leave it out")


def training_rules(method: Method, config: OptimizerConfig) -> list[TrainingRule]:
    """The rules of the method and those of `optimizer.groups`, which count where both are of one module."""
    groups = [
        TrainingRule(name, weight_decay=group.weight_decay, lr_factor=group.lr_factor)
        for name, group in config.groups.items()
    ]
    return [*method.training_rules(), *groups]
