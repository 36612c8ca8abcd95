"""A silent rank ends the job: every rank says where it is, and all leave together when one makes no progress.

The training thread only notes its step and phase. A courier thread carries that note to the store the ranks met at and
looks there for a verdict; a monitor thread, which touches neither the network nor the device, measures how long the
phase has lasted. A rank that fails leaves its verdict in the same place, so the others follow within seconds, even
out of a collective that would never return.
"""

import json
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from trainer.ranks.launch import Place
from trainer.ranks.shutdown import add_herald, exit_now, last_words, remove_herald

# Longest time between two looks; short timeouts, as in tests, look more often.
_BEAT_SECONDS = 2.0
_BEATS_PER_TIMEOUT = 20
# A store that has not answered for so many beats is not going to.
_LOST_BEATS = 5
_FOLLOW_SECONDS = 2.0
_FAILED = 1
_NAMED_RANKS = 16
_PHASES = (
    *("begin", "preview", "data", "forward", "backward", "step"),
    *("log", "rollback", "verify", "save", "evaluate", "end"),
)


@dataclass(frozen=True)
class Where:
    """How far a rank has come; a new object at every call of `Watchdog.enter`."""

    step: int
    phase: str

    def __str__(self) -> str:
        return f"step {self.step}, {self.phase}"

    def before(self, other: "Where") -> bool:
        """Whether this rank has yet to get to where the other one is."""
        return (self.step, _PHASES.index(self.phase)) < (other.step, _PHASES.index(other.phase))


@dataclass(frozen=True)
class _Verdict:
    """Why the job ends; `where` is the place that some rank did not get to, if that is the reason."""

    message: str
    code: int
    where: Where | None = None

    def dump(self) -> str:
        return json.dumps([self.message, self.code, self.where and [self.where.step, self.where.phase]])

    @staticmethod
    def load(text: bytes) -> "_Verdict":
        message, code, where = json.loads(text)
        return _Verdict(message, code, where and Where(*where))


