#!/usr/bin/env python3
"""From a machine with Python and nothing else to a trained model, or to passed tests.

  python3 start.py train                          train the demo; any flag of trainer/run.py may follow
  python3 start.py train --recipe clip_demo
  python3 start.py test                           run the tests; any argument of pytest may follow
  python3 start.py test -k resume

The first call makes a virtual environment of this interpreter in .venv beside this file (DECLIP_VENV names another
place) and installs into it; what is there already, for example a CPU build of torch, is kept.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
OLDEST = (3, 11)
# What each command installs beyond the project itself.
EXTRAS = {"train": "", "test": "[test,mpi]"}


class SetupError(Exception):
    """Something the user can mend; one line."""


def main(arguments: list[str]) -> int:
    """Make the environment where it is missing, and become the command in it; returns only after a mistake."""
    if arguments[:1] in ([], ["-h"], ["--help"]):
        print(__doc__)
        return 0
    name, rest = arguments[0], arguments[1:]
    try:
        if name not in EXTRAS:
            raise SetupError(f"unknown command '{name}': use {' or '.join(EXTRAS)}")
        venv = Path(os.environ.get("DECLIP_VENV") or ROOT / ".venv").expanduser().absolute()
        prepare(venv, EXTRAS[name])
        command, folder = command_of(name, rest, venv / "bin")
        os.chdir(folder)
        os.execve(command[0], command, environment_of(venv))
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
    return 2


def command_of(name: str, rest: list[str], bin_folder: Path) -> tuple[list[str], Path]:
    """The command line, and the folder it runs in: paths in training flags are the user's, tests are the project's."""
    if name == "test":
        return [str(bin_folder / "python"), "-m", "pytest", *rest], ROOT
    defaults = []
    if not any(word.split("=")[0] in ("--ds_config", "--deepspeed_config") for word in rest):
        defaults = ["--ds_config", str(ROOT / "ds_configs" / "zero2.json")]
    return [str(bin_folder / "deepspeed"), str(ROOT / "trainer" / "run.py"), *defaults, *rest], Path.cwd()


def environment_of(venv: Path) -> dict[str, str]:
    """The environment of an activated virtual environment: launchers start `python` by name."""
    return {**os.environ, "VIRTUAL_ENV": str(venv), "PATH": f"{venv / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"}


def prepare(venv: Path, extras: str) -> None:
    """Make the virtual environment and install the project with its extras, unless that was done before.

    Raises:
        SetupError: Python is too old, has no venv, or the installation failed.
    """
    # Who can test can train.
    marks = [venv / f".installed-{stamp(extra)}" for extra in ("", extras)]
    if all(mark.is_file() for mark in marks):
        return
    if sys.version_info < OLDEST:
        raise SetupError(f"Python {'.'.join(map(str, OLDEST))} or newer is needed, this is {sys.version.split()[0]}")
    pip = [str(venv / "bin" / "python"), "-m", "pip"]
    if not works([*pip, "--version"]):
        print(f"making a virtual environment in {venv}", flush=True)
        run([sys.executable, "-m", "venv", str(venv)], "is Python's venv there (Debian: apt install python3-venv)?")
    print("installing torch, DeepSpeed and what else is needed: minutes, and gigabytes with CUDA", flush=True)
    quiet = [] if sys.stdout.isatty() else ["--quiet"]
    install = [*pip, "install", "--disable-pip-version-check", *quiet, "-e", f"{ROOT}{extras}"]
    run(install, "see pip's message above, mend it and repeat the command")
    for mark in marks:
        mark.touch()


def stamp(extras: str) -> str:
    """Changes with what has to be installed."""
    content = (ROOT / "setup.py").read_bytes() + (ROOT / "pyproject.toml").read_bytes() + extras.encode()
    return hashlib.sha256(content).hexdigest()[:16]


def works(command: list[str]) -> bool:
    """Whether a command is there and succeeds."""
    try:
        return subprocess.run(command, check=False, capture_output=True).returncode == 0
    except OSError:
        return False


def run(command: list[str], hint: str) -> None:
    """Run one step of the installation."""
    finished = subprocess.run(command, check=False)
    if finished.returncode:
        raise SetupError(f"`{' '.join(command)}` failed: {hint}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
