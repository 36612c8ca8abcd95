"""Metrics of a run: metrics.jsonl, TensorBoard, optionally W&B, and the console."""

import json
import math
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import rich.console
import rich.progress
import rich.table

from data.errors import printable_lines
from trainer.config.sections import LoggingConfig
from trainer.errors import ConfigError
from trainer.tables import print_table

METRICS = "metrics.jsonl"
BAD_SAMPLES = "bad_samples.jsonl"


class MetricsWriter:
    """Writes one record per logged step and one per event. Lives on rank 0 only.

    Raises:
        ConfigError: From any method, when the disk is full or gone.
    """

    def __init__(self, run_dir: Path, config: LoggingConfig, start_step: int = 0) -> None:
        self.path = run_dir / METRICS
        self._file = self.path.open("a", encoding="utf-8")
        self._tensorboard = _tensorboard(run_dir, start_step) if config.tensorboard else None
        self._wandb = _wandb(run_dir, config.wandb_project) if config.wandb_project else None

    def log(self, record: dict[str, Any]) -> None:
        """Append the metrics of one step."""
        self._append(record)
        numbers = {key: value for key, value in record.items() if isinstance(value, int | float) and key != "step"}
        self._scalars(numbers, record["step"])

    def event(self, name: str, step: int, **details: Any) -> None:
        """Append an event (`resumed`, `checkpoint`, `bad_sample`, `skipped_step`, `loss_spike`, `rollback`, `eval`)."""
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
        with writable(self.path):
            self._file.write(json.dumps(clean) + "\n")
            self._file.flush()

    def _scalars(self, numbers: dict[str, float], step: int) -> None:
        if self._tensorboard is not None:
            with writable(self.path.with_name("tensorboard")):
                for key, value in numbers.items():
                    self._tensorboard.add_scalar(key, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)


@contextmanager
def writable(path: Path) -> Iterator[None]:
    """Turn a disk that refuses into an error that says what could not be written."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written ({error.strerror or error}); make room or repair the disk, then continue from "
            "the last checkpoint with --resume auto"
        ) from None


def truncate_records(run_dir: Path, step: int) -> int:
    """Drop records after `step`: a resumed run writes them again, and a torn last line is of no use.

    Returns:
        How many lines metrics.jsonl lost; bad_samples.jsonl is cut back alike.
    """
    _truncate(run_dir / BAD_SAMPLES, step)
    return _truncate(run_dir / METRICS, step)


def _truncate(path: Path, step: int) -> int:
    if not path.is_file():
        return 0
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if _is_record_up_to(line, step)]
    if len(kept) < len(lines):
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        temporary.replace(path)
    return len(lines) - len(kept)


def evaluated_sets(run_dir: Path, step: int) -> set[str]:
    """Names of the evaluation sets whose figures at a step are on record."""
    path = run_dir / METRICS
    if not path.is_file():
        return set()
    with path.open(encoding="utf-8") as stream:
        found = [json.loads(line) for line in stream if '"eval"' in line]
    return {record["set"] for record in found if record.get("event") == "eval" and record["step"] == step}


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
        """Print one line, or several; what they quote from data may hold anything."""
        if not self.enabled:
            return
        if self._progress is not None:
            self._progress.console.print(printable_lines(text), markup=False, emoji=False)
        else:
            print(printable_lines(text), flush=True)

    def table(self, table: rich.table.Table) -> None:
        """Print a table; see `trainer.tables`."""
        if self.enabled:
            print_table(table)

    def warn(self, text: str) -> None:
        """Print one warning line on stderr."""
        if self.enabled:
            print(f"warning: {printable_lines(text)}", file=sys.stderr, flush=True)

    def start(self, steps: int, done: int) -> None:
        """Show the bar when there is a terminal."""
        if not self.enabled or not self._rich.is_terminal:
            return
        columns = [
            rich.progress.TextColumn("step"),
            rich.progress.MofNCompleteColumn(),
            rich.progress.BarColumn(),
            rich.progress.TextColumn("{task.description}", markup=False),
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
