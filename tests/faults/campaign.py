"""A run that is broken again and again, resumed each time, and compared with the run that nothing ever happened to."""

import random
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path

from data.shards.index_store import scan_shard, sidecar_path
from tests.faults import records
from tests.faults.attempt import START_LIMIT_S, Attempt, Options
from tests.faults.disk import SmallDisk
from tests.faults.fault import Fault, Stage
from tests.faults.kinds import KINDS
from tests.faults.server import ShardServer
from tests.trainer.harness import WORKER, command_of, ds_config, write_eval_set, write_recipe, write_shards

SAVE_EVERY = 5
_EVAL_EVERY = 15
_KEEP_LAST = 2
_SHARDS, _PER_SHARD = 16, 24
_RECIPE = {
    "model": {"name": "vit_femto_p8_32"},
    "checkpoint": {"every": SAVE_EVERY, "keep_last": _KEEP_LAST},
}


@dataclass(frozen=True)
class Line:
    """A run under faults: how many ranks, and the launchers its attempts take turns with."""

    ranks: int
    launchers: tuple[str, ...]
    faults: tuple[Fault, ...]

    @property
    def steps(self) -> int:
        """Long enough for every fault to find it running."""
        return sum(fault.steps for fault in self.faults) + 10


@dataclass
class Outcome:
    """What one fault did.

    Attributes:
        number: Place in the plan, from 1.
        fault: Kind.
        ranks: World size.
        launcher: Of the attempt.
        after: Steps the attempt had logged when the fault struck.
        struck: False if the attempt ended before.
        survived: The attempt came to its own end in spite of the fault.
        gave_up: It did not, although the fault was one that passes.
        code: Exit code of the launcher; negative for a signal.
        seconds: From the fault to the end.
        last_step: Newest step on record at the end.
        published: Newest published checkpoint at the end.
        resumed_at: Step from which the next attempt went on.
        hang: Not ended within its limit.
        lost: Checkpointed progress that was lost, in words.
        divergent: Steps and evaluations that differ from the uninterrupted run.
        left_over: Processes that outlived the attempt.
        half_written: Unfinished folders that the next attempt left where they were.
    """

    number: int
    fault: str
    ranks: int
    launcher: str
    after: int = 0
    struck: bool = False
    survived: bool = False
    gave_up: bool = False
    code: int = 0
    seconds: float = 0.0
    last_step: int = 0
    published: int = 0
    resumed_at: int | None = None
    hang: bool = False
    lost: str = ""
    divergent: list[str] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)
    half_written: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        """Whether it struck and nothing was lost, changed or left behind."""
        spoiled = self.gave_up or self.hang or self.lost or self.divergent or self.left_over or self.half_written
        return self.struck and not spoiled


def plan(seed: int, count: int, names: list[str], *, one_rank_share: float = 0.3) -> list[Line]:
    """The faults of a campaign: every kind about equally often, in an order and with details drawn from the seed.

    Args:
        seed: Same seed, same plan.
        count: Faults in all.
        names: Kinds, of `KINDS`.
        one_rank_share: Part of the faults that strikes a run of one rank.
    """
    rng = random.Random(seed)
    single = [name for name in names if KINDS[name].min_ranks == 1]
    alone = round(count * one_rank_share) if single else 0
    lines = []
    for ranks, launchers, kinds, number in (
        (2, ("deepspeed", "torchrun"), list(names), count - alone),
        (1, ("python", "torchrun"), single, alone),
    ):
        rng.shuffle(kinds)
        dealt = list(islice(cycle(kinds), number))
        rng.shuffle(dealt)
        if dealt:
            lines.append(Line(ranks, launchers, tuple(KINDS[name](random.Random(rng.random())) for name in dealt)))
    return lines


