"""ProtoCLIP: CLIP plus prototypes, clusters of an episode to which each sample's partner is classified."""

import copy
import hashlib
import importlib.util
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from data.errors import DataError
from data.rng import keyed_hash
from losses import Clusters, EpisodeFeatures, cluster_episode, contrastive_terms, normalize, prototype_loss
from losses.clustering import MAX_ENTRY
from losses.distributed import world_size
from losses.episode import EXTERNAL, IMAGE, TABLES, TEXT
from models.clip import ClipModel, LogitScale
from models.heads import PrototypeHead
from trainer.config.sections import PathText, TrainConfig
from trainer.errors import ConfigError
from trainer.methods.base import BoundedParameter, Method, MethodSettings, TrainingRule

# As faiss: more rows than this for each centroid make K-Means slower and hardly better.
_ROWS_PER_CENTROID = 256
_HASHED_ROWS = 1024


class ProtoclipSettings(MethodSettings):
    """Term weights, episodes, clusters and heads.

    `episode_steps` global batches are one episode. In the first `warmup_episodes` and the last `lit_episodes` only the
    contrastive term counts; in the latter the image tower stands still. `external_teacher`: a .npy file with one row
    for each training sample, in stored order, whose clusters are a third set of targets.
    """

    w_clip: float = Field(1.0, gt=0.0)
    w_proto: float = Field(1.0, ge=0.0)
    w_external: float = Field(1.0, ge=0.0)
    episode_steps: int = Field(391, ge=1)
    warmup_episodes: int = Field(1, ge=0)
    lit_episodes: int = Field(0, ge=0)
    clusters: int = Field(20_000, ge=1)
    cluster_iterations: int = Field(20, ge=1)
    cluster_restarts: int = Field(3, ge=1)
    # Samples of an episode that the centroids are fitted on, at most; None: 256 for each cluster.
    cluster_sample: int | None = Field(None, ge=1)
    # Of a rank; features of longer episodes go to a file in TMPDIR.
    feature_memory_gib: float = Field(4.0, ge=0.0)
    # Of the soft targets; 0 takes hard labels.
    target_temperature: float = Field(0.01, ge=0.0)
    normalize_teacher: bool = False
    back_translation: bool = True
    external_teacher: PathText | None = None
    head_dim: int = Field(128, ge=1)
    head_hidden_dim: int = Field(2048, ge=1)
    head_layers: int = Field(1, ge=0)
    head_bn: Literal["sync", "local"] = "sync"


