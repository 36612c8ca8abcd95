"""Metrics of a run: metrics.jsonl, the trackers, and the console."""

import json
import math
import sys
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
from trainer.records import cut_records, end_line, read_records
from trainer.tables import print_table
from trainer.trackers import Trackers

METRICS = "metrics.jsonl"
BAD_SAMPLES = "bad_samples.jsonl"


class MetricsWriter:
    """Writes one record per logged step and one per event. Lives on rank 0 only.

    Raises:
        ConfigError: From any method, when the disk is full or gone; at first also when a tracker cannot be opened.
    """

    def __init__(self, run_dir: Path, config: LoggingConfig, start_step: int = 0) -> None:
        self.path = run_dir / METRICS
        with writable(self.path):
            end_line(self.path)
            self._file = self.path.open("a", encoding="utf-8")
        self._trackers = Trackers(run_dir, config, start_step)

    def log(self, record: dict[str, Any]) -> None:
        """Append the metrics of one step."""
        self._append(record)
        numbers = {key: value for key, value in record.items() if isinstance(value, int | float) and key != "step"}
        self._trackers.log(numbers, record["step"])

    def event(self, name: str, step: int, **details: Any) -> None:
        """Append an event (`resumed`, `checkpoint`, `bad_sample`, `skipped_step`, `loss_spike`, `rollback`, `eval`)."""
        self._append({"event": name, "step": step, **details})
        if name == "eval":
            prefix = f"eval/{details['set']}/"
            numbers = {prefix + key: value for key, value in details.items() if isinstance(value, float)}
            self._trackers.log(numbers, step)

    def close(self) -> None:
        """Flush and close every destination."""
        with writable(self.path):
            self._file.close()
        self._trackers.close()

    def _append(self, record: dict[str, Any]) -> None:
        # JSON has no NaN; null keeps every line readable by any parser.
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        with writable(self.path):
            self._file.write(json.dumps(clean) + "\n")
            self._file.flush()


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
    cut_records(run_dir / BAD_SAMPLES, step)
    return cut_records(run_dir / METRICS, step)


def evaluated_sets(run_dir: Path, step: int) -> set[str]:
    """Names of the evaluation sets whose figures at a step are on record."""
    path = run_dir / METRICS
    if not path.is_file():
        return set()
    return {
        record["set"]
        for record in read_records(path).whole
        if record.get("event") == "eval" and record["step"] == step and "set" in record
    }


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