class Campaign:
    """Runs plans in a folder.

    Args:
        folder: Everything goes here.
        report: Called with each outcome as soon as it is complete.
    """

    def __init__(self, folder: Path, report: Callable[[Outcome], None] = lambda _: None) -> None:
        self.folder = folder
        self.outcomes: list[Outcome] = []
        self.final_problems: list[str] = []
        self.disk_method = ""
        self._report = report
        self._attempts = 0
        # Unfinished folders at the end of each fault whose next attempt has not begun.
        self._unsettled: dict[int, dict[str, tuple[int, int]]] = {}
        self._known_differences: set[str] = set()
        shards = folder / "shards"
        self._pattern = Path(write_shards(shards, _SHARDS, _PER_SHARD)).name
        for shard in shards.glob("*.tar"):
            scan_shard(str(shard)).save(sidecar_path(str(shard)))
        self._recipe = write_recipe(
            folder / "tiny.yaml",
            f"{shards}/{self._pattern}",
            **_RECIPE,
            eval={"every": _EVAL_EVERY, "sets": {"shapes": {"data": str(write_eval_set(folder / "eval"))}}},
            # A sample that cannot be read would be replaced, and the run with it; this one must stop instead.
            # Two lanes: shards are opened and fetched all through an epoch, not all at its start.
            data={"mask_token": False, "max_bad_fraction": 0.0, "lanes": 2, **WORKER["data"]},
        )

    def run(self, line: Line) -> list[Outcome]:
        """Break one run as planned, let it come to its end, and compare it."""
        reference = self._reference(line)
        self._unsettled, self._known_differences = {}, set()
        with self._stage(reference) as stage:
            outcomes = [self._strike(stage, line, number, reference) for number in range(len(line.faults))]
            self._finish(stage, line, reference)
        return outcomes

    def _reference(self, line: Line) -> Path:
        run_dir = self.folder / f"reference_{line.ranks}"
        with self._start(line, line.launchers[0], run_dir, Options(["--resume", "never"])) as attempt:
            ending = attempt.end(START_LIMIT_S + 10 * line.steps)
        if not ending.in_time or ending.code:
            raise RuntimeError(f"the uninterrupted run failed:\n{attempt.output()}")
        return run_dir

    @contextmanager
    def _stage(self, reference: Path) -> Iterator[Stage]:
        newest = reference / "checkpoints" / f"step_{records.published(reference)}"
        checkpoint_bytes = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
        # The checkpoints that are kept, one that is being written and one that is being removed.
        disk = SmallDisk(self.folder / "disk", ((_KEEP_LAST + 2) * checkpoint_bytes >> 20) + 32)
        self.disk_method = disk.method
        server = ShardServer(self.folder / "shards")
        scratch = Path(tempfile.mkdtemp(dir=self.folder))
        try:
            run_dir = disk.folder / "run"
            yield Stage(run_dir, self.folder / "shards", self._pattern, scratch, server, disk, checkpoint_bytes)
        finally:
            server.close()
            disk.close()
            shutil.rmtree(disk.folder)
            shutil.rmtree(scratch)

    def _start(self, line: Line, launcher: str, run_dir: Path, options: Options) -> Attempt:
        self._attempts += 1
        arguments = ["--recipe", str(self._recipe), "--run_dir", str(run_dir), "--ds_config", ds_config(2)]
        # Without a second vocabulary in a head: checkpoints take most of the time here.
        arguments += ["--train.steps", str(line.steps), "--method.w_tss", "0", "--resume", "auto"]
        log = self.folder / f"attempt_{self._attempts:03d}.log"
        environment = {"DECLIP_CACHE": str(self.folder / "cache"), **options.environment}
        options = Options(options.arguments, environment, options.before_exec)
        return Attempt(command_of(launcher, line.ranks), arguments, run_dir, log, uuid.uuid4().hex, options)

    def _strike(self, stage: Stage, line: Line, number: int, reference: Path) -> Outcome:
        fault = line.faults[number]
        launcher = line.launchers[number % len(line.launchers)]
        outcome = Outcome(len(self.outcomes) + 1, fault.name, line.ranks, launcher)
        self.outcomes.append(outcome)
        before = records.published(stage.run_dir)
        with self._start(line, launcher, stage.run_dir, fault.options(stage)) as attempt:
            outcome.struck = fault.strike(stage, attempt)
            outcome.after = attempt.advanced()
            ending = attempt.end(fault.limit_s if outcome.struck else 0.0)
        fault.heal(stage)
        outcome.code, outcome.seconds = ending.code, ending.seconds
        outcome.hang, outcome.left_over = not ending.in_time, ending.left_over
        outcome.survived = outcome.struck and not ending.code and not fault.saves_before_end
        outcome.gave_up = fault.passes and not outcome.survived
        self._settle(stage, attempt)
        outcome.last_step = max(records.steps(attempt.records()), default=0)
        outcome.published = records.published(stage.run_dir)
        outcome.lost = lost_at_end(outcome, before, fault)
        outcome.divergent = self._new_differences(stage, reference)
        self._unsettled[outcome.number] = records.half_written(stage.run_dir)
        self._report(outcome)
        return outcome

    def _settle(self, stage: Stage, attempt: Attempt) -> None:
        """What only the next attempt can tell of the faults before: where it went on, and what it cleaned up."""
        if not attempt.begun():
            return
        went_on = records.resumed_at(attempt.records()) or 0
        now = records.half_written(stage.run_dir)
        for number, unfinished in self._unsettled.items():
            outcome = self.outcomes[number - 1]
            outcome.resumed_at = went_on
            outcome.half_written = [name for name, identity in unfinished.items() if now.get(name) == identity]
            if went_on < outcome.published:
                outcome.lost = f"step {outcome.published} was published, the run went on from {went_on}"
        self._unsettled.clear()

    def _new_differences(self, stage: Stage, reference: Path, *, whole: bool = False) -> list[str]:
        """What differs from the reference and did not after the fault before."""
        ours, theirs = (records.parse(records.lines(run_dir)) for run_dir in (stage.run_dir, reference))
        found = records.differences(records.steps(ours), records.steps(theirs), whole=whole)
        found += records.differences(records.evaluations(ours), records.evaluations(theirs), whole=whole)
        new = [text for text in found if text not in self._known_differences]
        self._known_differences = set(found)
        return new

    def _finish(self, stage: Stage, line: Line, reference: Path) -> None:
        """No more faults: the run must come to its end and be the reference."""
        with self._start(line, line.launchers[0], stage.run_dir, Options()) as attempt:
            ending = attempt.end(START_LIMIT_S + 10 * line.steps)
        self._settle(stage, attempt)
        problems = []
        if not ending.in_time or ending.code:
            problems.append(f"the last attempt ended with {ending.code}: {attempt.output()}")
        problems += [f"outlived the last attempt: {words}" for words in ending.left_over]
        problems += [f"differs at the end: {text}" for text in self._new_differences(stage, reference, whole=True)]
        problems += [f"left in the checkpoint folder: {name}" for name in records.half_written(stage.run_dir)]
        if records.published(stage.run_dir) != line.steps:
            problems.append(f"newest checkpoint {records.published(stage.run_dir)} instead of {line.steps}")
        self.final_problems += [f"{line.ranks} rank(s): {problem}" for problem in problems]


def lost_at_end(outcome: Outcome, before: int, fault: Fault) -> str:
    """Progress beyond the steps since the last checkpoint, in words; what was published must still be there."""
    if outcome.published < before:
        return f"step {before} was published, the newest is {outcome.published} now"
    if fault.saves_before_end and outcome.published < outcome.last_step:
        return f"told to stop after step {outcome.last_step}, saved only step {outcome.published}"
    # A checkpoint is published before the step after it is logged.
    due = SAVE_EVERY * ((outcome.last_step - 1) // SAVE_EVERY)
    if not fault.may_skip_saves and outcome.published < due:
        return f"step {outcome.last_step} was logged before step {due} was published"
    return ""
