"""The quality of an embedding: pure functions of arrays, and `score`, which makes the table."""

from __future__ import annotations

from coembed.metrics.biology import ami, ari, best_partition, label_asw, nmi
from coembed.metrics.graph import louvain_partitions, neighbours
from coembed.metrics.score import score
from coembed.metrics.silhouette import silhouette_samples
from coembed.metrics.technical import batch_asw, graph_connectivity, scorable_types
from coembed.metrics.trajectory import diffusion_map, rank_agreement, trajectory_conservation

__all__ = [
    "ami",
    "ari",
    "batch_asw",
    "best_partition",
    "diffusion_map",
    "graph_connectivity",
    "label_asw",
    "louvain_partitions",
    "neighbours",
    "nmi",
    "rank_agreement",
    "scorable_types",
    "score",
    "silhouette_samples",
    "trajectory_conservation",
]
