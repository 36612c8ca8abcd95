"""What is read before torch is: path settings, shipped configurations, and the mistakes that need nothing more."""

import json
import os
import resource
import subprocess
import sys
import zipfile
from pathlib import Path
from shutil import copy, copytree, ignore_patterns

import pytest
import yaml

from trainer.config.ds_config import find_ds_config, read_ds_config, shipped_ds_configs
from trainer.config.recipe import dump_config, read_recipe, recipe_names
from trainer.config.sections import holds_path
from trainer.config.start import read_run_config, saved_config
from trainer.errors import ConfigError
from trainer.run import parse_arguments

ROOT = Path(__file__).resolve().parents[3]
COMMANDS = ("evaluate", "export", "overlap", "report", "teacher", "checkpoint", "run")
# Each with words of its one line.
REFUSED = {
    ("--recipe", "nope"): "unknown recipe 'nope'",
    ("--frobnicate",): "unknown argument '--frobnicate'",
    ("--trian.steps", "3"): "unknown key 'trian'",
    ("--train.step", "3"): "did you mean 'train.steps'",
    ("--train.steps", "many"): "train.steps: got 'many'",
    ("--train.global_batch_size", "7", "--train.micro_batch_size", "2"): "does not divide",
    ("--model.name", "vit_b33"): "did you mean vit_b32",
    ("--model.pretrained", "~no-such-user/x"): "model.pretrained: '~no-such-user/x': there is no user",
    ("--eval.sets.demo.data", "$NOPE/x"): "eval.sets.demo.data: '$NOPE/x': the environment variable NOPE",
    ("--ds_config", "zero7"): "did you mean 'zero3'",
    ("--ds_config", "wrong.json"): "remove 'optimizer'",
    ("--ds_config", "stage.json"): "expected 0, 1, 2 or 3",
    ("--run_dir", ""): "--run_dir: the path is empty",
    ("--run_dir", "~no-such-user/x"): "--run_dir: '~no-such-user/x': there is no user",
}
# Runs each case in a fork of one process, which has imported what a command imports before it does anything.
FORKS = """
import io, json, os, runpy, sys
from contextlib import redirect_stderr, redirect_stdout
import trainer.config.start, trainer.ranks.shutdown

leave = os._exit
for module, argv in json.loads(sys.argv[1]):
    if os.fork() == 0:
        said = io.StringIO()
        stdout = sys.stdout
        os._exit = lambda code: (
            print(json.dumps([code, said.getvalue(), "torch" in sys.modules]), file=stdout, flush=True), leave(0)
        )
        sys.argv = [module, *argv]
        code = 0
        try:
            with redirect_stdout(said), redirect_stderr(said):
                runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = end.code or 0
        os._exit(code)
    os.wait()
"""


