"""The whole transform: contract, keys, captions and errors."""

import io
import json
import pickle
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from data.captions.tokenizer import ClipTokenizer
from data.errors import BadSample, DataError
from data.images.augment import AUGMENTATIONS, ImageAugmentation
from data.sample import EvalTransform, SampleTransform


def png(width: int = 40, height: int = 30, seed: int = 0) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def tokenizer():
    return ClipTokenizer(mask_token=True)


@pytest.fixture(scope="module")
def declip(tokenizer):
    return SampleTransform(tokenizer, ("moco_v2", "moco_v2"), ("masked", "eda"), 24)


CAPTION = "a small brown dog on a red chair beside the old window"


def test_views_follow_the_contract(declip, tokenizer):
    sample = declip(png(), [CAPTION], (0, "set", 0, 0))
    assert sample.images.shape == (2, 3, 24, 24)
    assert sample.images.dtype == np.uint8
    masked, edited = sample.token_ids
    assert masked[0] == edited[0] == tokenizer.sot_id
    assert masked[-1] == edited[-1] == tokenizer.eot_id
    restored = list(masked)
    for position, target in zip(sample.mlm_positions, sample.mlm_targets, strict=True):
        restored[position] = target
    assert restored == tokenizer.encode(CAPTION)


def test_everything_is_a_function_of_the_key(declip):
    key = (3, "set", 2, 17)
    first, again = declip(png(), [CAPTION], key), declip(png(), [CAPTION], key)
    copy = pickle.loads(pickle.dumps(declip))(png(), [CAPTION], key)
    for other in (again, copy):
        assert np.array_equal(first.images, other.images)
        assert first[1:] == other[1:]


@pytest.mark.parametrize("place", range(4))
def test_each_part_of_the_key_matters(declip, place):
    key: list = [3, "set", 2, 17]
    first = declip(png(), [CAPTION], tuple(key))
    key[place] = "other" if place == 1 else 18
    second = declip(png(), [CAPTION], tuple(key))
    assert not np.array_equal(first.images, second.images)


def test_views_of_one_sample_are_independent(declip):
    masks, edits = Counter(), Counter()
    for sample in range(400):
        views = declip(png(), ["one two three four five six"], (0, "set", 0, sample))
        masks[2 in views.mlm_positions] += 1
        edits[tuple(views.token_ids[1])] += 1
    assert abs(masks[True] / 400 - 0.15) < 0.07
    assert len(edits) > 10


def test_text_views_share_one_caption_drawn_uniformly(tokenizer):
    transform = SampleTransform(tokenizer, ("none",), ("original", "masked"), 8, mask_probability=0.0)
    captions = ["red", "green", "blue"]
    seen = Counter()
    for sample in range(900):
        first, second = transform(png(8, 8), captions, (0, "set", 0, sample)).token_ids
        assert first == second
        seen[tokenizer.decode(first)] += 1
    assert all(abs(seen[caption] / 900 - 1 / 3) < 0.06 for caption in captions)


def test_adding_a_text_view_leaves_the_images_alone(tokenizer):
    few = SampleTransform(tokenizer, ("glyph",), ("original",), 16)
    more = SampleTransform(tokenizer, ("glyph", "clip"), ("eda", "masked"), 16)
    key = (1, "set", 0, 5)
    assert np.array_equal(few(png(), [CAPTION], key).images[0], more(png(), [CAPTION], key).images[0])


def test_synonym_table_reaches_the_eda_view(tokenizer, tmp_path):
    (tmp_path / "table.json").write_text(json.dumps({"dog": ["hound"]}))
    transform = SampleTransform(tokenizer, ("none",), ("eda",), 8, synonyms_path=tmp_path / "table.json")
    texts = {tokenizer.decode(transform(png(8, 8), ["a dog"], (0, "s", 0, i)).token_ids[0]) for i in range(60)}
    assert "a hound" in texts


def test_captions_are_cut_before_any_work(tokenizer):
    transform = SampleTransform(tokenizer, ("none",), ("original",), 8, max_caption_chars=5)
    ids = transform(png(8, 8), ["a cat" + " dog" * 1000], (0, "s", 0, 0)).token_ids[0]
    assert tokenizer.decode(ids) == "a cat"
    for caption in ("\ud800 broken", "x" * 100_000):
        assert len(transform(png(8, 8), [caption], (0, "s", 0, 0)).token_ids[0]) >= 3
    for caption in ("", "\x00" * 10_000):
        with pytest.raises(BadSample, match="no readable character"):
            transform(png(8, 8), [caption], (0, "s", 0, 0))


def test_bad_samples_are_reported(declip):
    with pytest.raises(BadSample, match="no caption"):
        declip(png(), [], (0, "s", 0, 0))
    with pytest.raises(BadSample, match="found HTML, expected JPEG, PNG or WebP"):
        declip(b"<html>", [CAPTION], (0, "s", 0, 0))
    with pytest.raises(BadSample, match="damaged image"):
        declip(png(200, 200)[:2000], [CAPTION], (0, "s", 0, 0))


def test_pixel_limit(tokenizer):
    transform = SampleTransform(tokenizer, ("none",), ("original",), 8, max_image_pixels=100)
    with pytest.raises(BadSample, match="above the limit of 100"):
        transform(png(11, 10), ["a"], (0, "s", 0, 0))
    with pytest.raises(BadSample, match="above the limit of 100"):
        EvalTransform(8, max_image_pixels=100)(png(11, 10))


def test_mistakes_are_named(tokenizer):
    with pytest.raises(DataError, match="unknown image view 'mocov2'; expected one of none, clip"):
        SampleTransform(tokenizer, ("mocov2",), ("original",), 8)
    with pytest.raises(DataError, match="unknown text view 'clean'"):
        SampleTransform(tokenizer, ("clip",), ("clean",), 8)
    with pytest.raises(DataError, match="needs a tokenizer with a mask token"):
        SampleTransform(ClipTokenizer(), ("clip",), ("masked",), 8)
    with pytest.raises(DataError, match="more than once"):
        SampleTransform(tokenizer, ("clip",), ("masked", "masked"), 8)
    with pytest.raises(DataError, match=r"mask_probability is 1\.5"):
        SampleTransform(tokenizer, ("clip",), ("masked",), 8, mask_probability=1.5)
    with pytest.raises(DataError, match="resize_size is 10, expected at least image_size 16"):
        EvalTransform(16, resize_size=10)
    with pytest.raises(DataError, match="interpolation is 'area', expected bilinear or bicubic"):
        EvalTransform(16, interpolation="area")


def test_names_and_objects_are_the_same_view(tokenizer):
    by_name = SampleTransform(tokenizer, ("glyph",), ("original",), 8)
    assert by_name.image_views == (AUGMENTATIONS["glyph"],)
    own = ImageAugmentation(crop_scale=(0.3, 0.4))
    assert SampleTransform(tokenizer, (own,), ("original",), 8).image_views == (own,)


def test_eval_transform_is_deterministic_and_picklable():
    transform = EvalTransform(16, resize_size=18)
    first = transform(png())
    assert first.shape == (3, 16, 16)
    assert first.dtype == np.uint8
    assert np.array_equal(first, pickle.loads(pickle.dumps(transform))(png()))
