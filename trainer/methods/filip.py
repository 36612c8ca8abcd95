"""FILIP: images and captions compared token by token."""

import math
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from losses import KeySelection, contrastive_terms, filip_loss, normalize
from models.clip import ClipModel, LogitScale
from models.heads import TokenHead
from models.sequences import copy_to
from models.text import caption_rows
from trainer.config.sections import Section
from trainer.errors import ConfigError
from trainer.methods.base import BoundedParameter, Method, MethodSettings


class TokenSettings(Section):
    """The token-wise term: its space, which tokens other samples are matched with, its own temperature.

    `filip_select`: by `own_pair` (summed similarity to the own partner) or `local_max` (largest similarity in a group
    of `filip_select_group` samples; without it those of a rank, and the loss depends on the number of ranks).
    """

    filip_dim: int = Field(256, ge=1)
    filip_keys: Literal["all", "topk"] = "topk"
    filip_topk: int = Field(16, ge=1)
    filip_select: Literal["own_pair", "local_max"] = "own_pair"
    filip_select_group: int | None = Field(None, ge=1)
    # What evaluation compares.
    filip_eval: Literal["tokens", "global"] = "tokens"
    logit_scale_dense_min: float = 0.0
    logit_scale_dense_max: float = Field(math.log(100.0), le=math.log(300.0))

    @model_validator(mode="after")
    def _check_selection(self) -> Self:
        if self.filip_select_group and (self.filip_keys, self.filip_select) != ("topk", "local_max"):
            raise ValueError("filip_select_group has no effect without filip_keys topk and filip_select local_max")
        return self


class FilipSettings(TokenSettings, MethodSettings):
    """Term weights; FILIP itself has no global term."""

    w_filip: float = Field(1.0, gt=0.0)
    w_clip: float = Field(0.0, ge=0.0)

    @model_validator(mode="after")
    def _check_evaluation(self) -> Self:
        if self.filip_eval == "global" and not self.w_clip:
            raise ValueError("filip_eval global needs w_clip above 0: without it the global features are not trained")
        return self


class TokenAlignment(nn.Module):
    """Heads, temperature and loss of the token-wise term, for every method that has it.

    Raises:
        ConfigError: The image tower has no tokens.
    """

    def __init__(self, model: ClipModel, settings: TokenSettings, communication_dtype: torch.dtype | None) -> None:
        super().__init__()
        if not model.image_tower.has_tokens:
            raise ConfigError(
                f"method.filip_*: a {type(model.image_tower).__name__} does not give the tokens that FILIP compares; "
                "choose one of the vit_* or rn* models"
            )
        self.settings = settings
        self.image_head = TokenHead(model.image_tower.token_dim, settings.filip_dim)
        self.text_head = TokenHead(model.text_tower.width, settings.filip_dim)
        self.logit_scale = LogitScale()
        self._max_text_length = model.text_tower.context_length
        self._communication_dtype = communication_dtype
        count = settings.filip_topk if settings.filip_keys == "topk" else None
        self._keys = KeySelection(count, settings.filip_select, settings.filip_select_group)

    def image_tokens(self, states: Tensor) -> Tensor:
        """Unit-norm fp32 tokens of states [..., width]."""
        return normalize(self.image_head(states))

    def text_tokens(self, states: Tensor) -> Tensor:
        """Unit-norm fp32 tokens of states [N, width]."""
        return normalize(self.text_head(states))

    def loss(self, features: dict[str, Tensor], scale: Tensor) -> Tensor:
        """The term of `image_tokens` [b, P, d], `text_tokens` [N, d] and `token_counts` [b], this rank's share.

        Raises:
            ConfigError: The selection group does not divide this rank's share of the batch.
        """
        samples = len(features["image_tokens"])
        if self._keys.group is not None and samples % self._keys.group:
            raise ConfigError(
                f"method.filip_select_group {self._keys.group} does not divide the {samples} samples of a rank; "
                "use a divisor"
            )
        return filip_loss(
            features["image_tokens"],
            features["text_tokens"],
            features["token_counts"],
            scale,
            keys=self._keys,
            max_text_length=self._max_text_length,
            communication_dtype=self._communication_dtype,
        )

    def bounded_parameter(self) -> BoundedParameter:
        """The term's temperature."""
        low, high = self.settings.logit_scale_dense_min, self.settings.logit_scale_dense_max
        return BoundedParameter(self.logit_scale.log_value, low, high)

    def describe(self, global_batch_size: int) -> str:
        """A line for the log."""
        chosen = f"at most {self._keys.count}" if self._keys.count else "all"
        line = f"filip: {global_batch_size - 1} negatives per row, {chosen} tokens of a sample are matched with"
        if self._keys.count and self._keys.by == "local_max" and self._keys.group is None:
            line += "; they are chosen among a rank's samples, so that the loss depends on the number of ranks"
        return line

    def exchanged_per_sample(self, model: ClipModel) -> int:
        """Numbers of each sample that travel in a step, once forth and once back: its keys of both sides."""
        limits = (model.image_tower.num_tokens, self._max_text_length)
        return sum(min(self._keys.count or limit, limit) for limit in limits) * self.settings.filip_dim

    def embed_image(self, model: ClipModel, pixels: Tensor) -> dict[str, Tensor]:
        """Unit-norm fp32 tokens [n, P, filip_dim]."""
        return {"embeddings": self.image_tokens(model.encode_image_tokens(pixels)[1])}

    def embed_text(self, model: ClipModel, token_ids: Tensor, text_lengths: Tensor) -> dict[str, Tensor]:
        """Unit-norm fp32 tokens [n, T, filip_dim], zero behind a caption's end."""
        rows = caption_rows(text_lengths, token_ids.shape[1])
        tokens = self.text_tokens(model.encode_text(token_ids, text_lengths, state_rows=rows).states)
        padded = tokens.new_zeros(token_ids.numel(), tokens.shape[-1])
        padded = padded.index_copy(0, copy_to(rows, tokens.device), tokens)
        return {"embeddings": padded.unflatten(0, token_ids.shape)}


