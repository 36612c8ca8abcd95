"""Measurements in fresh processes of one thread each, alternating between the implementations compared."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import Measurement

_ROOT = Path(__file__).resolve().parents[1]
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_ERROR_LINES = 15


@dataclass(frozen=True)
class Peer:
    """One open_clip to compare with.

    Attributes:
        name: Shown in the table.
        path: Folder put in front of the installed packages; None means the installed open_clip.
    """

    name: str = "open_clip"
    path: str | None = None


@dataclass(frozen=True)
class Job:
    """One measurement: a module-level function of this package with JSON arguments.

    Attributes:
        function: Returns a Measurement.
        arguments: Keyword arguments.
        peer: Which open_clip the process imports.
    """

    function: Callable[..., Measurement]
    arguments: dict[str, Any]
    peer: Peer = Peer()


Runner = Callable[[Job], Measurement]


def run_inline(job: Job) -> Measurement:
    """Runs a job in this process, with the installed open_clip: no start-up time, no isolation."""
    return job.function(**job.arguments)


def run_in_fresh_process(job: Job, timeout_s: float = 1800) -> Measurement:
    """Runs a job in a new interpreter of one thread.

    Raises:
        RuntimeError: The job failed; the message ends with the last lines of its traceback.
        subprocess.TimeoutExpired: It was still running after `timeout_s` and has been killed.
    """
    environment = {**os.environ, **dict.fromkeys(_THREAD_VARIABLES, "1")}
    if job.peer.path is not None:
        inherited = os.environ.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [job.peer.path, inherited]))
    request = {"module": job.function.__module__, "function": job.function.__name__, "arguments": job.arguments}
    finished = subprocess.run(
        [sys.executable, "-m", "benchmarks.worker"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        cwd=_ROOT,
        env=environment,
        timeout=timeout_s,
        check=False,
    )
    if finished.returncode:
        last_lines = "\n".join(finished.stderr.splitlines()[-_ERROR_LINES:])
        name = f"{job.function.__module__}.{job.function.__name__}"
        raise RuntimeError(f"{name}({job.arguments}) beside {job.peer.name} failed:\n{last_lines}")
    return Measurement(**json.loads(finished.stdout))


def interleave(runner: Runner, jobs: dict[str, Job], *, rounds: int) -> dict[str, Measurement]:
    """Runs every job once per round, so that a slow minute of the machine falls on all of them alike.

    Args:
        runner: `run_in_fresh_process` or `run_inline`.
        jobs: By the name of the implementation.
        rounds: How often each job runs.

    Returns:
        One measurement per name: least times, largest memory, and figures that were equal in all rounds.
    """
    results: dict[str, Measurement] = {}
    for _ in range(rounds):
        for name, job in jobs.items():
            result = runner(job)
            results[name] = results[name].merged(result) if name in results else result
    return results


def check_agreement(results: dict[str, Measurement], figure: str, *, relative: float) -> None:
    """Proves that all implementations computed the same thing.

    Raises:
        RuntimeError: The figure differs between them by more than `relative`.
    """
    values = {name: result.figures[figure] for name, result in results.items()}
    low, high = min(values.values()), max(values.values())
    if high - low > relative * max(abs(low), abs(high)):
        raise RuntimeError(f"the implementations did not compute the same {figure}: {values}")
