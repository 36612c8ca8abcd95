"""How a process ends: one line for a user's mistake, a traceback for a bug, and never a rank left hanging."""

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from data.errors import DataError, LoaderError, escape_unencodable, printable_lines
from data.writing import refusal
from trainer.errors import ConfigError
from trainer.ranks.launch import Place
from trainer.ranks.output import Output

USER_ERROR = 2
INTERRUPTED = 130
# Time for rank 0 to print a mistake that every rank found by itself, before another rank's exit ends the job.
_GRACE_SECONDS = 1.0
_LOST_CONTACT_SECONDS = 5.0
_LOST_CONTACT = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "NCCL communicator was aborted",
    "remote process exited",
    "ncclRemoteError",
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
    except LoaderError as error:
        _leave(place, f"error: {error}", 1)
    except KeyboardInterrupt:
        _leave(place, "interrupted", INTERRUPTED)
    except Exception as error:
        said = refusal(error)
        if said is not None:
            _leave(place, f"error: {said}", USER_ERROR)
        if _is_lost_contact(error):
            # The rank that failed prints why; leaving after it lets its exit code be the job's.
            time.sleep(_LOST_CONTACT_SECONDS)
            _leave(place, "lost contact with another rank, whose message above is the cause", 1)
        _leave(place, traceback.format_exc(), 1)


def _leave(place: Place, message: str, code: int) -> None:
    # First, as a launcher may kill this rank while it lets rank 0 speak.
    _abandon_loaders()
    if not place.is_main:
        time.sleep(_GRACE_SECONDS)
    last_words(place, message, code)
    sys.stdout.flush()
    for tell in _heralds:
        tell(message, code)
    exit_now(code)


def exit_now(code: int) -> NoReturn:
    """Leave without the orderly end of the interpreter, from any thread; loaders leave nothing behind."""
    _abandon_loaders()
    os._exit(code)


def _abandon_loaders() -> None:
    # Only where there can be some, as importing it takes seconds.
    delivery = sys.modules.get("data.delivery")
    if delivery is not None:
        delivery.abandon_all()


def _is_lost_contact(error: Exception) -> bool:
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _LOST_CONTACT)


@contextmanager
def plain_errors() -> Iterator[None]:
    """`reported_errors` for a process that has no ranks: one line and exit code 2 for what the user can mend."""
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(INTERRUPTED)
    except LoaderError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    except (ConfigError, DataError, OSError, RuntimeError) as error:
        said = str(error) if isinstance(error, ConfigError | DataError) else refusal(error)
        if said is None:
            raise
        print(f"error: {said}", file=sys.stderr, flush=True)
        sys.exit(USER_ERROR)


def end_process(main: Callable[[list[str]], None], argv: list[str]) -> None:
    """Run `main` as a process: one line for mistakes made before the ranks are known, and for Ctrl-C.

    A good end leaves through `os._exit` after the process group is closed, because threads of communication
    libraries can abort a process that is already done.
    """
    escape_unencodable()
    with plain_errors():
        main(argv)
    _close_process_group()
    _finalize_mpi()
    sys.stdout.flush()
    sys.stderr.flush()
    exit_now(0)


def _close_process_group() -> None:
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _finalize_mpi() -> None:
    # mpirun calls a process that leaves without this a crash.
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        mpi.Finalize()
