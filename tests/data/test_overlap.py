"""Perceptual hashes find planted near-duplicates, and the banded search equals comparing all pairs."""

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw

from data.image_folder import open_image_folder
from data.overlap import PerceptualHash, hash_pictures, nearest_within
from data.shards.index_store import IndexStore


def drawing(seed: int, side: int = 160) -> Image.Image:
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (side, side), tuple(int(v) for v in rng.integers(150, 255, 3)))
    draw = ImageDraw.Draw(image)
    for _ in range(7):
        left, top, width, height = (int(v) for v in rng.integers(5, side // 2, 4))
        colour = tuple(int(v) for v in rng.integers(0, 200, 3))
        draw.ellipse((left, top, left + width, top + height), fill=colour)
    return image


def encoded(image: Image.Image, kind: str = "PNG", **options: int) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def distance(left: np.ndarray, right: np.ndarray) -> int:
    return int(np.bitwise_count((left ^ right).view(np.uint64))[0])


def test_size_and_compression_hardly_change_the_hash_and_other_pictures_do():
    own = PerceptualHash()(encoded(drawing(0)))
    assert distance(own, PerceptualHash()(encoded(drawing(0), "JPEG", quality=40))) <= 4
    assert distance(own, PerceptualHash()(encoded(drawing(0).resize((97, 97))))) <= 4
    assert min(distance(own, PerceptualHash()(encoded(drawing(seed)))) for seed in range(1, 20)) > 4


@pytest.mark.parametrize("limit", [0, 3, 4, 15])
def test_banded_search_against_all_pairs(limit):
    rng = np.random.default_rng(limit)
    others = rng.integers(0, 2**64, 500, dtype=np.uint64)
    queries = rng.integers(0, 2**64, 300, dtype=np.uint64)
    # Plant neighbours at every distance around the limit.
    for row in range(200):
        flips = rng.choice(64, row % 20, replace=False)
        queries[row] = others[row] ^ np.bitwise_or.reduce(np.uint64(1) << flips.astype(np.uint64), initial=np.uint64(0))
    found = nearest_within(queries, others, limit)
    far = np.bitwise_count(queries[:, None] ^ others)
    expected = np.where(far.min(axis=1) <= limit, far.argmin(axis=1), -1)
    assert (found == expected).all()
    assert (found >= 0).sum() >= 10


def test_search_in_nothing_and_for_nothing():
    none = np.empty(0, np.uint64)
    assert nearest_within(none, np.arange(3, dtype=np.uint64)).tolist() == []
    assert nearest_within(np.arange(3, dtype=np.uint64), none).tolist() == [-1, -1, -1]
    with pytest.raises(ValueError, match="0 to 15"):
        nearest_within(none, none, 16)


def test_hashes_of_an_image_folder(tmp_path):
    for label, seeds in {"cat": (0, 1), "dog": (2, 3, 4)}.items():
        (tmp_path / "set" / label).mkdir(parents=True)
        for seed in seeds:
            (tmp_path / "set" / label / f"{seed}.png").write_bytes(encoded(drawing(seed)))
    (tmp_path / "set" / "dog" / "5.png").write_bytes(b"no picture")
    folder = open_image_folder(tmp_path / "set")
    assert (folder.class_names, folder.labels) == (("cat", "dog"), (0, 0, 1, 1, 1, 1))
    indices, hashes = hash_pictures(folder, IndexStore.create(tmp_path / "cache"))
    assert indices.tolist() == [0, 1, 2, 3, 4]
    planted = PerceptualHash()(encoded(drawing(3), "JPEG", quality=50)).view(np.uint64)
    assert nearest_within(planted, hashes).tolist() == [3]
