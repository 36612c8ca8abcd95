"""A disk that can be filled: a small tmpfs where this user may mount one, else a limit on the size of written files."""

import errno
import os
import resource
import subprocess
from collections.abc import Callable
from pathlib import Path


class SmallDisk:
    """Where the runs under test write.

    Args:
        folder: Mount point; created.
        mib: Size of the tmpfs.

    Attributes:
        is_mounted: Whether there is a tmpfs. If not, `folder` is a plain folder and `limit_files` is the fault.
    """

    def __init__(self, folder: Path, mib: int) -> None:
        self.folder = folder
        self._ballast = folder / "ballast"
        folder.mkdir(parents=True, exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(folder)]
        try:
            self.is_mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
        except FileNotFoundError:
            self.is_mounted = False

    @property
    def method(self) -> str:
        """How a full disk is made, for the report."""
        return "tmpfs" if self.is_mounted else "file-size limit"

    def fill(self, leave_bytes: int) -> None:
        """Occupy all but the last bytes, growing until it is so, since the run may free or take some meanwhile."""
        with self._ballast.open("ab") as stream:
            while (room := _free_bytes(self.folder) - leave_bytes) > 0:
                try:
                    os.posix_fallocate(stream.fileno(), os.fstat(stream.fileno()).st_size, room)
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise

    def free(self) -> None:
        """Give the room back."""
        self._ballast.unlink(missing_ok=True)

    def close(self) -> None:
        """Unmount; what was on the tmpfs is gone."""
        if self.is_mounted:
            subprocess.run(["umount", "--lazy", str(self.folder)], check=True)


def limit_files(max_bytes: int) -> Callable[[], None]:
    """For a child process before it starts its program: no file may grow beyond this."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, max_bytes))

    return limit


def _free_bytes(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize
