"""What a fault is: when it strikes, what it changes about the start of its attempt, what the run owes in spite of it.

Each draws everything random about itself when it is made, so a seed gives the same plan again.
"""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from tests.faults.attempt import Attempt, Options
from tests.faults.disk import SmallDisk
from tests.faults.server import ShardServer


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
