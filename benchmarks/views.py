"""From an encoded photograph to its views: what each choice of the image path costs and how far it is from Pillow.

Every implementation cuts the same boxes and makes the same 8-bit output unless its name says otherwise. The yardstick
is what published CLIP training does: a full decode and Pillow's antialiased bicubic filter. The implementations
alternate within one process, as none leaves anything behind that another could gain or lose by.
"""

import io
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import nn
from torchvision import io as torchvision_io
from torchvision import transforms
from torchvision.transforms import functional, v2

from benchmarks.harness import Measurement
from benchmarks.loader import encode_jpeg, make_photo
from benchmarks.processes import Job, Peer, Runner
from benchmarks.report import OURS, Row, compare, number_text
from data.images.augment import AUGMENTATIONS, DECODE_MARGIN, ImageAugmentation, align, random_views
from data.images.decode import open_image, shrink_factor
from data.images.pixels import gaussian_blur, turn_hue
from data.rng import keyed_rng
from models.clip import IMAGENET_MEAN, IMAGENET_STD

NAME = "views"
_IMAGE_SIZE = 224
_PHOTO_SHAPE = (2048, 1536)
_CROP = ImageAugmentation(crop_scale=(0.5, 1.0), crop_ratio=(3 / 4, 4 / 3))
_PAIR = AUGMENTATIONS["moco_v2"]
_HUE, _BLUR_SIGMA = 0.07, 1.05
_YARDSTICK = "Pillow bicubic"

Box = tuple[int, int, int, int]
# (encoded picture, number of the picture) -> views
Implementation = Callable[[bytes, int], np.ndarray]


@dataclass(frozen=True)
class Settings:
    """Sizes.

    Attributes:
        sizes: Shorter sides of the pictures in pixels.
        num_photos: Different pictures of each size.
        repeats: Timings of all of them per implementation.
    """

    sizes: tuple[int, ...] = (256, 512, 1024)
    num_photos: int = 16
    repeats: int = 5


FULL = Settings()
QUICK = Settings(sizes=(256,), num_photos=4, repeats=2)


def _box(encoded_size: tuple[int, int], number: int) -> Box:
    """The box of `random_views` for one view of `_CROP`."""
    box = _CROP.crop_box(encoded_size, keyed_rng(number, 0))
    side = min(box[2] - box[0], box[3] - box[1])
    return align(box, encoded_size, shrink_factor(side / (DECODE_MARGIN * _IMAGE_SIZE)))


def _ours(data: bytes, number: int) -> np.ndarray:
    return random_views(open_image(data), (_CROP,), [keyed_rng(number, 0)], _IMAGE_SIZE)[0]


def _pillow(
    filter_: Image.Resampling = Image.Resampling.BICUBIC, *, reducing_gap: float | None = None, crop: bool = False
) -> Implementation:
    def view(data: bytes, number: int) -> np.ndarray:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        box = _box(image.size, number)
        size = (_IMAGE_SIZE, _IMAGE_SIZE)
        if crop:
            image = image.crop(box).resize(size, filter_)
        else:
            image = image.resize(size, filter_, box=box, reducing_gap=reducing_gap)
        return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))

    return view


