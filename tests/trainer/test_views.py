"""Views are a choice: from the names in a recipe to pictures, captions and terms."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.family.methods import Data, recipe
from data.errors import DataError
from data.images.augment import AUGMENTATIONS, ImageAugmentation
from data.sample import SampleTransform
from tests.trainer.methods.test_gradients import micro_batch
from trainer.building import build_method
from trainer.config.recipe import dump_config
from trainer.errors import ConfigError
from trainer.loading import load_config, parse_config
from trainer.methods import METHODS
from trainer.pipeline import build_tokenizer
from trainer.views import sample_transform, unused_augmentations

DECLIP = {"name": "declip", "nns_queue_size": 32, "iss_hidden_dim": 32, "iss_predictor_dim": 16}
DEFILIP = {**DECLIP, "name": "defilip", "filip_dim": 16, "filip_topk": 4}
ONLY_CLIP = {"w_mvs": 0.0, "w_nns": 0.0, "w_iss": 0.0, "w_tss": 0.0}
CAPTION = "a small brown dog on a red chair beside the old window"
OWN = {"mild": {"preset": "clip", "crop_scale": [0.8, 1.0]}, "strong": "moco_v2"}


def configured(method: dict, **data):
    tree = {
        "model": {"name": "vit_femto_p8_32"},
        "method": method,
        "data": {"train": "none", "mask_token": True, **data},
        "train": {"steps": 1, "global_batch_size": 8},
        "optimizer": {"lr": 1e-3},
    }
    return parse_config(tree)


TOKENIZER = build_tokenizer(configured({"name": "clip"}))


def built(method: dict, device: str = "meta", **data):
    """The method, by default without numbers, and what the loader does to its samples."""
    config = configured(method, **data)
    torch.manual_seed(0)
    with torch.device(device):
        made = build_method(config, TOKENIZER)
    return made, sample_transform(config, made, TOKENIZER)


def picture() -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


PICTURE = picture()


def sampled(transform, sample: int = 0):
    return transform(PICTURE, [CAPTION], (0, "set", 0, sample))


PUBLISHED = {
    "aclip": (("augmented", "augmented"), ("original",)),
    "align": (("base",), ("original",)),
    "clip": (("base",), ("original",)),
    "declip": (("augmented", "augmented"), ("masked", "eda")),
    "defilip": (("augmented", "augmented"), ("masked", "eda")),
    "filip": (("base",), ("original",)),
    "protoclip": (("base",), ("original",)),
    "siglip": (("base",), ("original",)),
    "slip": (("base", "augmented", "augmented"), ("original",)),
}


@pytest.mark.parametrize("name", METHODS)
def test_the_published_choice_is_the_default(name):
    small = {"declip": DECLIP, "defilip": DEFILIP, "aclip": {"name": name, "mask_block": 1, "head_hidden_dim": 8}}
    made, transform = built(small.get(name, {"name": name}), augmentation={"augmented": "aclip"})
    assert (made.image_views, made.text_views) == PUBLISHED[name]
    assert transform.text_views == PUBLISHED[name][1]
    presets = {"base": "clip", "augmented": "aclip"}
    assert transform.image_views == tuple(AUGMENTATIONS[presets[role]] for role in made.image_views)


def test_names_reach_the_pictures():
    views = {"image_views": ["base", "strong"]}
    made, transform = built({**DECLIP, **views}, augmentation={**OWN, "base": "glyph"})
    assert made.describe_views() == "views: images base, strong; captions masked, eda"
    explicit = SampleTransform(transform.tokenizer, ("glyph", "moco_v2"), ("masked", "eda"), 32)
    for sample in range(4):
        assert np.array_equal(sampled(transform, sample).images, sampled(explicit, sample).images)
        assert sampled(transform, sample)[1:4] == sampled(explicit, sample)[1:4]
    _, transform = built({"name": "clip", "image_views": "mild"}, augmentation=OWN)
    assert transform.image_views == (
        ImageAugmentation(crop_scale=(0.8, 1.0), crop_ratio=AUGMENTATIONS["clip"].crop_ratio),
    )


def test_choosing_one_view_leaves_the_others_alone():
    published = sampled(built(DECLIP)[1])
    chosen = sampled(built({**DECLIP, "image_views": ["base", "augmented"], "text_views": ["original"] * 2})[1])
    assert not np.array_equal(chosen.images[0], published.images[0])
    assert np.array_equal(chosen.images[1], published.images[1])
    assert chosen.token_ids[0] == published.token_ids[0]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("name", ["declip", "defilip"])
def test_edits_are_switched_and_masking_follows(name, shared):
    method = {**(DECLIP if name == "declip" else DEFILIP), "mlm_shared_pass": shared}
    made, transform = built({**method, "text_views": ["original", "original"]})
    original = transform.tokenizer.encode(CAPTION)
    assert made.text_views == (("masked", "original") if shared else ("original", "original", "masked"))
    for sample in range(8):
        *first, second = sampled(transform, sample).token_ids[:2]
        assert second == original
        assert shared or first == [original]
    made, transform = built({**method, "text_views": ["eda", "original"]})
    assert made.text_views == (("masked_eda", "original") if shared else ("eda", "original", "masked"))
    edited = SampleTransform(transform.tokenizer, ("none",), ("eda",), 8)
    changed = 0
    for sample in range(8):
        views = sampled(transform, sample)
        # The masked caption, restored: the edited one where they share a pass, else the original.
        masked = list(views.token_ids[0 if shared else 2])
        for position, target in zip(views.mlm_positions, views.mlm_targets, strict=True):
            masked[position] = target
        (expected,) = sampled(edited, sample).token_ids
        assert masked == (expected if shared else original)
        assert shared or views.token_ids[0] == expected
        changed += expected != original
    assert changed > 4
    assert made.num_captions == 2


@pytest.mark.parametrize("name", ["clip", "siglip", "align", "slip", "filip", "protoclip"])
def test_one_caption_may_be_edited(name):
    made, transform = built({"name": name, "text_views": "eda"})
    assert made.text_views == transform.text_views == ("eda",)
    original = transform.tokenizer.encode(CAPTION)
    captions = [sampled(transform, sample).token_ids for sample in range(8)]
    assert all(len(ids) == 1 for ids in captions)
    assert any(ids != [original] for ids in captions)


@pytest.mark.parametrize("method", [DECLIP, DEFILIP], ids=["declip", "defilip"])
def test_a_view_that_no_term_reads_is_not_computed(method):
    views = {"image_views": ["base", "augmented"], "text_views": ["original", "eda"]}
    for weights, images, captions in (
        ({}, 2, ("masked", "eda")),
        ({"w_mvs": 0.0}, 2, ("masked", "eda")),
        ({"w_mvs": 0.0, "w_nns": 0.0}, 2, ("masked",)),
        ({"w_mvs": 0.0, "w_nns": 0.0, "mlm_shared_pass": False}, 2, ("original", "masked")),
        ({**ONLY_CLIP, "w_iss": 0.2}, 2, ("original",)),
        (ONLY_CLIP, 1, ("original",)),
    ):
        made, _ = built({**method, **views, **weights})
        assert made.image_views == ("base", "augmented")[:images]
        assert made.text_views == captions
    # What is left is CLIP, on its one view: the same value from the same weights.
    batch = micro_batch(0, 8, 1, 1)
    left, _ = built({**method, **views, **ONLY_CLIP}, "cpu")
    clip, _ = built({"name": "clip"}, "cpu")
    clip.model.load_state_dict(left.model.state_dict())
    expected = clip("train", {"micro_batches": [batch]})["loss"].item()
    assert left("train", {"micro_batches": [batch]})["loss/clip"].item() == pytest.approx(expected, rel=1e-6)


def test_slip_keeps_its_first_view():
    views = {"image_views": ["mild", "strong", "augmented"]}
    assert built({"name": "slip", **views}, augmentation=OWN)[0].image_views == ("mild", "strong", "augmented")
    assert built({"name": "slip", "w_simclr": 0.0, **views}, augmentation=OWN)[0].image_views == ("mild",)


@pytest.mark.parametrize(
    ("method", "augmentation", "expected"),
    [
        ({**DECLIP, "image_views": ["base"]}, {}, "method.image_views: got 1 of them, [base], but the method has 2"),
        ({"name": "clip", "image_views": []}, {}, "method.image_views: got 0 of them"),
        ({"name": "slip", "image_views": ["base", "base"]}, {}, "for example [base, augmented, augmented]"),
        ({"name": "clip", "text_views": ["original", "eda"]}, {}, "method.text_views: got 2 of them"),
        ({**DECLIP, "text_views": ["masked", "eda"]}, {}, "'masked' is no choice"),
        ({"name": "clip", "text_views": "ead"}, {}, "method.text_views: unknown edit 'ead'; use original or eda"),
        ({"name": "clip", "image_views": [1]}, {}, "method.image_views.0: got 1"),
        ({"name": "clip", "image_views": {"a": 1}}, {}, "method.image_views: got {'a': 1}"),
        ({"name": "clip", "image_views": "strogn"}, OWN, "unknown view 'strogn': did you mean 'strong'?"),
        ({"name": "clip", "image_views": "glyph"}, {}, "as in {glyph: glyph}"),
        # Also one that a weight of 0 leaves out.
        ({"name": "slip", "w_simclr": 0, "image_views": ["base", "x", "base"]}, {}, "unknown view 'x'"),
        (
            {"name": "clip", "image_views": "own"},
            {"own": {"rotation": 3.0}},
            "data.augmentation.own: preset is missing",
        ),
        ({"name": "clip", "image_views": "own"}, {"own": "mocov2"}, "data.augmentation.own: unknown preset 'mocov2'"),
        ({"name": "clip"}, {"base": {"preset": ["clip"]}}, "data.augmentation.base: unknown preset"),
        (
            {"name": "clip"},
            {"base": {"crop_scale": 0.5}},
            "data.augmentation.base: image augmentation: crop_scale is 0.5",
        ),
        ({"name": "clip"}, {"base": {"crop_scale": [0.5]}}, "crop_scale is (0.5,), expected (low, high)"),
        ({"name": "clip"}, {"base": {"crop_scale": [0.5, "x"]}}, "expected (low, high)"),
        ({"name": "clip"}, {"base": {"rotation": "much"}}, "rotation is much, expected a number from 0 to 180"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(method, augmentation, expected):
    with pytest.raises(ConfigError) as refusal:
        configured(method, augmentation=augmentation)
    assert expected in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_views_with_boxes_neither_turn_nor_shift():
    aclip = {"name": "aclip", "mask_block": 1, "head_hidden_dim": 8, "image_views": ["base", "own"]}
    made, transform = built(aclip, augmentation={"own": "aclip"})
    assert made.image_views == ("base", "own")
    assert sampled(transform).crop_boxes.shape == (3, 4)
    for moved in ("glyph", {"preset": "aclip", "shift": 0.1}, {"preset": "aclip", "flip_probability": 0.5}):
        with pytest.raises(DataError, match="image view 2 of 2 moves them: set rotation, shift and flip_probability"):
            built(aclip, augmentation={"own": moved})


def test_names_without_a_view_are_told():
    assert unused_augmentations(configured({"name": "clip"}, augmentation={"base": "glyph", **OWN})) == [*OWN]
    assert not unused_augmentations(configured({**DECLIP, "image_views": [*OWN]}, augmentation=OWN))


def test_flags_and_saved_recipes_carry_them(tmp_path):
    flags = {"method.image_views": "[base, strong]", "method.text_views": "[original, original]"}
    config = load_config("demo", {**flags, "data.augmentation": "{strong: moco_v2}", "data.caption": "first"})
    (tmp_path / "saved.yaml").write_text(dump_config(config))
    saved = load_config(str(tmp_path / "saved.yaml"))
    assert saved == config
    assert saved.method["image_views"] == ("base", "strong")
    assert saved.method["text_views"] == ("original", "original")
    with pytest.raises(ConfigError, match=r"data\.caption: got 'last'"):
        load_config("demo", {"data.caption": "last"})


def test_the_comparison_may_pass_them(monkeypatch):
    from benchmarks.family import methods

    entry = methods.ENTRIES["declip"]
    monkeypatch.setitem(entry.method, "image_views", ["base", "base"])
    tree = recipe("declip", Data("none", "none", 256, {}, "none"))
    config = parse_config(tree)
    assert config.method["image_views"] == ("base", "base")


def test_the_first_caption_or_one_of_all():
    captions = ["red", "green", "blue"]
    for choice, expected in ((None, 3), ("random", 3), ("first", 1)):
        _, transform = built({"name": "clip"}, **({} if choice is None else {"caption": choice}))
        found = {tuple(transform(PICTURE, captions, (0, "set", epoch, 5)).token_ids[0]) for epoch in range(40)}
        assert len(found) == expected
    assert found == {tuple(transform.tokenizer.encode("red"))}
