"""Programs of this project as forks of a process that has imported what takes seconds: libraries, and the trainer."""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
# None of it starts threads or a GPU.
PRELOADED = [
    "torch._dynamo",
    "deepspeed",
    "pydantic",
    "pytest",
    "webdataset",
    "ftfy",
    "tokenizers",
    "safetensors.torch",
    "trainer.assemble",
    "trainer.loop",
]


def start_server() -> multiprocessing.context.BaseContext:
    """The context whose processes are forks of this test process's one server, started by the first call."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    # DeepSpeed chooses while it is imported; what runs in forks is told to use the CPU. The trainer is this checkout's.
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with mock.patch.dict(os.environ, DS_ACCELERATOR="cpu", PYTHONPATH=paths):
        forkserver.ensure_running()
    return context


class Forked:
    """A running program; answers as `subprocess.Popen` does.

    Args:
        arguments: A script or, after `-m`, a module, and what follows on its command line.
        environment: Its whole environment.
        cwd: Its working directory.
        output: File that takes what it prints.
        errors: Another file for what it prints to stderr; None for the same.
    """

    def __init__(
        self, arguments: list[str], environment: dict[str, str], cwd: Path, output: Path, errors: Path | None = None
    ) -> None:
        self._output = output
        files = [str(output), str(errors or output)]
        for file in files:
            Path(file).touch()
        self._process = start_server().Process(target=_run, args=(arguments, environment, str(cwd), files), daemon=True)
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """Exit code, or minus the signal that ended it; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """See `returncode`."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end.

        Raises:
            subprocess.TimeoutExpired: It was still running.
        """
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """Wait for its end; all it printed."""
        self.wait(timeout)
        return self._output.read_text(errors="replace"), None

    def send_signal(self, number: int) -> None:
        """Signal it, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)


def run_module(
    module: str, arguments: list[str], environment: dict[str, str], cwd: Path, timeout_s: float = 300
) -> subprocess.CompletedProcess[str]:
    """`python -m module arguments`, to its end."""
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder, "stdout"), Path(folder, "stderr")
        program = Forked(["-m", module, *arguments], environment, cwd, output, errors)
        try:
            code = program.wait(timeout_s)
        finally:
            program.kill()
        return subprocess.CompletedProcess(arguments, code, output.read_text(), errors.read_text())


def begin(environment: dict[str, str]) -> None:
    """Make a fork of the server what a process of its own would be.

    Args:
        environment: Its whole environment.
    """
    # Loader workers come from the same server, which they may have started with signals blocked.
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    # Wherever bytecode is not to be kept, each of hundreds of processes would compile the project again.
    sys.dont_write_bytecode = False
    os.environ.clear()
    os.environ.update(environment)


def _run(arguments: list[str], environment: dict[str, str], cwd: str, files: list[str]) -> None:
    begin(environment)
    os.chdir(cwd)
    for standard, file in enumerate(files, start=1):
        descriptor = os.open(file, os.O_WRONLY | os.O_APPEND)
        os.dup2(descriptor, standard)
        os.close(descriptor)
    # A program may start processes of its own; this one is a daemon only so that none outlives the tests.
    multiprocessing.current_process()._config["daemon"] = False
    # The libraries read it when they were loaded.
    if "OMP_NUM_THREADS" in environment:
        import torch

        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(arguments)
        runpy.run_path(arguments[0], run_name="__main__")
