"""The processes of a run under test, found by a mark in their environment, whoever their parent is by now."""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

MARK = "DECLIP_FAULTS_MARK"
_PROC = Path("/proc")
_ENTRY_POINT = "trainer/run.py"


def marked(mark: str) -> dict[int, list[str]]:
    """Command lines by process id of all live processes that were started with `MARK=mark`, their children included."""
    wanted, found = f"{MARK}={mark}".encode(), {}
    for folder in _PROC.iterdir():
        if not folder.name.isdigit():
            continue
        # A process may end between any two of these lines; a dead one that nobody has waited for reads as empty.
        with suppress(OSError):
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                found[int(folder.name)] = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
    return found


def ranks(mark: str) -> dict[int, int]:
    """Process id of each rank that runs now. Launchers and loader workers are not among them."""
    found = {}
    for pid, command in marked(mark).items():
        # `python [-u] .../trainer/run.py`; a launcher has its own script there.
        if any(word.endswith(_ENTRY_POINT) for word in command[1:3]):
            found[_rank_of(pid)] = pid
    return found


def _rank_of(pid: int) -> int:
    with suppress(OSError):
        for entry in (_PROC / str(pid) / "environ").read_bytes().split(b"\0"):
            if entry.startswith(b"RANK="):
                return int(entry[5:])
    # Plain python: no launcher, one rank.
    return 0


def send(pids: list[int], number: signal.Signals) -> None:
    """Signal processes, those that are gone already left out."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def left_over(mark: str, grace_s: float) -> dict[int, list[str]]:
    """Processes that are still there `grace_s` after the end of their launcher; returns as soon as there are none."""
    deadline = time.monotonic() + grace_s
    while (found := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found
