"""The tokenizer against open_clip's own, and its behaviour on hostile captions."""

import pickle
import time
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.captions.tokenizer import ClipTokenizer
from data.errors import DataError

HAND_PICKED = [
    "",
    "   \t\n ",
    "a photo of a cat",
    "Don't you think we're here? They'll've GONE!",
    "don\u2019t \u201cquote\u201d \u2014 dash\u2026",
    "fish &amp; chips &amp;amp; &lt;b&gt;bold&lt;/b&gt; &eacute;t&eacute; &#233; &#0; &#xD800; &unknown;",
    "Ã©tÃ© schÃ¶n \u00e2\u20ac\u0153mojibake\u00e2\u20ac\u009d",
    "caf\u00e9 cafe\u0301 \ufb01ne \uff26\uff35\uff2c\uff2c width",
    "\u65e5\u672c\u8a9e \u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u0939\u093f\u0928\u094d\u0926\u0940",
    "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f",
    "1234 one2three 3.14 \u00bd \u2167 \u0664",
    "It\u017f '\u017f long s",
    "\x00nul\x00 \x1b[31mescape\x1b[0m \x1c\x0b\x85\u2028separators",
    "lone \ud800 surrogate",
    "word " * 200,
    "x" * 3000,
]


def random_captions(count: int) -> list[str]:
    rng = np.random.default_rng(0)
    ranges = [(1, 0x80), (1, 0x250), (1, 0x3000), (1, 0x110000)]
    captions = []
    for index in range(count):
        low, high = ranges[index % len(ranges)]
        points = rng.integers(low, high, size=rng.integers(1, 40))
        captions.append("".join(map(chr, points)))
        captions.append(" ".join(unicodedata.name(chr(point), "x") for point in points[:8]))
    return captions


@pytest.fixture(scope="module")
def reference():
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


@pytest.fixture(scope="module")
def tokenizer():
    return ClipTokenizer()


@pytest.mark.parametrize("context_length", [77, 12])
def test_ids_equal_open_clip(reference, context_length):
    tokenizer = ClipTokenizer(context_length=context_length)
    captions = HAND_PICKED + random_captions(1500)
    expected = reference(captions, context_length=context_length).tolist()
    for caption, row in zip(captions, expected, strict=True):
        ids = tokenizer.encode(caption)
        assert ids + [0] * (context_length - len(ids)) == row, repr(caption)


@settings(max_examples=300)
@given(st.text(max_size=60))
def test_any_text_gives_the_ids_of_open_clip(tokenizer, reference, caption):
    ids = tokenizer.encode(caption)
    assert ids + [0] * (77 - len(ids)) == reference([caption])[0].tolist()


# Category Cs: lone surrogates, which a JSON member can spell out.
@settings(max_examples=200)
@given(st.text(st.characters() | st.characters(categories=["Cs", "Cc", "Cf", "Mn"]), max_size=60))
def test_any_text_is_encoded_within_bounds(tokenizer, caption):
    ids = tokenizer.encode(caption)
    assert (ids[0], ids[-1]) == (tokenizer.sot_id, tokenizer.eot_id)
    assert all(0 <= token < tokenizer.sot_id for token in ids[1:-1])
    assert isinstance(tokenizer.decode(ids), str)


def test_special_ids_of_both_conventions():
    stock, declip = ClipTokenizer(), ClipTokenizer(mask_token=True)
    assert (stock.vocab_size, stock.sot_id, stock.eot_id, stock.mask_id) == (49408, 49406, 49407, None)
    assert (declip.vocab_size, declip.mask_id, declip.sot_id, declip.eot_id) == (49409, 49406, 49407, 49408)
    assert stock.encode("a cat") == [49406, 320, 2368, 49407]
    assert declip.encode("a cat") == [49407, 320, 2368, 49408]
    assert stock.pad_id == declip.pad_id == 0


def test_truncation_keeps_the_first_ids_and_ends_with_eot():
    long = ClipTokenizer(context_length=77).encode("one two three four five six seven eight nine ten")
    short = ClipTokenizer(context_length=6).encode("one two three four five six seven eight nine ten")
    assert short == [*long[:5], 49407]


def test_special_tokens_spelled_out_are_ordinary_text():
    ids = ClipTokenizer(mask_token=True).encode("<start_of_text> a <|mask|> b <end_of_text> c")
    assert ids[0] == 49407
    assert ids[-1] == 49408
    assert max(ids[1:-1]) < 49406


@pytest.mark.parametrize(
    "caption",
    ["a" * 100_000, "\u65e5\u672c" * 50_000, "&amp;" * 20_000, "\x00" * 100_000, "\ud800" * 100_000, "'" * 100_000],
)
def test_hostile_captions_stay_bounded(caption):
    tokenizer = ClipTokenizer()
    start = time.process_time()
    ids = tokenizer.encode(caption)
    assert 2 <= len(ids) <= 77
    # A quadratic merge loop needs minutes here; the bound only tells those apart.
    assert time.process_time() - start < 20
    assert not any(len(word) > 100 for word in tokenizer._word_ids)


def test_pickled_copy_gives_the_same_ids():
    tokenizer = ClipTokenizer(mask_token=True, context_length=20)
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode("a caf\u00e9 by the sea") == tokenizer.encode("a caf\u00e9 by the sea")
    assert copy.hash == tokenizer.hash
    assert len(pickle.dumps(tokenizer)) < 1000


def test_hash_tells_conventions_apart():
    hashes = {ClipTokenizer().hash, ClipTokenizer(mask_token=True).hash, ClipTokenizer(context_length=32).hash}
    assert len(hashes) == 3
    assert ClipTokenizer().hash == ClipTokenizer().hash


def test_decode_inverts_encode():
    tokenizer = ClipTokenizer(mask_token=True)
    assert tokenizer.decode(tokenizer.encode("Caf\u00e9 \u65e5\u672c 42")) == "caf\u00e9 \u65e5\u672c 4 2"


def test_mistakes_are_named(tmp_path):
    with pytest.raises(DataError, match="context_length is 2; it must be at least 3"):
        ClipTokenizer(context_length=2)
    import gzip

    with gzip.open(tmp_path / "merges.gz", "wt") as file:
        file.write("header\na b\n")
    with pytest.raises(DataError, match="not CLIP's merges file"):
        ClipTokenizer(merges_path=tmp_path / "merges.gz")
