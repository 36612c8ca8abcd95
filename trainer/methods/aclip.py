"""A-CLIP: two views that keep only the patches a slower copy of the image tower attends to."""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from losses import byol_loss, contrastive_terms, feature_std, normalize, simclr_loss
from models.attentive_mask import carry_over, most_attended, patches_of_blocks
from models.clip import ClipModel
from models.heads import ByolHead, SimClrHead
from models.vit import VisionTransformer
from trainer.config.sections import TrainConfig
from trainer.errors import ConfigError
from trainer.methods.base import Method, MethodSettings
from trainer.methods.mean_teacher import cosine_momentum, teacher_of, update_teacher


class AclipSettings(MethodSettings):
    """Term weights, masks and heads; a weight of 0 skips the term's compute and its head."""

    w_clip: float = Field(1.0, gt=0.0)
    w_simclr: float = Field(1.0, ge=0.0)
    w_byol: float = Field(2.0, ge=0.0)
    # Of n blocks of mask_block x mask_block patches, floor(keep_ratio * n) + 1 stay, as in the released code.
    keep_ratio: float = Field(0.5, gt=0.0, lt=1.0)
    mask_block: int = Field(2, ge=1)
    # Pixels of the crop the teacher sees; None means as many as a view. Half of them is the paper's efficient variant.
    teacher_image_size: int | None = Field(None, ge=1)
    # At the first step; it rises to 1 in half a cosine.
    teacher_momentum: float = Field(0.996, ge=0.0, lt=1.0)
    simclr_temperature: float = Field(0.1, gt=0.0)
    head_hidden_dim: int = Field(4096, ge=1)
    head_out_dim: int = Field(256, ge=1)
    head_bn: Literal["sync", "local"] = "sync"
    image_views: tuple[str, ...] = ("augmented", "augmented")


