"""How batches get from worker processes to the one that uses them, and that a wait for them ends."""

import atexit
import functools
import multiprocessing
import multiprocessing.connection
import multiprocessing.util
import os
import queue
import shutil
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from data.errors import DataError, LoaderError
from data.worker import (
    initialise_worker,
    job_signals_blocked,
    main_module_hidden,
    raise_open_file_limit,
    worker_context,
)

_SHARED_MEMORY = Path("/dev/shm")
_JOIN_S = 5.0
# How often a wait looks whether the workers live.
_LOOK_S = 0.5
# torch looks every five seconds; what it says about a dead worker comes before what is said here.
_NOTICE_S = 8.0
# Launchers kill what has not ended 30 s after SIGTERM.
_AFTER_SIGNAL_S = 25.0
_ADVICE = "lower data.workers, data.prefetch or the batch size"
_DEATHS = {
    signal.SIGKILL: f"as the system does when memory runs out; {_ADVICE}, or give the job more memory",
    signal.SIGBUS: f"as when {_SHARED_MEMORY} or a disk is full; make room (docker --shm-size), or {_ADVICE}",
}
_open: "weakref.WeakSet[Pipeline]" = weakref.WeakSet()


@dataclass(frozen=True)
class Patience:
    """How long a batch is waited for.

    Args:
        timeout_minutes: Longest wait for one batch; None leaves it to somebody else to end it.
        told_to_stop: Whether this process was asked to end; then a batch is waited for some seconds only.
    """

    timeout_minutes: float | None = 30.0
    told_to_stop: Callable[[], object] = bool


class _Delivered(Dataset):
    """The batches of a data set as they leave a worker: in shared memory already, so that no thread behind has to find
    room for them; and mistakes as {"error": message}, because an exception would arrive wrapped in a traceback.
    """

    def __init__(self, dataset: Dataset, held_batches: int) -> None:
        self._dataset = dataset
        self._held_batches = held_batches
        # The ranks of a node share it, and all look before any worker of this loader has put something there.
        self._free = _free_shared_memory()
        self._ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self._is_checked = False

    def __getitem__(self, item: Any) -> dict[str, Any]:
        try:
            batch = self._dataset[item]
            if get_worker_info() is not None:
                self._share([value for value in batch.values() if torch.is_tensor(value)])
            return batch
        except DataError as error:
            return {"error": str(error)}
        except MemoryError:
            return {"error": f"a loader worker got no memory for a batch; {_ADVICE}"}

    def _share(self, tensors: list[torch.Tensor]) -> None:
        num_bytes = sum(tensor.nbytes for tensor in tensors)
        if not self._is_checked and self._free is not None:
            self._is_checked = True
            needed = num_bytes * self._held_batches * self._ranks
            if needed > self._free:
                whose = f" in each of {self._ranks} ranks" if self._ranks > 1 else ""
                raise DataError(
                    f"{_SHARED_MEMORY} has {_mib(self._free)} free, the loader needs {_mib(needed)} for "
                    f"{self._held_batches} batches of {_mib(num_bytes)}{whose}; give the container more "
                    f"(docker --shm-size) or {_ADVICE}"
                )
        try:
            for tensor in tensors:
                tensor.share_memory_()
        except RuntimeError as error:
            free = _free_shared_memory()
            room = "" if free is None else f", which has {_mib(free)} free"
            # What stands before is the random name of a file.
            reason = str(error).rpartition(": ")[2]
            raise DataError(
                f"a batch of {_mib(num_bytes)} cannot be put into {_SHARED_MEMORY}{room} ({reason}); give the "
                f"container more (docker --shm-size) or {_ADVICE}"
            ) from None


def _most_shared(items: Any, held: int) -> int:
    """Batches in shared memory at once; pinned ones are copies and have left it."""
    return min(held, len(items)) if hasattr(items, "__len__") else held


def _free_shared_memory() -> int | None:
    return shutil.disk_usage(_SHARED_MEMORY).free if _SHARED_MEMORY.is_dir() else None