class ComparesTokens(Method):
    """What evaluation compares in a method that has a `TokenAlignment`: its tokens, or the global features."""

    settings: TokenSettings
    alignment: TokenAlignment

    def embed_image(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tokens or global embeddings, by `filip_eval`, of uint8 images [n, 3, H, W]."""
        if self.settings.filip_eval == "global":
            return super().embed_image(inputs)
        return self.alignment.embed_image(self.model, self.pixels(inputs["images"]))

    def embed_text(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tokens or global embeddings, by `filip_eval`, of token_ids [n, T] with text_lengths [n]."""
        if self.settings.filip_eval == "global":
            return super().embed_text(inputs)
        return self.alignment.embed_text(self.model, inputs["token_ids"], inputs["text_lengths"])


class FilipMethod(ComparesTokens):
    """One image view, one caption, one token-wise term over the global batch; a global CLIP term on request.

    Source: Yao et al., "FILIP: Fine-grained Interactive Language-Image Pre-Training", ICLR 2022. Sizes and selection
    by the own pair are those of DeCLIP's authors (Cui et al., "Democratizing Contrastive Language-Image Pre-training",
    2022). Deviations from their code: padding takes no part, captions are not masked for a task that is not trained,
    the temperature has bounds.
    """

    Settings: ClassVar[type[MethodSettings]] = FilipSettings
    settings: FilipSettings

    def __init__(self, model: ClipModel, settings: FilipSettings, communication_dtype: torch.dtype | None) -> None:
        super().__init__(model, settings, communication_dtype)
        self.alignment = TokenAlignment(model, settings, communication_dtype)
        self.has_global_embeddings = settings.w_clip > 0
        if not self.has_global_embeddings:
            for module in (*model.image_tower.head_modules(), *model.text_tower.head_modules(), model.logit_scale):
                module.requires_grad_(False)

    def encode(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Features of one micro-batch.

        Returns:
            image_tokens [m, P, filip_dim], text_tokens [N, filip_dim] (captions one after the other), both of unit
            length, and token_counts int64 [m] on the CPU; with a CLIP term also image_features and text_features,
            each [1, m, embed_dim], not normalised.
        """
        token_ids, lengths = batch["token_ids"][0], batch["text_lengths"][0].cpu()
        keys = batch["view_keys"][0] if "view_keys" in batch else None
        image_features, image_states = self.model.encode_image_tokens(self.pixels(batch["images"][0]), keys)
        rows = caption_rows(lengths, token_ids.shape[1])
        text = self.model.encode_text(token_ids, lengths, state_rows=rows)
        features = {
            "image_tokens": self.alignment.image_tokens(image_states),
            "text_tokens": self.alignment.text_tokens(text.states),
            "token_counts": lengths,
        }
        if self.has_global_embeddings:
            features["image_features"] = image_features.unsqueeze(0)
            features["text_features"] = text.features.unsqueeze(0)
        return features

    def objective(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """The token-wise term of this rank's share, and CLIP's."""
        dense_scale = self.alignment.logit_scale()
        filip = self.alignment.loss(features, dense_scale)
        terms = {"loss": self.settings.w_filip * filip, "loss/filip": filip.detach()}
        if not self.has_global_embeddings:
            return {**terms, "logit_scale": dense_scale.detach()}
        scale = self.model.logit_scale()
        clip = contrastive_terms(
            normalize(features["image_features"]),
            normalize(features["text_features"]),
            scale,
            communication_dtype=self.communication_dtype,
        ).clip[0, 0]
        terms["loss"] = terms["loss"] + self.settings.w_clip * clip
        scales = {"logit_scale": scale.detach(), "logit_scale_dense": dense_scale.detach()}
        return {**terms, "loss/clip": clip.detach(), **scales}

    def bounded_parameters(self) -> list[BoundedParameter]:
        """The temperature of each term."""
        own = [self.alignment.bounded_parameter()]
        return own + super().bounded_parameters() if self.has_global_embeddings else own

    def describe(self, global_batch_size: int) -> list[str]:
        """Negatives of each term."""
        own = [self.alignment.describe(global_batch_size)]
        return own + super().describe(global_batch_size) if self.has_global_embeddings else own

    def exchanged_per_sample(self) -> tuple[int, int]:
        """Keys of both sides, and the features of a CLIP term."""
        keys = self.alignment.exchanged_per_sample(self.model)
        gathered, reduced = super().exchanged_per_sample() if self.has_global_embeddings else (0, 0)
        return gathered + keys, reduced + keys
