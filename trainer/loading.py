"""The configuration of a run with everything in it checked: the sections, and the settings of the method it names."""

from typing import Any

from trainer.config.recipe import read_recipe
from trainer.config.sections import RunConfig, validate_section
from trainer.methods import parse_method
from trainer.views import check_views


def load_config(recipe: str, overrides: dict[str, str] | None = None) -> RunConfig:
    """Read a recipe and apply dotted overrides.

    Args:
        recipe: Name of a file in `trainer/recipes`, or a path to any YAML file.
        overrides: Dotted key to YAML text, e.g. {"optimizer.lr": "5e-4"}.

    Returns:
        The validated configuration.

    Raises:
        ConfigError: Unknown recipe or key, wrong type, value out of range.
    """
    return check_method(read_recipe(recipe, overrides))


def parse_config(tree: dict[str, Any]) -> RunConfig:
    """Validate a plain tree into a RunConfig; raises ConfigError naming the key, the value and the fix."""
    return check_method(validate_section(RunConfig, tree))


def check_method(config: RunConfig) -> RunConfig:
    """The configuration with the settings of its method validated and filled in.

    Raises:
        ConfigError: Unknown method, key or view, wrong type, value out of range.
    """
    name, settings = parse_method(config.method)
    config = config.model_copy(update={"method": {"name": name, **settings.model_dump()}})
    check_views(config)
    return config
