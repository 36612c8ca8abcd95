"""The faults. Each draws everything random about itself when it is made, so a seed gives the same plan again."""

import random
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from tests.faults import processes, records
from tests.faults.attempt import START_LIMIT_S, Attempt, Options
from tests.faults.disk import SmallDisk, limit_files
from tests.faults.server import ShardServer

_TIMEOUT_MINUTES = 0.4


@dataclass
class Stage:
    """What faults act on.

    Attributes:
        run_dir: Run folder, on `disk`.
        shards: Folder of the training shards.
        pattern: Their brace range without the folder.
        scratch: For caches of single attempts.
        checkpoint_bytes: Size of one checkpoint.
    """

    run_dir: Path
    shards: Path
    pattern: str
    scratch: Path
    server: ShardServer
    disk: SmallDisk
    checkpoint_bytes: int


class Fault:
    """One fault; subclasses say which.

    Attributes:
        name: In plans and tables.
        what: One line for the table.
        limit_s: Longest time from the fault to the end of its attempt.
        min_ranks: World size that it needs.
        saves_before_end: The run is told to end and can: no step may be repeated.
        may_skip_saves: Nothing can be saved while it lasts.
        passes: It is over soon, and the run must go on by itself.
        steps: How far the run may get in this attempt.
    """

    name: ClassVar[str]
    what: ClassVar[str]
    limit_s: ClassVar[float] = 120.0
    min_ranks: ClassVar[int] = 1
    saves_before_end: ClassVar[bool] = False
    may_skip_saves: ClassVar[bool] = False
    passes: ClassVar[bool] = False

    def __init__(self, rng: random.Random) -> None:
        self.after = rng.randint(1, 10)
        self.steps = self.after + 5
        self.draw(rng)

    def draw(self, rng: random.Random) -> None:
        """Draw what this kind needs besides `after`, the steps before it strikes."""

    def options(self, stage: Stage) -> Options:
        """What it changes about the start of the attempt."""
        return Options()

    def strike(self, stage: Stage, attempt: Attempt) -> bool:
        """Wait for the moment and act; False if the attempt ended before."""
        if not attempt.wait_until_advanced(self.after):
            return False
        self.act(stage, attempt)
        return True

    def act(self, stage: Stage, attempt: Attempt) -> None:
        """Do it."""
        raise NotImplementedError

    def heal(self, stage: Stage) -> None:
        """Undo it before the next attempt."""


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
        if not attempt.wait_for(lambda: bool(records.half_written(stage.run_dir)), START_LIMIT_S):
            return False
        time.sleep(self.part * min([*seconds, 0.5]))
        processes.send(list(found.values()), signal.SIGKILL)
        return True


class DiskFull(Fault):
    name = "disk_full"
    what = "no space left where the run writes"
    limit_s = 180.0
    may_skip_saves = True

    def draw(self, rng: random.Random) -> None:
        self.at_start = rng.random() < 0.25
        self.room = rng.random()
        self.steps = self.after + 8

    def options(self, stage: Stage) -> Options:
        # A run that goes on without saving ends by itself, in a save that cannot succeed either.
        arguments = ["--train.stop_after", str(self.steps)]
        if not stage.disk.is_mounted:
            # The largest file is about half of a checkpoint; metrics and the like stay below.
            limit = int((0.1 + 0.3 * self.room) * stage.checkpoint_bytes)
            return Options(arguments, before_exec=limit_files(limit))
        if self.at_start:
            stage.disk.fill(int(self.room * 4096))
        return Options(arguments)

    def strike(self, stage: Stage, attempt: Attempt) -> bool:
        if self.at_start or not stage.disk.is_mounted:
            return True
        return super().strike(stage, attempt)

    def act(self, stage: Stage, attempt: Attempt) -> None:
        stage.disk.fill(int(self.room * stage.checkpoint_bytes))

    def heal(self, stage: Stage) -> None:
        stage.disk.free()


