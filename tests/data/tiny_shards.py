"""Small shards and a tiny transform for the tests of the data core."""

import io
import json
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.errors import BadSample
from data.rng import keyed_rng
from data.shards.index_store import IndexedSource, IndexStore, load_sources
from data.shards.sources import Source


class TinyViews(NamedTuple):
    images: np.ndarray
    token_ids: list[list[int]]
    mlm_positions: list[int]
    mlm_targets: list[int]


class TinyTransform:
    """Two image views of 2 x 2 pixels that say which sample this is and which random numbers it drew."""

    def __init__(self, text_views=("original", "masked")):
        self.text_views = text_views

    def __call__(self, image_bytes, captions, key):
        if image_bytes.startswith(b"bad"):
            raise BadSample("cannot decode the image")
        images = np.empty((2, 3, 2, 2), dtype=np.uint8)
        for view in range(2):
            images[view] = keyed_rng(*key, "image", view).integers(256, size=(3, 2, 2))
        caption = captions[keyed_rng(*key, "caption").integers(len(captions))]
        ids = [1, *(3 + ord(letter) for letter in caption), 2]
        masked = list(ids)
        position = 1 + int(keyed_rng(*key, "mask").integers(len(ids) - 2))
        masked[position] = 999
        return TinyViews(images, [ids, masked], [position], [ids[position]])


def tiny_eval(image_bytes):
    """Image of 2 x 2 pixels that holds the number in the image bytes."""
    if image_bytes.startswith(b"bad"):
        raise BadSample("cannot decode the image")
    return np.full((3, 2, 2), int(image_bytes.decode()) % 256, dtype=np.uint8)


def write_tar(path: Path, members: list[tuple[str, bytes]], **options) -> Path:
    """Writes members with the standard library."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as archive:
        for name, payload in members:
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            archive.addfile(info, io.BytesIO(payload))
    return path


def sample_members(number: int, *, image: bytes | None = None) -> list[tuple[str, bytes]]:
    """Members of one sample; its caption is the number in words of letters."""
    key = f"{number:06d}"
    caption = "abcdefgh"[: 1 + number % 8] * (1 + number % 3)
    return [(f"{key}.jpg", image or str(number).encode()), (f"{key}.txt", caption.encode())]


def write_shards(folder: Path, counts: list[int], bad: tuple[int, ...] = ()) -> list[str]:
    """Writes shards of numbered samples; `bad` numbers cannot be decoded."""
    paths, number = [], 0
    for shard, count in enumerate(counts):
        members = []
        for _ in range(count):
            members += sample_members(number, image=b"bad" if number in bad else None)
            number += 1
        paths.append(str(write_tar(folder / f"{shard:05d}.tar", members)))
    return paths


def indexed(
    folder: Path, shards: list[str], name: str = "train", weight=1, **options
) -> tuple[IndexedSource, IndexStore]:
    """Indexes shards into a cache under the folder."""
    store = IndexStore.create(folder / "cache", **options)
    return load_sources([Source(name, tuple(shards), weight)], store)[0], store


def json_member(key: str, **content) -> tuple[str, bytes]:
    """A `.json` member."""
    return f"{key}.json", json.dumps(content).encode()
