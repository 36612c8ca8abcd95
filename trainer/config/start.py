"""What a run starts from: the recipe and DeepSpeed JSON it was given, or those of the run that it continues."""

from pathlib import Path

from models.architectures import find_architecture
from trainer.config.ds_config import find_ds_config
from trainer.config.recipe import read_recipe
from trainer.config.sections import RunConfig
from trainer.errors import ConfigError

DEFAULT_RECIPE = "demo"
CONFIG = "config.yaml"


def read_run_config(recipe: str | None, run_dir: Path | None, resume: str, overrides: dict[str, str]) -> RunConfig:
    """The recipe that was asked for; a run that is resumed without `--recipe` keeps its own.

    Raises:
        ConfigError: See `trainer.config.recipe.read_recipe`, or an unknown model; the method's settings are still to
            be checked.
    """
    config = read_recipe(recipe or _saved_file(CONFIG, run_dir, resume) or DEFAULT_RECIPE, overrides)
    try:
        find_architecture(config.model.name)
    except ValueError as error:
        raise ConfigError(f"model: {error}") from None
    return config


def saved_config(run: Path) -> RunConfig:
    """The configuration of a run, its method's settings unchecked.

    Raises:
        ConfigError: The folder holds no run, or one whose configuration is not valid.
    """
    path = run / CONFIG
    if not path.is_file():
        raise ConfigError(f"{run} has no {CONFIG}; give the folder of a run (what --run_dir was)")
    return read_recipe(path)


def run_ds_config(given: str | None, run_dir: Path | None, resume: str) -> str | None:
    """The DeepSpeed JSON that was asked for, or that of the run that is resumed; None for the default.

    Raises:
        ConfigError: There is no such file.
    """
    found = find_ds_config(given) if given else _saved_file("ds_config.json", run_dir, resume)
    return found and str(found)


def _saved_file(name: str, run_dir: Path | None, resume: str) -> Path | None:
    """A file of the run that is being resumed, so that a resumed run keeps its settings unless others are given."""
    if resume == "never":
        return None
    folders = [run_dir] if run_dir else []
    if resume != "auto":
        folders += [Path(resume), Path(resume).parent.parent]
    return next((folder / name for folder in folders if (folder / name).is_file()), None)
