"""What is asked of this process from outside: signals that mean "save and leave", and a launcher that has died."""

import os
import select
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# Launchers pass on a Ctrl-C that the terminal has already sent to every rank: only a later one is a second wish.
_SAME_WISH_SECONDS = 3.0
# Command lines of the processes that start ranks; anything else above a rank may end without meaning it.
_LAUNCHERS = ("deepspeed", "torchrun", "torch.distributed")

_told = 0
_first_interrupt = 0.0


def listen() -> None:
    """Take the signals from now on. The first thing a rank does: by default they would kill it while it imports."""
    for number in _SIGNALS:
        signal.signal(number, _on_signal)


def told_to_stop() -> int:
    """The signal that asked this process to stop, or 0."""
    return _told


def _on_signal(number: int, frame: FrameType | None) -> None:
    global _told, _first_interrupt
    if number == signal.SIGINT:
        if _first_interrupt and time.monotonic() - _first_interrupt > _SAME_WISH_SECONDS:
            raise KeyboardInterrupt
        if not _first_interrupt and os.environ.get("RANK", "0") == "0":
            with suppress(OSError):
                os.write(2, b"\nstopping as soon as everything is saved; Ctrl-C again (after 3 s) leaves at once\n")
        _first_interrupt = _first_interrupt or time.monotonic()
    _told = number


def follow_launcher() -> None:
    """Stop, saved, when the launcher dies: a killed `deepspeed` or `torchrun` would leave its ranks running for ever.

    `deepspeed` is two processes above each rank and a signal ends the upper one alone, so both are watched.
    """
    watched = []
    process = os.getppid()
    for _ in range(2):
        if not _is_launcher(process):
            break
        with suppress(OSError):
            watched.append(os.pidfd_open(process))
        process = _parent_of(process)
    if watched:
        threading.Thread(target=_stop_with, args=(watched,), daemon=True, name="follow-launcher").start()


def _stop_with(watched: list[int]) -> None:
    poll = select.poll()
    for descriptor in watched:
        poll.register(descriptor, select.POLLIN)
    poll.poll()
    os.kill(os.getpid(), signal.SIGTERM)


def _is_launcher(process: int) -> bool:
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False
    # The interpreter's first arguments name the launcher; further ones are the run's and may hold any word.
    return any(name in word for word in words[:4] for name in _LAUNCHERS)


def _parent_of(process: int) -> int:
    try:
        # pid (name, which may hold anything) state parent
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return 0
