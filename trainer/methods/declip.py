"""DeCLIP: CLIP plus self-supervision in each modality, multi-view and nearest-neighbour supervision."""

import hashlib
from typing import Any, ClassVar, Literal, Self

import torch
import torch.distributed as dist
from pydantic import Field, model_validator
from torch import Tensor

from losses import (
    NearestNeighborQueue,
    contrastive_terms,
    feature_std,
    masked_lm_loss,
    neighbour_statistics,
    normalize,
    reshard_queue_states,
    simsiam_loss,
)
from losses.distributed import rank, world_size
from models.clip import ClipModel
from models.heads import MlmHead, SimSiamHead
from trainer.config.sections import TrainConfig
from trainer.methods.base import Method, MethodSettings

# The released code weighs the mean of all four view pairs by 0.4, so the original pair gets 0.1 and the other three
# 0.3; the paper gives the original pair 0.4 and the others 0.2.
PRESETS = {
    "declip-code": {"w_clip": 0.1, "w_mvs": 0.3, "w_nns": 0.2, "w_iss": 0.2, "w_tss": 0.2},
    "declip-paper": {"w_clip": 0.4, "w_mvs": 0.2, "w_nns": 0.2, "w_iss": 0.2, "w_tss": 0.2},
}


class DeclipSettings(MethodSettings):
    """Term weights (None takes the preset's) and the options of each term; a weight of 0 skips the term's compute."""

    preset: Literal["declip-code", "declip-paper"] = "declip-code"
    w_clip: float | None = Field(None, ge=0.0)
    w_mvs: float | None = Field(None, ge=0.0)
    w_nns: float | None = Field(None, ge=0.0)
    w_iss: float | None = Field(None, ge=0.0)
    w_tss: float | None = Field(None, ge=0.0)
    nns_queue_size: int = Field(65536, ge=1)
    # `local`: a queue per rank with that rank's captions alone, as released. W ranks are then not one rank.
    nns_queue: Literal["global", "local"] = "global"
    # `random`: rows drawn from `train.seed` count as neighbours until captions have taken their place, as released.
    nns_warmup: Literal["skip", "random"] = "skip"
    nns_enqueue: Literal["both", "orig"] = "both"
    nns_symmetric: bool = False
    nns_mask_duplicates: bool = False
    iss_bn: Literal["sync", "local"] = "sync"
    iss_hidden_dim: int = Field(1024, ge=1)
    iss_predictor_dim: int = Field(512, ge=1)
    mlm_probability: float = Field(0.15, gt=0.0, lt=1.0)
    # True: the masked caption is also the contrastive one (the released code). False: a third, clean text pass.
    mlm_shared_pass: bool = True

    @model_validator(mode="after")
    def _check_queue(self) -> Self:
        if self.nns_queue == "local" and self.nns_warmup != "random":
            raise ValueError(
                "nns_queue local needs nns_warmup random, so that no rank is without neighbours while others have some"
            )
        return self

    def weights(self) -> dict[str, float]:
        """The five weights in force."""
        preset = PRESETS[self.preset]
        return {name: value if getattr(self, name) is None else getattr(self, name) for name, value in preset.items()}


