"""A trained model by itself: from a run's checkpoint to a method on one device, without an engine."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.captions.tokenizer import CaptionTokenizer
from trainer.building import build_method
from trainer.checkpoint.folders import list_checkpoints, step_of, verify_alone
from trainer.config.sections import RunConfig
from trainer.config.start import saved_config
from trainer.engine.device import set_precision_of_products
from trainer.errors import ConfigError
from trainer.loading import check_method
from trainer.methods import Method
from trainer.pipeline import build_tokenizer
from trainer.run_weights import read_averaged

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class TrainedRun:
    """A method with the weights of one checkpoint, in evaluation mode on the CPU, and where it comes from.

    Attributes:
        method: Towers and heads.
        tokenizer: Its tokenizer.
        config: The run's configuration.
        run: The run's folder.
        checkpoint: The checkpoint's folder.
        weights: `trained`, or `ema` for their moving average.
    """

    method: Method
    tokenizer: CaptionTokenizer
    config: RunConfig
    run: Path
    checkpoint: Path
    weights: str

    @property
    def step(self) -> int:
        """The checkpoint's step."""
        return step_of(self.checkpoint)


class TrainedModel:
    """A trained method on a device; answers as the engine does in the loop."""

    def __init__(self, method: Method, device: torch.device, precision: str = "fp32") -> None:
        self.method = method.to(device).eval()
        self.device = device
        self._dtype = _AUTOCAST.get(precision)
        set_precision_of_products(precision, device)

    def __call__(self, phase: str, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Run one phase (`image`, `text`) of the method's forward."""
        with torch.autocast(self.device.type, self._dtype, enabled=self._dtype is not None):
            return self.method(phase, inputs)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """It is always in evaluation mode."""
        yield


def run_config(run: Path) -> RunConfig:
    """The configuration of a run.

    Raises:
        ConfigError: The folder holds no run.
    """
    return check_method(saved_config(run))


def load_trained(run: Path, step: int | None = None, weights: str = "auto") -> TrainedRun:
    """Build the model of a checkpoint, from any ZeRO stage and world size.

    Args:
        run: Folder of the run.
        step: Which checkpoint; None means the newest.
        weights: `trained`, `ema`, or `auto`: the average where the run kept one.

    Raises:
        ConfigError: There is no such run, checkpoint or average, or the checkpoint is damaged.
    """
    config = run_config(run)
    folder = _find_checkpoint(run, step)
    tokenizer = build_tokenizer(config)
    method = build_method(config, tokenizer)
    state, found = read_averaged(folder, weights != "trained" and bool(config.train.ema_decay))
    if weights == "ema" and found != "ema":
        raise ConfigError(f"{folder} holds no moving average; train with --train.ema_decay, or use --weights trained")
    try:
        method.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ConfigError(f"checkpoint {folder} does not fit {run / 'config.yaml'}: {reason}") from None
    return TrainedRun(method.eval(), tokenizer, config, run, folder, found)


def _find_checkpoint(run: Path, step: int | None) -> Path:
    found = [folder for folder in list_checkpoints(run / "checkpoints") if step in (None, step_of(folder))]
    if not found:
        steps = ", ".join(str(step_of(folder)) for folder in list_checkpoints(run / "checkpoints")[:10])
        what = "checkpoint" if step is None else f"checkpoint of step {step}"
        raise ConfigError(f"{run} has no {what}; it has those of steps {steps or 'none'}")
    problems = verify_alone(found[0])
    if problems:
        raise ConfigError(f"checkpoint {found[0]} is damaged: {problems[0]}; choose another with --step")
    return found[0]
