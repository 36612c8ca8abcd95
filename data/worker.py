"""How loader workers start, behave and end."""

import multiprocessing
import multiprocessing.connection
import multiprocessing.queues
import multiprocessing.resource_tracker
import os
import resource
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection

import torch

from data.errors import printable, repeatable

_MAX_OPEN_FILES = 65_536
_LEAST_URGENT = 19
# A message of this length is written in one piece, also where several workers write at once.
_MAX_LAST_WORDS = 1000
# Schedulers send these, and a terminal SIGINT, to every process of a job. The main process decides what happens;
# workers live on so that it can finish its step, and are closed or killed by it.
_JOB_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
# Imported once in the fork server; each worker is then a fork of a process that has them. None of our own modules: the
# server searches the working directory first, where a user's folder called "data" would be taken for our package.
_PRELOADED = ["torch.utils.data", "tokenizers", "PIL.Image"]


def worker_context() -> multiprocessing.context.BaseContext:
    """Returns the start method for loader workers.

    A plain fork is unsafe after CUDA, NCCL or gloo have started threads, and spawn imports torch anew in every worker.
    The fork server is a small clean process that does neither.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


@contextmanager
def main_module_hidden(*objects: object) -> Iterator[None]:
    """Keeps new workers from importing the main script again while the block starts them.

    multiprocessing would run the imports of the training script, DeepSpeed included, in every worker: many seconds and
    gigabytes for nothing.

    Args:
        *objects: What is sent to the workers; if one comes from the main script, the script stays visible.
    """
    main = sys.modules["__main__"]
    needed = any("__main__" in (type(thing).__module__, getattr(thing, "__module__", None)) for thing in objects)
    if needed:
        yield
        return
    missing = object()
    kept = {name: getattr(main, name, missing) for name in ("__spec__", "__file__")}
    main.__spec__ = None
    main.__file__ = None
    try:
        yield
    finally:
        for name, value in kept.items():
            if value is missing:
                delattr(main, name)
            else:
                setattr(main, name, value)


@contextmanager
def job_signals_blocked() -> Iterator[None]:
    """Starts processes in the block with the signals of a job blocked, from their first instruction on.

    A worker that ignored them only once it runs could be hit while it starts; and the fork server has no code of ours
    to ignore them at all, yet torch's workers give up when it dies.
    """
    kept = signal.pthread_sigmask(signal.SIG_BLOCK, _JOB_SIGNALS)
    try:
        # The tracker unblocks some of them when it starts, so it must be there before the mask that counts.
        multiprocessing.resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, _JOB_SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, kept)


def initialise_worker(last_words: Connection, background: bool, worker_id: int) -> None:
    """Sets up a loader worker.

    Args:
        last_words: Where the worker says why it ends.
        background: Take only the processor time that other processes leave.
        worker_id: Not used; the loader passes it.
    """
    torch.set_num_threads(1)
    if background:
        os.nice(_LEAST_URGENT)
    _end_with_any_thread(last_words)
    follow_parent()


def follow_parent() -> None:
    """Leaves the signals of a job to the main process, and ends when that does."""
    for number in _JOB_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_any_thread(last_words: Connection) -> None:
    """Ends this worker when any of its threads fails.

    By default a thread prints its error and is gone, and the worker lives on without it: a batch that the thread of a
    queue cannot send is dropped, and the loader waits for it for ever.
    """

    def leave(error: BaseException) -> None:
        traceback.print_exception(error)
        text = f"{type(error).__name__}: {error}"
        with suppress(OSError):
            last_words.send_bytes(printable(repeatable(text), _MAX_LAST_WORDS).encode("utf-8", "replace"))
        sys.stderr.flush()
        os._exit(1)

    def thread_failed(failed: threading.ExceptHookArgs) -> None:
        if failed.exc_type is not SystemExit:
            leave(failed.exc_value or failed.exc_type())

    threading.excepthook = thread_failed
    # The thread that hands out file descriptors catches its errors and shows them to this one.
    sys.excepthook = lambda kind, error, trace: leave(error)
    # The hook of the threads behind queues, which catch theirs too; nothing public replaces it.
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(lambda error, item: leave(error))


def _end_with_parent() -> None:
    # The parent that torch watches is the fork server here, which outlives a killed trainer as long as workers do.
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def raise_open_file_limit() -> None:
    """Raises the soft limit on open files: every tensor from a worker holds a descriptor, and 1024 are soon used up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
