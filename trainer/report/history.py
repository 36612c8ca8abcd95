"""What a run wrote down: steps, events and settings."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import ConfigError
from trainer.records import read_records

_METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class History:
    """The records of one run.

    Attributes:
        name: Folder name of the run, made distinct among the runs of a page.
        run_dir: Its folder.
        steps: Records of logged steps, in order.
        events: Event records, in order.
        torn: Lines of the file that are no whole records, and left out.
    """

    name: str
    run_dir: Path
    steps: list[dict[str, Any]]
    events: list[dict[str, Any]]
    torn: int = 0

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """(samples, values) of one logged number, records without it left out."""
        points = [(record["samples"], record[key]) for record in self.steps if record.get(key) is not None]
        return [x for x, _ in points], [y for _, y in points]

    def evaluations(self, set_name: str, figure: str) -> tuple[list[float], list[float]]:
        """(samples, values) of one figure of an evaluation set."""
        per_step = self.samples_per_step
        points = [
            (event["step"] * per_step, event[figure])
            for event in self.events
            if event["event"] == "eval" and event.get("set") == set_name and event.get(figure) is not None
        ]
        return [x for x, _ in points], [y for _, y in points]

    @property
    def samples_per_step(self) -> float:
        """The global batch size."""
        return self.steps[-1]["samples"] / self.steps[-1]["step"]

    @property
    def keys(self) -> list[str]:
        """Names of the logged numbers."""
        return sorted({key for record in self.steps for key, value in record.items() if isinstance(value, int | float)})

    def final_evaluations(self) -> dict[str, dict[str, Any]]:
        """The last `eval` event of each set."""
        return {event["set"]: event for event in self.events if event["event"] == "eval" and "set" in event}


def read_histories(run_dirs: list[Path]) -> list[History]:
    """The records of several runs, under distinct names.

    Raises:
        ConfigError: A folder without a readable metrics.jsonl, or one in which nothing was logged.
    """
    names = [run_dir.resolve().name for run_dir in run_dirs]
    distinct = names if len(set(names)) == len(names) else [str(run_dir) for run_dir in run_dirs]
    return [_read(run_dir, name) for run_dir, name in zip(run_dirs, distinct, strict=True)]


def _read(run_dir: Path, name: str) -> History:
    path = run_dir / _METRICS
    try:
        records, torn = read_records(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); give the --run_dir of a training run") from None
    steps = [record for record in records if "event" not in record and record.get("samples")]
    if not steps:
        raise ConfigError(
            f"{path} has no logged step yet ({len(records)} other records, {torn} torn lines); wait for the first, or "
            "lower train.log_every"
        )
    return History(name, run_dir, steps, [record for record in records if "event" in record], torn)
