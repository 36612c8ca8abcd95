"""The trainer's commands when the operating system says no: one line, exit code 2, before the work."""

import errno
import getpass
import os
import re
import tarfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from benchmarks import chaos
from benchmarks.__main__ import main as benchmark
from benchmarks.family.__main__ import main as family
from data.errors import DataError
from losses.row_store import RowStore
from tests.compatibility.test_first_house import ARCHIVE
from tests.distributed import run_distributed
from tests.trainer.harness import write_recipe
from trainer.config.ds_config import _read_json
from trainer.config.recipe import dump_config, read_recipe
from trainer.engine.compilation import _name_cache
from trainer.errors import ConfigError
from trainer.export.__main__ import main as export
from trainer.loading import load_config
from trainer.ranks import shutdown
from trainer.ranks.agreement import together
from trainer.ranks.launch import Place
from trainer.ranks.output import RANK_LOGS, Output

ALONE = Place(0, 0, 1, 1, "test")
DENIED = PermissionError(errno.EACCES, "Permission denied", "/x/config.yaml")


@pytest.fixture
def file(tmp_path) -> Path:
    """A file where a folder is wanted."""
    path = tmp_path / "file"
    path.write_text("")
    return path


def refuse_and_agree(rank: int, world_size: int, folder: Path) -> list[str]:
    """What each rank is told when one alone is refused, and what the commands say before they do anything."""
    from trainer import evaluate, overlap, teacher
    from trainer.report import __main__ as report

    said = []

    def attempt(action, *arguments):
        try:
            action(*arguments)
        except (ConfigError, DataError) as error:
            said.append(str(error))

    def refused_on_one() -> None:
        if rank == 1:
            raise DENIED

    attempt(together, refused_on_one)
    place = Place(rank, rank, world_size, world_size, "test")
    out = str(folder / "file" / "out")
    with (
        mock.patch("trainer.trained.load_trained", side_effect=AssertionError("loaded")),
        # The ranks have met already; DeepSpeed takes seconds to import.
        mock.patch("trainer.engine.engine.init_distributed"),
        mock.patch("models.hf_towers.HfTextTower", side_effect=AssertionError("loaded")),
    ):
        words = [str(folder / "run"), "--device", "cpu", "--out", out]
        attempt(evaluate.evaluate, evaluate.parse_arguments([*words, "--set", "x=shards"]), place)
        attempt(overlap.find_overlap, overlap.parse_arguments(words), place)
        attempt(
            teacher.make_teacher,
            teacher.parse_arguments(["--model", "x", "--recipe", str(folder / "tiny.yaml"), *words[1:]]),
            place,
        )
        attempt(report.write_report, report.parse_arguments(words), ALONE)
    return said


def test_one_rank_is_refused_and_all_say_so_and_outputs_are_tried_first(tmp_path):
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    (tmp_path / "file").write_text("")
    write_recipe(tmp_path / "tiny.yaml", str(tmp_path / "shards"))
    first, second = run_distributed(refuse_and_agree, 2, tmp_path)
    assert first == second
    assert first[0] == "/x/config.yaml: Permission denied; check the path, its permissions and the space on its disk"
    assert len(first) == 5
    for words in first[1:]:
        assert f"{tmp_path}/file" in words
        assert re.search(r"cannot be written \((Not a directory|a file is in .*)\); choose another", words)
        assert words.endswith("with --out")


def test_export_is_tried_before_the_weights_are_read(tmp_path, file):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(dump_config(load_config("clip_demo")))
    # In the place of the folder that is written where --out says nothing.
    (run / "export").write_text("")
    with mock.patch("trainer.export.export.load_run", side_effect=AssertionError("loaded")):
        for words in (["--out", str(file / "out")], []):
            with pytest.raises(DataError, match=r"cannot be written \((Not a dir|a file is).*\); choose another --out"):
                export([str(run), "--to", "safetensors", *words])
        with pytest.raises(ConfigError, match="exists already"):
            export([str(run), "--to", "safetensors", "--out", str(tmp_path)])


@pytest.mark.parametrize("main", [benchmark, family, chaos.main])
def test_benchmarks_try_their_folder_first(main, file, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--out", str(file / "out")])
    assert ended.value.code == 2
    assert "out cannot be written (Not a directory); choose another --out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (DENIED, 2, "error: /x/config.yaml: Permission denied; check the path"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "error: No space left on device; check the path"),
        (DataError("no home"), 2, "error: no home"),
        (OSError(errno.EIO, "Input/output error", "/x"), 1, "Traceback"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/x"), 1, "Traceback"),
    ],
)
def test_how_a_process_ends(error, code, words, monkeypatch, capsys):
    ends = []
    monkeypatch.setattr(shutdown, "_leave", lambda place, message, code: ends.append((message, code)))
    monkeypatch.setattr(shutdown, "Output", lambda place: mock.Mock())
    with shutdown.reported_errors(ALONE):
        raise error
    assert ends[0][1] == code
    assert ends[0][0].startswith(words)

    def main(argv):
        raise error

    with pytest.raises(SystemExit if code == 2 else type(error)) as ended:
        shutdown.end_process(main, [])
    if code == 2:
        assert ended.value.code == 2
        assert capsys.readouterr().err.startswith(words)


def test_a_folder_for_logs_that_cannot_be_written(file, monkeypatch):
    monkeypatch.setenv(RANK_LOGS, str(file / "logs"))
    with pytest.raises(DataError, match=r"logs cannot be written \(Not a directory\); point DECLIP_RANK_LOGS to"):
        Output(ALONE)


def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    recipe, json = tmp_path / "r.yaml", tmp_path / "ds.json"
    write_recipe(recipe, "shards")
    json.write_text("{}")

    def deny(path, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    for method in ("read_text", "is_file", "stat"):
        with monkeypatch.context() as patched:
            patched.setattr(Path, method, deny)
            with pytest.raises(ConfigError, match=r"r.yaml cannot be read \(Permission denied\)"):
                read_recipe(str(recipe))
            if method != "is_file":
                with pytest.raises(ConfigError, match=r"--ds_config .*ds.json cannot be read \(Permission denied\)"):
                    _read_json(json)


def test_room_for_features_is_asked_for_in_words(monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left on device, for 4000 bytes of features; TMPDIR moves them"):
        RowStore(100, 10, 0)
    assert len(RowStore(100, 10, 4000)._rows) == np.int64(100)


def test_a_user_without_a_name_compiles(monkeypatch):
    def unknown():
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    _name_cache()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    monkeypatch.setattr(getpass, "getuser", unknown)
    _name_cache()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"].endswith(f"torchinductor_{os.getuid()}")
