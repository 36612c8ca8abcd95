"""Captions and metadata out of untrusted members."""

import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.captions.tokenizer import ClipTokenizer
from data.errors import BadSample
from data.sample import SampleTransform
from data.shards.reader import ReadLimits
from data.shards.records import MAX_JSON_BYTES, caption_list, parse_json
from tests.data.bad_files import encoded, odd_texts, refused_texts


@pytest.mark.parametrize(
    ("text", "record", "by_line", "expected"),
    [
        (b" a cat \n", None, False, ["a cat"]),
        (b"one\ntwo", None, False, ["one\ntwo"]),
        (b"one\r\n\n two \n", None, True, ["one", "two"]),
        (b"text", {"captions": ["x", " ", 5, "y "]}, False, ["x", "y"]),
        (b"text", {"captions": [" "], "caption": "c"}, False, ["text"]),
        (b" ", {"caption": "c"}, False, ["c"]),
        (None, {"captions": "not a list", "caption": "c"}, False, ["c"]),
        (b"\xef\xbb\xbfa", None, False, ["a"]),
    ],
)
def test_which_captions_count(text, record, by_line, expected):
    assert caption_list(text, record, by_line=by_line) == expected


@pytest.mark.parametrize(
    "payload", [b"{" * 10**6, b"[" * 10**6, b'{"a":1e400}', b'{"a":%s}' % (b"9" * 10**5), b'{"a":"\\ud800"}']
)
def test_json_bombs(payload):
    try:
        assert isinstance(parse_json(payload), dict)
    except BadSample as bad:
        assert bad.reason.startswith("the .json member is not JSON")
        assert len(bad.reason) <= 300


def test_the_worst_json_takes_a_bounded_multiple_of_its_size():
    unit = b'{"":[]},'
    payload = b'{"a":[' + unit * ((1 << 20) // len(unit)) + b"0]}"
    tracemalloc.start()
    parse_json(payload)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 36 << 20
    assert ReadLimits().max_json_bytes == MAX_JSON_BYTES == 4 << 20


@settings(max_examples=300)
@given(st.binary(max_size=80), st.binary(max_size=80) | st.none(), st.booleans())
def test_any_members_give_captions_or_a_bad_sample(payload, text, by_line):
    try:
        captions = caption_list(text, parse_json(b'{"captions":' + payload + b"}"), by_line=by_line)
    except BadSample as bad:
        assert bad.reason.isprintable()
    else:
        assert captions and all(isinstance(caption, str) and caption.strip() == caption != "" for caption in captions)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300)
@given(st.dictionaries(st.sampled_from(["captions", "caption", "key", "cls"]), JSON_VALUES), st.text(max_size=9))
def test_any_json_object_gives_captions_or_a_bad_sample(record, text):
    parsed = parse_json(json.dumps(record).encode())
    try:
        assert all(caption_list(text.encode("utf-8", "surrogatepass"), parsed))
    except BadSample as bad:
        assert bad.reason in ("the caption is empty", "the caption is not UTF-8")


@pytest.fixture(scope="module")
def transform():
    return SampleTransform(ClipTokenizer(mask_token=True), ("none",), ("original", "eda", "masked"), 16)


def captions_of(members):
    record = parse_json(members["json"]) if "json" in members else None
    return caption_list(members.get("txt"), record)


def test_odd_captions_become_bounded_ids(transform):
    picture = encoded("PNG")
    for name, members in odd_texts().items():
        views = transform(picture, captions_of(members), (0, name))
        assert all(3 <= len(ids) <= 77 for ids in views.token_ids), name


@pytest.mark.parametrize("name", [name for name in refused_texts() if "large" not in name])
def test_bad_texts_are_bad_samples(transform, name):
    members, words = refused_texts()[name]
    with pytest.raises(BadSample, match=words):
        transform(encoded("PNG"), captions_of(members), (0,))


@settings(max_examples=200)
@given(st.lists(st.text(st.characters(), max_size=30), min_size=1, max_size=3))
def test_any_caption_is_encoded_or_a_bad_sample(transform, captions):
    try:
        views = transform(encoded("PNG"), captions, (0,))
    except BadSample as bad:
        assert bad.reason == "the caption has no readable character"
        return
    original, edited, masked = views.token_ids
    assert original[0] == edited[0] == masked[0] == 49407
    assert original[-1] == edited[-1] == masked[-1] == 49408
    assert len(masked) == len(original)
    assert all(0 <= token < 49407 for token in (*original[1:-1], *edited[1:-1], *masked[1:-1]))
