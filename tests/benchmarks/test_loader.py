"""The loader benchmark on a handful of small pictures: both pipelines run, and bytes per image are exact."""

import io

from PIL import Image

from benchmarks import loader
from benchmarks.processes import Peer, run_inline


def test_rows_and_bytes():
    settings = loader.Settings(
        sizes=(64,), num_photos=2, num_samples=8, shards=2, batch_size=2, batches=1, repeats=1, rounds=1
    )
    *found, tokens = loader.run(run_inline, [Peer("open_clip")], settings)
    assert tokens.unit == "captions/s" and tokens.ours > 0 and tokens.reference_value > 0
    rows = {row.quantity: row for row in found}
    assert rows.keys() == {"one core", "batch, per image"}
    kib = rows["batch, per image"]
    assert (kib.ours, kib.reference_value) == (3 * 224 * 224 / 1024, 4 * 3 * 224 * 224 / 1024)
    assert rows["one core"].ours > 0 and rows["one core"].reference_value > 0


def test_pictures_compress_like_photographs():
    jpeg = loader.encode_jpeg(loader.make_photo(0), 256)
    assert Image.open(io.BytesIO(jpeg)).size == (341, 256)
    # About 3 bits per pixel at this quality; noise takes 8 and drawings less than 1.
    assert 2 < len(jpeg) * 8 / (341 * 256) < 4.5