def _mib(num_bytes: int) -> str:
    mib = num_bytes / 2**20
    return f"{mib:.0f} MiB" if mib >= 10 else f"{mib:.2g} MiB"


class Pipeline:
    """One pass of a torch DataLoader together with its worker processes.

    Args:
        dataset: Its items are batches, dicts.
        items: Items to ask for, in order.
        transform: Part of the data set; see `data.worker.main_module_hidden`.
        workers: Worker processes; 0 = load in this process.
        prefetch: Batches each worker prepares ahead.
        pin_memory: Whether batches are for a GPU.
        held_by_user: Batches that whoever iterates holds at once.
        patience: How long a batch is waited for.
        background: Workers take only the processor time that other processes leave.

    Raises:
        DataError: Counts out of range; from `next`, what a batch cannot be made for.
        LoaderError: From `next`, a worker that ended or gives no answer.
    """

    def __init__(
        self,
        dataset: Dataset,
        items: Any,
        *,
        transform: object,
        workers: int,
        prefetch: int,
        pin_memory: bool,
        held_by_user: int,
        patience: Patience,
        background: bool = False,
    ) -> None:
        if workers < 0 or prefetch < 1:
            raise DataError(f"data.workers is {workers} and prefetch {prefetch}; they must be at least 0 and 1")
        self._iterator: Iterator[dict[str, Any]] | None = None
        self._receiver: _Receiver | None = None
        options, ends = {}, ()
        if workers:
            raise_open_file_limit()
            context = worker_context()
            ends = context.Pipe(duplex=False)
            options = {
                "prefetch_factor": prefetch,
                "multiprocessing_context": context,
                "worker_init_fn": functools.partial(initialise_worker, ends[1], background),
            }
        loader = DataLoader(
            _Delivered(dataset, _most_shared(items, workers * prefetch + (1 if pin_memory else held_by_user))),
            batch_size=None,
            sampler=items,
            num_workers=workers,
            pin_memory=pin_memory,
            # Without a generator of its own the loader draws from the global one and shifts the model's numbers.
            generator=torch.Generator(),
            **options,
        )
        before = set(multiprocessing.active_children())
        with main_module_hidden(transform), job_signals_blocked():
            iterator = iter(loader)
        self._processes = [child for child in multiprocessing.active_children() if child not in before]
        if workers:
            ends[1].close()
            self._receiver = _Receiver(iterator, self._processes, ends[0], patience)
        else:
            self._iterator = iterator
        # multiprocessing waits for its children when the interpreter ends, and ours ignore the SIGTERM it sends them.
        self._exit_hook = functools.partial(_close_referenced, weakref.ref(self))
        atexit.register(self._exit_hook)
        _open.add(self)

    def __next__(self) -> dict[str, Any]:
        if self._receiver is not None:
            try:
                batch = self._receiver.receive()
            except LoaderError:
                self.kill()
                self.close()
                raise
        elif self._iterator is not None:
            batch = next(self._iterator)
        else:
            raise StopIteration
        if "error" in batch:
            self.close()
            raise DataError(batch["error"])
        return batch

    def kill(self) -> None:
        """Ends the workers at once."""
        for process in self._processes:
            process.kill()

    def close(self) -> None:
        """Ends the workers, by force where one hangs."""
        self._iterator = None
        if self._receiver is not None:
            self._receiver.close()
            self._receiver = None
        for process in self._processes:
            if process.is_alive():
                process.kill()
                process.join(_JOIN_S)
        self._processes = []
        atexit.unregister(self._exit_hook)
        _open.discard(self)


