"""Caption edits: shares, semantics and edge cases."""

import json
import logging
from collections import Counter

import pytest

from data.captions.eda import Eda, load_synonyms
from data.errors import DataError
from data.rng import keyed_rng

TABLE = {"dog": ["hound", "domestic dog"], "big": ["large"], "the": ["ye"]}
CAPTION = "The big dog, a Dog of the old town"


def classify(before: str, after: str) -> str:
    words, edited = before.split(), after.split()
    if edited == words:
        return "same"
    if sorted(edited) == sorted(words):
        return "swap"
    if not Counter(edited) - Counter(words):
        return "delete"
    return "replace"


def test_three_edits_with_a_third_each():
    edit = Eda(TABLE)
    caption = " ".join(["dog", *(f"word{index}" for index in range(60))])
    kinds = Counter(classify(caption, edit(caption, keyed_rng("eda", index))) for index in range(6000))
    # With 61 words a deletion almost never leaves the caption as it was.
    assert all(abs(kinds[kind] / 6000 - 1 / 3) < 0.025 for kind in ("replace", "swap", "delete"))


def test_two_edits_with_half_each_without_a_table(caplog):
    with caplog.at_level(logging.INFO):
        edit = Eda()
    assert caplog.text.count("no synonym table") == 1
    caption = " ".join(f"word{index}" for index in range(60))
    kinds = Counter(classify(caption, edit(caption, keyed_rng("eda", index))) for index in range(4000))
    assert abs(kinds["swap"] / 4000 - 0.5) < 0.03
    assert abs(kinds["delete"] / 4000 - 0.5) < 0.03


def test_synonym_replaces_all_occurrences_and_keeps_punctuation():
    edit = Eda(TABLE)
    seen = {edit(CAPTION, keyed_rng("synonym", index)) for index in range(500)}
    assert "The big hound, a hound of the old town" in seen
    assert "The big domestic dog, a domestic dog of the old town" in seen
    assert "The large dog, a Dog of the old town" in seen
    assert not any("ye" in caption.lower().split() for caption in seen), "a stopword was replaced"


def test_deletion_removes_a_tenth_of_the_words():
    edit = Eda()
    caption = " ".join(f"word{index}" for index in range(50))
    lengths = [len(edit(caption, keyed_rng("delete", index)).split()) for index in range(4000)]
    deleted = [50 - length for length in lengths]
    # Half of the captions are swapped instead, which deletes nothing.
    assert abs(sum(deleted) / (4000 * 50) - 0.05) < 0.003


def test_deletion_never_empties_a_caption():
    edit = Eda()
    results = {edit("a b", keyed_rng("short", index)) for index in range(2000)}
    assert results == {"a b", "b a", "a", "b"}


def test_swap_moves_two_different_words():
    edit = Eda()
    results = Counter(edit("a b c", keyed_rng("swap", index)) for index in range(3000))
    swaps = [results[caption] for caption in ("b a c", "c b a", "a c b")]
    assert max(swaps) - min(swaps) < 120


@pytest.mark.parametrize("caption", ["", "   ", "word", "!!!", "..."])
def test_short_captions_pass_through(caption):
    for table in (None, TABLE):
        edit = Eda(table)
        assert {edit(caption, keyed_rng(index)) for index in range(50)} == {caption}


def test_caption_without_synonyms_is_unchanged_by_replacement():
    edit = Eda(TABLE)
    results = Counter(edit("red car", keyed_rng("none", index)) for index in range(3000))
    # A third draws replacement, and deletion leaves both words with probability .81, or both are lost with .01.
    assert abs(results["red car"] / 3000 - (1 / 3 + 0.81 / 3)) < 0.04


def test_the_key_decides():
    edit = Eda(TABLE)
    first = [edit(CAPTION, keyed_rng(7, "s", 0, index)) for index in range(50)]
    assert first == [edit(CAPTION, keyed_rng(7, "s", 0, index)) for index in range(50)]
    assert len(set(first)) > 10


def test_table_files(tmp_path):
    entries = {"Dog": ["Hound", "dog", "K9", "domestic dog", "hound"], "cat": ["c@t"], "big": ["large"]}
    (tmp_path / "table.json").write_text(json.dumps(entries))
    lines = ["Dog\tHound\tdog\tK9\tdomestic dog", "", "cat\tc@t", "big\tlarge", "dog\thound"]
    (tmp_path / "table.tsv").write_text("\n".join(lines))
    expected = {"dog": ["hound", "domestic dog"], "big": ["large"]}
    assert load_synonyms(tmp_path / "table.json") == expected
    assert load_synonyms(tmp_path / "table.tsv") == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{not json", "cannot be read"),
        ("b.json", '["dog"]', "not an object of lists"),
        ("c.json", '{"dog": "hound"}', "not an object of lists"),
        ("d.tsv", "dog\n", "no usable entry"),
        ("e.json", "{}", "no usable entry"),
    ],
)
def test_broken_tables_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        load_synonyms(tmp_path / name)


def test_missing_table_is_named(tmp_path):
    with pytest.raises(DataError, match=r"missing\.tsv cannot be read"):
        load_synonyms(tmp_path / "missing.tsv")