class ProtoclipMethod(Method):
    """InfoNCE, and cross entropy of each sample to the prototype of its partner's cluster.

    Before an episode is trained on, its features are computed in evaluation mode, with views of their own, and
    clustered by modality. Prototypical back-translation then expresses the clusters of one modality by the mean
    features of the other, so that a sample is compared within its own space.

    Source: Chen et al., "Prototypical Contrastive Language Image Pretraining", 2022. Deviations: an episode is a
    stretch of the data order instead of a draw with replacement; ranks cluster together and compute the prototype
    terms of their own samples only, whose gradients are those of one process; synchronised batch norm in the heads;
    clusters that end without members are left out of the softmax.
    """

    Settings: ClassVar[type[MethodSettings]] = ProtoclipSettings
    settings: ProtoclipSettings

    needs_places = True

    def __init__(self, model: ClipModel, settings: ProtoclipSettings, communication_dtype: torch.dtype | None) -> None:
        super().__init__(model, settings, communication_dtype)
        self.text_head = PrototypeHead(
            model.embed_dim,
            settings.head_hidden_dim,
            settings.head_dim,
            settings.head_layers,
            batch_norm=settings.head_bn,
        )
        # Both start from the same weights.
        self.image_head = copy.deepcopy(self.text_head)
        self.proto_scale = LogitScale()
        self.clusters: Clusters | None = None
        self._features: EpisodeFeatures | None = None
        self._external: np.ndarray | None = None
        self._external_hash = ""
        # Whether the step at hand has prototype terms.
        self._active = False

    def begin_run(self, train: TrainConfig, num_samples: int | None) -> None:
        """Check the episodes against the run, find faiss, open the external teacher."""
        settings = self.settings
        self._steps, self._global_batch_size, self._seed = train.steps, train.global_batch_size, train.seed
        self._episode_size = settings.episode_steps * train.global_batch_size
        self._warm_until = settings.warmup_episodes * settings.episode_steps
        self._last_step = train.steps - settings.lit_episodes * settings.episode_steps
        if not settings.w_proto and not (settings.w_external and settings.external_teacher):
            raise ConfigError(
                "method protoclip without prototype terms is CLIP: set method.w_proto above 0, or use method.name clip"
            )
        if self._warm_until >= self._last_step:
            raise ConfigError(
                f"train.steps {train.steps} leaves no step for prototypes: method.warmup_episodes "
                f"{settings.warmup_episodes} and method.lit_episodes {settings.lit_episodes} of method.episode_steps "
                f"{settings.episode_steps} take them all; train longer or use shorter or fewer episodes"
            )
        if settings.clusters > self._episode_size:
            raise ConfigError(
                f"method.clusters {settings.clusters} is more than the {self._episode_size} samples of an episode "
                f"(method.episode_steps {settings.episode_steps} x train.global_batch_size {train.global_batch_size}); "
                "use fewer clusters or longer episodes"
            )
        if settings.cluster_sample is not None and settings.cluster_sample < settings.clusters:
            raise ConfigError(
                f"method.cluster_sample {settings.cluster_sample} is less than method.clusters {settings.clusters}; "
                "fit on at least one sample for each cluster"
            )
        if importlib.util.find_spec("faiss") is None:
            raise ConfigError("method protoclip clusters with faiss, which is missing: pip install faiss-cpu")
        if settings.external_teacher is not None:
            self._open_external(Path(settings.external_teacher), num_samples)

    def _open_external(self, path: Path, num_samples: int | None) -> None:
        if not self.settings.back_translation:
            raise ConfigError(
                "method.external_teacher has a space of its own, which only method.back_translation true can use"
            )
        try:
            rows = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"method.external_teacher {path} is no .npy file that can be read ({reason})") from None
        if not isinstance(rows, np.ndarray) or rows.ndim != 2 or rows.dtype.kind != "f":
            raise ConfigError(f"method.external_teacher {path} must hold one array of floats, a row for each sample")
        if num_samples is not None and len(rows) != num_samples:
            raise ConfigError(
                f"method.external_teacher {path} has {len(rows)} rows, data.train has {num_samples} samples; make it "
                "from the same shards in the same order"
            )
        # Some rows spread over the file tell another one apart without reading it all.
        some = rows[np.linspace(0, len(rows) - 1, min(len(rows), _HASHED_ROWS)).astype(np.int64)]
        digest = hashlib.blake2b(repr((rows.shape, str(rows.dtype))).encode(), digest_size=16)
        digest.update(np.ascontiguousarray(some).data)
        self._external, self._external_hash = rows, digest.hexdigest()

    def training_rules(self) -> list[TrainingRule]:
        """Heads do not decay; with `lit_episodes` the image tower's learning rate ends where they begin."""
        rules = [TrainingRule("image_head", weight_decay=0.0), TrainingRule("text_head", weight_decay=0.0)]
        if self.settings.lit_episodes:
            rules.append(TrainingRule("model.image_tower", last_step=self._last_step))
        return rules

    def begin_step(self, step: int, batch: int) -> range | None:
        """Ask for the episode of this batch, where prototypes count and it is not the one at hand."""
        self._active = self._warm_until < step <= self._last_step
        if not self._active:
            self.clusters = None
            return None
        length = self.settings.episode_steps
        first = batch // length * length
        if self.clusters is not None and self.clusters.first == first * self._global_batch_size:
            return None
        self.clusters = None
        dims = [self.settings.head_dim] * 2 + ([] if self._external is None else [self._external.shape[1]])
        self._features = EpisodeFeatures(
            self._episode_size // world_size(), dims, int(self.settings.feature_memory_gib * 2**30)
        )
        self._first = first * self._global_batch_size
        return range(first, first + length)

    def encode(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """image_features and text_features, each [1, m, embed_dim], not normalised; position int64 [m]."""
        return {**super().encode(batch), "position": batch["position"]}

    def preview(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The rows to be clustered, each [m, head_dim], unit norm."""
        image, text = self._project(self.encode(batch))
        return {"image": image, "text": text}

    def _project(self, features: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        image, text = features["image_features"][0], features["text_features"][0]
        return normalize(self.image_head(image)), normalize(self.text_head(text))

    def collect(self, features: dict[str, Tensor], batch: dict[str, Tensor]) -> None:
        """Keep the rows, and the external teacher's, until the episode is complete."""
        rows = [features["image"], features["text"]]
        if self._external is not None:
            found = torch.from_numpy(self._external[batch["sample_index"].cpu().numpy()].astype(np.float32))
            if found.abs().max() > MAX_ENTRY:
                raise DataError(f"method.external_teacher has entries above {MAX_ENTRY}; scale its rows to unit length")
            rows.append(found)
        self._features.append(rows, batch["position"])

    def end_preview(self) -> str:
        """Cluster the episode."""
        settings = self.settings
        features, self._features = self._features, None
        episode = self._first // self._episode_size
        self.clusters = cluster_episode(
            features,
            self._first,
            self._episode_size,
            settings.clusters,
            iterations=settings.cluster_iterations,
            restarts=settings.cluster_restarts,
            sample=settings.cluster_sample or _ROWS_PER_CENTROID * settings.clusters,
            seed=keyed_hash("clusters", self._seed, episode) >> 1,
            back_translation=settings.back_translation,
            device=self.pixel_mean.device,
        )
        left_out = self.clusters.left_out
        without = f", {left_out} without finite features" if left_out else ""
        return (
            f"episode {episode}: {settings.clusters} clusters of {self._episode_size} samples in "
            f"{len(self.clusters.labels)} modalities{without}"
        )

    def objective(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """The symmetric InfoNCE of the global batch and the prototype terms, this rank's share."""
        scale, proto_scale = self.model.logit_scale(), self.proto_scale()
        contrastive = contrastive_terms(
            normalize(features["image_features"]),
            normalize(features["text_features"]),
            scale,
            communication_dtype=self.communication_dtype,
        )
        terms = {"clip": contrastive.clip[0, 0]}
        image, text = self._project(features)
        if self._active:
            terms |= self._prototype_terms(image, text, proto_scale, features["position"])
        loss = sum(getattr(self.settings, f"w_{name}") * term for name, term in terms.items())
        if len(terms) == 1:
            # Heads and scale get gradients of zero rather than none, which engines that partition would wait for.
            loss = loss + 0.0 * (image.sum() + text.sum() + proto_scale.sum())
        detached = {f"loss/{name}": term.detach() for name, term in terms.items()}
        return {"loss": loss, **detached, "logit_scale": scale.detach(), "proto_scale": proto_scale.detach()}

    def _prototype_terms(self, image: Tensor, text: Tensor, scale: Tensor, positions: Tensor) -> dict[str, Tensor]:
        settings, clusters = self.settings, self.clusters
        labels, members = clusters.of(positions), clusters.counts > 0
        students = {IMAGE: image, TEXT: text}

        def term(table: int, temperature: float) -> Tensor:
            source, target = TABLES[table]
            teacher = None
            if temperature:
                teacher = clusters.centroids[target]
                teacher = normalize(teacher) if settings.normalize_teacher else teacher
            return prototype_loss(
                students[source],
                clusters.tables[table] if settings.back_translation else clusters.centroids[target],
                scale,
                labels[target],
                members=members[target],
                teacher=teacher,
                target_temperature=temperature,
            )

        terms = {}
        if settings.w_proto:
            terms["proto"] = sum(term(table, settings.target_temperature) for table in (0, 1)) / 2
        if len(labels) > EXTERNAL and settings.w_external:
            terms["external"] = sum(term(table, 0.0) for table in (2, 3)) / 2
        return terms

    def metrics(self) -> dict[str, float]:
        """Of the clusters at hand: share with members (the least of the modalities), tightness, samples left out."""
        if self.clusters is None:
            return {}
        used = (self.clusters.counts > 0).double().mean(dim=1)
        inertia = self.clusters.inertia.tolist()
        return {
            "proto/used_clusters": float(used.min()),
            "proto/inertia_image": inertia[IMAGE],
            "proto/inertia_text": inertia[TEXT],
            "proto/left_out": float(self.clusters.left_out),
        }

    def method_state(self) -> dict[str, Any]:
        """The clusters of the episode at hand, so that a run resumed within it does not cluster again."""
        state = {} if self.clusters is None else {"clusters": self.clusters.state()}
        return {**state, "external_hash": self._external_hash}

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Restore the clusters; those of other settings are dropped, and the episode is clustered again."""
        if state.get("external_hash", "") != self._external_hash:
            raise ConfigError(
                "the checkpoint was made with another method.external_teacher; restore the file, or start a new "
                "--run_dir"
            )
        self.clusters = None
        if "clusters" in state:
            clusters = Clusters.from_state(state["clusters"], self.pixel_mean.device)
            modalities = 2 if self._external is None else 3
            expected = (
                (modalities, self._episode_size),
                (2, self.settings.clusters, self.settings.head_dim),
                2 * (modalities - 1) if self.settings.back_translation else 0,
            )
            found = (tuple(clusters.labels.shape), tuple(clusters.centroids.shape), len(clusters.tables))
            self.clusters = clusters if found == expected else None

    def state_digest(self) -> str:
        """Hash of the clusters."""
        return "" if self.clusters is None else self.clusters.content_hash()

    def bounded_parameters(self) -> list[BoundedParameter]:
        """Both temperatures."""
        low, high = self.settings.logit_scale_min, self.settings.logit_scale_max
        return [*super().bounded_parameters(), BoundedParameter(self.proto_scale.log_value, low, high)]

    def describe(self, global_batch_size: int) -> list[str]:
        """Negatives, and what an episode is."""
        settings = self.settings
        size = settings.episode_steps * global_batch_size
        return [
            *super().describe(global_batch_size),
            f"prototypes: {settings.clusters} clusters of each modality per episode of {settings.episode_steps} steps "
            f"= {size} samples; the first {settings.warmup_episodes} and last {settings.lit_episodes} episodes without",
        ]