class DeclipMethod(Method):
    """Two image views and two captions: InfoNCE on all four pairs, SimSiam, masked language modelling, neighbours.

    Source: Li et al., "Supervision Exists Everywhere: A Data Efficient Contrastive Language-Image Pre-training
    Paradigm", ICLR 2022. Deviations, so that W ranks are one rank: one global queue instead of one per rank (the
    official behaviour is `nns_queue: local`), synchronised BN in the SimSiam head (`iss_bn: local`), and the MLM mean
    taken over the global batch.
    """

    Settings: ClassVar[type[MethodSettings]] = DeclipSettings
    settings: DeclipSettings
    image_views = ("augmented", "augmented")

    def __init__(self, model: ClipModel, settings: DeclipSettings, communication_dtype: torch.dtype | None) -> None:
        super().__init__(model, settings, communication_dtype)
        self.weights = settings.weights()
        self.text_views = self._text_views()
        if self.weights["w_iss"]:
            self.simsiam = SimSiamHead(
                model.embed_dim,
                hidden_dim=settings.iss_hidden_dim,
                out_dim=settings.iss_hidden_dim,
                predictor_dim=settings.iss_predictor_dim,
                batch_norm=settings.iss_bn,
            )
        if self.weights["w_tss"]:
            self.mlm = MlmHead(model.text_tower.width, model.text_tower.vocab_size)
        self.queue = None
        if self.weights["w_nns"]:
            self.queue = NearestNeighborQueue(
                settings.nns_queue_size, model.embed_dim, warmup=settings.nns_warmup, enqueue_views=settings.nns_enqueue
            )
        self._pending: Tensor | None = None
        # What `metrics` reports on, from the last step.
        self._found: tuple[Tensor, Tensor] | None = None
        self._projections: Tensor | None = None

    @property
    def _queue_is_local(self) -> bool:
        return self.queue is not None and self.settings.nns_queue == "local"

    def begin_run(self, train: TrainConfig, num_samples: int | None) -> None:
        """Draw the queue's random rows, the same on all ranks."""
        if self.queue is not None and self.settings.nns_warmup == "random":
            self.queue.restart(train.seed)

    def _text_views(self) -> tuple[str, ...]:
        if not self.weights["w_tss"]:
            return ("original", "eda")
        return ("masked", "eda") if self.settings.mlm_shared_pass else ("original", "eda", "masked")

    def encode(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Features of one micro-batch.

        Returns:
            image_features [2, m, embed_dim], text_features [2, m, embed_dim] (original, EDA), not normalised; with
            MLM also mlm_rows [n, text width] (states at the masked positions) and mlm_targets int64 [n].
        """
        features = self.encode_captions(batch)
        images = self.pixels(batch["images"])
        features["image_features"] = self.model.encode_image_views(images, batch.get("view_keys"))
        return features

    def encode_captions(self, batch: dict[str, Tensor], more_rows: Tensor | None = None) -> dict[str, Tensor]:
        """The text side of `encode`, and the states at further flat positions `more_rows` as more_states."""
        token_ids = batch["token_ids"]
        views, size, positions = token_ids.shape
        mlm_rows = batch["text_lengths"].new_empty(0)
        if self.weights["w_tss"]:
            mlm_rows = batch["mlm_index"] + self.text_views.index("masked") * size * positions
        wanted = mlm_rows if more_rows is None else torch.cat([mlm_rows, more_rows])
        text = self.model.encode_text(
            token_ids.flatten(0, 1),
            batch["text_lengths"].flatten(),
            state_rows=wanted if self.weights["w_tss"] or more_rows is not None else None,
        )
        features = {"text_features": text.features.unflatten(0, (views, size))[:2]}
        if self.weights["w_tss"]:
            features["mlm_rows"] = text.states[: len(mlm_rows)]
            features["mlm_targets"] = batch["mlm_targets"]
        if more_rows is not None:
            features["more_states"] = text.states[len(mlm_rows) :]
        return features

    def objective(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """All terms of this rank's share; see the class docstring for their sources."""
        image_features = normalize(features["image_features"])
        text_features = normalize(features["text_features"])
        scale = self.model.logit_scale()
        mlm_count = torch.zeros(1, dtype=torch.float64, device=scale.device)
        if self.weights["w_tss"]:
            mlm_count += features["mlm_targets"].numel()
        slots, cosine = self._search(text_features)
        neighbours = {} if slots is None else self._neighbours(slots)
        contrastive = contrastive_terms(
            image_features,
            text_features,
            scale,
            **neighbours,
            neighbour_symmetric=self.settings.nns_symmetric,
            neighbour_mask_duplicates=self.settings.nns_mask_duplicates,
            clip_pairs=None if self.weights["w_mvs"] else [(0, 0)],
            extra_sums=mlm_count,
            communication_dtype=self.communication_dtype,
        )
        if self.queue is not None:
            self._pending = text_features.detach() if self._queue_is_local else contrastive.gathered_text
        found = slots if contrastive.gathered_slots is None else contrastive.gathered_slots
        self._found = None if cosine is None else (found, cosine)
        terms = {"clip": contrastive.clip[0, 0]}
        if self.weights["w_mvs"]:
            terms["mvs"] = (contrastive.clip[0, 1] + contrastive.clip[1, 0] + contrastive.clip[1, 1]) / 3.0
        if self.weights["w_nns"]:
            # Nothing to search yet (warm-up `skip`): a zero that every rank agrees on, as `filled` is replicated.
            terms["nns"] = terms["clip"].detach() * 0.0 if contrastive.nns is None else contrastive.nns.mean()
        if self.weights["w_iss"]:
            projections, predictions = self.simsiam(features["image_features"])
            terms["iss"] = simsiam_loss(projections, predictions)
            self._projections = projections.detach()
        if self.weights["w_tss"]:
            logits = self.mlm(features["mlm_rows"])
            terms["tss"] = masked_lm_loss(logits, features["mlm_targets"], contrastive.extra_sums[0])
        loss = sum(self.weights[f"w_{name}"] * term for name, term in terms.items() if self.weights[f"w_{name}"])
        detached = {f"loss/{name}": term.detach() for name, term in terms.items()}
        return {"loss": loss, **detached, "logit_scale": scale.detach()}

    def _search(self, text_features: Tensor) -> tuple[Tensor | None, Tensor | None]:
        if self.queue is None or not self.queue.ready:
            return None, None
        return self.queue.search(text_features)

    def _neighbours(self, slots: Tensor) -> dict[str, Tensor]:
        """How `contrastive_terms` is told of them: by slot where all ranks hold the same rows."""
        if not self._queue_is_local:
            return {"queue_rows": self.queue.rows, "neighbour_slots": slots}
        found = {"neighbour_vectors": self.queue.rows[slots]}
        if self.settings.nns_mask_duplicates:
            found["neighbour_slots"] = self.queue.identities(slots)
        return found

    def metrics(self) -> dict[str, float]:
        """Fill of the queue and health of the neighbours; spread of the SimSiam projections (0 when collapsed)."""
        values = {}
        if self.queue is not None:
            values["nns/filled"] = float(self.queue.filled)
            values["nns/skipped_blocks"] = float(self.queue.skipped_blocks)
        if self._found is not None:
            values |= {f"nns/{name}": value for name, value in neighbour_statistics(*self._found).items()}
        if self._projections is not None:
            values["iss/std"] = float(feature_std(self._projections))
        return values

    def after_step(self) -> None:
        """Enqueue the step's captions; after the backward pass, which still reads the queue's rows."""
        if self._pending is not None:
            self.queue.enqueue(self._pending)
            self._pending = None

    def method_state(self) -> dict[str, Any]:
        """The queue, where it is one for all ranks."""
        return {} if self.queue is None or self._queue_is_local else {"queue": self.queue.state()}

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Restore the queue; a checkpoint without one starts it empty. Queues per rank each start from a global one."""
        if self.queue is not None and "queue" in state:
            self.queue.load_state(state["queue"])

    def rank_state(self) -> dict[str, Any]:
        """The queue of this rank, where each has its own."""
        return {"queue": self.queue.state()} if self._queue_is_local else {}

    def load_rank_states(self, states: list[dict[str, Any]]) -> None:
        """Restore this rank's queue: bit for bit at the same number of ranks, else its share of all rows by age."""
        saved = [state["queue"] for state in states if "queue" in state]
        if self.queue is None or not saved:
            return
        wanted = world_size() if self._queue_is_local else 1
        if len(saved) != wanted:
            saved = reshard_queue_states(saved, wanted)
        self.queue.load_state(saved[rank() % wanted])

    def own_buffers(self) -> list[Tensor]:
        """The queue's, where each rank has its own."""
        return list(self.queue.buffers()) if self._queue_is_local else []

    def state_digest(self) -> str:
        """Hash of the queue's rows, pointer and fill, or of those of all queues."""
        if self.queue is None:
            return ""
        own = self.queue.content_hash()
        if not self._queue_is_local or world_size() == 1:
            return own
        digests = [""] * world_size()
        dist.all_gather_object(digests, own)
        return hashlib.blake2b("".join(digests).encode(), digest_size=16).hexdigest()

    def describe(self, global_batch_size: int) -> list[str]:
        """Negatives of each contrastive term and the age of the queue."""
        lines = super().describe(global_batch_size)
        if self.queue is not None:
            settings, ranks = self.settings, world_size() if self._queue_is_local else 1
            rows = global_batch_size // ranks * (2 if settings.nns_enqueue == "both" else 1)
            size, steps = settings.nns_queue_size, settings.nns_queue_size / rows
            which = "a queue of each rank's own captions," if self._queue_is_local else "global queue of"
            lines.append(f"nearest neighbours: {which} {size} rows = {steps:.1f} steps")
        return lines

    def exchanged_per_sample(self) -> tuple[int, int]:
        """Captions' features both ways; vectors of the neighbours forward, where their slots say nothing elsewhere."""
        gathered, reduced = super().exchanged_per_sample()
        return gathered * (2 if self._queue_is_local else 1), reduced