class Watchdog:
    """Watches one rank, between `start` and `stop`.

    Args:
        place: This rank.
        timeout_minutes: How long one phase may last.
    """

    def __init__(self, place: Place, timeout_minutes: float) -> None:
        self._place = place
        self._timeout_minutes = timeout_minutes
        self._timeout = timeout_minutes * 60.0
        self._beat = min(_BEAT_SECONDS, self._timeout / _BEATS_PER_TIMEOUT)
        self._store: dist.Store | None = None
        self._where = Where(0, "data")
        self._stopped = threading.Event()
        self._threads: list[threading.Thread] = []
        self._answered = time.monotonic()
        self._lost = False
        self._verdict: _Verdict | None = None

    def start(self, step: int) -> None:
        """Begin to watch, on every rank of the default process group."""
        self.enter(step, "data")
        # A connection of its own: the shared one is locked while another thread waits on it.
        store = dist.distributed_c10d._get_default_store().clone()
        store.set_timeout(timedelta(seconds=max(1.0, _LOST_BEATS * self._beat)))
        self._store = dist.PrefixStore("watchdog", store)
        self._answered = time.monotonic()
        add_herald(self.tell)
        for target in (self._carry, self._monitor):
            thread = threading.Thread(target=target, daemon=True)
            thread.start()
            self._threads.append(thread)

    def enter(self, step: int, phase: str) -> None:
        """Note that this rank begins a phase of a step; repeated, a sign of life from within a long one."""
        self._where = Where(step, phase)

    def stop(self) -> None:
        """Stop watching; harmless when not started."""
        remove_herald(self.tell)
        self._stopped.set()
        for thread in self._threads:
            # The courier may be waiting for a store that went first.
            thread.join(timeout=_BEAT_SECONDS)
        self._threads = []

    def tell(self, message: str, code: int) -> None:
        """Leave word that this rank is about to end with an error, for the others to follow."""
        self._stopped.set()
        # In a thread of its own: a store that does not answer must not keep this rank from leaving.
        sender = threading.Thread(target=self._pronounce, args=(_Verdict(message, code),), daemon=True)
        sender.start()
        sender.join(timeout=2.0)
        self._linger()

    def _linger(self) -> None:
        """The store is in rank 0's process under most launchers: the others must have read it before that ends."""
        if self._place.is_main and self._place.world_size > 1:
            time.sleep(2 * self._beat)

    def _pronounce(self, verdict: _Verdict) -> bool:
        """Publish a verdict; False when another rank was first, or the store is gone."""
        try:
            if self._store.add("claims", 1) == 1:
                self._store.set("verdict", verdict.dump())
                return True
        except RuntimeError:
            pass
        return False

    def _carry(self) -> None:
        beats = 0
        try:
            while True:
                beats += 1
                where = self._where
                # The count of beats tells a live process from a stopped one.
                self._store.set(f"rank{self._place.rank}", f"{beats} {where.step} {where.phase}")
                if self._store.check(["verdict"]):
                    self._verdict = _Verdict.load(self._store.get("verdict"))
                    return
                self._answered = time.monotonic()
                if self._stopped.wait(self._beat):
                    return
        except RuntimeError:
            self._lost = True

    def _monitor(self) -> None:
        seen, spent, silence, last = self._where, 0.0, 0.0, time.monotonic()
        while not self._stopped.wait(self._beat / 2):
            now = time.monotonic()
            # A process that was itself suspended has not waited; it slept.
            passed, last = min(now - last, 2 * self._beat), now
            spent = 0.0 if self._where is not seen else spent + passed
            seen = self._where
            silence = 0.0 if now - self._answered < 2 * self._beat else silence + passed
            if self._verdict is not None:
                self._follow(self._verdict)
            if self._lost and silence > _LOST_BEATS * _BEAT_SECONDS:
                self._leave("the store of the job is gone: rank 0, or the process that started it, has ended")
            if spent >= self._timeout:
                self._expire(seen, store_answers=silence < _LOST_BEATS * self._beat)

    def _expire(self, where: Where, *, store_answers: bool) -> None:
        begin = f"no progress for {self._timeout_minutes:g} minutes (train.timeout_minutes) in "
        if self._place.world_size == 1:
            self._leave(f"{begin}{where}, which is here:", stack=True)
        found = self._compare() if store_answers else None
        if found is None:
            # Without the store nobody can be asked. One rank speaks first; most launchers end the others on its exit.
            time.sleep(0.0 if self._place.rank <= 1 else 2 * _BEAT_SECONDS)
            self._leave(f"{begin}{where}: rank 0, or the process that started it, does not answer")
        furthest, absent = found
        message = f"{begin}{furthest}: {absent or 'all ranks are there, and the operation does not end'}"
        if self._pronounce(_Verdict(message, _FAILED, furthest)):
            self._leave(message, stack=not absent or self._where.before(furthest))
        # Another rank was first, and may still be writing.
        deadline = time.monotonic() + 4 * self._beat + 1.0
        while self._verdict is None and time.monotonic() < deadline:
            time.sleep(self._beat / 4)
        self._follow(self._verdict or _Verdict(message, _FAILED, furthest))

    def _compare(self) -> tuple[Where, str] | None:
        """How far the furthest rank is, and in words the ranks that are not; None when the store does not answer.

        Read twice: a rank whose count of beats stands still is stopped, dead or cut off, wherever it said it was.
        """
        read: list[dict[int, tuple[int, Where]]] = []

        def read_twice() -> None:
            read.append(self._read_all())
            time.sleep(3 * self._beat)
            read.append(self._read_all())

        reader = threading.Thread(target=read_twice, daemon=True)
        reader.start()
        reader.join(timeout=3 * self._beat + _LOST_BEATS * _BEAT_SECONDS)
        if len(read) < 2:
            return None
        furthest = self._where
        for _, there in read[1].values():
            furthest = there if furthest.before(there) else furthest
        absent = []
        for rank in range(self._place.world_size):
            beats, there = read[1].get(rank, (0, None))
            if there is None:
                absent.append(f"rank {rank} has not begun")
            elif beats == read[0].get(rank, (0, None))[0]:
                absent.append(f"rank {rank} gives no sign of life, it was last in {there}")
            elif there.before(furthest):
                absent.append(f"rank {rank} is still in {there}")
        more = len(absent) - _NAMED_RANKS
        return furthest, "; ".join(absent[:_NAMED_RANKS]) + (f"; and {more} more" if more > 0 else "")

    def _read_all(self) -> dict[int, tuple[int, Where]]:
        notes = {}
        for rank in range(self._place.world_size):
            if self._store.check([f"rank{rank}"]):
                beats, step, phase = self._store.get(f"rank{rank}").decode().split()
                notes[rank] = (int(beats), Where(int(step), phase))
        return notes

    def _follow(self, verdict: _Verdict) -> None:
        """Leave because of another rank, which prints why; one that was waited for shows where it is."""
        # The other rank's message first, and its exit code as the job's.
        time.sleep(_FOLLOW_SECONDS)
        if self._stopped.is_set():
            return
        if verdict.where is not None and self._where.before(verdict.where):
            self._leave(f"the others wait for this rank, which is in {self._where}:", verdict.code, stack=True)
        exit_now(verdict.code)

    def _leave(self, message: str, code: int = _FAILED, *, stack: bool = False) -> None:
        frame = sys._current_frames().get(threading.main_thread().ident)
        lines = "".join(traceback.format_stack(frame)[-4:]) if stack and frame else ""
        last_words(self._place, f"error: {message}\n{lines}".rstrip(), code)
        self._linger()
        exit_now(code)