def in_forks(cases, cwd):
    """(exit code, what was said, whether torch was imported) of each (module, arguments)."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "NOPE")}
    environment["PYTHONPATH"] = str(ROOT)
    finished = subprocess.run(
        [sys.executable, "-c", FORKS, json.dumps(cases)], cwd=cwd, env=environment, capture_output=True, text=True
    )
    answers = [json.loads(line) for line in finished.stdout.splitlines() if line.startswith("[")]
    assert len(answers) == len(cases), finished.stdout + finished.stderr
    return answers


def test_what_is_wrong_outside_the_method_is_refused_without_torch(tmp_path):
    (tmp_path / "wrong.json").write_text('{"optimizer": {}}')
    (tmp_path / "stage.json").write_text('{"zero_optimization": {"stage": 9}}')
    answers = in_forks([("trainer.run", arguments) for arguments in REFUSED], tmp_path)
    for (arguments, expected), (code, said, torch) in zip(REFUSED.items(), answers, strict=True):
        assert (code, torch) == (2, False), (arguments, said)
        (line,) = said.splitlines()
        assert line.startswith("error: ") and expected in line
    assert not (tmp_path / "runs").exists()


def test_it_takes_less_than_a_second():
    def seconds():
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    before = seconds()
    finished = subprocess.run([sys.executable, ROOT / "trainer" / "run.py", "--recipe", "x"], capture_output=True)
    assert finished.returncode == 2
    # Of the processor: the machine may be busy.
    assert seconds() - before < 1.0


def test_help_and_folders_that_hold_no_run_need_no_torch(tmp_path):
    answers = in_forks([(f"trainer.{name}", ["--help"]) for name in COMMANDS], tmp_path)
    assert all(code == 0 and said.startswith("usage: ") and not torch for code, said, torch in answers)
    answers = in_forks([("data.index", ["--help"]), ("data.demo", ["--help"])], tmp_path)
    assert all(code == 0 and not torch for code, said, torch in answers)
    cases = [
        ("trainer.evaluate", ["~/nothing"]),
        ("trainer.overlap", ["nothing"]),
        ("trainer.report", ["nothing"]),
        ("trainer.export", ["nothing", "--to", "openclip"]),
        ("trainer.checkpoint", ["list", "nothing"]),
        ("trainer.evaluate", ["nothing", "--frobnicate"]),
        ("trainer.report", ["~no-such-user/x"]),
    ]
    for code, said, torch in in_forks(cases, tmp_path):
        assert (code, torch) == (2, False), said
        assert "Traceback" not in said


def test_every_path_of_a_recipe_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WEIGHTS", "/weights")
    keys = ("data.cache_dir", "data.synonyms", "model.pretrained", "model.image_pretrained")
    keys += tuple(f"eval.sets.x.{name}" for name in ("data", "class_names", "templates"))
    prefixed = ("model.name", "model.text_name", "data.tokenizer")
    folder = "a b/[1] #2/{x}: é"
    values = dict.fromkeys(keys, folder) | dict.fromkeys(prefixed, f"hf:{folder}")
    for start, expanded in (("~/", f"{tmp_path}/"), ("$WEIGHTS/", "/weights/"), ("file:///q/", "/q/"), ("", "")):
        given = {key: value.replace(folder, start + folder) for key, value in values.items()}
        written = {"extends": "demo", "model": {}, "data": {}, "eval": {"sets": {"x": {}}}}
        for key, value in given.items():
            *parents, last = key.split(".")
            node = written
            for part in parents:
                node = node[part]
            node[last] = value
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(written))
        by_file = read_recipe("~/r.yaml")
        by_flags = read_recipe("demo", {"eval.sets": "{x: {data: y}}", **given})
        for config in (by_file, by_flags):
            for key, value in values.items():
                node = config
                for part in key.split("."):
                    node = node[part] if isinstance(node, dict) else getattr(node, part)
                assert node == value.replace(folder, expanded + folder), key
    assert all(holds_path(key) for key in (*keys, *prefixed, "method.external_teacher"))
    others = ("train.steps", "eval.sets", "eval.sets.x.tasks", "data.augmentation", "method.name", "no.such")
    assert not any(holds_path(key) for key in others)


def test_the_plan_and_the_saved_recipe_break_no_long_value():
    name = "a folder with blanks " * 20
    assert f"cache_dir: {name.strip()}\n" in dump_config(read_recipe("demo", {"data.cache_dir": name.strip()}))


def test_values_of_path_settings_that_are_no_path():
    flags = {"data.cache_dir": "null", "model.image_pretrained": "true", "data.synonyms": "'a b'"}
    config = read_recipe("demo", flags)
    assert (config.data.cache_dir, config.model.image_pretrained, config.data.synonyms) == (None, True, "a b")


def test_paths_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    arguments, _ = parse_arguments(["--run_dir=~/runs/x", "--resume", "~/runs/y", "--ds_config", "file:///a%20b.json"])
    assert arguments.run_dir == f"{tmp_path}/runs/x"
    assert arguments.resume == f"{tmp_path}/runs/y"
    assert arguments.ds_config == "/a b.json"
    assert parse_arguments([])[0].resume == "never"


def test_a_run_folder_of_any_name_is_read_and_resumed(tmp_path, monkeypatch):
    monkeypatch.setenv("x", "elsewhere")
    run = tmp_path / "~ $x [1]"
    run.mkdir()
    (run / "config.yaml").write_text("extends: clip_demo\nrecipe: mine\n")
    assert saved_config(run).recipe == "mine"
    assert read_run_config(None, run, "auto", {}).recipe == "mine"


def test_extends_names_a_recipe_beside_it(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "base.yaml").write_text("extends: clip_demo\ntrain: {seed: 7}\n")
    (tmp_path / "sub" / "mine.yaml").write_text("extends: base.yaml\n")
    monkeypatch.chdir(tmp_path)
    assert read_recipe("sub/mine.yaml").train.seed == 7


def test_a_recipe_that_cannot_be_read(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "r.yaml").write_text("extends: demo\n")
    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(ConfigError, match=r"r\.yaml cannot be read"):
        read_recipe(str(tmp_path / "r.yaml"))


def test_shipped_configurations_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(shipped_ds_configs()) == 6
    for name in shipped_ds_configs():
        found = {find_ds_config(text) for text in (name, f"{name}.json", f"ds_configs/{name}.json")}
        assert found == {str(ROOT / "ds_configs" / f"{name}.json")}
        read_ds_config(found.pop())
    for name in recipe_names():
        assert read_recipe(f"trainer/recipes/{name}.yaml") == read_recipe(name)
    # A file that is there comes first.
    (tmp_path / "ds_configs").mkdir()
    (tmp_path / "ds_configs" / "zero2.json").write_text("{}")
    assert find_ds_config("ds_configs/zero2.json") == "ds_configs/zero2.json"
    with pytest.raises(ConfigError, match=f"shipped one: {', '.join(shipped_ds_configs())}"):
        find_ds_config("elsewhere/zero2.json")


def test_installed_copies(tmp_path):
    """A wheel finds what ships with it; an editable installation is a folder on the path."""
    pytest.importorskip("setuptools")
    source, installed = tmp_path / "source", tmp_path / "site"
    skipped = ignore_patterns("__pycache__")
    for name in ("trainer", "models", "losses", "data", "ds_configs"):
        copytree(ROOT / name, source / name, ignore=skipped)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        copy(ROOT / name, source)
    build = "from setuptools import build_meta as b; b.build_wheel('wheel'); b.build_editable('editable')"
    finished = subprocess.run(
        [sys.executable, "-c", build], cwd=source, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""}
    )
    assert finished.returncode == 0, finished.stderr
    (editable,) = (source / "editable").glob("*.whl")
    with zipfile.ZipFile(editable) as archive:
        (path,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith(".pth"))
    assert path.strip() == str(source)
    (wheel,) = (source / "wheel").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    for name in shipped_ds_configs():
        assert (installed / "trainer" / "ds_configs" / f"{name}.json").is_file()
    assert {path.stem for path in (installed / "trainer" / "recipes").iterdir()} == set(recipe_names())
    # A working directory with a folder and modules of the user's that have the names of ours.
    work = tmp_path / "work"
    (work / "data").mkdir(parents=True)
    for name in ("models", "losses"):
        (work / f"{name}.py").write_text("raise ImportError('of the user')\n")
    finished = subprocess.run(
        [sys.executable, "-m", "trainer.run", "--ds_config", "zero7"],
        cwd=work,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 2
    assert f"shipped one: {', '.join(shipped_ds_configs())}" in finished.stderr


@pytest.mark.parametrize("path", ["data.py", "data/__init__.py"])
def test_modules_of_the_user_are_not_in_the_way(path, tmp_path):
    """Python puts the working directory first; what runs there is ours all the same."""
    (tmp_path / path).parent.mkdir(exist_ok=True)
    for name in (path, "models.py", "losses.py"):
        (tmp_path / name).write_text("raise ImportError('of the user')\n")
    for command in (["-m", "trainer.evaluate", "nothing"], [str(ROOT / "trainer" / "run.py"), "--recipe", "nope"]):
        finished = subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert finished.returncode == 2, finished.stderr
        assert finished.stderr.startswith("error: ")
