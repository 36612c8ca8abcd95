"""Training runs and their records, which outlive the runs: what is on record is not run again."""

import json
import math
import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.family.methods import CONTROL, Data, recipe
from trainer.records import read_records

_ROOT = Path(__file__).resolve().parents[2]
_NEAR = 1.05


@dataclass(frozen=True)
class RunKey:
    """One training run."""

    name: str
    steps: int
    seed: int

    def __str__(self) -> str:
        return f"{self.name}-{self.steps}-{self.seed}"


class Records:
    """The file of all figures.

    Attributes:
        costs: `seconds`, `mib` and `flops` per step, by entry.
        settings: Of the comparison; records of other settings are not mixed with these.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        """Opens the file, or begins it.

        Raises:
            ValueError: It holds a comparison with other settings.
        """
        self._path, self._lock = path, threading.Lock()
        self.settings = settings
        self.costs: dict[str, dict[str, float]] = {}
        self._curves: dict[str, list[dict[str, Any]]] = {}
        if path.is_file():
            found = json.loads(path.read_text())
            if found["settings"] != settings:
                raise ValueError(f"{path} holds a comparison with other settings; give another --out, or delete it")
            self.costs, self._curves = found["costs"], found["runs"]

    def has(self, key: RunKey) -> bool:
        """Whether the run is on record."""
        return str(key) in self._curves

    def curve(self, key: RunKey) -> list[dict[str, Any]]:
        """Evaluations of a run in order: `step`, `set` and figures."""
        return self._curves[str(key)]

    def add(self, key: RunKey, curve: list[dict[str, Any]]) -> None:
        """Record a finished run."""
        with self._lock:
            self._curves[str(key)] = curve
            self.save()

    def save(self) -> None:
        """Write the file, whole or not at all."""
        content = {"settings": self.settings, "costs": self.costs, "runs": dict(sorted(self._curves.items()))}
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=1) + "\n")
        partial.replace(self._path)


def write_recipe(name: str, data: Data, folder: Path) -> Path:
    """The recipe of an entry as a file, which `trainer/run.py --recipe` also takes by hand."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.yaml"
    # Through JSON: parts that recipes share would become YAML aliases.
    path.write_text(yaml.safe_dump(json.loads(json.dumps(recipe(name, data))), sort_keys=False))
    return path


def train(key: RunKey, recipe_path: Path, run_dir: Path) -> list[dict[str, Any]]:
    """Train a run to its end, or go on with one that was interrupted.

    Returns:
        Its evaluations.

    Raises:
        RuntimeError: It ended with an error; the message has its last lines.
    """
    command = [sys.executable, str(_ROOT / "trainer" / "run.py"), "--recipe", str(recipe_path)]
    command += ["--run_dir", str(run_dir), "--resume", "auto"]
    command += ["--train.steps", str(key.steps), "--train.seed", str(key.seed)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True, check=False)
    if finished.returncode:
        lines = (finished.stdout + finished.stderr).splitlines()[-15:]
        raise RuntimeError(f"{key} failed:\n" + "\n".join(lines))
    records = read_records(run_dir / "metrics.jsonl").whole
    return [
        {name: value for name, value in record.items() if name != "event"}
        for record in records
        if record.get("event") == "eval"
    ]


def control_steps(names: list[str], compute: dict[str, float], steps: int) -> dict[str, int]:
    """How long CLIP trains to spend what each entry does.

    Entries within 10 % of each other share a run in their middle, so that no more than 5 % are given or taken; what
    costs CLIP's own compute within 5 % shares CLIP's own run.

    Args:
        names: Entries.
        compute: FLOPs of a run of each over those of CLIP's run.
        steps: Of the short runs.

    Returns:
        Steps by entry, in the order of names.
    """
    found: dict[str, int] = {name: steps for name in names if compute[name] <= _NEAR}
    waiting = sorted(set(names) - set(found), key=compute.__getitem__)
    while waiting:
        group = [name for name in waiting if compute[name] <= compute[waiting[0]] * _NEAR**2]
        waiting = waiting[len(group) :]
        middle = math.sqrt(compute[group[0]] * compute[group[-1]])
        found |= dict.fromkeys(group, round(steps * middle))
    return {name: found[name] for name in names if name != CONTROL}
