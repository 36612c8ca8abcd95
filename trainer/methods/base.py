"""What every method is: an nn.Module that owns towers, heads and losses and turns a batch into named terms."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn

from losses import normalize
from models.clip import ClipModel
from trainer.config.sections import Section, TrainConfig
from trainer.methods.gradient_cache import encode_micro_batches

CAPTION_EDITS = ("original", "eda")


class MethodSettings(Section):
    """Settings shared by all methods: bounds of the temperature, and what its views are.

    The stored log temperature is projected onto its bounds after each step. `image_views` names the augmentation of
    each image view (`base`, `augmented`, or another that `data.augmentation` defines), `text_views` the edit of each
    caption (`CAPTION_EDITS`). A method has as many of each as its defaults, which are the published choice.
    """

    logit_scale_min: float = 0.0
    logit_scale_max: float = Field(math.log(100.0), le=math.log(300.0))
    image_views: tuple[str, ...] = ("base",)
    text_views: tuple[str, ...] = ("original",)

    @field_validator("image_views", "text_views", mode="before")
    @classmethod
    def _list_one(cls, views: Any) -> Any:
        return (views,) if isinstance(views, str) else views

    @field_validator("image_views", "text_views")
    @classmethod
    def _check_views(cls, views: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        published = cls.model_fields[info.field_name].default
        if len(views) != len(published):
            raise ValueError(
                f"got {len(views)} of them, [{', '.join(views)}], but the method has {len(published)}: give as many, "
                f"for example [{', '.join(published)}]"
            )
        if info.field_name == "text_views" and "masked" in views:
            raise ValueError(
                "'masked' is no choice, masking belongs to masked language modelling (method.w_tss and "
                "method.mlm_shared_pass of declip and defilip); use original or eda"
            )
        unknown = [view for view in views if view not in CAPTION_EDITS]
        if info.field_name == "text_views" and unknown:
            raise ValueError(f"unknown edit '{unknown[0]}'; use {' or '.join(CAPTION_EDITS)}")
        return views


@dataclass(frozen=True)
class TrainingRule:
    """How the parameters below a module are trained, where not like the others.

    None leaves a thing as it is for what stands above the module, in the end as the recipe's `optimizer` and `schedule`
    say: of all rules that reach a parameter, the one of the innermost module counts, for each attribute by itself.

    Attributes:
        module: Its name in the method, e.g. `model.image_tower`.
        weight_decay: Of its parameters, those that decay at all (`optimizer.no_decay`).
        last_step: The step at which its learning rate has come down to `schedule.end_lr`, and after which it is 0;
            None: as the rest, at `train.steps`.
        lr_factor: Its learning rate over that of the recipe, at every step; 0 leaves it as it starts.
    """

    module: str
    weight_decay: float | None = None
    last_step: int | None = None
    lr_factor: float | None = None

    def reaches(self, path: str) -> bool:
        """Whether the module at `path` is the rule's, or below it."""
        return f"{path}.".startswith(f"{self.module}.")


@dataclass(frozen=True)
class BoundedParameter:
    """A parameter the trainer projects onto [low, high] after each optimizer step, under every ZeRO stage."""

    parameter: nn.Parameter
    low: float
    high: float