def _pillow_draft(data: bytes, number: int) -> np.ndarray:
    """Pillow's draft mode down to the output size itself, without our margin."""
    image = Image.open(io.BytesIO(data))
    size, box = image.size, _box(image.size, number)
    factor = shrink_factor(min(box[2] - box[0], box[3] - box[1]) / _IMAGE_SIZE)
    image.draft("RGB", (size[0] // factor, size[1] // factor))
    scales = (image.width / size[0], image.height / size[1])
    box = tuple(edge * scales[axis % 2] for axis, edge in enumerate(box))
    view = image.convert("RGB").resize((_IMAGE_SIZE, _IMAGE_SIZE), Image.Resampling.BICUBIC, box=box)
    return np.ascontiguousarray(np.asarray(view).transpose(2, 0, 1))


def _torchvision_v2(data: bytes, number: int) -> np.ndarray:
    image = torchvision_io.decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    left, top, right, bottom = _box((image.shape[2], image.shape[1]), number)
    size = [_IMAGE_SIZE, _IMAGE_SIZE]
    bicubic = v2.InterpolationMode.BICUBIC
    return v2.functional.resized_crop(image, top, left, bottom - top, right - left, size, bicubic).numpy()


def _pillow_floats(data: bytes, number: int) -> np.ndarray:
    view = torch.from_numpy(_pillow()(data, number)).float().div_(255)
    return functional.normalize(view, IMAGENET_MEAN, IMAGENET_STD, inplace=True).numpy()


_ONE_VIEW: dict[str, Implementation] = {
    OURS: _ours,
    _YARDSTICK: _pillow(),
    "Pillow bicubic, cropped first": _pillow(crop=True),
    "Pillow bicubic, reducing_gap 2": _pillow(reducing_gap=2.0),
    "Pillow bicubic, draft": _pillow_draft,
    "Pillow bicubic, normalised floats": _pillow_floats,
    "Pillow bilinear": _pillow(Image.Resampling.BILINEAR),
    "Pillow box": _pillow(Image.Resampling.BOX),
    "torchvision v2, own decoder": _torchvision_v2,
}


def _our_pair(data: bytes, number: int) -> np.ndarray:
    return random_views(open_image(data), (_PAIR, _PAIR), [keyed_rng(number, view) for view in (0, 1)], _IMAGE_SIZE)


def _our_pair_decoded_twice(data: bytes, number: int) -> np.ndarray:
    views = [random_views(open_image(data), (_PAIR,), [keyed_rng(number, view)], _IMAGE_SIZE) for view in (0, 1)]
    return np.concatenate(views)


class _PillowBlur:
    """The blur of MoCo v2's published code."""

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(*_PAIR.blur_sigma)))


def _published_steps(blur: Callable, library: object) -> list:
    jitter = library.ColorJitter(_PAIR.brightness, _PAIR.contrast, _PAIR.saturation, _PAIR.hue)
    return [
        library.RandomResizedCrop(_IMAGE_SIZE, _PAIR.crop_scale, _PAIR.crop_ratio, antialias=True),
        library.RandomApply(nn.ModuleList([jitter]), _PAIR.jitter_probability),
        library.RandomGrayscale(_PAIR.grayscale_probability),
        library.RandomApply([blur], _PAIR.blur_probability),
        library.RandomHorizontalFlip(_PAIR.flip_probability),
    ]


def _pillow_pair() -> Implementation:
    draw = transforms.Compose(_published_steps(_PillowBlur(), transforms))

    def views(data: bytes, number: int) -> np.ndarray:
        torch.manual_seed(number)
        random.seed(number)
        image = Image.open(io.BytesIO(data)).convert("RGB")
        return np.stack([np.asarray(draw(image)).transpose(2, 0, 1) for _ in range(2)])

    return views


def _torchvision_v2_pair() -> Implementation:
    draw = v2.Compose(_published_steps(v2.GaussianBlur(13, _PAIR.blur_sigma), v2))

    def views(data: bytes, number: int) -> np.ndarray:
        torch.manual_seed(number)
        image = torchvision_io.decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        return np.stack([draw(image).numpy() for _ in range(2)])

    return views


_TWO_VIEWS: dict[str, Callable[[], Implementation]] = {
    OURS: lambda: _our_pair,
    "ours, decoded twice": lambda: _our_pair_decoded_twice,
    "torchvision on Pillow, as published": _pillow_pair,
    "torchvision v2 on tensors": _torchvision_v2_pair,
}
_DISTORTIONS: dict[str, dict[str, Callable[[Image.Image, int], np.ndarray]]] = {
    "turned hue": {
        OURS: lambda view, _: turn_hue(np.asarray(view), _HUE),
        "torchvision on Pillow": lambda view, _: np.asarray(functional.adjust_hue(view, _HUE)),
    },
    "Gaussian blur": {
        OURS: lambda view, _: gaussian_blur(np.asarray(view), _BLUR_SIGMA),
        "Pillow": lambda view, _: np.asarray(view.filter(ImageFilter.GaussianBlur(_BLUR_SIGMA))),
    },
}
_YARDSTICKS = {"one view": _YARDSTICK, "turned hue": "torchvision on Pillow", "Gaussian blur": "Pillow"}


