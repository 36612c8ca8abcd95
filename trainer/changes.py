"""How a resumed run differs from the run it continues: each setting is listed, or refused."""

import json
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from trainer.checkpoint import TrainerState
from trainer.config.safe_yaml import YamlError, parse_yaml
from trainer.config.sections import RunConfig
from trainer.engine.schedule import learning_rate
from trainer.errors import ConfigError
from trainer.methods import METHODS

_MAX_SHOWN = 160
_GONE = "(no longer a setting)"
# How long a process runs is not part of the run.
_NOT_OF_THE_RUN = {"train.stop_after"}
# What the weights, the moments and the samples seen so far belong to.
_REFUSED = {
    "method.name": "method",
    "train.seed": "data order",
    "train.global_batch_size": "data order",
    "data.shuffle_window": "data order",
}
# Of the section that is otherwise refused: how the towers are trained or begun, not what they compute. Parameters that
# were frozen, or are now, are compared with those in the checkpoint.
_FREE_OF_MODEL = {
    "pretrained", "pretrained_format", "image_pretrained", "text_pretrained", "activation_checkpointing",
    "patch_dropout", "batch_norm", "lock_image", "lock_image_unlocked_groups", "lock_text", "lock_text_unlocked_groups",
}  # fmt: skip
_AT_THE_START = "only a new run begins with it"
_EFFECTS = {
    "model.pretrained": _AT_THE_START,
    "model.image_pretrained": _AT_THE_START,
    "model.text_pretrained": _AT_THE_START,
    "method.logit_scale_init": _AT_THE_START,
    "method.logit_bias_init": _AT_THE_START,
    "data.train": "the same samples, or the run is refused",
    "data.tokenizer": "the same tokens, or the run is refused",
    "data.mask_token": "the same tokens, or the run is refused",
    "data.lanes": "the same order, or the run is refused",
    "ranks": "the same run but for rounding",
    "train.micro_batch_size": "the same run but for rounding",
    "train.compile": "the same run but for rounding",
}
_EFFECTS_BY_SECTION = {
    "model": "trained so from here on",
    "method": "another loss from here on",
    "optimizer": "from here on",
    "schedule": "from here on",
    "deepspeed": "the same run but for rounding",
}
_EFFECTS |= dict.fromkeys(
    ("data.augmentation", "data.synonyms", "data.max_image_pixels", "data.max_caption_chars"),
    "other views from here on",
)
_EFFECTS |= dict.fromkeys(
    ("train.precision", "train.communication_dtype", "train.gradient_dtype", "precision", "device"),
    "other rounding from here on",
)
_EFFECTS |= {"train.ema_decay": "another average from here on"}


@dataclass(frozen=True)
class Changes:
    """What differs from the saved run.

    Attributes:
        values: Setting to its value in the saved run and now.
        lines: The same for the log, with what it does.
    """

    values: dict[str, tuple[Any, Any]]
    lines: list[str]


def find_changes(saved: TrainerState, config: RunConfig, setup: dict[str, Any], checkpoint: str) -> Changes:
    """Compare a run with the one it continues.

    Args:
        saved: State of the checkpoint.
        config: Configuration now.
        setup: What is not in the configuration, e.g. {"ranks": 2, "deepspeed": {...}}; keys that the checkpoint's
            `setup` lacks are not compared.
        checkpoint: For messages.

    Raises:
        ConfigError: A setting differs that the weights or the order of the samples belong to, or the checkpoint is
            beyond the last step.
    """
    values = _differences(_settings(saved.config, config), _sections(config.model_dump(mode="json")), config)
    known = [key for key in setup if key in saved.setup]
    before, after = ({key: tree[key] for key in known} for tree in (saved.setup, setup))
    for key, (old, new) in _differences(_flat(before), _flat(after)).items():
        # Said once where the setting behind it changed as well.
        if f"train.{key}" not in values:
            values[key] = old, new
    _refuse(values, checkpoint)
    if saved.step > config.train.steps:
        raise ConfigError(
            f"train.steps {config.train.steps} is before checkpoint {checkpoint}, which is of step {saved.step}; raise "
            "train.steps, or go back with --resume to an earlier checkpoint"
        )
    lines = [f"changed since the saved run: {_line(key, old, new)}" for key, (old, new) in values.items()]
    return Changes(values, lines + _rate_lines(saved, config, values))


def _settings(text: str, config: RunConfig) -> dict[str, Any]:
    """Settings of a saved configuration; a checkpoint without one says nothing."""
    try:
        tree = parse_yaml(text)
    except YamlError:
        tree = None
    return _sections(tree if isinstance(tree, dict) and tree else config.model_dump(mode="json"))


