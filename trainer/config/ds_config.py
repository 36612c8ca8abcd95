"""The DeepSpeed JSON: `auto` values are filled from the recipe, a fixed value that differs is an error."""

import copy
import difflib
import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config.sections import RunConfig
from trainer.errors import ConfigError

_OWNED_BY_RECIPE = {
    "optimizer": "optimizer.*",
    "scheduler": "schedule.*",
    "data_efficiency": "data.*",
    "curriculum_learning": "data.*",
    "tensorboard": "logging.*",
    "wandb": "logging.*",
    "comet": "logging.*",
}
_SECTIONS = {
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "torch_autocast", "bf16", "fp16", "zero_optimization", "zero_allow_untested_optimizer", "steps_per_print",
    "wall_clock_breakdown", "memory_breakdown", "flops_profiler", "comms_logger", "communication_data_type",
    "prescale_gradients", "gradient_predivide_factor", "dump_state", "csv_monitor", "aio",
}  # fmt: skip
_UNSUPPORTED_ZERO = (
    "round_robin_gradients", "zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_gradients",
    "zero_quantized_nontrainable_weights", "mics_shard_size", "elastic_checkpoint", "zenflow",
)  # fmt: skip
_MAX_JSON_BYTES = 1 << 20
_PACKAGE = Path(__file__).resolve().parents[1]
# In an installed copy inside the package, in a checkout beside it.
_SHIPPED = next(
    (folder for folder in (_PACKAGE / "ds_configs", _PACKAGE.parent / "ds_configs") if folder.is_dir()), _PACKAGE
)


@dataclass(frozen=True)
class BatchPlan:
    """Batch arithmetic of a run: global = micro * accumulation * world_size."""

    global_batch_size: int
    micro_batch_size: int
    accumulation_steps: int
    world_size: int

    @property
    def rank_batch_size(self) -> int:
        """Samples of one rank per step."""
        return self.micro_batch_size * self.accumulation_steps


@dataclass(frozen=True)
class ResolvedDeepSpeed:
    """What `deepspeed.initialize` is given, and what the trainer needs to know of it."""

    config: dict[str, Any]
    # The same with the recipe's values as "auto" again: what the run folder keeps, good for any number of ranks.
    portable: dict[str, Any]
    stage: int
    offload_optimizer: bool


