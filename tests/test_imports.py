"""Imports point one way: trainer may import all; models, losses and data import neither it nor each other."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("models", "losses", "data")


def imported_packages(path: Path) -> set[str]:
    """Top-level names a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", PACKAGES)
def test_package_imports_no_sibling(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert len(files) > 3
    forbidden = {"trainer", "tests", "benchmarks", "deepspeed", *PACKAGES} - {package}
    for path in files:
        assert not imported_packages(path) & forbidden, path


def test_trainer_imports_no_tests():
    for path in (ROOT / "trainer").rglob("*.py"):
        assert not imported_packages(path) & {"tests", "benchmarks"}, path


def test_loader_workers_import_no_compiler():
    """Which takes a second of each start, and hundreds of megabytes."""
    code = "import sys, data.dataset, data.sample; print({'torchvision', 'torch._dynamo'} & sys.modules.keys())"
    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "set()"
