"""From shards of JPEGs to batches: processor time per image and bytes per batch, in one process."""

import io
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from benchmarks.harness import Measurement
from benchmarks.processes import Job, Peer, Runner, interleave
from benchmarks.report import OURS, Row, Target, compare

NAME = "loader"
_IMAGE_SIZE = 224
# What open_clip crops by default.
_CROP_SCALE, _CROP_RATIO = (0.9, 1.0), (3 / 4, 4 / 3)
_SHUFFLE_BUFFER = 256
_JPEG_QUALITY = 95
_PHOTO_SHAPE = (1024, 768)
_TARGETS = {256: Target(1.3, at_most=False)}
_VOCABULARY = """
a the man woman dog cat street photo of in on with two red blue green old young standing sitting near table
field water playing riding bicycle horse train kitchen plate food window tree road beach surfer giraffe group
"""


@dataclass(frozen=True)
class Settings:
    """Sizes.

    Attributes:
        sizes: Shorter sides of the stored pictures, in pixels.
        num_photos: Different pictures; they are stored again and again up to `num_samples`.
        num_samples: Samples in the shards.
        shards: Number of shards.
        batch_size: Images per batch.
        batches: Batches per timing.
        repeats: Timings per process.
        rounds: Processes per implementation.
    """

    sizes: tuple[int, ...] = (256, 384, 512)
    num_photos: int = 48
    num_samples: int = 1024
    shards: int = 4
    batch_size: int = 64
    batches: int = 6
    repeats: int = 3
    rounds: int = 2


FULL = Settings()
QUICK = Settings(sizes=(256,), num_photos=16, num_samples=512, rounds=1)


