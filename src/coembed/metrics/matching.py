"""How well two embeddings, or a matrix of weights, find each cell's partner in another modality."""

from __future__ import annotations

import numpy as np
from scipy import sparse

from coembed.errors import DataError


def foscttm(a: np.ndarray, b: np.ndarray, chunk: int = 512) -> float:
    """Return the fraction of samples closer than the true match (translation_metrics.md section 3).

    For a cell of one modality, the cells of the other that are closer than its partner, and half
    of those at the same distance, divided by n - 1; averaged over cells and both directions.
    0 is perfect, 0.5 is chance, and an embedding that has collapsed to a point scores 0.5 too.
    Published variants that divide by n or ignore ties give other numbers.

    Args:
        a: (n, d) embedding of one modality, finite.
        b: (n, d) of the other; row i is the same cell as row i of `a`.
        chunk: number of cells whose distances to all others, 8 bytes each, are held in memory.

    Raises:
        DataError: fewer than two cells, shapes that differ, a value that is not finite.
    """
    from scipy.spatial.distance import cdist

    a, b = _checked_embedding("a", a), _checked_embedding("b", b)
    if a.shape != b.shape:
        raise DataError(
            f"the embeddings have shapes {a.shape} and {b.shape}",
            remedy="Pass the same cells in the same order, in one space",
        )
    n = len(a)
    blocks = [slice(start, start + chunk) for start in range(0, n, chunk)]
    partner = np.concatenate([cdist(a[k], b[k], "sqeuclidean").diagonal() for k in blocks])
    ahead = 0.0
    for k in blocks:
        distances = cdist(a[k], b, "sqeuclidean")
        np.fill_diagonal(distances[:, k], np.inf)  # a cell does not compete with itself
        for limit in (partner[k, None], partner):  # from a to all of b, from b to this part of a
            ahead += np.count_nonzero(distances < limit)
            ahead += np.count_nonzero(distances == limit) / 2
    return ahead / (2 * n * (n - 1))


def match_score(weights: np.ndarray | sparse.csr_matrix) -> float:
    """Return the mean weight of the true partner (NeurIPS 2021; translation_metrics.md section 3).

    Negative weights become 0, then each row is divided by its sum; a row without weight scores 0.
    Uniform weights score 1 / n. Early leaderboards show a thousand times this.

    Args:
        weights: (n, n), dense or sparse, finite; cell i belongs to column i.

    Raises:
        DataError: not square, empty, or a value that is not finite.
    """
    matrix = sparse.csr_matrix(weights, dtype=np.float64)
    if matrix.shape[0] != matrix.shape[1] or matrix.shape[0] == 0:
        raise DataError(
            f"the weights have shape {matrix.shape}", remedy="Pass a row and a column per cell"
        )
    if not np.isfinite(matrix.data).all():
        raise DataError("not every weight is finite", remedy="Give pairs without a weight 0")
    matrix = matrix.maximum(0)
    totals = np.asarray(matrix.sum(axis=1)).ravel()
    shares = np.divide(matrix.diagonal(), totals, out=np.zeros_like(totals), where=totals > 0)
    return float(shares.mean())


def _checked_embedding(name: str, embedding: np.ndarray) -> np.ndarray:
    """The embedding as (n, d) float64."""
    points = np.asarray(embedding, dtype=np.float64)
    if points.ndim != 2 or len(points) < 2 or points.shape[1] == 0:
        raise DataError(
            f"has shape {points.shape}",
            where=f"embedding {name}",
            remedy="Pass one row per cell, at least two of them, and at least one column",
        )
    usable = np.asarray(np.isfinite(points).all(axis=1))
    if not usable.all():
        raise DataError(
            f"{(~usable).sum()} of {len(usable)} cells have values that are not finite, the first "
            f"is cell {usable.argmin()} (counted from 0)",
            where=f"embedding {name}",
            remedy="The model has probably diverged; score an embedding of its last good state",
        )
    return points
