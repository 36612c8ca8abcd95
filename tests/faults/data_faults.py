"""Faults of the training shards, on disk and on a web server."""

import random
import shutil
from pathlib import Path

from tests.faults.attempt import Attempt, Options
from tests.faults.fault import Fault, Stage


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
