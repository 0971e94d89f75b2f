"""The quality of an embedding, a translation or a matching: pure functions of arrays.

`score` makes the table of an embedding, `score_translation` that of a translation.
"""

from __future__ import annotations

from coembed.metrics.biology import ami, ari, best_partition, label_asw, nmi
from coembed.metrics.graph import louvain_partitions, neighbours
from coembed.metrics.matching import foscttm, match_score
from coembed.metrics.score import score
from coembed.metrics.silhouette import silhouette_samples
from coembed.metrics.technical import batch_asw, graph_connectivity, scorable_types
from coembed.metrics.trajectory import diffusion_map, rank_agreement, trajectory_conservation
from coembed.metrics.translation import (
    clr,
    correlation_matrix_distance,
    log_normalised,
    score_translation,
)

__all__ = [
    "ami",
    "ari",
    "batch_asw",
    "best_partition",
    "clr",
    "correlation_matrix_distance",
    "diffusion_map",
    "foscttm",
    "graph_connectivity",
    "label_asw",
    "log_normalised",
    "louvain_partitions",
    "match_score",
    "neighbours",
    "nmi",
    "rank_agreement",
    "scorable_types",
    "score",
    "score_translation",
    "silhouette_samples",
    "trajectory_conservation",
]
