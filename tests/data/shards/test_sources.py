"""What may stand under data.train."""

import sys
import types

import braceexpand
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import DataError
from data.shards.sources import expand_braces, is_remote
from data.sources import expand_pattern, parse_sources, source_names
from tests.data.tiny_shards import write_shards

PATTERNS = [
    "plain.tar",
    "a{000..011}.tar",
    "a{9..11}.tar",
    "a{3..1}x",
    "{0..10..5}",
    "{a,b}/{1..2}.tar",
    "x{a,b{1..2}c,{d,e}}y",
    "{single}",
    "a{b{1,2}c}d",
    "{,x}.tar",
    "http://host/{00..02}.tar?a={1,2}",
    "{-1..1}",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_braces_are_those_of_a_shell(pattern):
    assert expand_braces(pattern) == list(braceexpand.braceexpand(pattern, escape=False))


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="{},.01a", max_size=14))
def test_any_pattern_ends(pattern):
    try:
        assert expand_braces(pattern)
    except DataError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("pattern", ["{0..99999999}", "{000..999}" * 3, "a{0..3"])
def test_hopeless_braces(pattern):
    with pytest.raises(DataError):
        expand_braces(pattern)


def test_files_folders_wildcards_and_lists(tmp_path):
    shards = write_shards(tmp_path / "set", [1, 1, 1])
    for spec in (
        str(tmp_path / "set"),
        str(tmp_path / "set" / "*.tar"),
        str(tmp_path / "set" / "{00000..00002}.tar"),
        shards,
        [shards[0], str(tmp_path / "set" / "{00001,00002}.tar")],
        f"file://{tmp_path}/set",
    ):
        (source,) = parse_sources(spec)
        assert (source.name, source.weight, list(source.shards)) == ("train", 1, shards)


def test_weighted_mappings(tmp_path):
    shards = write_shards(tmp_path / "set", [1, 1])
    pattern = str(tmp_path / "set")
    first, second = parse_sources({pattern: 0.25, "mine": {"path": [shards[0]], "weight": 3}})
    assert (first.name, first.weight, list(first.shards)) == ("set", 0.25, shards)
    assert (second.name, second.weight, second.shards) == ("mine", 3, (shards[0],))


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["d1/a", "d1/b"], ["a", "b"]),
        (["/data/d2/a/", "~/d1/b"], ["a", "b"]),
        (["cc3m/{0..9}.tar", "yfcc/{0..9}.tar", "yfcc/x.tar"], ["cc3m/{0..9}.tar", "yfcc/{0..9}.tar", "x.tar"]),
        (["a", "x/a"], ["a", "x/a"]),
        (["x/a", "./x/a", "/y/a"], ["x/a", "./x/a", "y/a"]),
        (["s3://b/cc/{0..9}.tar", "https://h/yfcc/{0..9}.tar?key=a/b"], ["cc/{0..9}.tar", "yfcc/{0..9}.tar"]),
        (["pipe:cat /x/a.tar", "file:///x/a.tar"], ["pipe:cat /x/a.tar", "a.tar"]),
        (["unicode-symbols"], ["unicode-symbols"]),
    ],
)
def test_names_do_not_depend_on_the_folder(patterns, names):
    assert source_names(patterns) == names


def test_a_name_that_the_user_gave_is_not_given_again(tmp_path):
    shards = write_shards(tmp_path / "set", [1, 1])
    found = parse_sources({shards[0]: 1, "00000.tar": {"path": shards[1]}})
    assert [source.name for source in found] == [shards[0], "00000.tar"]


def test_remote_names_are_kept_as_they_are():
    (source,) = parse_sources("https://host/cc/{00..01}.tar?x=1")
    assert source.shards == ("https://host/cc/00.tar?x=1", "https://host/cc/01.tar?x=1")
    assert all(is_remote(name) for name in ("pipe:cat x", "s3://b/k", "HTTP://h/x"))
    assert not any(is_remote(name) for name in ("/a/b.tar", "a:b.tar", "x/y://z"))


def test_built_in_names(tmp_path, monkeypatch):
    shards = write_shards(tmp_path / "set", [1, 1])
    demo = types.ModuleType("data.demo")
    demo.resolve_builtin = lambda name, cache: [str(tmp_path / "set")] if name == "toy-set" else None
    monkeypatch.setitem(sys.modules, "data.demo", demo)
    assert expand_pattern("toy-set") == shards
    assert parse_sources({"toy-set": 1})[0].name == "toy-set"
    with pytest.raises(DataError, match="unknown-set"):
        expand_pattern("unknown-set")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("/nowhere/{00..11}.tar", r"/nowhere/\{00\.\.11\}\.tar.*no existing file"),
        ("/nowhere/x.tar", "does not exist"),
        ("/nowhere/*.tar", "matched no file"),
        ("a.tar::b.tar", "weighted mapping"),
        ("", "data source"),
        ([], "data.train"),
        ({}, "empty mapping"),
        (7, "data.train"),
        ([1], "must be a path"),
        ({"/nowhere/x.tar": 0}, "above 0"),
        ({"/nowhere/x.tar": "many"}, "above 0"),
        ({"/nowhere/x.tar": True}, "above 0"),
        ({"a": {"paths": "x"}}, "path and weight"),
    ],
)
def test_mistakes_are_named_in_one_line(spec, words):
    with pytest.raises(DataError, match=words) as caught:
        parse_sources(spec)
    assert "\n" not in str(caught.value)


def test_empty_folders_and_repeated_shards(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no"):
        parse_sources(str(tmp_path / "empty"))
    shards = write_shards(tmp_path / "set", [1])
    with pytest.raises(DataError, match="twice"):
        parse_sources(shards * 2)
