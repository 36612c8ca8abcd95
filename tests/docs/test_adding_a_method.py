"""The method that docs/adding_a_method.md adds, in a copy of the project: its files, its test, its commands."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs import guide
from tests.trainer.harness import ROOT, metrics, steps, write_shards

REGISTRY = "trainer/methods/__init__.py"


def blocks() -> dict[str, str]:
    """What the guide prints, by file; its commands under ''."""
    found = guide.blocks(guide.read("adding_a_method"), "python|yaml|bash")
    assert len(found) == 6
    return dict(found)


def write_method(files: dict[str, str], root: Path) -> None:
    """Writes the new files, and the two lines into the registry."""
    for path, text in files.items():
        if path != REGISTRY:
            assert not (root / path).exists()
            (root / path).write_text(text)
    imported, entry = files[REGISTRY].splitlines()
    registry = (root / REGISTRY).read_text()
    registry = registry.replace("\nMETHODS:", f"{imported}\n\nMETHODS:").replace(" = {\n", f" = {{\n{entry}\n", 1)
    (root / REGISTRY).write_text(registry)


@pytest.mark.slow(seconds=60)
def test_the_guide_adds_a_method(tmp_path):
    files = blocks()
    commands = files.pop("")
    code = "".join(text for path, text in files.items() if not path.startswith("tests/"))
    assert len(code.splitlines()) < 100
    guide.copy_project(tmp_path)
    (tmp_path / "tests" / "losses").mkdir(parents=True)
    for name in (
        "pyproject.toml",
        "tests/__init__.py",
        "tests/distributed.py",
        "tests/forked.py",
        "tests/losses/__init__.py",
    ):
        shutil.copy(ROOT / name, tmp_path / name)
    write_method(files, tmp_path)
    # The set of the demo takes longer to draw than the twenty steps.
    shards = write_shards(tmp_path / "shards")
    smaller = f"--data.train '{shards}' --eval.sets {{}} --train.global_batch_size 64"
    commands = commands.replace("--recipe cyclip_demo", f"--recipe cyclip_demo {smaller}")
    guide.run_commands(commands, tmp_path, 500, PYTHONPATH=str(tmp_path))
    run = tmp_path / "runs" / "cyclip"
    logged = steps(run)
    assert list(logged) == [10, 20]
    assert logged[20].keys() >= {"loss/clip", "loss/cross", "loss/within"}
    assert logged[20]["loss/clip"] < logged[10]["loss/clip"]
    assert [record["world_size"] for record in metrics(run) if record.get("event") == "resumed"] == [1]


def test_the_code_of_the_guide_keeps_the_style(tmp_path):
    for path, text in blocks().items():
        if path.endswith(".py") and path != REGISTRY:
            file = tmp_path / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
    settings = ["--config", str(ROOT / "pyproject.toml")]
    for check in (["check", *settings], ["format", "--check", *settings]):
        finished = subprocess.run(
            [sys.executable, "-m", "ruff", *check, str(tmp_path)], capture_output=True, text=True, check=False
        )
        assert finished.returncode == 0, finished.stdout + finished.stderr
