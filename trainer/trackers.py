"""TensorBoard and Weights & Biases: tried before a run, and never the end of one."""

import os
import sys
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data.errors import printable
from data.writing import try_folder
from trainer.config.sections import LoggingConfig
from trainer.errors import ConfigError

_MAX_REASON = 200
_WITHOUT_KEY = ("offline", "disabled", "dryrun")
_WANDB_ADVICE = "run `wandb login`, set WANDB_API_KEY or WANDB_MODE=offline, or leave logging.wandb_project out"


class Trackers:
    """The destinations of numbers besides metrics.jsonl. One that fails is left out from then on, with a warning.

    Args:
        run_dir: The run's folder.
        config: Which ones.
        start_step: The last step before the numbers that come.

    Raises:
        ConfigError: One of them cannot be opened.
    """

    def __init__(self, run_dir: Path, config: LoggingConfig, start_step: int = 0) -> None:
        # (log numbers of a step, close) by name.
        self._open: dict[str, tuple[Callable[[dict[str, float], int], None], Callable[[], None]]] = {}
        if config.tensorboard:
            self._open["TensorBoard"] = _open_tensorboard(run_dir, start_step)
        if config.wandb_project:
            self._open["W&B"] = _open_wandb(run_dir, config.wandb_project)

    def log(self, numbers: dict[str, float], step: int) -> None:
        """Send the numbers of a step to all."""
        for name, (log, _) in list(self._open.items()):
            self._attempt(name, lambda log=log: log(numbers, step))

    def close(self) -> None:
        """Flush and close all."""
        for name, (_, close) in list(self._open.items()):
            self._attempt(name, close)
        self._open = {}

    def _attempt(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        # Whatever a library raises: the run is worth more than its curves, which are in metrics.jsonl as well.
        except Exception as error:
            del self._open[name]
            print(
                f"warning: {name} fails ({_reason(error)}) and gets no more numbers; all of them are in metrics.jsonl",
                file=sys.stderr,
                flush=True,
            )


def try_trackers(run_dir: Path, config: LoggingConfig) -> None:
    """Find out early what would keep `Trackers` from opening, without opening anything.

    Raises:
        ConfigError, DataError: A package or a key is missing, or the folder cannot be written.
    """
    if config.tensorboard:
        _summary_writer()
        try_folder(run_dir / "tensorboard", "repair it, or set logging.tensorboard false")
    if config.wandb_project:
        _check_key(_wandb_module())


def _reason(error: Exception) -> str:
    text = " ".join(str(getattr(error, "strerror", None) or error).split())
    return printable(text or type(error).__name__, _MAX_REASON)


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError(
            "logging.tensorboard needs the tensorboard package: pip install tensorboard, or set it false"
        ) from None
    return SummaryWriter


def _open_tensorboard(run_dir: Path, start_step: int) -> tuple[Callable, Callable]:
    writer_class = _summary_writer()
    _silence_writer_thread()
    folder = run_dir / "tensorboard"
    try:
        # A resumed run replaces what came after its checkpoint, as in metrics.jsonl.
        writer = writer_class(folder, purge_step=start_step + 1 if start_step else None)
    except Exception as error:
        raise ConfigError(
            f"{folder} cannot be written ({_reason(error)}); repair it, or set logging.tensorboard false"
        ) from None

    def log(numbers: dict[str, float], step: int) -> None:
        for key, value in numbers.items():
            writer.add_scalar(key, value, step)

    return log, writer.close


def _silence_writer_thread() -> None:
    """TensorBoard's thread hands its error to whoever writes next; Python would print a traceback as well."""
    usual = threading.excepthook
    if getattr(usual, "leaves_out_tensorboard", False):
        return

    def hook(arguments: Any) -> None:
        if type(arguments.thread).__module__.split(".")[0] != "tensorboard":
            usual(arguments)

    hook.leaves_out_tensorboard = True
    threading.excepthook = hook


def _wandb_module() -> Any:
    try:
        import wandb
    except ImportError:
        raise ConfigError("logging.wandb_project needs wandb: pip install 'declip-trainer[tracking]'") from None
    return wandb


def _check_key(wandb: Any) -> None:
    if os.environ.get("WANDB_MODE", "") in _WITHOUT_KEY or os.environ.get("WANDB_DISABLED", "") in ("true", "1"):
        return
    try:
        key = wandb.api.api_key
    except Exception:
        # Another release keeps it elsewhere; opening the run will tell.
        return
    if not key:
        raise ConfigError(f"logging.wandb_project: W&B has no API key on this machine; {_WANDB_ADVICE}")


def _open_wandb(run_dir: Path, project: str) -> tuple[Callable, Callable]:
    wandb = _wandb_module()
    # Kept in the folder: a resumed run goes on in its own record, and a namesake elsewhere has another.
    identity = run_dir / "wandb_id"
    try:
        run_id = identity.read_text(encoding="utf-8").strip() if identity.is_file() else ""
        if not run_id:
            run_id = uuid.uuid4().hex[:12]
            identity.write_text(run_id, encoding="utf-8")
        run = wandb.init(project=project, name=run_dir.name, dir=str(run_dir), resume="allow", id=run_id)
    except Exception as error:
        raise ConfigError(f"logging.wandb_project: W&B cannot be used ({_reason(error)}); {_WANDB_ADVICE}") from None
    return lambda numbers, step: run.log(numbers, step=step), run.finish
