"""The crop around all views: its box, its pixels, its keys, and which views it can hold."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from data.captions.tokenizer import ClipTokenizer
from data.dataset import collate_views
from data.errors import DataError
from data.images.augment import AUGMENTATIONS, ImageAugmentation, random_views
from data.images.context import enclosing_box, views_in_context
from data.images.decode import open_image
from data.rng import keyed_rng
from data.sample import SampleTransform
from tests.data.images.test_augment import encode, picture

PLAIN = ImageAugmentation(crop_scale=(0.3, 0.6), crop_ratio=(3 / 4, 4 / 3), interpolation="bilinear")


def generators(key: int) -> list[np.random.Generator]:
    return [keyed_rng(key, view) for view in range(2)]


def test_box_holds_all_views_and_lies_in_the_picture():
    size, crop = (375, 500), AUGMENTATIONS["aclip"]
    edges = []
    for key in range(10_000):
        boxes = [crop.crop_box(size, rng) for rng in generators(key)]
        left, top, right, bottom = enclosing_box(size, boxes, keyed_rng(key, "context"))
        assert 0 <= left <= min(box[0] for box in boxes)
        assert 0 <= top <= min(box[1] for box in boxes)
        assert max(box[2] for box in boxes) <= right <= 375
        assert max(box[3] for box in boxes) <= bottom <= 500
        edges.append((left, top, right, bottom))
    # Every edge is drawn: between the views' own and the picture's.
    assert all(len(set(column)) > 20 for column in zip(*edges, strict=True))


@pytest.mark.parametrize("box", [(0, 0, 40, 30), (1, 0, 40, 30), (0, 0, 39, 29)])
def test_box_with_no_room_or_one_pixel(box):
    found = {enclosing_box((40, 30), [box, box], keyed_rng(key)) for key in range(200)}
    expected = {
        (left, top, right, bottom)
        for left in range(box[0] + 1)
        for top in range(box[1] + 1)
        for right in range(box[2], 41)
        for bottom in range(box[3], 31)
    }
    assert found == expected


def test_view_lies_in_the_context_where_the_boxes_say():
    # A picture whose red grows to the right and whose green grows downwards tells where a crop is from.
    down, right = np.mgrid[0:200, 0:250]
    image = np.stack([right, down, 0 * down], axis=-1).astype(np.uint8)
    found = views_in_context(
        open_image(encode(Image.fromarray(image))), (PLAIN, PLAIN), generators(3), 32, keyed_rng(3, "context"), 64
    )
    assert found.context.shape == (3, 64, 64)
    for crop, (left, top, r, bottom) in zip([*found.views, found.context], found.boxes[[1, 2, 0]], strict=True):
        assert crop[0].min() >= left and crop[0].max() <= r
        assert crop[0].mean() == pytest.approx((left + r - 1) / 2, abs=0.6)
        assert crop[1].mean() == pytest.approx((top + bottom - 1) / 2, abs=0.6)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_views_are_those_without_a_context(kind):
    data = encode(picture(700, 500), kind)
    pair = (AUGMENTATIONS["aclip"], AUGMENTATIONS["aclip"])
    found = views_in_context(open_image(data), pair, generators(5), 32, keyed_rng(5, "context"), 16)
    assert np.array_equal(found.views, random_views(open_image(data), pair, generators(5), 32))
    around, *inner = found.boxes.tolist()
    for box in inner:
        assert around[0] <= box[0] < box[2] <= around[2] <= 700
        assert around[1] <= box[1] < box[3] <= around[3] <= 500


def test_transform_and_collation():
    transform = SampleTransform(ClipTokenizer(), ("aclip", "aclip"), ("original",), 24, 12)
    data = encode(picture(64, 48))
    samples = [transform(data, ["a caption"], (0, "set", 0, number)) for number in range(3)]
    again = transform(data, ["a caption"], (0, "set", 0, 1))
    assert np.array_equal(samples[1].context, again.context)
    assert not np.array_equal(samples[0].crop_boxes, samples[1].crop_boxes)
    batch = collate_views(samples, masked=False, in_context=True)
    assert batch["context_images"].shape == (1, 3, 3, 12, 12)
    assert batch["context_images"].dtype == torch.uint8
    assert batch["crop_boxes"].shape == (3, 3, 4)
    assert batch["crop_boxes"][:, 1].tolist() == samples[1].crop_boxes.tolist()
    without = SampleTransform(ClipTokenizer(), ("aclip", "aclip"), ("original",), 24)(data, ["a"], (0, "set", 0, 0))
    assert without.context is None
    assert np.array_equal(without.images, samples[0].images)


@pytest.mark.parametrize("field", ["flip_probability", "rotation", "shift"])
def test_views_that_move_pixels_are_refused(field):
    view = dataclasses.replace(AUGMENTATIONS["aclip"], **{field: 0.5})
    with pytest.raises(DataError, match=r"set rotation, shift and flip_probability to 0 in data\.augmentation"):
        SampleTransform(ClipTokenizer(), ("aclip", view), ("original",), 24, 12)


def test_solarisation_inverts_the_upper_half():
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2))
    view = ImageAugmentation(solarize_probability=1.0)
    solarised = np.asarray(view.distort(ramp, keyed_rng(0)))[..., 0].flatten()
    assert solarised.tolist() == [value if value < 128 else 255 - value for value in range(256)]
