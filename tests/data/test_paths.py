"""Paths as users write them."""

import argparse
from pathlib import Path

import pytest

from data.errors import DataError
from data.paths import expand_path, path_argument
from data.shards.cache import cache_dir
from data.sources import expand_pattern, parse_sources

# Folders that look like patterns, or like something else.
ODD = ("d[1]", "a{1,2}", "x*y", "q?", "sp ace", "ünï", "a::b", "~odd", "$odd", "c%20d", "100$", "#1")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder, which is the working directory too, of odd folders with a shard or two each."""
    for name in (*ODD, "d1", "c d"):
        (tmp_path / name).mkdir()
        for shard in ("0.tar", "1.tar"):
            (tmp_path / name / shard).write_bytes(b"x")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DATA", str(tmp_path / "d[1]"))
    monkeypatch.delenv("odd", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("~", "{home}"),
        ("~/runs/x", "{home}/runs/x"),
        ("~root/x", "/root/x"),
        ("$DATA/{0..1}.tar", "{home}/d[1]/{0..1}.tar"),
        ("${DATA}.old", "{home}/d[1].old"),
        ("runs/a~b", "runs/a~b"),
        ("cost100$/x", "cost100$/x"),
        ("file:///a%20b/%7B0..1%7D.tar", "/a b/{0..1}.tar"),
        ("FILE://localhost/a", "/a"),
        ("file:/a", "/a"),
        ("file://~/a", "{home}/a"),
        ("file://d1/0.tar", "d1/0.tar"),
        ("file://{home}/c%20d", "{home}/c d"),
        ("file://{home}/100%25", "{home}/100%"),
        ("~odd/0.tar", "~odd/0.tar"),
        ("$odd/0.tar", "$odd/0.tar"),
        ("pipe:cat $NOPE/~", "pipe:cat $NOPE/~"),
        ("s3://bucket/$NOPE/~", "s3://bucket/$NOPE/~"),
        ("", ""),
    ],
)
def test_expanded(written, expected, home):
    assert expand_path(written.replace("{home}", str(home))) == expected.replace("{home}", str(home))


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ("~no-such-user/x", r"no user 'no-such-user'; write ./~no-such-user/x"),
        ("$NOPE/x", "variable NOPE is not set"),
        ("a/${NOPE}", "variable NOPE is not set"),
        ("file://server/x", "host 'server'"),
        ("a\0b", "NUL"),
        ("file:///a%00b", "NUL"),
    ],
)
def test_refused(written, reason, home):
    with pytest.raises(DataError, match=reason):
        expand_path(written)


def test_a_home_that_nobody_knows(monkeypatch):
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("os.path.expanduser", lambda text: text)
    with pytest.raises(DataError, match="set HOME"):
        expand_path("~/x")


def test_arguments(home, monkeypatch):
    assert path_argument("~/runs/x/") == home / "runs" / "x"
    for wrong in ("", "  ", "$NOPE/x"):
        with pytest.raises(argparse.ArgumentTypeError):
            path_argument(wrong)
    monkeypatch.setenv("DECLIP_CACHE", "~/cache")
    assert cache_dir() == home / "cache"
    monkeypatch.setenv("DECLIP_CACHE", "~no-such-user")
    with pytest.raises(DataError, match="DECLIP_CACHE"):
        cache_dir()


@pytest.mark.parametrize("folder", ODD)
@pytest.mark.parametrize("shards", ["", "/", "/*.tar", "/[01].tar", "/{0..1}.tar", "/?.tar"])
def test_folders_may_have_any_name(folder, shards, home):
    expected = [f"{home}/{folder}/{number}.tar" for number in (0, 1)]
    assert expand_pattern(f"{home}/{folder}{shards}") == expected
    assert expand_pattern(f"{folder}{shards}") == [str(Path(path).relative_to(home)) for path in expected]


def test_a_pattern_is_one_where_nothing_has_its_name(home):
    assert expand_pattern("d[123]/0.tar") == ["d1/0.tar"]
    assert expand_pattern("~/{d1,q?}/0.tar") == [f"{home}/d1/0.tar", f"{home}/q?/0.tar"]
    assert expand_pattern("{~/d1,~/q?}/0.tar") == [f"{home}/d1/0.tar", f"{home}/q?/0.tar"]
    assert expand_pattern("d1/{0,1}.tar") == ["d1/0.tar", "d1/1.tar"]
    with pytest.raises(DataError, match="matched no file"):
        expand_pattern("d1/[5-9].tar")
    with pytest.raises(DataError, match="does not exist"):
        expand_pattern("d[1]/5.tar")
    with pytest.raises(DataError, match="data source 'xxx"):
        expand_pattern("x" * 5000)


def test_every_form_of_a_source(home):
    one = (f"{home}/d1/0.tar",)
    assert parse_sources("~/d1/0.tar")[0].shards == one
    assert parse_sources(["~/d1/0.tar"])[0].shards == one
    assert parse_sources({"~/d1/0.tar": 2})[0].shards == one
    assert parse_sources({"a": {"path": ["file://~/d1/0.tar"]}})[0].shards == one
