"""SLIP: CLIP plus SimCLR between two augmented views of each image."""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from losses import contrastive_terms, feature_std, normalize, simclr_loss
from models.clip import ClipModel
from models.heads import SimClrHead
from trainer.methods.base import Method, MethodSettings


class SlipSettings(MethodSettings):
    """Term weights and SimCLR's head; `w_simclr: 0` drops the two views of SimCLR, the last ones, and the head."""

    w_clip: float = Field(1.0, gt=0.0)
    w_simclr: float = Field(1.0, ge=0.0)
    simclr_temperature: float = Field(0.1, gt=0.0)
    simclr_hidden_dim: int = Field(4096, ge=1)
    simclr_out_dim: int = Field(256, ge=1)
    simclr_bn: Literal["sync", "local"] = "sync"
    image_views: tuple[str, ...] = ("base", "augmented", "augmented")


class SlipMethod(Method):
    """One base view for the contrastive term, two augmented ones for SimCLR on the image backbone.

    Source: Mu et al., "SLIP: Self-supervision meets Language-Image Pre-training", ECCV 2022. Deviation: the
    contrastive term's gradient flows through the gathered features of all ranks, where the released code's does not.
    """

    Settings: ClassVar[type[MethodSettings]] = SlipSettings
    settings: SlipSettings
    feature_dims: ClassVar[dict[str, int]] = {**Method.feature_dims, "pooled_features": 1}

    def __init__(self, model: ClipModel, settings: SlipSettings, communication_dtype: torch.dtype | None) -> None:
        super().__init__(model, settings, communication_dtype)
        if not settings.w_simclr:
            self.image_views = settings.image_views[:1]
        else:
            self.simclr = SimClrHead(
                model.image_tower.pooled_dim,
                settings.simclr_hidden_dim,
                settings.simclr_out_dim,
                batch_norm=settings.simclr_bn,
            )
        # What `metrics` reports on, from the last step.
        self._projections: Tensor | None = None

    def encode(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Features of one micro-batch.

        Returns:
            image_features and text_features, each [1, m, embed_dim], not normalised; with SimCLR also pooled_features
            [2, m, pooled_dim], what the image tower's projection reads of the augmented views.
        """
        text = self.model.encode_text(batch["token_ids"][0], batch["text_lengths"][0])
        images, pooled = self.model.encode_pooled_image_views(self.pixels(batch["images"]), batch.get("view_keys"))
        features = {"image_features": images[:1], "text_features": text.features.unsqueeze(0)}
        if self.settings.w_simclr:
            features["pooled_features"] = pooled[1:]
        return features

    def objective(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Both terms over the global batch, this rank's share."""
        scale = self.model.logit_scale()
        contrastive = contrastive_terms(
            normalize(features["image_features"]),
            normalize(features["text_features"]),
            scale,
            communication_dtype=self.communication_dtype,
        )
        terms = {"clip": contrastive.clip[0, 0]}
        if self.settings.w_simclr:
            projections = self.simclr(features["pooled_features"])
            self._projections = projections.detach()
            terms["simclr"] = simclr_loss(
                projections,
                temperature=self.settings.simclr_temperature,
                communication_dtype=self.communication_dtype,
            )
        loss = sum(getattr(self.settings, f"w_{name}") * term for name, term in terms.items())
        detached = {f"loss/{name}": term.detach() for name, term in terms.items()}
        return {"loss": loss, **detached, "logit_scale": scale.detach()}

    def metrics(self) -> dict[str, float]:
        """Spread of SimCLR's projections: 0 when they have collapsed."""
        return {} if self._projections is None else {"simclr/std": float(feature_std(self._projections))}

    def exchanged_per_sample(self) -> tuple[int, int]:
        """Captions' features both ways; projections of two views forward only."""
        gathered, reduced = super().exchanged_per_sample()
        return gathered + (2 * self.settings.simclr_out_dim if self.settings.w_simclr else 0), reduced

    def describe(self, global_batch_size: int) -> list[str]:
        """Negatives of both terms."""
        lines = super().describe(global_batch_size)
        if self.settings.w_simclr:
            lines.append(f"SimCLR: {2 * global_batch_size - 2} negatives per view (both views of the whole batch)")
        return lines
