"""ALIGN: a contrastive term with smoothed labels, for large sets of noisy pairs."""

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from losses import contrastive_terms, normalize, smoothing_sums, smoothing_term
from models.clip import ClipModel, LogitScale
from trainer.methods.base import Method, MethodSettings


class AlignSettings(MethodSettings):
    """Smoothing of the labels, and the scale (inverse temperature) at the start."""

    label_smoothing: float = Field(0.1, ge=0.0, lt=1.0)
    logit_scale_init: float = Field(1.0, gt=0.0)


class AlignMethod(Method):
    """Normalised softmax in both directions over the global batch, with smoothed labels and a learned temperature.

    Source: Jia et al., "Scaling Up Visual and Vision-Language Representation Learning With Noisy Text Supervision",
    ICML 2021. The towers, an EfficientNet and a BERT, are the recipe's.
    """

    Settings: ClassVar[type[MethodSettings]] = AlignSettings
    settings: AlignSettings

    def __init__(self, model: ClipModel, settings: AlignSettings, communication_dtype: torch.dtype | None) -> None:
        super().__init__(model, settings, communication_dtype)
        model.logit_scale = LogitScale(settings.logit_scale_init)

    def objective(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """The smoothed loss of the global batch, and the term without smoothing for comparison with other methods."""
        image_features = normalize(features["image_features"])
        text_features = normalize(features["text_features"])
        scale = self.model.logit_scale()
        terms = contrastive_terms(
            image_features,
            text_features,
            scale,
            extra_sums=smoothing_sums(image_features[0], text_features[0]),
            communication_dtype=self.communication_dtype,
        )
        clip = terms.clip[0, 0]
        smoothing = smoothing_term(image_features[0], text_features[0], scale, terms.extra_sums)
        loss = clip + self.settings.label_smoothing * smoothing
        return {
            "loss": loss,
            "loss/align": loss.detach(),
            "loss/clip": clip.detach(),
            "logit_scale": scale.detach(),
        }
