"""The command line."""

import json
from types import SimpleNamespace

import pytest

from benchmarks import __main__ as command
from benchmarks.report import Row


@pytest.fixture
def stubs(monkeypatch):
    """Two benchmarks that report how they were called."""

    def run(name):
        return lambda runner, peers, settings: [Row(name, settings, "peers", "", len(peers))]

    modules = {name: SimpleNamespace(run=run(name), FULL="full", QUICK="quick") for name in ("one", "two")}
    monkeypatch.setattr(command, "_BENCHMARKS", modules)


def test_all_of_it(stubs, tmp_path, capsys):
    assert command.main(["--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [(row["benchmark"], row["case"], row["ours"]) for row in rows] == [("one", "full", 1), ("two", "full", 1)]
    assert "one" in capsys.readouterr().out


def test_selection_and_checkout(stubs, tmp_path):
    package = tmp_path / "checkout" / "src" / "open_clip"
    package.mkdir(parents=True)
    (package / "version.py").write_text("__version__ = '9.8.7'\n")
    arguments = ["--quick", "--only", "two", "--peer-path", str(tmp_path / "checkout"), "--out", str(tmp_path)]
    assert command.main(arguments) == 0
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert (row["benchmark"], row["case"], row["ours"]) == ("two", "quick", 2)
    peers = command.find_peers(tmp_path / "checkout")
    assert peers[1].name == "open_clip 9.8.7"
    assert peers[1].path == str(tmp_path / "checkout" / "src")


def test_interruption_keeps_what_was_measured(stubs, monkeypatch, tmp_path):
    def interrupt(runner, peers, settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(command._BENCHMARKS["two"], "run", interrupt)
    with pytest.raises(KeyboardInterrupt):
        command.main(["--out", str(tmp_path)])
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["benchmark"] for row in rows] == ["one"]


def test_folder_without_open_clip(tmp_path, capsys):
    with pytest.raises(SystemExit):
        command.main(["--peer-path", str(tmp_path)])
    assert "neither src/open_clip nor open_clip" in capsys.readouterr().err


def test_every_benchmark_is_registered_under_its_name():
    names = ["loss", "collectives", "filip", "train_step", "loader", "views", "accumulation"]
    assert list(command._BENCHMARKS) == names
    assert all(hasattr(module, "FULL") and hasattr(module, "QUICK") for module in command._BENCHMARKS.values())