def plan_batch(config: RunConfig, world_size: int) -> BatchPlan:
    """Split the global batch over ranks and micro-batches.

    Raises:
        ConfigError: The world size does not divide the batch, or the micro-batch does not divide a rank's share.
    """
    total = config.train.global_batch_size
    if total % world_size:
        lower = total // world_size * world_size
        nearest = " or ".join(str(size) for size in (lower, lower + world_size) if size)
        raise ConfigError(
            f"train.global_batch_size {total} is not divisible by world size {world_size}; use {nearest}, "
            f"or start a number of ranks that divides {total}"
        )
    share = total // world_size
    micro = share if config.train.micro_batch_size == "auto" else config.train.micro_batch_size
    if share % micro:
        raise ConfigError(
            f"train.micro_batch_size {micro} does not divide a rank's share of {share} "
            f"(train.global_batch_size {total} / world size {world_size}); use a divisor of {share} or 'auto'"
        )
    return BatchPlan(total, micro, share // micro, world_size)


def shipped_ds_configs() -> list[str]:
    """Names of the DeepSpeed configurations that ship with the project, sorted."""
    return sorted(path.stem for path in _SHIPPED.glob("*.json"))


def find_ds_config(given: str) -> str:
    """The file that `--ds_config` means: one that is there, else a shipped one, found from any working directory.

    Args:
        given: A path, or a shipped one as `zero2`, `zero2.json` or `ds_configs/zero2.json`.

    Raises:
        ConfigError: There is no such file.
    """
    path = Path(given)
    if os.path.isfile(path):  # noqa: PTH113 - a name that is too long is no file
        return given
    name = path.name.removesuffix(".json")
    if str(path.parent) in (".", "ds_configs") and name in shipped_ds_configs():
        return str(_SHIPPED / f"{name}.json")
    close = difflib.get_close_matches(name, shipped_ds_configs(), n=1)
    hint = f"did you mean '{close[0]}'? " if close else ""
    raise ConfigError(
        f"--ds_config {given}: no such file; {hint}give a path or a shipped one: {', '.join(shipped_ds_configs())}"
    )


def read_ds_config(path: str) -> dict[str, Any]:
    """Read a DeepSpeed JSON and refuse what no recipe could make right.

    Raises:
        ConfigError: Not a JSON object, a section that the recipe owns, or one that this trainer does not support.
    """
    tree = _read_json(Path(path))
    for section, owner in _OWNED_BY_RECIPE.items():
        if section in tree:
            raise ConfigError(f"{path}: remove '{section}', the recipe's {owner} owns it")
    _refuse_unsupported(tree, path)
    _stage(tree.get("zero_optimization", {}), path)
    return tree


def resolve_deepspeed(path: str | None, config: RunConfig, plan: BatchPlan, precision: str) -> ResolvedDeepSpeed:
    """Read the JSON file and fill it from the recipe.

    Args:
        path: DeepSpeed JSON; None is ZeRO stage 0 with everything automatic.
        config: The run's configuration.
        plan: Its batch arithmetic.
        precision: `fp32`, `tf32`, `bf16` or `fp16`.

    Raises:
        ConfigError: Missing or invalid file, or a fixed value that contradicts the recipe (both are named).
    """
    tree = {} if path is None else read_ds_config(path)
    source = path or "the default DeepSpeed configuration"
    lowered = precision in ("bf16", "fp16")
    owned = {
        "train_batch_size": (plan.global_batch_size, "train.global_batch_size"),
        "train_micro_batch_size_per_gpu": (plan.micro_batch_size, "train.micro_batch_size"),
        "gradient_accumulation_steps": (plan.accumulation_steps, "train.global_batch_size / micro / ranks"),
        "gradient_clipping": (config.optimizer.gradient_clipping, "optimizer.gradient_clipping"),
        "communication_data_type": (config.train.gradient_dtype, "train.gradient_dtype"),
        "torch_autocast.enabled": (lowered, "train.precision"),
        "torch_autocast.dtype": ("float16" if precision == "fp16" else "bfloat16", "train.precision"),
        # Parameters stay fp32 and autocast computes in bf16 or fp16: a 16-bit logit_scale moves in steps of 3 %.
        "bf16.enabled": (False, "train.precision (fp32 parameters, torch_autocast)"),
        "fp16.enabled": (False, "train.precision (fp32 parameters, torch_autocast)"),
    }
    _check_fp16_clipping(tree, precision, config)
    says_dtype = "communication_data_type" in tree
    for dotted, (value, key) in owned.items():
        _fill(tree, dotted, value, key, source)
    portable = copy.deepcopy(tree)
    for dotted in owned:
        *parents, last = dotted.split(".")
        functools.reduce(dict.__getitem__, parents, portable)[last] = "auto"
    if not says_dtype:
        # Runs from before this setting have no such line.
        del portable["communication_data_type"]
    if lowered:
        # What travels does not depend on the class of a module, as it would by DeepSpeed's own list.
        tree["torch_autocast"]["lower_precision_safe_modules"] = []
    else:
        del tree["torch_autocast"]
    # One engine step per optimizer step: the trainer's gradient cache does the accumulation (whole-batch negatives).
    tree.update(train_micro_batch_size_per_gpu=plan.rank_batch_size, gradient_accumulation_steps=1)
    tree.setdefault("steps_per_print", 2**31 - 1)
    tree["zero_allow_untested_optimizer"] = True
    # On by default, and then it waits for the device twice a step.
    tree["timers"] = {"throughput": {"enabled": False}}
    return _describe(tree, portable, source)


def _check_fp16_clipping(tree: dict[str, Any], precision: str, config: RunConfig) -> None:
    zero = tree.get("zero_optimization")
    if precision == "fp16" and config.optimizer.gradient_clipping and isinstance(zero, dict) and zero.get("stage"):
        # DeepSpeed clips the gradients while they are still multiplied by the loss scale.
        raise ConfigError(
            f"optimizer.gradient_clipping {config.optimizer.gradient_clipping} does not work with train.precision fp16 "
            "at ZeRO 1 to 3; use bf16, ZeRO 0 or no clipping"
        )


def _refuse_unsupported(tree: dict[str, Any], source: str) -> None:
    """Options that would scramble or lose state the trainer saves and places itself, and misspelt sections."""
    for key in tree:
        if key not in _SECTIONS:
            close = difflib.get_close_matches(key, _SECTIONS, n=1)
            hint = f"did you mean '{close[0]}'?" if close else "remove it"
            raise ConfigError(f"{source}: '{key}' is not supported; {hint}")
    zero = tree.get("zero_optimization")
    for key in _UNSUPPORTED_ZERO:
        if isinstance(zero, dict) and zero.get(key):
            raise ConfigError(f"{source}: zero_optimization.{key} is not supported by this trainer; remove it")


def _describe(tree: dict[str, Any], portable: dict[str, Any], source: str) -> ResolvedDeepSpeed:
    zero = tree.setdefault("zero_optimization", {"stage": 0})
    stage = _stage(zero, source)
    _check_zero_section(zero, source)
    offload = {name: _offload_device(zero, name, source) for name in ("offload_optimizer", "offload_param")}
    left = _autos(tree)
    if left:
        raise ConfigError(f"{source}: no rule fills '{left[0]}': \"auto\"; write a value or remove the key")
    return ResolvedDeepSpeed(tree, portable, stage, offload["offload_optimizer"] != "none")


def _stage(zero: Any, source: str) -> int:
    stage = zero.get("stage", 0) if isinstance(zero, dict) else None
    if not isinstance(stage, int) or stage not in (0, 1, 2, 3):
        raise ConfigError(f"{source}: zero_optimization.stage is {stage!r}, expected 0, 1, 2 or 3")
    return stage


def _check_zero_section(zero: dict[str, Any], source: str) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**zero)
    except (ValidationError, AssertionError, ValueError) as error:
        raise ConfigError(f"{source}: zero_optimization: {' '.join(str(error).split())[:300]}") from None


