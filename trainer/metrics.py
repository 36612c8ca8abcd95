"""Metrics of a run: metrics.jsonl, TensorBoard, optionally W&B, and the console."""

import json
import math
import sys
import uuid
from pathlib import Path
from typing import Any

import rich.console
import rich.progress

from trainer.config import LoggingConfig
from trainer.errors import ConfigError


class MetricsWriter:
    """Writes one record per logged step and one per event. Lives on rank 0 only."""

    def __init__(self, run_dir: Path, config: LoggingConfig, start_step: int = 0) -> None:
        self.path = run_dir / "metrics.jsonl"
        self._file = self.path.open("a", encoding="utf-8")
        self._tensorboard = _tensorboard(run_dir, start_step) if config.tensorboard else None
        self._wandb = _wandb(run_dir, config.wandb_project) if config.wandb_project else None

    def log(self, record: dict[str, Any]) -> None:
        """Append the metrics of one step."""
        self._append(record)
        numbers = {key: value for key, value in record.items() if isinstance(value, int | float) and key != "step"}
        self._scalars(numbers, record["step"])

    def event(self, name: str, step: int, **details: Any) -> None:
        """Append an event (`resumed`, `checkpoint`, `bad_sample`, `skipped_step`, `eval`)."""
        self._append({"event": name, "step": step, **details})
        if name == "eval":
            prefix = f"eval/{details['set']}/"
            numbers = {prefix + key: value for key, value in details.items() if isinstance(value, float)}
            self._scalars(numbers, step)

    def close(self) -> None:
        """Flush and close every destination."""
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _append(self, record: dict[str, Any]) -> None:
        # JSON has no NaN; null keeps every line readable by any parser.
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self._file.write(json.dumps(clean) + "\n")
        self._file.flush()

    def _scalars(self, numbers: dict[str, float], step: int) -> None:
        if self._tensorboard is not None:
            for key, value in numbers.items():
                self._tensorboard.add_scalar(key, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)


def truncate_metrics(run_dir: Path, step: int) -> int:
    """Drop records after `step`: a resumed run writes them again, and a torn last line is of no use.

    Returns:
        How many lines were dropped.
    """
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        return 0
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if _is_record_up_to(line, step)]
    if len(kept) < len(lines):
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        temporary.replace(path)
    return len(lines) - len(kept)


def _is_record_up_to(line: str, step: int) -> bool:
    try:
        return line.endswith("\n") and json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False


class Console:
    """A progress bar with time left on a terminal, plain lines elsewhere. Silent off rank 0."""

    def __init__(self, is_main: bool) -> None:
        self._rich = rich.console.Console(soft_wrap=True, highlight=False)
        self.enabled = is_main
        self._progress: rich.progress.Progress | None = None
        self._task: rich.progress.TaskID | None = None

    def line(self, text: str) -> None:
        """Print one line."""
        if not self.enabled:
            return
        if self._progress is not None:
            self._progress.console.print(text, markup=False)
        else:
            print(text, flush=True)

    def warn(self, text: str) -> None:
        """Print one warning line on stderr."""
        if self.enabled:
            print(f"warning: {text}", file=sys.stderr, flush=True)

    def start(self, steps: int, done: int) -> None:
        """Show the bar when there is a terminal."""
        if not self.enabled or not self._rich.is_terminal:
            return
        columns = [
            rich.progress.TextColumn("step"),
            rich.progress.MofNCompleteColumn(),
            rich.progress.BarColumn(),
            rich.progress.TextColumn("{task.description}"),
            rich.progress.TimeRemainingColumn(),
        ]
        self._progress = rich.progress.Progress(*columns, console=self._rich, refresh_per_second=2)
        self._task = self._progress.add_task("", total=steps, completed=done)
        self._progress.start()

    def advance(self, step: int, description: str | None = None) -> None:
        """Move the bar."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step, description=description)

    def stop(self) -> None:
        """Remove the bar."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _tensorboard(run_dir: Path, start_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError("logging.tensorboard needs the tensorboard package: pip install tensorboard") from None
    # A resumed run replaces what came after its checkpoint, as in metrics.jsonl.
    return SummaryWriter(run_dir / "tensorboard", purge_step=start_step + 1 if start_step else None)


def _wandb(run_dir: Path, project: str) -> Any:
    try:
        import wandb
    except ImportError:
        raise ConfigError("logging.wandb_project needs wandb: pip install 'declip-trainer[tracking]'") from None
    # Kept in the folder: a resumed run goes on in its own record, and a namesake elsewhere has another.
    identity = run_dir / "wandb_id"
    run_id = identity.read_text(encoding="utf-8").strip() if identity.is_file() else ""
    if not run_id:
        run_id = uuid.uuid4().hex[:12]
        identity.write_text(run_id, encoding="utf-8")
    return wandb.init(project=project, name=run_dir.name, dir=str(run_dir), resume="allow", id=run_id)
