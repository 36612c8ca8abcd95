"""Image views: reproducible, independent, statistically right, and in step with torchvision."""

import dataclasses
import io
import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from torchvision.transforms import RandomResizedCrop, v2

from data.errors import DataError
from data.images import augment
from data.images.augment import AUGMENTATIONS, ImageAugmentation, align, eval_view, random_views
from data.images.decode import open_image
from data.rng import keyed_rng


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=95)
    return buffer.getvalue()


def views(data: bytes, names: tuple[str, ...], *key: int, size: int = 32) -> np.ndarray:
    augmentations = tuple(AUGMENTATIONS[name] for name in names)
    return random_views(open_image(data), augmentations, [keyed_rng(*key, view) for view in range(len(names))], size)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_views_are_a_function_of_the_key(name):
    data = encode(picture(64, 48))
    first = views(data, (name, name), 1, 2)
    torch.manual_seed(5)
    random.seed(5)
    assert first.dtype == np.uint8
    assert first.shape == (2, 3, 32, 32)
    assert np.array_equal(first, views(data, (name, name), 1, 2))
    if name != "none":
        assert not np.array_equal(first, views(data, (name, name), 1, 3))
        assert not np.array_equal(first[0], first[1])


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_global_generators_are_left_alone(name):
    data = encode(picture(64, 48))
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
    for key in range(20):
        views(data, (name,), key)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())


def test_a_view_does_not_depend_on_the_others():
    data = encode(picture(64, 48))
    both = views(data, ("moco_v2", "glyph"), 4)
    alone = random_views(open_image(data), (AUGMENTATIONS["glyph"],), [keyed_rng(4, 1)], 32)
    assert np.array_equal(both[1], alone[0])


def test_none_is_the_picture_itself():
    image = picture(32, 32)
    assert np.array_equal(views(encode(image), ("none",), 0)[0], np.asarray(image).transpose(2, 0, 1))


def test_crop_statistics_equal_torchvision():
    scale, ratio, size = (0.2, 1.0), (3 / 4, 4 / 3), (320, 240)
    augmentation = ImageAugmentation(crop_scale=scale, crop_ratio=ratio)
    rng = keyed_rng("crops")
    boxes = np.array([augmentation.crop_box(size, rng) for _ in range(4000)])
    ours = np.stack([boxes[:, 0], boxes[:, 1], boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]], axis=1)
    torch.manual_seed(0)
    blank = torch.empty(3, size[1], size[0])
    drawn = np.array([RandomResizedCrop.get_params(blank, list(scale), list(ratio)) for _ in range(4000)])
    theirs = drawn[:, [1, 0, 3, 2]]
    assert (ours[:, 0] + ours[:, 2]).max() <= size[0]
    assert (ours[:, 1] + ours[:, 3]).max() <= size[1]
    # Standard errors of the means are about 1 pixel.
    assert np.abs(ours.mean(axis=0) - theirs.mean(axis=0)).max() < 4
    assert np.abs(ours.std(axis=0) - theirs.std(axis=0)).max() < 4


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (3, 2), (2000, 31)])
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_extreme_shapes(size, name):
    assert views(encode(picture(*size)), (name, name), 0, size=16).shape == (2, 3, 16, 16)
    assert eval_view(picture(*size), 16, 18).shape == (3, 16, 16)


def jitter_reference(image: Image.Image, augmentation: ImageAugmentation, rng: np.random.Generator) -> np.ndarray:
    """torchvision's tensor kernels, which share no code with Pillow, on the numbers drawn in the documented order."""
    tensor = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
    names = ("brightness", "contrast", "saturation")
    factors = [rng.uniform(max(0, 1 - getattr(augmentation, name)), 1 + getattr(augmentation, name)) for name in names]
    hue = rng.uniform(-augmentation.hue, augmentation.hue)
    functions = (v2.functional.adjust_brightness, v2.functional.adjust_contrast, v2.functional.adjust_saturation)
    for index in rng.permutation(4):
        tensor = v2.functional.adjust_hue(tensor, hue) if index == 3 else functions[index](tensor, factors[index])
    return tensor.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("hue", [0.0, 0.1])
@pytest.mark.parametrize("key", range(10))
def test_colour_jitter_follows_torchvision(key, hue):
    augmentation = ImageAugmentation(brightness=0.4, contrast=0.4, saturation=0.4, hue=hue)
    image = picture(48, 48, seed=key)
    ours = np.asarray(augmentation._jitter(image, keyed_rng(key)), dtype=int)
    theirs = jitter_reference(image, augmentation, keyed_rng(key))
    difference = np.abs(ours - theirs)
    assert difference.mean() < 2
    assert np.quantile(difference, 0.99) <= 3


def test_probabilities_of_the_steps():
    image = picture(24, 24)
    cases = {
        "jitter_probability": {"brightness": 0.9},
        "grayscale_probability": {},
        "blur_probability": {"blur_sigma": (1.0, 2.0)},
        "flip_probability": {},
    }
    for field, others in cases.items():
        augmentation = ImageAugmentation(**{field: 0.3}, **others)
        changed = sum(
            augmentation.distort(image, keyed_rng(field, key)).tobytes() != image.tobytes() for key in range(1500)
        )
        assert abs(changed / 1500 - 0.3) < 0.05, field


