"""Where a rank's words go: rank 0 speaks, the others keep a file each, and a closed pipe harms nobody."""

import hashlib
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from data.errors import printable_lines
from data.writing import try_folder
from trainer.ranks.launch import Place

# A folder, set by the job script: ranks other than 0 write there instead of into the job's log.
RANK_LOGS = "DECLIP_RANK_LOGS"


class _Unbreakable:
    """A text stream that goes silent when its reader is gone.

    Ctrl-C ends the `tee` behind a run together with it, and the last lines must not cost the last checkpoint.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            # What could not be written would fail again at every later flush.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Output:
    """Standard output and error of this rank.

    Args:
        place: This rank; ranks other than 0 are redirected where `DECLIP_RANK_LOGS` names a folder.
    """

    def __init__(self, place: Place) -> None:
        self._prefix = f"rank {place.rank}: " if place.world_size > 1 else ""
        self._shared: int | None = None
        self._folder = Path(os.environ[RANK_LOGS]) if os.environ.get(RANK_LOGS) else None
        self._log: Path | None = None
        if self._folder is not None:
            try_folder(self._folder, f"point {RANK_LOGS} to a folder that can be written, or unset it")
            # A copy of the job's log, for the message of a rank that fails.
            self._shared = os.dup(2)
            if not place.is_main:
                self._log = self._folder / f"rank_{place.rank:05d}.log"
                descriptor = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
                os.dup2(descriptor, 1)
                os.dup2(descriptor, 2)
                os.close(descriptor)
        sys.stdout, sys.stderr = _Unbreakable(sys.stdout), _Unbreakable(sys.stderr)

    def last_words(self, message: str, code: int) -> None:
        """Say why this rank fails; what a thousand ranks have to say alike appears once in the job's log."""
        message = printable_lines(message)
        print(f"{self._prefix}{message}", file=sys.stderr, flush=True)
        if self._folder is None or not self._is_first(message, code):
            return
        if self._log is not None:
            with suppress(OSError):
                os.write(self._shared, f"{self._prefix}{message}\n".encode())

    def discard(self) -> None:
        """Remove the log of a rank that ended well."""
        if self._log is not None:
            self._log.unlink(missing_ok=True)

    def _is_first(self, message: str, code: int) -> bool:
        name = f"error_{code}_{hashlib.sha256(message.encode()).hexdigest()[:12]}"
        try:
            with (self._folder / name).open("x", encoding="utf-8") as file:
                file.write(message + "\n")
            return True
        except FileExistsError:
            return False
