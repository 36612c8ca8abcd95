"""Losses on feature tensors and the distributed primitives they need."""

from losses.clustering import kmeans
from losses.contrastive import ContrastiveTerms, contrastive_terms
from losses.episode import Clusters, EpisodeFeatures, cluster_episode
from losses.functional import normalize
from losses.mlm import masked_lm_loss
from losses.nearest_neighbor import NearestNeighborQueue, neighbour_statistics, reshard_queue_states
from losses.prototypes import prototype_loss
from losses.simsiam import feature_std, simsiam_loss

__all__ = [
    "Clusters",
    "ContrastiveTerms",
    "EpisodeFeatures",
    "NearestNeighborQueue",
    "cluster_episode",
    "contrastive_terms",
    "feature_std",
    "kmeans",
    "masked_lm_loss",
    "neighbour_statistics",
    "normalize",
    "prototype_loss",
    "reshard_queue_states",
    "simsiam_loss",
]
