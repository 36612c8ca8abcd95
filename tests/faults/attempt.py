"""One start of the real entry point, watched from outside through the run folder and the process table."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from tests.faults import processes, records
from tests.trainer.harness import BIN

# Imports, the process group, the data and the checkpoint; minutes on a machine that is busy with other things.
START_LIMIT_S = 600.0
# `deepspeed` dies of a SIGTERM at once, and its ranks save after it.
GRACE_S = 60.0
_POLL_S = 0.005
_LAUNCHER_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "LOCAL_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)


@dataclass(frozen=True)
class Options:
    """What a fault changes about the start of its attempt."""

    arguments: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    before_exec: Callable[[], None] | None = None


@dataclass(frozen=True)
class Ending:
    """How an attempt ended.

    Attributes:
        in_time: Whether the launcher ended by itself within the limit.
        code: Its exit code, negative for a signal.
        seconds: Until then, and until the last of its processes was gone.
        left_over: Command lines of processes that outlived it by `GRACE_S`.
    """

    in_time: bool
    code: int
    seconds: float
    left_over: list[str]


class Attempt:
    """A start of the run, from its launcher to the last process that it left; as a context, none outlives the block.

    Args:
        command: Launcher and script.
        arguments: Of the trainer.
        run_dir: Its run folder.
        log: Where everything that it prints goes.
        mark: Unique text, see `tests.faults.processes`.
        options: What a fault changes.
    """

    def __init__(
        self, command: list[str], arguments: list[str], run_dir: Path, log: Path, mark: str, options: Options
    ) -> None:
        self.run_dir, self.log, self.mark = run_dir, log, mark
        self._before = records.lines(run_dir)
        inherited = {key: value for key, value in os.environ.items() if key not in _LAUNCHER_VARIABLES}
        threads = {"OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"}
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [*command, *arguments, *options.arguments],
                env={**inherited, **threads, processes.MARK: mark, **options.environment},
                cwd=log.parent,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=options.before_exec,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()

    @property
    def running(self) -> bool:
        """Whether the launcher has not ended."""
        return self.process.poll() is None

    def records(self) -> list[dict[str, Any]]:
        """What this attempt has written to metrics.jsonl so far."""
        return records.parse(records.new_lines(self._before, records.lines(self.run_dir)))

    def advanced(self) -> int:
        """Steps logged since this attempt began."""
        found = self.records()
        start = records.resumed_at(found) or 0
        return max(records.steps(found), default=start) - start

    def wait_for(self, condition: Callable[[], bool], limit_s: float) -> bool:
        """Whether the condition came true before the attempt ended or the time was over."""
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            if condition():
                return True
            if not self.running:
                return condition()
            time.sleep(_POLL_S)
        return False

    def wait_until_advanced(self, steps: int) -> bool:
        """Whether so many steps were logged before the attempt ended."""
        return self.wait_for(lambda: self.advanced() >= steps, START_LIMIT_S)

    def ranks(self) -> dict[int, int]:
        """Process id of each rank."""
        return processes.ranks(self.mark)

    def begun(self) -> bool:
        """Whether it has resumed, or started afresh and logged a step."""
        return bool(self.records())

    def end(self, limit_s: float) -> "Ending":
        """Wait for the end, and end what does not."""
        started = time.monotonic()
        try:
            self.process.wait(limit_s)
            in_time = True
        except subprocess.TimeoutExpired:
            in_time = False
        left = processes.left_over(self.mark, GRACE_S) if in_time else {}
        seconds = time.monotonic() - started
        self._kill()
        return Ending(in_time, self.process.wait(), seconds, [" ".join(words).strip() for words in left.values()])

    def _kill(self) -> None:
        while remaining := processes.marked(self.mark):
            processes.send(list(remaining), signal.SIGKILL)
            # The launcher stays in the process table until somebody asks for its exit code.
            self.process.poll()
            time.sleep(_POLL_S)

    def output(self, last: int = 30) -> str:
        """The last lines that it printed."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-last:])
