"""Runs the commands of a guide in a copy of the project."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.trainer.harness import ROOT


def read(name: str) -> str:
    """A page of docs/."""
    return (ROOT / "docs" / f"{name}.md").read_text()


def blocks(page: str, languages: str) -> list[tuple[str, str]]:
    """What follows the language, and the text, of each block of code of a page in one of `languages` (a regex)."""
    return re.findall(rf"^```(?:{languages}) ?([^\n]*)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


def copy_project(folder: Path) -> None:
    """The packages and configurations of the project, without what git ignores."""
    for name in ("trainer", "models", "losses", "data", "ds_configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))


def run_commands(commands: str, folder: Path, timeout_s: float, **environment: str) -> None:
    """Runs shell commands in a folder, with a cache of its own, and requires all to succeed."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    own = {"PATH": path, "DECLIP_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        ["bash", "-c", f"set -e\n{commands}"],
        cwd=folder,
        env={**os.environ, **own, **environment},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
