"""A recipe (YAML) and dotted overrides, read into a configuration whose method's settings are still to be checked.

Nothing in here imports torch, so that what is wrong outside the method is said at once.
"""

import difflib
import math
import os
from pathlib import Path
from typing import Any

import yaml

from data.errors import DataError
from data.paths import expand_path
from trainer.config.safe_yaml import YamlError, parse_yaml
from trainer.config.sections import RunConfig, holds_path, validate_section
from trainer.errors import ConfigError

RECIPE_DIR = Path(__file__).resolve().parents[1] / "recipes"
# Nothing real nests recipes deeper; a longer chain is a cycle.
_MAX_EXTENDS = 8
_MAX_CONFIG_BYTES = 1 << 20


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the project, sorted."""
    return sorted(path.stem for path in RECIPE_DIR.glob("*.yaml"))


def read_recipe(recipe: str | Path, overrides: dict[str, str] | None = None) -> RunConfig:
    """Read a recipe, a name or path as a user writes it or a file, and apply dotted overrides.

    See `trainer.loading.load_config`, which checks `method` too.
    """
    tree = _read_recipe(recipe)
    name = tree.pop("recipe", None) or Path(recipe).stem
    for key, text in (overrides or {}).items():
        _set_dotted(tree, key, text if _is_plain_path(key, text) else _parse_scalar(key, text))
    return validate_section(RunConfig, {"recipe": name, **tree})


def dump_config(config: RunConfig) -> str:
    """The configuration as YAML that `load_config` reads back to an equal object."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=math.inf)


def _read_recipe(recipe: str | Path, depth: int = 0, beside: Path | None = None) -> dict[str, Any]:
    if depth > _MAX_EXTENDS:
        raise ConfigError(f"recipe '{recipe}': 'extends' goes round in a circle; remove one of the links")
    path = _recipe_path(recipe, beside)
    tree = _read_yaml(path)
    parent = tree.pop("extends", None)
    if parent is None:
        return tree
    if not isinstance(parent, str):
        raise ConfigError(f"recipe '{recipe}': 'extends' must be the name of one recipe, got {parent!r}")
    return _merge(_read_recipe(parent, depth + 1, path.parent), tree)


def _recipe_path(recipe: str | Path, beside: Path | None) -> Path:
    """The file of a recipe: a shipped one by its name, a path, or what `extends` names in the folder of its recipe."""
    if isinstance(recipe, Path):
        return recipe
    if "/" not in recipe and recipe in recipe_names():
        return RECIPE_DIR / f"{recipe}.yaml"
    try:
        path = Path(expand_path(recipe))
    except DataError as error:
        raise ConfigError(f"recipe {error}") from None
    for candidate in (path, *([beside / path] if beside else [])):
        try:
            if candidate.is_file():
                return candidate
        except PermissionError as error:
            raise ConfigError(f"recipe {candidate} cannot be read ({error.strerror}); check its permissions") from None
        except OSError:
            # A name too long for a file is no file.
            continue
    if str(path.parent) in (".", "trainer/recipes", "recipes") and path.name.removesuffix(".yaml") in recipe_names():
        return RECIPE_DIR / path.with_suffix(".yaml").name
    close = difflib.get_close_matches(recipe, recipe_names(), n=1)
    hint = f"did you mean '{close[0]}'? " if close else ""
    raise ConfigError(f"unknown recipe '{recipe}': {hint}give a YAML path or one of: {', '.join(recipe_names())}")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise ConfigError(f"{path} is larger than {_MAX_CONFIG_BYTES} bytes; that is no recipe")
        tree = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); check the path and its permissions") from None
    except (YamlError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise ConfigError(f"{path} must be a mapping of sections (model, method, data, train, ...)")
    return tree


# Replaced whole by a child recipe: merging two weightings or two role tables would be a third that nobody wrote.
_REPLACED_WHOLE = {"data.train", "data.augmentation", "eval.sets", "optimizer.groups"}


def _merge(base: dict[str, Any], child: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    # Settings of another method make no sense under this one.
    if prefix == "method." and child.get("name", base.get("name")) != base.get("name"):
        return child
    merged = dict(base)
    for key, value in child.items():
        path = f"{prefix}{key}"
        old = merged.get(key)
        mergeable = isinstance(old, dict) and isinstance(value, dict) and path not in _REPLACED_WHOLE
        merged[key] = _merge(old, value, f"{path}.") if mergeable else value
    return merged


# What else the setting of a path may be.
_YAML_WORDS = {"null", "true", "false", "yes", "no", "on", "off", ""}


def _is_plain_path(key: str, text: str) -> bool:
    # To YAML, ~ is nothing, a blank and # begin a comment, and brackets make a list.
    if key == "data.train":
        return os.path.lexists(text)
    return holds_path(key) and text.lower() not in _YAML_WORDS and text[0] not in "'\""


def _parse_scalar(key: str, text: str) -> Any:
    try:
        value = parse_yaml(text)
    except YamlError:
        return text
    if not key.startswith("data.train") or isinstance(value, list):
        return value
    # A brace range is data; as a YAML flow mapping it has keys without values.
    return value if isinstance(value, dict) and value and None not in value.values() else text


def _set_dotted(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    node = tree
    for part in parents:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--{dotted}: '{part}' holds a value, not a section")
        node = child
    node[last] = value
