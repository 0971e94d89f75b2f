"""How far an embedding is free of technical structure: batch and site widths, connectivity.

As in `biology`, one labeling, (n,), or several, (m, n), at once.
"""

from __future__ import annotations

import numpy as np
from scipy import sparse

from coembed.metrics.silhouette import codes_of, silhouette_samples


def scorable_types(labels: np.ndarray, batches: np.ndarray) -> np.ndarray:
    """Return which cell types can have a batch silhouette (metrics.md section 4).

    Args:
        labels: (n,) cell types.
        batches: (n,).

    Returns:
        (number of types,) bool in the sorted order of the types: more than one batch, and fewer
        batches than cells.
    """
    types, groups = codes_of(labels), codes_of(batches)
    table = np.bincount(
        types * (groups.max() + 1) + groups, minlength=(types.max() + 1) * (groups.max() + 1)
    )
    table = table.reshape(types.max() + 1, -1)
    n_batches = (table > 0).sum(axis=1)
    return (n_batches > 1) & (n_batches < table.sum(axis=1))


def batch_asw(
    embedding: np.ndarray, labels: np.ndarray, batches: np.ndarray, chunk: int = 256
) -> np.ndarray:
    """Return the batch silhouette width within types (metrics.md section 4).

    Within each scorable type the mean over its cells of 1 - |s|, s the silhouette of the batches;
    then the unweighted mean over types. With sites for batches this is the site width. It rises
    with mixing, and also with few cells: read it against its null.

    Args:
        embedding: (n, d).
        labels: (n,) cell types.
        batches: (n,) or (m, n).
        chunk: see `silhouette_samples`.

    Returns:
        () or (m,), in [0, 1]; NaN where no type can be scored.
    """
    labelings = codes_of(np.atleast_2d(batches))
    types = codes_of(labels)
    scorable = np.array([scorable_types(types, labeling) for labeling in labelings])
    widths = np.full(scorable.shape, np.nan)
    for kind in np.flatnonzero(scorable.any(axis=0)):
        cells = np.flatnonzero(types == kind)
        s = silhouette_samples(embedding[cells], labelings[:, cells], chunk)
        widths[:, kind] = np.where(scorable[:, kind], 1 - np.abs(s).mean(axis=1), np.nan)
    n_types = scorable.sum(axis=1)
    with np.errstate(invalid="ignore"):
        mean = np.nansum(widths, axis=1) / n_types
    return mean.reshape(np.shape(batches)[:-1])


def graph_connectivity(connectivities: sparse.csr_matrix, labels: np.ndarray) -> np.ndarray:
    """Return how far each label is one piece of the graph (metrics.md section 6).

    The share of a label's cells in its largest connected component, mean over labels.

    Args:
        connectivities: (n, n) symmetric graph.
        labels: (n,) or (m, n).

    Returns:
        () or (m,), in (0, 1].
    """
    source, target = connectivities.nonzero()
    labelings = codes_of(np.atleast_2d(labels))
    shares = [_connectivity(source, target, codes_of(labeling)) for labeling in labelings]
    return np.reshape(shares, np.shape(labels)[:-1])


def _connectivity(source: np.ndarray, target: np.ndarray, codes: np.ndarray) -> float:
    """Connectivity of one labeling: the pieces of the graph without the edges between labels."""
    within = codes[source] == codes[target]
    edges = (np.ones(within.sum()), (source[within], target[within]))
    graph = sparse.csr_matrix(edges, shape=(len(codes), len(codes)))
    _, piece = sparse.csgraph.connected_components(graph, directed=False)
    largest = np.zeros(codes.max() + 1)
    np.maximum.at(largest, codes, np.bincount(piece)[piece])
    return float(np.mean(largest / np.bincount(codes)))
