"""SigLIP: every image-text pair of the global batch is a binary classification, with a learned temperature and bias."""

import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from losses import normalize, sigmoid_loss
from models.clip import ClipModel, LogitBias, LogitScale
from trainer.methods.base import Method, MethodSettings


class SiglipSettings(MethodSettings):
    """Scale (inverse temperature) and bias at the start; the published models end above CLIP's bound of 100."""

    logit_scale_init: float = Field(10.0, gt=0.0)
    logit_bias_init: float = -10.0
    logit_scale_max: float = Field(math.log(300.0), le=math.log(300.0))


class SiglipMethod(Method):
    """Pairwise sigmoid loss.

    Source: Zhai et al., "Sigmoid Loss for Language Image Pre-Training", ICCV 2023. Deviation: texts are gathered once
    instead of passed from rank to rank; the loss is the same sum over all pairs.
    """

    Settings: ClassVar[type[MethodSettings]] = SiglipSettings
    settings: SiglipSettings

    def __init__(self, model: ClipModel, settings: SiglipSettings, communication_dtype: torch.dtype | None) -> None:
        super().__init__(model, settings, communication_dtype)
        model.logit_scale = LogitScale(settings.logit_scale_init)
        model.logit_bias = LogitBias(settings.logit_bias_init)

    def objective(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """The sigmoid loss of the global batch, this rank's share."""
        scale, bias = self.model.logit_scale(), self.model.logit_bias()
        loss = sigmoid_loss(
            normalize(features["image_features"][0]),
            normalize(features["text_features"][0]),
            scale,
            bias,
            communication_dtype=self.communication_dtype,
        )
        detached = {"loss/sigmoid": loss.detach(), "logit_scale": scale.detach(), "logit_bias": bias.detach()}
        return {"loss": loss, **detached}

    def describe(self, global_batch_size: int) -> list[str]:
        """Pairs that an image is classified in."""
        return [f"sigmoid: 1 positive and {global_batch_size - 1} negative pairs per image (the whole global batch)"]
