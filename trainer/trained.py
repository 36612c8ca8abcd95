"""A trained model by itself: from a run's checkpoint to a method on one device, without an engine."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.tokenizer import ClipTokenizer
from trainer.assemble import build_method
from trainer.checkpoint import checkpoint_of_step, consolidate
from trainer.config import RunConfig, load_config
from trainer.errors import ConfigError
from trainer.methods import Method
from trainer.pipeline import build_tokenizer

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class TrainedModel:
    """A method with trained weights, in evaluation mode; answers as the engine does in the loop.

    Attributes:
        method: Towers and heads.
        device: Where it computes.
    """

    def __init__(self, method: Method, device: torch.device, precision: str = "fp32") -> None:
        self.method = method.to(device).eval()
        self.device = device
        self._dtype = _AUTOCAST.get(precision)

    def __call__(self, phase: str, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Run one phase (`image`, `text`) of the method's forward."""
        with torch.autocast(self.device.type, self._dtype, enabled=self._dtype is not None):
            return self.method(phase, inputs)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """It is always in evaluation mode."""
        yield


def run_config(run_dir: Path) -> RunConfig:
    """The configuration of a run.

    Raises:
        ConfigError: The folder holds no run.
    """
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{run_dir} is no run folder: it has no config.yaml; give the --run_dir of a training run")
    return load_config(str(path))


def load_trained(run_dir: Path, config: RunConfig, step: int | None) -> tuple[Method, ClipTokenizer, Path]:
    """The method of a run with the weights of one of its checkpoints, on the CPU.

    Args:
        run_dir: The run's folder.
        config: Its configuration.
        step: Which checkpoint; None takes the newest complete one.

    Returns:
        The method, its tokenizer and the checkpoint's folder.

    Raises:
        ConfigError: No such checkpoint, a damaged one, or weights that do not fit the configuration.
    """
    folder = checkpoint_of_step(run_dir / "checkpoints", step)
    tokenizer = build_tokenizer(config)
    method = build_method(config, tokenizer)
    weights = consolidate(folder)
    try:
        method.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise ConfigError(
            f"{folder} does not fit {run_dir / 'config.yaml'}: {str(error).splitlines()[-1].strip()}"
        ) from None
    return method, tokenizer, folder