def test_glyph_views_keep_sides_and_colours_true():
    """A red square left of a blue one stays left, red and blue, whatever is drawn."""
    image = Image.new("RGB", (32, 32), "white")
    image.paste((200, 0, 0), (6, 10, 14, 22))
    image.paste((0, 0, 200), (18, 10, 26, 22))
    columns = np.arange(32)
    for key in range(200):
        red, green, blue = views(encode(image), ("glyph",), key)[0].astype(float)
        red_weight, blue_weight = np.clip(red - blue, 0, None).sum(axis=0), np.clip(blue - red, 0, None).sum(axis=0)
        assert (columns * red_weight).sum() / red_weight.sum() < (columns * blue_weight).sum() / blue_weight.sum() - 4
        assert green.mean() > 60


def test_rotation_and_shift_fill_with_the_background():
    image = Image.new("RGB", (32, 32), (250, 240, 230))
    augmentation = ImageAugmentation(rotation=30, shift=0.3)
    for key in range(20):
        moved = np.asarray(augmentation.distort(image, keyed_rng(key)))
        assert np.abs(moved.astype(int) - (250, 240, 230)).max() <= 1


@pytest.mark.parametrize("size", [(64, 64), (100, 80), (80, 100), (333, 217), (30, 47)])
@pytest.mark.parametrize(("image_size", "resize_size"), [(32, 32), (32, 37), (64, 73)])
def test_eval_view_equals_torchvision(size, image_size, resize_size):
    image = picture(*size)
    for interpolation in v2.InterpolationMode.BICUBIC, v2.InterpolationMode.BILINEAR:
        resize = v2.Resize(resize_size, interpolation=interpolation)
        expected = np.asarray(v2.CenterCrop(image_size)(resize(image)), dtype=int)
        view = eval_view(image, image_size, resize_size, interpolation.value)
        difference = np.abs(view.transpose(1, 2, 0) - expected)
        assert difference.max() <= 2
        assert difference.mean() < 0.3
    assert np.array_equal(
        eval_view(image, image_size, resize_size), eval_view(image, image_size, resize_size, "bicubic")
    )


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
@pytest.mark.parametrize("box", [(0, 0, 1003, 757), (3, 5, 1003, 750), (499, 123, 900, 701)])
def test_aligned_boxes_move_by_half_a_decoded_pixel_at_most(box, factor):
    size = (1003, 757)
    aligned = align(box, size, factor)
    assert all(abs(new - old) <= factor / 2 for new, old in zip(aligned, box, strict=True))
    assert all(edge % factor == 0 or edge == size[axis % 2] for axis, edge in enumerate(aligned))
    assert aligned == align(aligned, size, factor)


def test_shrunken_jpeg_decode_changes_views_little():
    image = picture(1024, 768)
    jpeg, png = encode(image, "JPEG"), encode(image, "PNG")
    for key in range(5):
        drafted, full = (views(data, ("clip",), key, size=64).astype(int) for data in (jpeg, png))
        assert np.abs(drafted - full).mean() < 3


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("crop_scale", (0.0, 1.0)),
        ("crop_scale", (0.5, 1.5)),
        ("crop_ratio", (2.0, 1.0)),
        ("hue", 0.6),
        ("flip_probability", -0.1),
        ("blur_probability", 1.1),
        ("interpolation", "nearest"),
        ("rotation", 400),
    ],
)
def test_values_out_of_range_are_named(field, value):
    with pytest.raises(DataError, match=field):
        dataclasses.replace(AUGMENTATIONS["moco_v2"], **{field: value})


def test_a_gray_picture_has_the_views_of_its_three_channels():
    every = ImageAugmentation(
        crop_scale=(0.3, 1.0),
        interpolation="bilinear",
        rotation=30.0,
        shift=0.2,
        brightness=0.5,
        contrast=0.5,
        saturation=0.5,
        hue=0.2,
        **{f"{change}_probability": 0.5 for change in ("jitter", "grayscale", "blur", "solarize", "flip")},
    )
    for size in ((40, 33), (200, 300)):
        gray = picture(*size).convert("L")
        for number, augmentation in enumerate((every, *AUGMENTATIONS.values())):
            for key in range(12):
                found, expected = (
                    random_views(open_image(encode(image)), (augmentation,), [keyed_rng(number, key)], 32)
                    for image in (gray, gray.convert("RGB"))
                )
                assert np.array_equal(found, expected)
    for kind in ("JPEG", "WEBP"):
        data = encode(picture(320, 200).convert("L"), kind)
        kept, decoded = open_image(data).decode(4, keep_gray=True), open_image(data).decode(4)
        assert kept.mode == ("L" if kind == "JPEG" else "RGB")
        assert kept.convert("RGB").tobytes() == decoded.tobytes()


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_colours_and_turns_are_those_of_pillow_byte_for_byte(mode):
    image = picture(32, 32).convert(mode)
    enhancers = {"_brightness": "Brightness", "_contrast": "Contrast", "_saturation": "Color"}
    for factor in np.linspace(0.3, 1.9, 23).tolist():
        for ours, theirs in enhancers.items():
            found = getattr(augment, ours)(image, factor)
            assert found.tobytes() == getattr(ImageEnhance, theirs)(image).enhance(factor).tobytes()
    turn = ImageAugmentation(rotation=170.0, shift=0.3)
    for key in range(40):
        rng = keyed_rng(key)
        angle, offset = rng.uniform(-170.0, 170.0), tuple(rng.uniform(-0.3, 0.3, size=2) * 32)
        expected = image.rotate(angle, Image.Resampling.BICUBIC, translate=offset, fillcolor=image.getpixel((0, 0)))
        assert turn.distort(image, keyed_rng(key)).tobytes() == expected.tobytes()
