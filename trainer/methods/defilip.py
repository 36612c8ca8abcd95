"""DeFILIP: DeCLIP with a token-wise term."""

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from models.clip import ClipModel
from models.text import caption_rows
from trainer.methods.base import BoundedParameter, MethodSettings
from trainer.methods.declip import DeclipMethod, DeclipSettings
from trainer.methods.filip import ComparesTokens, TokenAlignment, TokenSettings


class DefilipSettings(TokenSettings, DeclipSettings):
    """DeCLIP's settings and those of the token-wise term; zero-shot is by the global features, as published."""

    w_filip: float = Field(0.2, gt=0.0)
    filip_eval: Literal["tokens", "global"] = "global"


class DefilipMethod(ComparesTokens, DeclipMethod):
    """DeCLIP's terms, and FILIP's on the first image view and the original caption (masked, where that is shared).

    Source: Cui et al., "Democratizing Contrastive Language-Image Pre-training: A CLIP Benchmark of Data, Model, and
    Supervision", 2022. Deviations: see DeclipMethod and FilipMethod.
    """

    Settings: ClassVar[type[MethodSettings]] = DefilipSettings
    settings: DefilipSettings

    def __init__(self, model: ClipModel, settings: DefilipSettings, communication_dtype: torch.dtype | None) -> None:
        super().__init__(model, settings, communication_dtype)
        self.alignment = TokenAlignment(model, settings, communication_dtype)

    def encode(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """DeCLIP's features and those of `FilipMethod.encode`."""
        lengths = batch["text_lengths"][0].cpu()
        features = self.encode_captions(batch, caption_rows(lengths, batch["token_ids"].shape[2]))
        features["text_tokens"] = self.alignment.text_tokens(features.pop("more_states"))
        features["token_counts"] = lengths
        # One pass each: that of the second view stops at its class token.
        first, *others = self.pixels(batch["images"])
        key, *other_keys = batch.get("view_keys", (None, None)[: 1 + len(others)])
        first_features, states = self.model.encode_image_tokens(first, key)
        features["image_tokens"] = self.alignment.image_tokens(states)
        other_features = map(self.model.encode_image, others, other_keys)
        features["image_features"] = torch.stack([first_features, *other_features])
        return features

    def objective(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """DeCLIP's terms and the token-wise one, this rank's share."""
        terms = super().objective(features)
        dense_scale = self.alignment.logit_scale()
        filip = self.alignment.loss(features, dense_scale)
        loss = terms["loss"] + self.settings.w_filip * filip
        return {**terms, "loss": loss, "loss/filip": filip.detach(), "logit_scale_dense": dense_scale.detach()}

    def bounded_parameters(self) -> list[BoundedParameter]:
        """Both temperatures."""
        return [*super().bounded_parameters(), self.alignment.bounded_parameter()]

    def describe(self, global_batch_size: int) -> list[str]:
        """DeCLIP's lines and that of the token-wise term."""
        return [*super().describe(global_batch_size), self.alignment.describe(global_batch_size)]

    def exchanged_per_sample(self) -> tuple[int, int]:
        """DeCLIP's features and the keys of both sides."""
        keys = self.alignment.exchanged_per_sample(self.model)
        gathered, reduced = super().exchanged_per_sample()
        return gathered + keys, reduced + keys
