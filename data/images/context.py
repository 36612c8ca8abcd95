"""A crop around all views of a picture, for models that look at the whole before they look at its parts."""

from typing import NamedTuple

import numpy as np

from data.images.augment import Box, Cutter, ImageAugmentation, planes
from data.images.decode import EncodedImage

__all__ = ["ContextViews", "enclosing_box", "views_in_context"]


class ContextViews(NamedTuple):
    """Random views and the crop around them.

    Attributes:
        views: uint8 [V, 3, image_size, image_size].
        context: uint8 [3, context_size, context_size], without any change of colour.
        boxes: int64 [1 + V, 4], (left, top, right, bottom) of the context and of each view in the picture.
    """

    views: np.ndarray
    context: np.ndarray
    boxes: np.ndarray


def enclosing_box(size: tuple[int, int], boxes: list[Box], rng: np.random.Generator) -> Box:
    """Draws a box that holds all others, each edge uniform between theirs and the picture's.

    Args:
        size: Width and height of the picture.
        boxes: (left, top, right, bottom), at least one.
        rng: A keyed generator.

    Source: Yang et al. 2023, "Attentive Mask CLIP". Deviation: their code mixes up two sides and does not extend the
    box again after moving its corner, so that its boxes may miss a part of a view.
    """
    lefts, tops, rights, bottoms = zip(*boxes, strict=True)
    width, height = size
    left, top = (int(rng.integers(min(edges) + 1)) for edges in (lefts, tops))
    right, bottom = (int(rng.integers(max(edges), limit + 1)) for edges, limit in ((rights, width), (bottoms, height)))
    return left, top, right, bottom


def views_in_context(
    encoded: EncodedImage,
    augmentations: tuple[ImageAugmentation, ...],
    generators: list[np.random.Generator],
    image_size: int,
    context_rng: np.random.Generator,
    context_size: int,
) -> ContextViews:
    """`data.images.augment.random_views`, and a crop around all views from the same decoded picture.

    Args:
        encoded: The checked picture.
        augmentations: One per view; none may move pixels.
        generators: One keyed generator per view.
        image_size: Side of the square views in pixels.
        context_rng: Keyed generator of the crop around them.
        context_size: Side of its square output in pixels.

    Raises:
        BadSample: Truncated or damaged picture.
    """
    pairs = list(zip(augmentations, generators, strict=True))
    boxes = [augmentation.crop_box(encoded.size, rng) for augmentation, rng in pairs]
    around = enclosing_box(encoded.size, boxes, context_rng)
    cutter = Cutter(encoded, boxes, image_size)
    views = cutter.views(pairs)
    context = np.empty((3, context_size, context_size), dtype=np.uint8)
    context[:] = planes(cutter.cut(around, context_size, augmentations[0].interpolation))
    # Rounding edges keeps their order, so that the aligned boxes still lie in the aligned context.
    return ContextViews(views, context, np.array([cutter.aligned(box) for box in (around, *boxes)]))
