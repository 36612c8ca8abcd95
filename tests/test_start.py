"""start.py: the environment is made once, then the command takes over; nothing is installed here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import start

SCRIPT = Path(start.__file__)
# Stands in for an environment's programs: says how it was called.
ECHO = """#!{python}
import json, os, sys
print(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:], os.getcwd(), os.environ["PATH"].split(":")[0]]))
"""


@pytest.fixture
def venv(tmp_path) -> Path:
    """An environment that is installed as far as start.py can see."""
    folder = tmp_path / "env"
    (folder / "bin").mkdir(parents=True)
    for name in ("python", "deepspeed"):
        program = folder / "bin" / name
        program.write_text(ECHO.format(python=sys.executable))
        program.chmod(0o755)
    for extras in start.EXTRAS.values():
        (folder / f".installed-{start.stamp(extras)}").touch()
    return folder


def called(arguments: list[str], venv: Path, cwd: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "DECLIP_VENV": str(venv)}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train"], ["deepspeed", "SCRIPT", "--ds_config", "ZERO2"]),
        (["train", "--recipe", "clip_demo"], ["deepspeed", "SCRIPT", "--ds_config", "ZERO2", "--recipe", "clip_demo"]),
        (["train", "--ds_config=mine.json"], ["deepspeed", "SCRIPT", "--ds_config=mine.json"]),
        (["test", "-k", "resume"], ["python", "-m", "pytest", "-k", "resume"]),
    ],
)
def test_the_command_runs_in_the_environment(arguments, expected, venv, tmp_path):
    finished = called(arguments, venv, tmp_path)
    assert finished.returncode == 0, finished.stderr
    *command, folder, first_on_path = json.loads(finished.stdout)
    paths = {"SCRIPT": start.ROOT / "trainer" / "run.py", "ZERO2": start.ROOT / "ds_configs" / "zero2.json"}
    assert command == [str(paths.get(word, word)) for word in expected]
    # Files named in training flags are the user's, from where he stands.
    assert folder == str(tmp_path if arguments[0] == "train" else start.ROOT)
    assert first_on_path == str(venv / "bin")


def test_an_unknown_command_is_one_line(venv, tmp_path):
    finished = called(["trian"], venv, tmp_path)
    assert finished.returncode == 2
    assert finished.stderr == "error: unknown command 'trian': use train or test\n"


@pytest.mark.parametrize(("name", "extras"), [("train", [""]), ("test", ["", "[test,mpi]"])])
def test_the_environment_is_made_once(name, extras, tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(start, "run", lambda command, hint: commands.append(command))
    venv = tmp_path / "env"
    venv.mkdir()
    start.prepare(venv, start.EXTRAS[name])
    assert commands[0] == [sys.executable, "-m", "venv", str(venv)]
    assert commands[1][1:4] == ["-m", "pip", "install"]
    assert commands[1][-2:] == ["-e", f"{start.ROOT}{extras[-1]}"]
    assert {path.name for path in venv.iterdir()} == {f".installed-{start.stamp(extra)}" for extra in extras}
    start.prepare(venv, start.EXTRAS[name])
    assert len(commands) == 2


def test_a_failed_installation_is_tried_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DECLIP_VENV", str(tmp_path))
    monkeypatch.setattr(start.sys, "executable", "/nowhere/python")
    monkeypatch.setattr(start.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1))
    assert start.main(["train"]) == 2
    assert "apt install python3-venv" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_old_python_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(start.sys, "version_info", (3, 9))
    with pytest.raises(start.SetupError, match=r"3\.11 or newer is needed"):
        start.prepare(tmp_path, "")
