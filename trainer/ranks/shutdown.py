"""How a process ends: one line for a user's mistake, a traceback for a bug, and never a rank left hanging."""

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from data.errors import DataError, escape_unencodable, printable_lines
from trainer.errors import ConfigError
from trainer.ranks.launch import Place
from trainer.ranks.output import Output

USER_ERROR = 2
# Time for rank 0 to print a mistake that every rank found by itself, before another rank's exit ends the job.
_GRACE_SECONDS = 1.0
_LOST_CONTACT_SECONDS = 5.0
_QUEUE_SECONDS = 2.0
_LOST_CONTACT = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "NCCL communicator was aborted",
)
# Called with the message and exit code when this rank leaves with an error: the run's way to tell the others.
_heralds: list[Callable[[str, int], None]] = []
_output: Output | None = None


def add_herald(tell: Callable[[str, int], None]) -> None:
    """Have `tell(message, exit_code)` called before this rank leaves with an error."""
    _heralds.append(tell)


def remove_herald(tell: Callable[[str, int], None]) -> None:
    """Undo `add_herald`; harmless when it was not added."""
    if tell in _heralds:
        _heralds.remove(tell)


def last_words(place: Place, message: str, code: int) -> None:
    """Say why this rank ends, where its job looks for it."""
    if _output is not None:
        _output.last_words(message, code)
        return
    prefix = f"rank {place.rank}: " if place.world_size > 1 else ""
    print(f"{prefix}{printable_lines(message)}", file=sys.stderr, flush=True)


@contextmanager
def reported_errors(place: Place) -> Iterator[None]:
    """Turn an exception on this rank into its message and an exit that ends all ranks.

    The process leaves at once, without the orderly shutdown of process groups: the other ranks may be waiting in a
    collective this rank will never join, and the launcher ends them when this one exits with an error.
    """
    global _output
    _output = Output(place)
    try:
        yield
        _output.discard()
    except (ConfigError, DataError) as error:
        _leave(place, f"error: {error}", USER_ERROR)
    except KeyboardInterrupt:
        _leave(place, "interrupted", 130)
    except Exception as error:
        if _is_lost_contact(error):
            # The rank that failed prints why; leaving after it lets its exit code be the job's.
            time.sleep(_LOST_CONTACT_SECONDS)
            _leave(place, "lost contact with another rank, whose message above is the cause", 1)
        _leave(place, traceback.format_exc(), 1)


def _leave(place: Place, message: str, code: int) -> None:
    if not place.is_main:
        time.sleep(_GRACE_SECONDS)
    last_words(place, message, code)
    sys.stdout.flush()
    for tell in _heralds:
        tell(message, code)
    os._exit(code)


def _is_lost_contact(error: Exception) -> bool:
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _LOST_CONTACT)


def end_process(main: Callable[[list[str]], None], argv: list[str]) -> None:
    """Run `main` as a process: exit code 2 and one line for mistakes made before the ranks are known.

    A good end leaves through `os._exit` after the process group is closed, because threads of communication
    libraries can abort a process that is already done.
    """
    escape_unencodable()
    try:
        main(argv)
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(USER_ERROR)
    _close_process_group()
    _finalize_mpi()
    _join_queue_threads()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _close_process_group() -> None:
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _join_queue_threads() -> None:
    # One that has not yet noticed that its loader is closed holds semaphores, which Python would report as leaked.
    for thread in threading.enumerate():
        if thread.name == "QueueFeederThread":
            thread.join(_QUEUE_SECONDS)


def _finalize_mpi() -> None:
    # mpirun calls a process that leaves without this a crash.
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        mpi.Finalize()
