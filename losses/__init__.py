"""Losses on feature tensors and the distributed primitives they need."""

from losses.byol import byol_loss
from losses.clustering import kmeans
from losses.contrastive import ContrastiveTerms, contrastive_terms
from losses.episode import Clusters, EpisodeFeatures, cluster_episode
from losses.filip import KeySelection, filip_loss
from losses.functional import normalize
from losses.label_smoothing import smoothing_sums, smoothing_term
from losses.late_interaction import late_interaction_scores
from losses.mlm import masked_lm_loss
from losses.nearest_neighbor import NearestNeighborQueue, neighbour_statistics, reshard_queue_states
from losses.prototypes import prototype_loss
from losses.sigmoid import sigmoid_loss
from losses.simclr import simclr_loss
from losses.simsiam import feature_std, simsiam_loss

__all__ = [
    "Clusters",
    "ContrastiveTerms",
    "EpisodeFeatures",
    "KeySelection",
    "NearestNeighborQueue",
    "byol_loss",
    "cluster_episode",
    "contrastive_terms",
    "feature_std",
    "filip_loss",
    "kmeans",
    "late_interaction_scores",
    "masked_lm_loss",
    "neighbour_statistics",
    "normalize",
    "prototype_loss",
    "reshard_queue_states",
    "sigmoid_loss",
    "simclr_loss",
    "simsiam_loss",
    "smoothing_sums",
    "smoothing_term",
]