def _offload_device(zero: dict[str, Any], name: str, source: str) -> str:
    section = zero.get(name) or {}
    if zero.get("stage", 0) == 0 and section:
        raise ConfigError(f"{source}: zero_optimization.{name} needs stage 1, 2 or 3")
    if section.get("ratio", 1.0) != 1.0:
        raise ConfigError(
            f"{source}: zero_optimization.{name}.ratio below 1 is not supported by this trainer; remove it"
        )
    device = section.get("device", "none")
    if device not in ("none", "cpu"):
        raise ConfigError(f"{source}: zero_optimization.{name}.device '{device}' is not supported; use cpu or none")
    return device


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ConfigError(f"--ds_config {path}: larger than {_MAX_JSON_BYTES} bytes, no DeepSpeed configuration")
        tree = json.loads(path.read_text(encoding="utf-8-sig"))
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError(f"--ds_config {path} cannot be read ({error.strerror}); check its permissions") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--ds_config {path} is not valid JSON: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"--ds_config {path} must be a JSON object")
    return tree


def _fill(tree: dict[str, Any], dotted: str, value: Any, key: str, source: str) -> None:
    *parents, last = dotted.split(".")
    node = tree
    for part in parents:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise ConfigError(f"{source}: '{part}' must be an object")
    given = node.get(last, "auto")
    if given != "auto" and given != value:
        raise ConfigError(
            f"{source}: {dotted} is {json.dumps(given)} but {key} gives {json.dumps(value)}; "
            f'write "auto" in the JSON or change the recipe'
        )
    node[last] = value


def _autos(tree: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key, value in tree.items():
        if value == "auto":
            found.append(prefix + key)
        elif isinstance(value, dict):
            found.extend(_autos(value, f"{prefix}{key}."))
    return found
