"""How well an embedding keeps cell types: agreement of clusters with labels, silhouette width.

Every function takes one labeling, (n,), or several, (m, n), and returns one value for each, so
that a score and its permutation null cost one pass.
"""

from __future__ import annotations

import numpy as np

from coembed.metrics.silhouette import codes_of, silhouette_samples


def nmi(labels: np.ndarray, clusters: np.ndarray) -> float:
    """Return NMI = 2 I(U; V) / (H(U) + H(V)) of two labelings, (n,) each (metrics.md section 2).

    1 where both are one group; 0 where one of them is.
    """
    return _nmi(codes_of(labels), codes_of(clusters))


def _nmi(labels: np.ndarray, clusters: np.ndarray) -> float:
    """NMI of two labelings given as whole numbers from 0."""
    n_clusters = int(clusters.max()) + 1
    table = np.bincount(labels * n_clusters + clusters, minlength=(labels.max() + 1) * n_clusters)
    table = table.reshape(-1, n_clusters)
    n_cells, of_label, of_cluster = len(labels), table.sum(axis=1), table.sum(axis=0)
    entropies = _entropy(of_label) + _entropy(of_cluster)
    if entropies == 0:
        return 1.0
    row, column = table.nonzero()
    joint = table[row, column]
    # A ratio of whole numbers: exactly 1, and I exactly 0, for independent groups.
    lift = joint * float(n_cells) / (of_label[row] * of_cluster[column].astype(float))
    return float(np.clip(2 * np.sum(joint * np.log(lift)) / n_cells / entropies, 0, 1))


def _entropy(sizes: np.ndarray) -> float:
    """Entropy, in nats, of groups of these sizes."""
    share = sizes[sizes > 0] / sizes.sum()
    return float(-np.sum(share * np.log(share))) if len(share) > 1 else 0.0


def ari(labels: np.ndarray, clusters: np.ndarray) -> float:
    """Return the Rand index adjusted for chance (metrics.md section 2), labelings of (n,)."""
    from sklearn.metrics import adjusted_rand_score

    return float(adjusted_rand_score(labels, clusters))


def ami(labels: np.ndarray, clusters: np.ndarray) -> float:
    """Return the mutual information adjusted for chance, arithmetic mean, labelings of (n,)."""
    from sklearn.metrics import adjusted_mutual_info_score

    return float(adjusted_mutual_info_score(labels, clusters))


def best_partition(labels: np.ndarray, partitions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Choose the partition with the highest NMI, for each labeling (metrics.md section 2).

    The first maximum above 0 is kept. The choice uses the labels it is scored on, so the score is
    optimistic; its null must be chosen the same way.

    Args:
        labels: (n,) or (m, n).
        partitions: (p, n).

    Returns:
        the NMI, 0 where no partition is above 0, and the index of the partition, there -1; both
        of shape () or (m,).
    """
    labelings = codes_of(np.atleast_2d(labels))
    clusterings = [codes_of(partition) for partition in partitions]
    scores = np.array([[_nmi(one, clusters) for clusters in clusterings] for one in labelings])
    best, index = scores.max(axis=1), scores.argmax(axis=1)
    shape = np.shape(labels)[:-1]
    return best.reshape(shape), np.where(best > 0, index, -1).reshape(shape)


def label_asw(embedding: np.ndarray, labels: np.ndarray, chunk: int = 256) -> np.ndarray:
    """Return the cell-type silhouette width (s + 1) / 2, mean over cells (metrics.md section 3).

    Args:
        embedding: (n, d).
        labels: (n,) or (m, n).
        chunk: see `silhouette_samples`.

    Returns:
        () or (m,), in [0, 1]; NaN unless there are at least 2 and at most n - 1 labels.
    """
    labelings = np.atleast_2d(labels)
    n_labels = np.array([len(np.unique(labeling)) for labeling in labelings])
    width = (silhouette_samples(embedding, labelings, chunk).mean(axis=1) + 1) / 2
    width[(n_labels < 2) | (n_labels >= labelings.shape[1])] = np.nan
    return width.reshape(np.shape(labels)[:-1])
