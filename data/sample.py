"""From one stored sample to the views a method trains on; runs in loader workers."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from data.captions.eda import Eda, load_synonyms
from data.captions.mlm import mask_tokens
from data.captions.tokenizer import CaptionTokenizer
from data.errors import BadSample, DataError
from data.images.augment import AUGMENTATIONS, INTERPOLATIONS, ImageAugmentation, eval_view, random_views
from data.images.context import views_in_context
from data.images.decode import DEFAULT_MAX_PIXELS, EncodedImage, check_max_pixels, open_image
from data.rng import keyed_rng

__all__ = ["MASKED", "TEXT_VIEWS", "EvalTransform", "SampleTransform", "SampleViews", "has_masked"]

# What masked language modelling makes of a caption.
MASKED = {"original": "masked", "eda": "masked_eda"}
TEXT_VIEWS = (*MASKED, *MASKED.values())
_EDITED = frozenset({"eda", MASKED["eda"]})
_CAPTIONS = ("random", "first")
# Start and end token.
_EMPTY_CAPTION = 2


def has_masked(text_views: Iterable[str]) -> bool:
    """Whether one of the views is masked for MLM."""
    return any(view in MASKED.values() for view in text_views)


class SampleViews(NamedTuple):
    """The views of one sample.

    Attributes:
        images: uint8 [V, 3, H, W].
        token_ids: K lists of ids, SOT and EOT included, without padding.
        mlm_positions: Selected positions in the masked view; empty without one.
        mlm_targets: Original ids there.
        context: uint8 [3, C, C], a crop around all views; None unless asked for.
        crop_boxes: int64 [1 + V, 4], (left, top, right, bottom) of the context and of each view; None without.
    """

    images: np.ndarray
    token_ids: list[list[int]]
    mlm_positions: list[int]
    mlm_targets: list[int]
    context: np.ndarray | None = None
    crop_boxes: np.ndarray | None = None


class SampleTransform:
    """Decodes a picture, draws its views, and encodes the views of one of its captions.

    Args:
        tokenizer: Caption tokenizer; it needs a mask token for a masked view.
        image_views: One augmentation, or its name in `AUGMENTATIONS`, per image view.
        text_views: Each "original", "eda" (one edited word-level copy), "masked" or "masked_eda" (ids of the one or the
            other masked for MLM, at most once).
        image_size: Side of the square views in pixels.
        context_size: Side in pixels of one more crop, around all views; None for none.
        mask_probability: Chance of each token of the masked view to be selected.
        synonyms_path: Table for edited views, see `data.captions.eda.load_synonyms`.
        max_image_pixels: Larger pictures are bad samples.
        max_caption_chars: Longer captions are cut before any other work.
        caption: Which of several captions is taken: "random", drawn by the key, or "first".

    Raises:
        DataError: An unknown view or caption, a missing mask token, a limit out of range, or with `context_size` a view
            whose pixels are not where its crop box says.
    """

    def __init__(
        self,
        tokenizer: CaptionTokenizer,
        image_views: tuple[ImageAugmentation | str, ...],
        text_views: tuple[str, ...],
        image_size: int,
        context_size: int | None = None,
        mask_probability: float = 0.15,
        synonyms_path: Path | str | None = None,
        max_image_pixels: int = DEFAULT_MAX_PIXELS,
        max_caption_chars: int = 4096,
        caption: Literal["random", "first"] = "random",
    ):
        check_max_pixels(max_image_pixels)
        _check_text_views(text_views, tokenizer)
        if not 0 <= mask_probability <= 1:
            raise DataError(f"mask_probability is {mask_probability}, expected a number from 0 to 1")
        if caption not in _CAPTIONS:
            raise DataError(f"caption is {caption!r}, expected {' or '.join(_CAPTIONS)}")
        self.tokenizer = tokenizer
        self.image_views = tuple(map(_augmentation, image_views))
        self.text_views = tuple(text_views)
        self.image_size = image_size
        self.context_size = context_size
        if context_size is not None:
            _check_still(self.image_views)
        self.mask_probability = mask_probability
        self.max_image_pixels = max_image_pixels
        self.max_caption_chars = max_caption_chars
        self.caption = caption
        synonyms = load_synonyms(synonyms_path) if synonyms_path is not None else None
        self._eda = Eda(synonyms) if not _EDITED.isdisjoint(text_views) else None

    def __call__(self, image_bytes: bytes, captions: list[str], key: tuple[int | str, ...]) -> SampleViews:
        """Makes the views of one sample.

        Args:
            image_bytes: The picture as stored: JPEG, PNG or WebP.
            captions: Its captions; all text views use the same one.
            key: (seed, source, epoch, sample): with the view it decides every random number.

        Raises:
            BadSample: A picture that cannot be decoded, or no caption, or one of control characters only.
        """
        if not captions:
            raise BadSample("sample has no caption")
        encoded = open_image(image_bytes, self.max_image_pixels)
        generators = [keyed_rng(*key, "image", view) for view in range(len(self.image_views))]
        images, context, boxes = self._image_views(encoded, generators, key)
        caption = captions[0]
        if len(captions) > 1 and self.caption == "random":
            caption = captions[keyed_rng(*key, "caption").integers(len(captions))]
        views = SampleViews(images, [], [], [], context, boxes)
        self._add_text_views(views, caption[: self.max_caption_chars], key)
        return views

    def _image_views(
        self, encoded: EncodedImage, generators: list[np.random.Generator], key: tuple[int | str, ...]
    ) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        if self.context_size is None:
            return random_views(encoded, self.image_views, generators, self.image_size), None, None
        rng = keyed_rng(*key, "context")
        return views_in_context(encoded, self.image_views, generators, self.image_size, rng, self.context_size)

    def _add_text_views(self, views: SampleViews, caption: str, key: tuple[int | str, ...]) -> None:
        original = self.tokenizer.encode(caption)
        if len(original) == _EMPTY_CAPTION:
            raise BadSample("the caption has no readable character")
        for view, kind in enumerate(self.text_views):
            if kind == "original":
                views.token_ids.append(original)
                continue
            rng = keyed_rng(*key, "text", view)
            ids = self.tokenizer.encode(self._eda(caption, rng)) if kind in _EDITED else original
            if kind == "eda":
                views.token_ids.append(ids)
                continue
            masked = mask_tokens(
                ids,
                rng,
                mask_id=self.tokenizer.mask_id,
                probability=self.mask_probability,
                text_ids=self.tokenizer.text_ids,
            )
            views.token_ids.append(masked.token_ids)
            views.mlm_positions.extend(masked.positions)
            views.mlm_targets.extend(masked.targets)


@dataclass(frozen=True)
class EvalTransform:
    """Decodes a picture, resizes its shorter side and crops the centre.

    Args:
        image_size: Side of the square output in pixels.
        resize_size: What the shorter side is resized to first; image_size by default (DeCLIP: 256 for 224).
        max_image_pixels: Larger pictures are bad samples.
        interpolation: "bilinear" or "bicubic".

    Raises:
        DataError: A size or limit out of range, or an unknown interpolation.
    """

    image_size: int
    resize_size: int | None = None
    max_image_pixels: int = DEFAULT_MAX_PIXELS
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        check_max_pixels(self.max_image_pixels)
        if self.interpolation not in INTERPOLATIONS:
            raise DataError(f"interpolation is '{self.interpolation}', expected {' or '.join(INTERPOLATIONS)}")
        if self.resize_size is not None and self.resize_size < self.image_size:
            raise DataError(f"resize_size is {self.resize_size}, expected at least image_size {self.image_size}")

    def __call__(self, image_bytes: bytes) -> np.ndarray:
        """Returns the picture as uint8 [3, image_size, image_size].

        Args:
            image_bytes: The picture as stored: JPEG, PNG or WebP.

        Raises:
            BadSample: A picture that cannot be decoded.
        """
        image = open_image(image_bytes, self.max_image_pixels).decode()
        return eval_view(image, self.image_size, self.resize_size or self.image_size, self.interpolation)


def _augmentation(view: ImageAugmentation | str) -> ImageAugmentation:
    if isinstance(view, ImageAugmentation):
        return view
    if view not in AUGMENTATIONS:
        raise DataError(f"unknown image view {view!r}; expected one of {', '.join(AUGMENTATIONS)}")
    return AUGMENTATIONS[view]


def _check_still(image_views: tuple[ImageAugmentation, ...]) -> None:
    for number, view in enumerate(image_views, start=1):
        if view.moves_pixels:
            raise DataError(
                "a crop around the views needs views whose pixels are where their crop boxes say, and image view "
                f"{number} of {len(image_views)} moves them: set rotation, shift and flip_probability to 0 in "
                "data.augmentation, or use the preset aclip"
            )


def _check_text_views(text_views: tuple[str, ...], tokenizer: CaptionTokenizer) -> None:
    unknown = [view for view in text_views if view not in TEXT_VIEWS]
    if unknown:
        raise DataError(f"unknown text view {unknown[0]!r}; expected some of {', '.join(TEXT_VIEWS)}")
    if sum(view in MASKED.values() for view in text_views) > 1:
        raise DataError("text_views has 'masked' more than once; masked language modelling trains on one view")
    if has_masked(text_views) and tokenizer.mask_id is None:
        raise DataError("a 'masked' text view needs a tokenizer with a mask token")