class AclipMethod(Method):
    """Masked views against the caption, against each other (SimCLR) and against the teacher's view of all (BYOL).

    The teacher moves before each step's forward, towards the weights as they are: once per step whatever the number of
    micro-batches, and after a skipped step towards the weights that the skip left alone. At the first step it is a
    copy. It runs once per micro-batch, outside of what the gradient cache repeats.

    Source: Yang et al., "Attentive Mask CLIP", ICCV 2023. Deviations: SimCLR pairs the two views (the released code
    pairs the first with itself), the teacher's crop holds both views whole, only the image side has a teacher, and its
    running statistics are its own.
    """

    Settings: ClassVar[type[MethodSettings]] = AclipSettings
    settings: AclipSettings
    feature_dims: ClassVar[dict[str, int]] = {**Method.feature_dims, "pooled_features": 1}

    def __init__(self, model: ClipModel, settings: AclipSettings, communication_dtype: torch.dtype | None) -> None:
        super().__init__(model, settings, communication_dtype)
        tower = model.image_tower
        self.context_size = settings.teacher_image_size or tower.image_size
        self.grid, self.num_kept = _mask_sizes(model, settings, self.context_size)
        dims = (tower.pooled_dim, settings.head_hidden_dim, settings.head_out_dim)
        if settings.w_simclr:
            self.simclr = SimClrHead(*dims, batch_norm=settings.head_bn)
        if settings.w_byol:
            self.byol = ByolHead(*dims, batch_norm=settings.head_bn)
            self.teacher_projector = teacher_of(self.byol.projector)
        self.teacher = teacher_of(tower)
        self._momentum = 0.0
        # What `metrics` reports on, from the last step.
        self._seen: dict[str, Tensor] = {}

    def begin_run(self, train: TrainConfig, num_samples: int | None) -> None:
        """Note how long the teacher's schedule is."""
        self._steps = train.steps

    def begin_step(self, step: int, batch: int) -> None:
        """Move the teacher towards the weights as the step before left them; collective at ZeRO 3."""
        # At the first step a copy: weights that training starts from were loaded after the teacher was made.
        self._momentum = cosine_momentum(step, self._steps, self.settings.teacher_momentum) if step > 1 else 0.0
        update_teacher(self.teacher, self.model.image_tower, self._momentum)
        if self.settings.w_byol:
            update_teacher(self.teacher_projector, self.byol.projector, self._momentum)

    @torch.no_grad()
    def prepare(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The micro-batch with what the teacher makes of its context crops.

        Returns:
            Also kept_patches int64 [2, m, k], teacher_features [m, pooled_dim], and kept_attention [m], the share of
            a view's attention that its kept patches have, the mean over both views.
        """
        features, scores = self.teacher.attend(self.pixels(batch["context_images"][0]))
        side = self.settings.mask_block
        blocks = self.grid // side
        if scores.shape[-1] <= blocks:
            scores = carry_over(scores, batch["crop_boxes"], blocks)
        else:
            scores = carry_over(scores, batch["crop_boxes"], self.grid)
            scores = scores.unflatten(-1, (blocks, side)).unflatten(-3, (blocks, side)).mean((-3, -1))
        kept = most_attended(scores, self.num_kept)
        scores = scores.flatten(-2)
        share = scores.take_along_dim(kept, dim=-1).sum(-1) / scores.sum(-1)
        return {
            **batch,
            "kept_patches": patches_of_blocks(kept, self.grid, side),
            "teacher_features": features,
            "kept_attention": share.mean(0),
        }

    def encode(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Features of one micro-batch.

        Returns:
            image_features [2, m, embed_dim] and text_features [1, m, embed_dim], not normalised; pooled_features
            [2, m, pooled_dim], what the image tower's projection reads; and from `prepare` teacher_features and
            kept_attention.
        """
        views = self.pixels(batch["images"])
        kept = batch["kept_patches"].flatten(0, 1)
        images, pooled = self.model.image_tower(views.flatten(0, 1), kept=kept, with_pooled=True)
        text = self.model.encode_text(batch["token_ids"][0], batch["text_lengths"][0])
        return {
            "image_features": images.unflatten(0, views.shape[:2]),
            "pooled_features": pooled.unflatten(0, views.shape[:2]),
            "text_features": text.features.unsqueeze(0),
            "teacher_features": batch["teacher_features"],
            "kept_attention": batch["kept_attention"],
        }

    def objective(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """All terms of this rank's share; see the class docstring for their sources."""
        scale = self.model.logit_scale()
        contrastive = contrastive_terms(
            normalize(features["image_features"]),
            normalize(features["text_features"]),
            scale,
            communication_dtype=self.communication_dtype,
        )
        self._seen = {"kept_attention": features["kept_attention"]}
        terms = {"clip": contrastive.clip.mean()}
        if self.settings.w_simclr:
            projections = self.simclr(features["pooled_features"])
            self._seen["simclr"] = projections.detach()
            terms["simclr"] = simclr_loss(
                projections,
                temperature=self.settings.simclr_temperature,
                communication_dtype=self.communication_dtype,
            )
        if self.settings.w_byol:
            self._seen["byol"] = targets = self._teacher_projections(features["teacher_features"])
            terms["byol"] = byol_loss(self.byol(features["pooled_features"]), targets[0])
        loss = sum(getattr(self.settings, f"w_{name}") * term for name, term in terms.items())
        detached = {f"loss/{name}": term.detach() for name, term in terms.items()}
        return {"loss": loss, **detached, "logit_scale": scale.detach()}

    @torch.no_grad()
    def _teacher_projections(self, features: Tensor) -> Tensor:
        """[1, n, head_out_dim], with batch statistics of the teacher's own features."""
        return self.teacher_projector(features[None].to(self.teacher_projector[0].weight.dtype))

    def metrics(self) -> dict[str, float]:
        """The teacher's momentum, how much of its attention the masks keep, and the spread of projections."""
        values = {"aclip/momentum": self._momentum}
        if self._seen:
            values["aclip/kept_attention"] = float(self._seen["kept_attention"].mean())
        for name in ("simclr", "byol"):
            if name in self._seen:
                # 0 when they have collapsed.
                values[f"{name}/std"] = float(feature_std(self._seen[name]))
        return values

    def describe(self, global_batch_size: int) -> list[str]:
        """Negatives of both contrastive terms, and what is kept."""
        lines = super().describe(global_batch_size)
        if self.settings.w_simclr:
            lines.append(f"SimCLR: {2 * global_batch_size - 2} negatives per view (both views of the whole batch)")
        kept = self.num_kept * self.settings.mask_block**2
        lines.append(
            f"masks: {kept} of {self.grid**2} patches kept per view, by the attention of a teacher that sees "
            f"{self.context_size} pixels"
        )
        return lines


def _mask_sizes(model: ClipModel, settings: AclipSettings, context_size: int) -> tuple[int, int]:
    """Patches along a side of a view, and how many blocks of them stay.

    Raises:
        ConfigError: A tower without patches, or sizes that do not fit together.
    """
    tower, side = model.image_tower, settings.mask_block
    if not isinstance(tower, VisionTransformer):
        raise ConfigError("method aclip masks patches, which needs one of the vit_* models; set model.name to one")
    if tower.has_patch_dropout:
        raise ConfigError("method aclip chooses the patches itself; set model.patch_dropout 0")
    grid = tower.image_size // tower.patch_size
    if grid % side:
        raise ConfigError(
            f"method.mask_block {side} does not divide the {grid} patches along a side of a view; use a divisor of "
            f"{grid}"
        )
    if context_size % tower.patch_size:
        below = max(1, context_size // tower.patch_size) * tower.patch_size
        raise ConfigError(
            f"method.teacher_image_size {context_size} is not a multiple of the patch size {tower.patch_size}; "
            f"use {below} or {below + tower.patch_size}"
        )
    num_blocks = (grid // side) ** 2
    num_kept = int(settings.keep_ratio * num_blocks) + 1
    if num_kept >= num_blocks:
        raise ConfigError(
            f"method.keep_ratio {settings.keep_ratio} keeps all {num_blocks} blocks of a view, so nothing is masked; "
            "lower it or method.mask_block"
        )
    return grid, num_kept