def _sections(tree: dict[str, Any]) -> dict[str, Any]:
    """`section.key` to value, whatever that is: what lies deeper is changed as a whole."""
    found = {}
    for section, values in tree.items():
        if isinstance(values, dict):
            found |= {f"{section}.{key}": value for key, value in values.items()}
    return {key: value for key, value in found.items() if key not in _NOT_OF_THE_RUN}


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def _differences(
    old: dict[str, Any], new: dict[str, Any], config: RunConfig | None = None
) -> dict[str, tuple[Any, Any]]:
    """What differs; a setting that one side lacks had, or has, its default there."""
    found = {}
    for key in [*new, *(key for key in old if key not in new)]:
        before = old[key] if key in old else _default(key, config)
        after = new.get(key, _GONE if config else None)
        if before != after:
            found[key] = before, after
    return found


def _default(key: str, config: RunConfig | None) -> Any:
    """A setting that the version which saved the run did not know was as its default is today."""
    if config is None:
        return None
    section, name = key.split(".", 1)
    if section == "method":
        fields = METHODS[config.method["name"]].Settings.model_fields
    else:
        fields = type(getattr(config, section)).model_fields
    if name not in fields:
        return None
    value = fields[name].get_default(call_default_factory=True)
    return list(value) if isinstance(value, tuple) else value


def _refuse(values: dict[str, tuple[Any, Any]], checkpoint: str) -> None:
    refused: dict[str, list[str]] = {}
    for key, (old, new) in values.items():
        what = _REFUSED.get(key)
        section, _, name = key.partition(".")
        if section == "model" and name not in _FREE_OF_MODEL and not _moved(old, new):
            what = "model"
        if what is not None and new != _GONE:
            refused.setdefault(what, []).append(f"{key} {_shown(old)}, now {_shown(new)}")
    # Settings of another method are no news.
    if "method" in refused:
        refused = {"method": refused["method"]}
    if refused:
        what, details = " and another ".join(refused), "; ".join(text for part in refused.values() for text in part)
        raise ConfigError(
            f"checkpoint {checkpoint} was made with another {what} ({details}); restore that, leave --recipe out to go "
            "on with the saved settings, or start a new --run_dir"
        )


def _moved(old: Any, new: Any) -> bool:
    """Whether a tower of a local folder has only another path: its shapes are compared with the checkpoint's."""
    names = [PurePosixPath(value).name for value in (old, new) if isinstance(value, str) and value.startswith("hf:")]
    return len(names) == 2 and names[0].removeprefix("hf:") == names[1].removeprefix("hf:")


def _line(key: str, old: Any, new: Any) -> str:
    effect = _EFFECTS.get(key) or _EFFECTS_BY_SECTION.get(key.partition(".")[0])
    if key == "train.steps":
        effect = f"the schedule ends at step {new}"
    return f"{key}: {_shown(old)} -> {_shown(new)}{f' ({effect})' if effect else ''}"


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def _rate_lines(saved: TrainerState, config: RunConfig, values: dict[str, tuple[Any, Any]]) -> list[str]:
    """What the changes do to the learning rate, where they do anything."""
    keys = ("train.steps", "optimizer.lr", "schedule.warmup_steps", "schedule.start_lr", "schedule.end_lr")
    now = {
        "train.steps": config.train.steps,
        "optimizer.lr": config.optimizer.lr,
        **{f"schedule.{name}": value for name, value in config.schedule.model_dump().items()},
    }
    before = now | {key: values[key][0] for key in keys if key in values}
    next_step = saved.step + 1
    if before == now or saved.step < 1 or next_step > config.train.steps:
        return []
    last, planned, rate = _rate(before, saved.step), _rate(before, next_step), _rate(now, next_step)
    finished = " (the saved run had finished its schedule)" if saved.step >= before["train.steps"] else ""
    return [
        f"learning rate: step {saved.step} was trained at {last:.2e}; step {next_step} is at {rate:.2e}, "
        f"with the saved settings {planned:.2e}{finished}"
    ]


def _rate(settings: dict[str, Any], step: int) -> float:
    return learning_rate(
        step,
        peak_lr=settings["optimizer.lr"],
        start_lr=settings["schedule.start_lr"],
        end_lr=settings["schedule.end_lr"],
        warmup_steps=settings["schedule.warmup_steps"],
        steps=settings["train.steps"],
    )