class _Receiver:
    """Asks for batches in a thread of its own, so that the wait for one ends whatever happens.

    A worker that is killed while it sends leaves half a message behind, and a read of the other half never returns.

    Args:
        iterator: torch's, over the workers; nobody else may hold it.
        processes: The workers.
        last_words: Where a worker has said why it ends.
        patience: How long a batch is waited for.
    """

    def __init__(
        self, iterator: Iterator, processes: list[BaseProcess], last_words: Connection, patience: Patience
    ) -> None:
        self._processes = processes
        self._last_words = last_words
        self._patience = patience
        self._requests: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[dict[str, Any] | BaseException] = queue.SimpleQueue()
        arguments = [iterator], self._requests, self._answers
        self._thread = threading.Thread(target=_answer, args=arguments, daemon=True, name="batches")
        self._thread.start()

    def receive(self) -> dict[str, Any]:
        """Waits for the next batch.

        Raises:
            StopIteration: There is none.
            LoaderError: A worker has ended, or the patience has.
        """
        self._requests.put(True)
        started = time.monotonic()
        told: float | None = None
        died: float | None = None
        while True:
            try:
                answer = self._answers.get(timeout=_LOOK_S)
                break
            except queue.Empty:
                now = time.monotonic()
            died = died or (now if self._has_dead() else None)
            told = told or (now if self._patience.told_to_stop() else None)
            if died is not None and now - died > _NOTICE_S:
                raise self._death()
            if told is not None and now - told > _AFTER_SIGNAL_S:
                raise LoaderError(f"told to stop, and the loader has given no batch for {now - started:.0f} s since")
            minutes = self._patience.timeout_minutes
            if minutes is not None and now - started > 60 * minutes:
                raise LoaderError(
                    f"the loader has given no batch for {minutes:g} minutes (train.timeout_minutes) although its "
                    "workers live; look for a disk, a file system or a server that does not answer"
                )
        if isinstance(answer, StopIteration) or not isinstance(answer, BaseException):
            if isinstance(answer, BaseException):
                raise answer
            return answer
        # How a dead worker shows depends on what it was doing; it may take a moment to be seen dead.
        if self._has_dead(wait_s=1.0):
            raise self._death() from None
        raise answer

    def close(self) -> None:
        """Lets go of the iterator, upon which torch asks its workers to end; waits for some seconds."""
        self._requests.put(False)
        self._thread.join(_JOIN_S)
        self._last_words.close()

    def _has_dead(self, wait_s: float = 0.0) -> bool:
        return bool(multiprocessing.connection.wait([process.sentinel for process in self._processes], wait_s))

    def _death(self) -> LoaderError:
        """What happened to the first worker that is dead."""
        text = self._read_last_words()
        if text:
            return LoaderError(f"a loader worker failed outside of its batches: {text}; the lines above say where")
        number, process = next(
            (number, process) for number, process in enumerate(self._processes) if not process.is_alive()
        )
        who, code = f"loader worker {number} (process {process.pid})", process.exitcode
        if code is not None and code < 0:
            why = _DEATHS.get(-code, "as when a library crashes; the lines above may say more")
            return LoaderError(f"{who} was ended by {_signal_name(-code)}, {why}")
        return LoaderError(f"{who} ended with exit code {code} instead of the next batch; the lines above may say why")

    def _read_last_words(self) -> str:
        try:
            return self._last_words.recv_bytes().decode("utf-8", "replace") if self._last_words.poll() else ""
        except (EOFError, OSError):
            # All workers are dead, and none has said anything.
            return ""


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _answer(owned: list[Iterator], requests: queue.SimpleQueue, answers: queue.SimpleQueue) -> None:
    iterator = owned.pop()
    while requests.get():
        try:
            answer = next(iterator)
        except BaseException as error:  # all of them belong to whoever waits
            answer = error
        answers.put(answer)
        del answer


def _close_referenced(reference: "weakref.ref[Pipeline]") -> None:
    pipeline = reference()
    if pipeline is not None:
        pipeline.close()


def abandon_all() -> None:
    """For a process about to leave through `os._exit`: ends all workers and gives back what was shared with them.

    The named semaphores of queues outlive their process otherwise, and Python reports them as leaked.
    """
    for pipeline in list(_open):
        pipeline.kill()
    # Those with a priority are what multiprocessing itself runs at an orderly end; below 0 are waits for threads.
    multiprocessing.util._run_finalizers(0)