class UnreadableShards(Fault):
    """A quarter of the shards, so that the run soon meets one that it has not opened yet."""

    limit_s = 180.0

    def draw(self, rng: random.Random) -> None:
        self.after = rng.randint(1, 5)
        self.steps = self.after + 10
        self.place = rng.random()

    def options(self, stage: Stage) -> Options:
        return Options(["--train.stop_after", str(self.steps)])

    def act(self, stage: Stage, attempt: Attempt) -> None:
        shards = sorted(stage.shards.glob("*.tar"))
        for shard in random.Random(self.place).sample(shards, max(1, len(shards) // 4)):
            shutil.copy2(shard, stage.scratch / shard.name)
            self.damage(shard)

    def damage(self, shard: Path) -> None:
        """Make one unreadable."""
        raise NotImplementedError

    def heal(self, stage: Stage) -> None:
        for kept in stage.scratch.glob("*.tar"):
            shutil.copy2(kept, stage.shards / kept.name)
            kept.unlink()


class TruncatedShards(UnreadableShards):
    name = "shard_truncated"
    what = "shards cut short while the run reads them"

    def damage(self, shard: Path) -> None:
        with shard.open("r+b") as stream:
            stream.truncate(shard.stat().st_size // 3)


class GarbageShards(UnreadableShards):
    name = "shard_garbage"
    what = "shards overwritten with garbage"

    def damage(self, shard: Path) -> None:
        size = shard.stat().st_size
        with shard.open("r+b") as stream:
            stream.write(random.Random(self.place).randbytes(size))


class RemovedShards(UnreadableShards):
    name = "shard_removed"
    what = "shards removed"

    def damage(self, shard: Path) -> None:
        shard.unlink()


class FromServer(Fault):
    """The shards come from a web server, into a cache that is empty when the attempt starts and holds a few of them."""

    limit_s = 300.0

    def draw(self, rng: random.Random) -> None:
        self.steps = rng.randint(8, 14)
        self.times = rng.randint(1, 2)
        self.pause_s = rng.uniform(2.0, 6.0)

    def options(self, stage: Stage) -> Options:
        shards = list(stage.shards.glob("*.tar"))
        room = sum(shard.stat().st_size for shard in shards) * 0.5
        arguments = ["--data.train", f"{stage.server.address}/{stage.pattern}", "--train.stop_after", str(self.steps)]
        arguments += ["--data.cache_gib", str(room / 2**30)]
        return Options(arguments, {"DECLIP_CACHE": str(stage.scratch / "cache")})

    def strike(self, stage: Stage, attempt: Attempt) -> bool:
        self.act(stage, attempt)
        return True

    def heal(self, stage: Stage) -> None:
        stage.server.behave()
        shutil.rmtree(stage.scratch / "cache", ignore_errors=True)


class ServerDrops(FromServer):
    name = "http_drop"
    what = "web server drops the first one or two connections for each file"
    passes = True

    def act(self, stage: Stage, attempt: Attempt) -> None:
        stage.server.misbehave("drop", self.times)


class ServerStalls(FromServer):
    name = "http_stall"
    what = "web server pauses in every file, and falls silent for good in one"
    passes = True

    def act(self, stage: Stage, attempt: Attempt) -> None:
        stage.server.misbehave("stall" if self.times == 1 else "slow", 1, self.pause_s)


class ServerSendsHalf(FromServer):
    name = "http_half"
    what = "web server sends the first half of each file as if it were the whole"
    passes = True

    def act(self, stage: Stage, attempt: Attempt) -> None:
        stage.server.misbehave("half", self.times)


class ServerDown(FromServer):
    name = "http_down"
    what = "web server answers every request with an error from some step on"

    def draw(self, rng: random.Random) -> None:
        super().draw(rng)
        self.after = rng.randint(1, 3)
        self.steps = 24

    def strike(self, stage: Stage, attempt: Attempt) -> bool:
        return Fault.strike(self, stage, attempt)

    def act(self, stage: Stage, attempt: Attempt) -> None:
        stage.server.misbehave("down", 1_000_000)


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


KINDS: dict[str, type[Fault]] = {
    kind.name: kind
    for kind in (
        KillRanks,
        KillOneRank,
        PowerOff,
        KillInSave,
        TermLauncher,
        TermRank,
        StopRank,
        DiskFull,
        TruncatedShards,
        GarbageShards,
        RemovedShards,
        ServerDrops,
        ServerStalls,
        ServerSendsHalf,
        ServerDown,
    )
}