def make_photo(seed: int, shape: tuple[int, int] = _PHOTO_SHAPE) -> Image.Image:
    """A picture of width and height `shape` with the statistics of photographs: a spectrum falling as 1 / f, and edges.

    The spectrum falls a little faster than that, so that JPEGs of it are as large as photographs' are.
    """
    width, height = shape
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1.0
    brightness, *colour = (_filtered_noise(rng, frequency, (height, width)) for _ in range(3))
    pixels = 128 + 42 * brightness[..., None] + 14 * np.stack([colour[0], colour[1], -colour[0]], axis=-1)
    y, x = np.mgrid[:height, :width]
    for _ in range(8):
        centre = rng.uniform(0, (width, height))
        radius = rng.uniform(40, 250, size=2)
        inside = ((x - centre[0]) / radius[0]) ** 2 + ((y - centre[1]) / radius[1]) ** 2 < 1
        pixels[inside] += rng.uniform(-60, 60, size=3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _filtered_noise(rng: np.random.Generator, frequency: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    spectrum = np.fft.rfft2(rng.standard_normal(shape)) / frequency**1.6
    noise = np.fft.irfft2(spectrum, shape)
    return noise / noise.std()


def write_shards(folder: Path, size: int, settings: Settings) -> list[str]:
    """Writes JPEGs of one size with captions as a WebDataset.

    Returns:
        Paths of the shards.
    """
    import webdataset

    jpegs = [encode_jpeg(make_photo(seed), size) for seed in range(settings.num_photos)]
    captions = _captions()
    paths = []
    for shard, rows in enumerate(np.array_split(np.arange(settings.num_samples), settings.shards)):
        path = folder / f"{size}-{shard:05d}.tar"
        with webdataset.TarWriter(str(path)) as writer:
            for row in rows:
                writer.write({"__key__": f"{row:06d}", "jpg": jpegs[row % len(jpegs)], "txt": next(captions)})
        paths.append(str(path))
    return paths


def _captions() -> Iterator[str]:
    rng = np.random.default_rng(0)
    words = _VOCABULARY.split()
    while True:
        yield " ".join(rng.choice(words, size=rng.integers(8, 15)))


def encode_jpeg(photo: Image.Image, size: int) -> bytes:
    """The picture with its shorter side reduced to `size` pixels."""
    scale = size / min(photo.size)
    resized = photo.resize((round(photo.width * scale), round(photo.height * scale)), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    resized.save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return buffer.getvalue()


def measure_ours(shards: list[str], cache: str, batch_size: int, batches: int, repeats: int) -> Measurement:
    """Our loader in this process: indexed shards, the exact global order, uint8 batches."""
    from data.captions.tokenizer import ClipTokenizer
    from data.images.augment import ImageAugmentation
    from data.loader import build_train_loader
    from data.sample import SampleTransform
    from data.shards.index_store import IndexStore, load_sources
    from data.shards.sources import Source

    store = IndexStore.create(Path(cache))
    view = ImageAugmentation(crop_scale=_CROP_SCALE, crop_ratio=_CROP_RATIO, interpolation="bicubic")
    loader = build_train_loader(
        load_sources([Source("photos", tuple(shards), 1)], store),
        SampleTransform(ClipTokenizer(), (view,), ("original",), _IMAGE_SIZE),
        seed=0,
        global_batch_size=batch_size,
        micro_batch_size=batch_size,
        workers=0,
        store=store,
    )
    return _measure(loader, itemgetter("images"), batches, repeats)


def measure_peer(shards: list[str], cache: str, batch_size: int, batches: int, repeats: int) -> Measurement:
    """The stages of open_clip's training pipeline in this process.

    They are put together here because open_clip_train's own reader of shards asks for an older webdataset. The
    shuffle buffer is smaller, so that it is full before the timing starts, as it is in a long run.
    """
    import webdataset
    from open_clip.tokenizer import SimpleTokenizer
    from open_clip.transform import image_transform

    tokenizer = SimpleTokenizer()
    pipeline = webdataset.DataPipeline(
        webdataset.ResampledShards(shards),
        webdataset.tarfile_to_samples(),
        webdataset.shuffle(_SHUFFLE_BUFFER, initial=_SHUFFLE_BUFFER),
        webdataset.select(lambda sample: "txt" in sample and "jpg" in sample),
        webdataset.decode("pilrgb"),
        webdataset.rename(image="jpg;png;jpeg;webp", text="txt"),
        webdataset.map_dict(image=image_transform(_IMAGE_SIZE, is_train=True), text=lambda text: tokenizer(text)[0]),
        webdataset.to_tuple("image", "text"),
        webdataset.batched(batch_size, partial=False),
    )
    return _measure(iter(pipeline), itemgetter(0), batches, repeats)


def measure_our_tokens(num_captions: int, repeats: int) -> Measurement:
    """Our tokenizer on captions of known words."""
    from data.captions.tokenizer import ClipTokenizer

    return _measure_tokens(ClipTokenizer().encode, num_captions, repeats)


def measure_peer_tokens(num_captions: int, repeats: int) -> Measurement:
    """open_clip's, one caption at a time as its loader calls it."""
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    return _measure_tokens(lambda caption: tokenizer(caption)[0], num_captions, repeats)


def _measure_tokens(encode: Callable[[str], Any], num_captions: int, repeats: int) -> Measurement:
    captions = list(itertools.islice(_captions(), num_captions))
    seconds = []
    # The first pass fills the tables of known words.
    for _ in range(1 + repeats):
        start = time.process_time()
        for caption in captions:
            encode(caption)
        seconds.append((time.process_time() - start) / num_captions)
    return Measurement({"caption": min(seconds[1:])})


def _measure(loader: Iterator[Any], get_images: Callable[[Any], Tensor], batches: int, repeats: int) -> Measurement:
    images = get_images(next(loader))
    num_images = images.numel() // (3 * _IMAGE_SIZE**2)
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        for _ in itertools.islice(loader, batches):
            pass
        seconds.append((time.process_time() - start) / (batches * num_images))
    return Measurement({"image": min(seconds)}, figures={"image bytes": images.nbytes / num_images})


def run(runner: Runner, peers: Sequence[Peer], settings: Settings) -> list[Row]:
    """Rows of images per second of processor time, by size of the stored pictures."""
    rows = []
    for size in settings.sizes:
        with TemporaryDirectory() as folder:
            shards = write_shards(Path(folder), size, settings)
            arguments = {
                "shards": shards,
                "cache": folder,
                "batch_size": settings.batch_size,
                "batches": settings.batches,
                "repeats": settings.repeats,
            }
            jobs = {OURS: Job(measure_ours, arguments)}
            jobs |= {peer.name: Job(measure_peer, arguments, peer) for peer in peers}
            results = interleave(runner, jobs, rounds=settings.rounds)
        rates = {name: 1 / result.seconds["image"] for name, result in results.items()}
        kib = {name: result.figures["image bytes"] / 1024 for name, result in results.items()}
        case = f"JPEGs of {size} pixels"
        rows += compare(NAME, case, "one core", "images/s", rates, _TARGETS.get(size))
        rows += compare(NAME, case, "batch, per image", "KiB", kib)
    arguments = {"num_captions": settings.num_samples, "repeats": settings.repeats}
    jobs = {OURS: Job(measure_our_tokens, arguments)}
    jobs |= {peer.name: Job(measure_peer_tokens, arguments, peer) for peer in peers}
    results = interleave(runner, jobs, rounds=settings.rounds)
    rates = {name: 1 / result.seconds["caption"] for name, result in results.items()}
    return [*rows, *compare(NAME, "captions to token ids", "one core", "captions/s", rates)]
