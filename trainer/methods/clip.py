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
    image_views = ("base",)
    text_views = ("original",)

    def encode(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """image_features and text_features, each [1, m, embed_dim], not normalised."""
        text = self.model.encode_text(batch["token_ids"][0], batch["text_lengths"][0])
        return {
            "image_features": self.model.encode_image_views(self.pixels(batch["images"]), batch.get("view_keys")),
            "text_features": text.features.unsqueeze(0),
        }

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
