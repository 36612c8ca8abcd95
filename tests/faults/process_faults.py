"""Faults of processes and of the disk they write to."""

import random
import signal
import time
from pathlib import Path

from tests.faults import processes, records
from tests.faults.attempt import START_LIMIT_S, Attempt, Options
from tests.faults.disk import limit_files
from tests.faults.fault import Fault, Stage

_TIMEOUT_MINUTES = 0.4


class KillRanks(Fault):
    name = "kill_ranks"
    what = "SIGKILL to all ranks"

    def act(self, stage: Stage, attempt: Attempt) -> None:
        processes.send(list(attempt.ranks().values()), signal.SIGKILL)


class PowerOff(Fault):
    name = "power_off"
    what = "SIGKILL to launcher, ranks and workers at any moment, start-up included"

    def draw(self, rng: random.Random) -> None:
        self.delay_s = rng.uniform(0.0, 20.0) if rng.random() < 0.5 else None

    def strike(self, stage: Stage, attempt: Attempt) -> bool:
        if self.delay_s is None:
            return super().strike(stage, attempt)
        time.sleep(self.delay_s)
        self.act(stage, attempt)
        return True

    def act(self, stage: Stage, attempt: Attempt) -> None:
        processes.send(list(processes.marked(attempt.mark)), signal.SIGKILL)


class KillOneRank(Fault):
    name = "kill_rank_1"
    what = "SIGKILL to rank 1 alone"
    min_ranks = 2

    def act(self, stage: Stage, attempt: Attempt) -> None:
        processes.send([pid for rank, pid in attempt.ranks().items() if rank == 1], signal.SIGKILL)


class TermLauncher(Fault):
    name = "term_launcher"
    what = "SIGTERM to the launcher"
    saves_before_end = True

    def act(self, stage: Stage, attempt: Attempt) -> None:
        processes.send([attempt.process.pid], signal.SIGTERM)


class TermRank(Fault):
    name = "term_rank"
    what = "SIGTERM to one rank"
    saves_before_end = True

    def draw(self, rng: random.Random) -> None:
        self.place = rng.random()

    def act(self, stage: Stage, attempt: Attempt) -> None:
        found = attempt.ranks()
        processes.send([found[int(self.place * len(found))]], signal.SIGTERM)


class StopRank(Fault):
    name = "stop_rank"
    what = f"SIGSTOP to one rank (train.timeout_minutes {_TIMEOUT_MINUTES})"
    limit_s = 180.0
    min_ranks = 2

    def draw(self, rng: random.Random) -> None:
        self.place = rng.random()

    def options(self, stage: Stage) -> Options:
        return Options(["--train.timeout_minutes", str(_TIMEOUT_MINUTES)])

    def act(self, stage: Stage, attempt: Attempt) -> None:
        found = attempt.ranks()
        processes.send([found[int(self.place * len(found))]], signal.SIGSTOP)


def in_save(run_dir: Path) -> bool:
    """Whether a checkpoint is being written: something is there that is none yet."""
    return bool(records.half_written(run_dir))


class KillInSave(Fault):
    name = "kill_in_save"
    what = "SIGKILL to all ranks in the middle of a save"

    def draw(self, rng: random.Random) -> None:
        self.after = rng.randint(1, 6)
        self.steps = self.after + 11
        self.part = rng.random()

    def strike(self, stage: Stage, attempt: Attempt) -> bool:
        if not attempt.wait_until_advanced(self.after):
            return False
        # Saves so far tell how long one takes, and so where its middle is.
        seconds = [record["seconds"] for record in attempt.records() if record.get("event") == "checkpoint"]
        found = attempt.ranks()
        if not attempt.wait_for(lambda: in_save(stage.run_dir), START_LIMIT_S):
            return False
        time.sleep(self.part * min([*seconds, 0.5]))
        processes.send(list(found.values()), signal.SIGKILL)
        return True


class DiskFull(Fault):
    name = "disk_full"
    what = "no space left where the run writes, from the start, from a step or from within a save on"
    limit_s = 180.0
    may_skip_saves = True

    def draw(self, rng: random.Random) -> None:
        self.moment = rng.choice(("start", "step", "save"))
        self.room = rng.random()
        self.steps = self.after + 8

    def options(self, stage: Stage) -> Options:
        # A run that goes on without saving ends by itself, in a save that cannot succeed either.
        arguments = ["--train.stop_after", str(self.steps)]
        if not stage.disk.is_mounted:
            # The largest file is about half of a checkpoint; metrics and the like stay below.
            limit = int((0.1 + 0.3 * self.room) * stage.checkpoint_bytes)
            return Options(arguments, before_exec=limit_files(limit))
        if self.moment == "start":
            stage.disk.fill(int(self.room * 4096))
        return Options(arguments)

    def strike(self, stage: Stage, attempt: Attempt) -> bool:
        if self.moment == "start" or not stage.disk.is_mounted:
            return True
        if not attempt.wait_until_advanced(self.after):
            return False
        if self.moment == "save" and not attempt.wait_for(lambda: in_save(stage.run_dir), START_LIMIT_S):
            return False
        # A save that is under way has seen that there was room.
        room = 1 << 20 if self.moment == "save" else stage.checkpoint_bytes
        stage.disk.fill(int(self.room * room))
        return True

    def heal(self, stage: Stage) -> None:
        stage.disk.free()
