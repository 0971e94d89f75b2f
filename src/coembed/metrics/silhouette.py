"""Silhouettes of many labelings in one pass over the distances."""

from __future__ import annotations

import numpy as np
from scipy import sparse


def codes_of(labels: np.ndarray) -> np.ndarray:
    """Return whole numbers 0, 1, ... in the sorted order of the labels; the shape is kept."""
    return np.unique(labels, return_inverse=True)[1].reshape(np.shape(labels))


def silhouette_samples(embedding: np.ndarray, labels: np.ndarray, chunk: int = 256) -> np.ndarray:
    """Return the silhouette s = (b - a) / max(a, b) of each cell (metrics.md section 3).

    a is the mean Euclidean distance to the other cells of its label, b the smallest mean distance
    to the cells of another label. s = 0 for the only cell of its label, and where a = b = 0;
    NaN where there is one label only. The distances of `chunk` cells are held at a time.

    Args:
        embedding: (n, d).
        labels: (n,) one labeling or (m, n) several, scored on the same distances.
        chunk: number of cells whose distances to all others are held in memory.

    Returns:
        of the shape of `labels`, in [-1, 1].
    """
    points = np.asarray(embedding, dtype=np.float64)
    codes = codes_of(np.atleast_2d(labels))
    n_labelings, n_cells = codes.shape
    n_labels = int(codes.max()) + 1
    columns = codes + n_labels * np.arange(n_labelings)[:, None]
    sizes = np.bincount(columns.ravel(), minlength=n_labelings * n_labels)
    # Row j of `members` marks the cells of one label of one labeling: members @ distances = sums.
    members = sparse.csr_matrix(
        (
            np.ones(columns.size),
            (columns.ravel(), np.tile(np.arange(n_cells), n_labelings)),
        ),
        shape=(n_labelings * n_labels, n_cells),
    )
    sizes = sizes.reshape(n_labelings, n_labels, 1)
    result = np.empty(codes.shape)
    for start in range(0, n_cells, chunk):
        cells = slice(start, start + chunk)
        result[:, cells] = _silhouettes(members @ _distances(points, cells), sizes, codes[:, cells])
    return result.reshape(np.shape(labels))


def _distances(points: np.ndarray, cells: slice) -> np.ndarray:
    """(n, c) distances of all cells to some; exactly 0 between identical points."""
    from scipy.spatial.distance import cdist

    return cdist(points, points[cells])


def _silhouettes(sums: np.ndarray, sizes: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """(m, c) silhouettes from (m * L, c) sums of distances, (m, L, 1) sizes and (m, c) codes."""
    own = codes[:, None, :]
    sums = sums.reshape(*sizes.shape[:2], -1)
    others = np.take_along_axis(np.broadcast_to(sizes, sums.shape), own, axis=1)[:, 0] - 1
    with np.errstate(divide="ignore", invalid="ignore"):
        a = np.take_along_axis(sums, own, axis=1)[:, 0] / others
        means = np.where(sizes > 0, sums / sizes, np.inf)
        np.put_along_axis(means, own, np.inf, axis=1)
        b = means.min(axis=1)
        s = (b - a) / np.maximum(a, b)
    return np.where((others == 0) | ((a == 0) & (b == 0)), 0.0, s)