def measure(size: int, num_photos: int, repeats: int) -> Measurement:
    """Seconds per picture of every implementation, and their distances from Pillow."""
    pictures = [encode_jpeg(make_photo(number, _PHOTO_SHAPE), size) for number in range(num_photos)]
    views = [Image.fromarray(_pillow()(data, number).transpose(1, 2, 0)) for number, data in enumerate(pictures)]
    codes: dict[str, Callable[[], list[np.ndarray]]] = {}
    for name, view in _ONE_VIEW.items():
        codes[f"one view: {name}"] = partial(_each, view, pictures)
    for name, make in _TWO_VIEWS.items():
        codes[f"two views: {name}"] = partial(_each, make(), pictures)
    for step, implementations in _DISTORTIONS.items():
        for name, distort in implementations.items():
            codes[f"{step}: {name}"] = partial(_each, distort, views)
    times: dict[str, list[float]] = {name: [] for name in codes}
    for _ in range(1 + repeats):
        for name, code in codes.items():
            start = time.process_time()
            made = code()
            times[name].append((time.process_time() - start) / num_photos)
            del made
    figures = {}
    for group, yardstick in _YARDSTICKS.items():
        expected = np.stack(codes[f"{group}: {yardstick}"]()).astype(int)
        for name in (name for name in codes if name.startswith(f"{group}: ")):
            made = np.stack(codes[name]())
            if made.dtype == np.uint8:
                difference = np.abs(made - expected)
                figures |= {f"mean {name}": float(difference.mean()), f"max {name}": float(difference.max())}
    return Measurement({name: min(found[1:]) for name, found in times.items()}, figures=figures)


def _each(make: Callable[[Any, int], np.ndarray], items: list) -> list[np.ndarray]:
    return [make(item, number) for number, item in enumerate(items)]


def run(runner: Runner, peers: Sequence[Peer], settings: Settings) -> list[Row]:
    """Rows of pictures per second of processor time and of distances, by size; open_clip takes no part."""
    rows = []
    for size in settings.sizes:
        arguments = {"size": size, "num_photos": settings.num_photos, "repeats": settings.repeats}
        found = runner(Job(measure, arguments))
        pictures = f"JPEGs of {size} pixels"
        for case, group in ((f"one view, {pictures}", "one view"), (f"two moco_v2 views, {pictures}", "two views")):
            rates = {name: 1 / seconds for name, seconds in _of(found.seconds, group).items()}
            rows += compare(NAME, case, "one core", "images/s", rates)
        rows += _distance_rows(found, "one view", f"one view, {pictures}")
        if size == settings.sizes[0]:
            for step in _DISTORTIONS:
                milliseconds = {name: 1e3 * seconds for name, seconds in _of(found.seconds, step).items()}
                rows += compare(NAME, step, "one view", "ms", milliseconds)
                rows += _distance_rows(found, step, step)[:2]
    return rows


def summary(rows: Sequence[Row]) -> str:
    """The rows as one Markdown table per group: an implementation per line, pictures per second by size, distances."""
    cases = list(dict.fromkeys(row.case for row in rows if row.unit == "images/s"))
    tables = []
    for group in dict.fromkeys(case.split(", ")[0] for case in cases):
        columns, names = [], [OURS]
        for case in (case for case in cases if case.startswith(f"{group}, ")):
            for unit, title in (("images/s", "images/s"), ("of 255", "mean distance")):
                found = [
                    row for row in rows if (row.case, row.unit) == (case, unit) and not row.quantity.startswith("max")
                ]
                if found:
                    values = {OURS: found[0].ours, **{row.reference: row.reference_value for row in found}}
                    columns.append((f"{case.split()[-2]} px: {title}", values))
                    names += [name for name in values if name not in names]
        lines = [[group, *(title for title, _ in columns)], ["---", *["---:"] * len(columns)]]
        for name in names:
            cells = [number_text(values[name]) if values.get(name) is not None else "" for _, values in columns]
            lines.append([name, *cells])
        tables.append("".join(f"| {' | '.join(line)} |\n" for line in lines))
    return "\n".join(tables)


def _of(values: dict[str, float], group: str) -> dict[str, float]:
    return {name.removeprefix(f"{group}: "): value for name, value in values.items() if name.startswith(f"{group}: ")}


def _distance_rows(found: Measurement, group: str, case: str) -> list[Row]:
    rows = []
    for kind in ("mean", "max"):
        distances = _of(found.figures, f"{kind} {group}")
        del distances[_YARDSTICKS[group]]
        rows += compare(NAME, case, f"{kind} distance from {_YARDSTICKS[group]}", "of 255", distances)
    return rows