class Method(nn.Module):
    """A training method, given whole to the engine so that one forward covers towers, heads and losses.

    A step has two halves, between which the gradient cache joins micro-batches: `encode` turns a micro-batch into
    feature tensors, `objective` turns the features of this rank's whole share of the global batch into named terms.
    What `encode` needs that has no gradient comes from `prepare`, which the gradient cache does not repeat.

    Attributes:
        image_views: Name of the augmentation of each image view that is computed, in order; the settings', unless a
            method leaves out what none of its terms reads.
        text_views: Kind of each text view, in order, see `data.sample.TEXT_VIEWS`; likewise.
        has_global_embeddings: Whether the model's own features are trained to be compared, as exports need them.
        context_size: Side in pixels of one more crop, around all image views; None for none.
        needs_places: Whether batches hold `position` and `sample_index`, places in the order and among the samples.
    """

    Settings: ClassVar[type[MethodSettings]] = MethodSettings
    # Along which dimension the gradient cache joins each feature tensor; 0 unless named here.
    feature_dims: ClassVar[dict[str, int]] = {"image_features": 1, "text_features": 1}

    has_global_embeddings: bool = True
    context_size: int | None = None
    needs_places: bool = False

    def __init__(self, model: ClipModel, settings: MethodSettings, communication_dtype: torch.dtype | None) -> None:
        super().__init__()
        self.model = model
        self.settings = settings
        self.communication_dtype = communication_dtype
        self.image_views, self.text_views = settings.image_views, settings.text_views
        # Not persistent: constants of the data, not of the model.
        self.register_buffer("pixel_mean", torch.tensor(model.pixel_mean).view(3, 1, 1) * 255.0, persistent=False)
        self.register_buffer("pixel_std", torch.tensor(model.pixel_std).view(3, 1, 1) * 255.0, persistent=False)

    def forward(self, phase: str, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Run one phase inside the engine.

        Args:
            phase: `train`, `preview`, or for evaluation `image` or `text`.
            inputs: `micro_batches` for `train`; a micro-batch for `preview`; `images`, or `token_ids` and
                `text_lengths`, for evaluation.

        Returns:
            Named tensors; for `train` the differentiable `loss` and detached `loss/<term>` scalars, each this rank's
            share (the mean over ranks is the value for the global batch).
        """
        if phase == "train":
            micro_batches = [self.prepare(batch) for batch in inputs["micro_batches"]]
            return self.objective(encode_micro_batches(self.encode, micro_batches, self.feature_dims))
        return {"image": self.embed_image, "text": self.embed_text, "preview": self.preview}[phase](inputs)

    def prepare(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A micro-batch with what `encode` needs besides, once per micro-batch; without gradient."""
        return batch

    def encode(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Features of one micro-batch: those of all views, unless a method needs others.

        Returns:
            image_features [V, m, embed_dim] and text_features [K, m, embed_dim], not normalised.
        """
        token_ids = batch["token_ids"]
        text = self.model.encode_text(token_ids.flatten(0, 1), batch["text_lengths"].flatten())
        return {
            "image_features": self.model.encode_image_views(self.pixels(batch["images"]), batch.get("view_keys")),
            "text_features": text.features.unflatten(0, token_ids.shape[:2]),
        }

    def objective(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Named terms of the whole local share of the global batch."""
        raise NotImplementedError

    def begin_run(self, train: TrainConfig, num_samples: int | None) -> None:
        """Told once, before the engine is built; for training only. Must not contain a collective.

        Args:
            train: The recipe's `train` section.
            num_samples: Samples of all sources; None in a dry run, which has not opened them.

        Raises:
            ConfigError: Settings that cannot work in such a run, or something missing that they need.
        """

    def training_rules(self) -> list[TrainingRule]:
        """Exceptions to weight decay and schedule."""
        return []

    def begin_step(self, step: int, batch: int) -> range | None:
        """What precedes a step (a schedule, a teacher). Called once per step on every rank, with the same numbers.

        Args:
            step: The step, from 1.
            batch: The global batch of the data order that it trains on, from 0.

        Returns:
            Global batches to be seen first, or None. Each rank then runs its own samples of them, with views of their
            own, through `preview` in evaluation mode and hands the results to `collect`; `end_preview` follows.
        """
        return None

    def preview(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """What a preview keeps of one micro-batch."""
        raise NotImplementedError

    def collect(self, features: dict[str, Tensor], batch: dict[str, Tensor]) -> None:
        """Take what `preview` returned for a micro-batch."""
        raise NotImplementedError

    def end_preview(self) -> str:
        """Make use of what was collected; a line for the log. Collective."""
        raise NotImplementedError

    def after_step(self) -> None:
        """What follows an optimizer step (a queue's enqueue, an EMA update). Called once per step on every rank."""

    def metrics(self) -> dict[str, float]:
        """Extras of the last step for the log, asked for at logged steps only and averaged over ranks."""
        return {}

    def method_state(self) -> dict[str, Any]:
        """State beyond parameters and buffers, identical on every rank, for checkpoints."""
        return {}

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Restore what `method_state` returned."""

    def rank_state(self) -> dict[str, Any]:
        """State of this rank alone, which a checkpoint keeps in a file for each rank; on all ranks or on none."""
        return {}

    def load_rank_states(self, states: list[dict[str, Any]]) -> None:
        """Restore what `rank_state` returned; called after `load_method_state`, on every rank.

        Args:
            states: Of all ranks that saved, in their order, whatever number there is now; empty if there were none.
        """

    def own_buffers(self) -> list[Tensor]:
        """Buffers that may differ between ranks."""
        return []

    def state_digest(self) -> str:
        """Hash of `method_state` and of all `rank_state`s, compared across ranks and logged; empty when there is none.

        Collective.
        """
        return ""

    def bounded_parameters(self) -> list[BoundedParameter]:
        """Temperatures and their bounds."""
        scale = self.model.logit_scale.log_value
        return [BoundedParameter(scale, self.settings.logit_scale_min, self.settings.logit_scale_max)]

    def exchanged_per_sample(self) -> tuple[int, int]:
        """For the plan: numbers that ranks gather per sample in the forward, and reduce per sample in the backward."""
        features = len(self.text_views) * self.model.embed_dim
        return features, features

    def describe_views(self) -> str:
        """A line for the log: what is computed of each sample."""
        return f"views: images {', '.join(self.image_views)}; captions {', '.join(self.text_views)}"

    def describe(self, global_batch_size: int) -> list[str]:
        """Lines for the log: how many negatives each term sees."""
        return [f"contrastive: {global_batch_size - 1} negatives per row (the whole global batch)"]

    def embed_image(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Unit-norm fp32 image embeddings of uint8 images [n, 3, H, W].

        Returns:
            `embeddings` [n, d]; or [n, P, d], tokens to be compared one by one.
        """
        return {"embeddings": normalize(self.model.encode_image(self.pixels(inputs["images"])))}

    def embed_text(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Unit-norm fp32 text embeddings of token_ids [n, T] with text_lengths [n].

        Returns:
            `embeddings` [n, d]; or [n, T, d], tokens to be compared one by one, zero behind a caption's end.
        """
        output = self.model.encode_text(inputs["token_ids"], inputs["text_lengths"])
        return {"embeddings": normalize(output.features)}

    def pixels(self, images: Tensor) -> Tensor:
        """uint8 [..., 3, H, W] to fp32, normalised by `model.pixel_mean` and `model.pixel_std`."""
        return (images.float() - self.pixel_mean) / self.pixel_std
