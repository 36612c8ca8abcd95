"""CLIP: one image view, one caption, one symmetric contrastive term over the global batch."""

from typing import ClassVar

from torch import Tensor

from losses import contrastive_terms, normalize
from trainer.methods.base import Method, MethodSettings


class ClipSettings(MethodSettings):
    """CLIP has no settings of its own."""


class ClipMethod(Method):
    """Contrastive language-image pre-training.

    Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021.
    """

    Settings: ClassVar[type[MethodSettings]] = ClipSettings

    def objective(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """The symmetric InfoNCE of the global batch, this rank's share."""
        scale = self.model.logit_scale()
        terms = contrastive_terms(
            normalize(features["image_features"]),
            normalize(features["text_features"]),
            scale,
            communication_dtype=self.communication_dtype,
        )
        loss = terms.clip[0, 0]
        return {"loss": loss, "loss/clip": loss.detach(), "logit_scale": scale.detach()}
