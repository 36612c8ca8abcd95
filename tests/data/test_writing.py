"""What the operating system refuses is one line that names the place and the way out."""

import errno
import os
import pwd
from pathlib import Path

import numpy as np
import pytest

from data.demo import ensure_unicode_symbols
from data.demo import main as demo
from data.errors import DataError
from data.index import main as index
from data.shards.cache import cache_dir
from data.shards.index_store import IndexStore, load_sources
from data.shards.remote import RemoteCache
from data.sources import parse_sources
from data.writing import refusal, try_file, try_folder, writing_to
from tests.data.tiny_shards import write_shards

CACHE = r"cannot be written \({}\); choose another cache folder with data.cache_dir or .* DECLIP_CACHE"


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def file(tmp_path) -> Path:
    """A file where a folder is wanted."""
    path = tmp_path / "file"
    path.write_text("")
    return path


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/x/y"), "/x/y: Permission denied; check the path"),
        (OSError(errno.EROFS, "Read-only file system", "/x"), "/x: Read-only file system; check the path"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "/x\n"), r"/x\n: Not a directory"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; check the path"),
        (FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']"), "set TMPDIR to a folder"),
        # A port, a bug, a failing disk or network: not the user's to mend in a setting, or worth another try.
        (PermissionError(errno.EACCES, "Permission denied"), None),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/x"), None),
        (OSError(errno.EIO, "Input/output error", "/x"), None),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), None),
        (KeyError("x"), None),
        (RuntimeError("Could not determine home directory."), "has no home folder for '~'; set HOME, or write paths"),
        (RuntimeError("a bug"), None),
    ],
)
def test_which_errors_are_the_users(error, words):
    said = refusal(error)
    assert (said is None) if words is None else (words in said and "\n" not in said)


def test_a_place_is_tried_and_left_as_it_was(tmp_path, file, monkeypatch):
    try_folder(tmp_path / "a" / "b", "choose another")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    try_file(tmp_path / "a" / "x", "choose another")
    try_file(file, "choose another")
    assert not (tmp_path / "a" / "x").exists()
    assert file.read_text() == ""
    for place, reason in ((file / "b", "Not a directory"), (Path("/proc/nothing"), "No such file or directory")):
        with pytest.raises(DataError, match=rf"{place} cannot be written \({reason}\); choose another --out"):
            try_folder(place, "choose another --out")
    with pytest.raises(DataError, match=r"cannot be written \(Is a directory\)"):
        try_file(tmp_path / "a", "choose another")
    with pytest.raises(DataError, match=r"nowhere cannot be written \(No such file"):
        try_file(tmp_path / "nowhere" / "x", "choose another", make=False)
    assert not (tmp_path / "nowhere").exists()
    with (
        pytest.raises(DataError, match="No space left on device"),
        writing_to(file, "x"),
        Path("/dev/full").open("w") as f,
    ):
        f.write("x" * 100_000)


def test_a_user_without_a_home_is_told_which_settings_there_are(monkeypatch):
    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("HOME", "XDG_CACHE_HOME", "DECLIP_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(DataError, match=r"has no home folder for '~'; set HOME, or choose one with data.cache_dir"):
        cache_dir()
    monkeypatch.setenv("DECLIP_CACHE", "~/cache")
    unknown_home = "'~/cache': the home folder of this user is not known; set HOME, .*or choose one with data.cache_dir"
    with pytest.raises(DataError, match=unknown_home):
        cache_dir()
    monkeypatch.setenv("DECLIP_CACHE", "/x")
    assert cache_dir() == Path("/x")


def test_whatever_is_written_to_the_cache(tmp_path, file, monkeypatch):
    shards = write_shards(tmp_path / "set", [2, 2])
    store = IndexStore.create(file / "cache")
    below = CACHE.format("Not a directory")
    with pytest.raises(DataError, match=f"^{file}/cache {below}"):
        load_sources(parse_sources(shards), store)
    with pytest.raises(DataError, match=below):
        ensure_unicode_symbols(file / "cache")
    for ask in (RemoteCache(file / "cache").fetch, RemoteCache(file / "cache").fetch_bytes):
        with pytest.raises(DataError, match=below):
            ask("https://localhost:1/0.tar")
    # What lies beside the shards needs no cache.
    for shard in shards:
        IndexStore.create(tmp_path / "good").load(shard).save(Path(f"{shard}.index.npz"))
    assert load_sources(parse_sources(shards), store)[0].num_samples == 4
    monkeypatch.setattr("data.shards.index_store._SUMMARY_FROM", 1)
    with pytest.raises(DataError, match=below):
        load_sources(parse_sources(shards), store)
    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(DataError, match=CACHE.format("No space left on device")):
        IndexStore.create(tmp_path / "full").load(shards[0], rebuild=True)
    assert not list((tmp_path / "full").rglob("*.npz"))


def test_a_cache_of_somebody_else_is_read(tmp_path, monkeypatch):
    cache = RemoteCache(tmp_path)
    cache.path("https://host/0.tar").write_bytes(b"abc")

    def refuse(path):
        raise PermissionError(errno.EPERM, "Operation not permitted", str(path))

    monkeypatch.setattr(os, "utime", refuse)
    with cache.open("https://host/0.tar", 3) as stream:
        assert stream.read() == b"abc"


def test_commands_try_before_they_work(tmp_path, file, monkeypatch, capsys):
    monkeypatch.setenv("DECLIP_CACHE", str(tmp_path / "cache"))
    shards = write_shards(tmp_path / "set", [2])
    monkeypatch.setattr("data.demo.render_unicode_symbols", lambda *_, **__: pytest.fail("rendered"))
    assert demo(["--out", str(file / "demo")]) == 2
    assert "demo cannot be written (Not a directory); choose another --out" in capsys.readouterr().err
    monkeypatch.setattr("data.writing.tempfile.NamedTemporaryFile", full)
    monkeypatch.setattr(IndexStore, "load", lambda *_, **__: pytest.fail("scanned"))
    assert index([shards[0]]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {tmp_path}/set cannot be written (No space left on device); use --cache")
    assert said.count("\n") == 1
    monkeypatch.setenv("DECLIP_CACHE", "~nobody_of_that_name/cache")
    assert index([shards[0]]) == 2
    assert "there is no folder for caches" in capsys.readouterr().err
