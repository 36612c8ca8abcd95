"""How the commands of this package end on Ctrl-C: one line, and nothing half-written."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import NoReturn

_INTERRUPTED = 130
_PATIENCE_S = 2.0


def leave_on_interrupt() -> None:
    """Has Ctrl-C end this process at once, until `run_command`: libraries take it for a failed import of theirs."""
    _on_interrupt(_leave)


def run_command(main: Callable[[], int]) -> NoReturn:
    """Runs a command and ends the process with its exit code.

    Args:
        main: The command; returns the exit code.
    """
    _on_interrupt(signal.default_int_handler)
    try:
        code = main()
    except KeyboardInterrupt:
        # What threads write just now they may finish; what they fetch is not waited for.
        deadline = time.monotonic() + _PATIENCE_S
        with suppress(KeyboardInterrupt):
            for thread in threading.enumerate():
                if thread is not threading.current_thread():
                    thread.join(max(0.0, deadline - time.monotonic()))
        _leave()
    sys.exit(code)


def _on_interrupt(handler: Callable[[int, FrameType | None], object]) -> None:
    # A shell starts its background jobs deaf to Ctrl-C, and they stay so.
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, handler)


def _leave(number: int = signal.SIGINT, frame: FrameType | None = None) -> NoReturn:
    # Not `print`, which may be what was interrupted.
    os.write(2, b"interrupted\n")
    os._exit(_INTERRUPTED)
