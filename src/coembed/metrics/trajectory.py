"""Whether an embedding keeps a known differentiation order (metrics.md section 5).

The embedding is ordered by diffusion pseudotime (Haghverdi et al. 2016) and compared with the
order that came with the data. The steps and constants are scib's and scanpy's, on purpose.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from coembed.metrics.silhouette import codes_of

N_EIGEN = 15
"""Eigenpairs that are computed."""
N_COMPONENTS = 10
"""Eigenpairs that the pseudotime uses."""
N_ROOT_VOTES = 3
"""Components that vote for the root, the trivial one first."""
STATIONARY = 0.9994
"""Eigenvalues from here on count as stationary."""


@dataclass(frozen=True, eq=False)
class DiffusionMap:
    """The diffusion map of the largest connected component of a graph.

    Attributes:
        n_cells: cells of the whole graph.
        cells: (m,) int, those of the largest component.
        values: (10,) eigenvalues, falling; (0,) for a component of fewer than 11 cells.
        vectors: (m, 10) eigenvectors; (m, 0) for a component of fewer than 11 cells.
    """

    n_cells: int
    cells: np.ndarray
    values: np.ndarray
    vectors: np.ndarray


@dataclass(frozen=True, eq=False)
class Conservation:
    """A trajectory score.

    Attributes:
        value: (rho + 1) / 2, mean over batches; 0 where the root is lost, else NaN if undefined.
        counted: (n,) bool, the cells of the batches that counted.
        undefined: why the value is no measurement, or None.
        caution: what makes the value doubtful, or None.
    """

    value: float
    counted: np.ndarray
    undefined: str | None = None
    caution: str | None = None


def diffusion_map(connectivities: sparse.csr_matrix) -> DiffusionMap:
    """Return the diffusion map of the largest component, as `scanpy.tl.diffmap` makes it.

    K = D^-1 W D^-1, T = Z^-1/2 K Z^-1/2 with D and Z the row sums of W and K; the largest
    eigenpairs of T.

    Args:
        connectivities: (n, n) symmetric graph of the cells in the order, a part of the graph of
            all cells.

    Raises:
        scipy.sparse.linalg.ArpackError: the eigenpairs do not converge.
    """
    from scipy.sparse.linalg import eigsh

    n_cells = connectivities.shape[0]
    _, piece = sparse.csgraph.connected_components(connectivities, directed=False)
    cells = np.flatnonzero(piece == np.bincount(piece).argmax())
    if len(cells) <= N_COMPONENTS:
        return DiffusionMap(n_cells, cells, np.empty(0), np.empty((len(cells), 0)))
    kernel = connectivities[cells][:, cells]
    kernel = _scaled(kernel, 1 / np.asarray(kernel.sum(axis=0)).ravel())
    kernel = _scaled(kernel, 1 / np.sqrt(np.asarray(kernel.sum(axis=0)).ravel()))
    values, vectors = eigsh(
        kernel.astype(np.float64),
        k=min(N_EIGEN, len(cells) - 1),
        which="LM",
        v0=np.random.RandomState(0).standard_normal(len(cells)),
    )
    # Single precision as in scanpy: the rule at 0.9994 then falls on the same side.
    falling = slice(None, -N_COMPONENTS - 1, -1)
    return DiffusionMap(
        n_cells, cells, values[falling].astype(np.float32), vectors[:, falling].astype(np.float32)
    )


def _scaled(matrix: sparse.csr_matrix, factor: np.ndarray) -> sparse.csr_matrix:
    """diag(factor) @ matrix @ diag(factor)."""
    diagonal = sparse.diags(factor)
    return sparse.csr_matrix(diagonal @ matrix @ diagonal)


def root_cell(vectors: np.ndarray, start: np.ndarray) -> int:
    """Choose the most extreme cell of the start type.

    On each of the first three components the start cell farthest to the side on which the start
    type lies gets a vote; ties go to the first cell.

    Args:
        vectors: (m, >= 3) diffusion components.
        start: (s,) int, the cells of the start type.
    """
    coordinates, centre = vectors[start, :N_ROOT_VOTES], vectors[:, :N_ROOT_VOTES].mean(axis=0)
    low = coordinates.mean(axis=0) < centre
    voted = np.where(low, coordinates.argmin(axis=0), coordinates.argmax(axis=0))
    return int(start[np.bincount(voted).argmax()])


def pseudotime(diffusion: DiffusionMap, root: int) -> np.ndarray:
    """Return the diffusion pseudotime, 0 at the root and outside the largest component.

    d^2 = sum_j w_j^2 (psi_rj - psi_ij)^2 with w = lambda / (1 - lambda), and w = 1 where
    lambda >= 0.9994; divided by its largest value.

    Args:
        diffusion: the diffusion map.
        root: position in `diffusion.cells`.

    Returns:
        (n,) in [0, 1].
    """
    values, vectors = diffusion.values, diffusion.vectors
    moving = values < STATIONARY
    weight = np.where(moving, values / np.where(moving, 1 - values, 1), 1)
    distance = np.sqrt(np.square(weight * (vectors - vectors[root])).sum(axis=1))
    time = np.zeros(diffusion.n_cells)
    if distance.max() > 0:
        time[diffusion.cells] = distance / distance.max()
    return time


def rank_agreement(
    before: np.ndarray,
    after: np.ndarray,
    batches: np.ndarray | None = None,
    min_cells_per_batch: int = 2,
) -> tuple[float, np.ndarray]:
    """Return (rho + 1) / 2, rho the Spearman correlation, unweighted mean over batches.

    Args:
        before, after: (n,) two orders of the same cells.
        batches: (n,); None is one batch.
        min_cells_per_batch: batches with fewer cells do not count; nor do those in which one of
            the orders is constant.

    Returns:
        the score, NaN where no batch counts; (n,) bool, the cells of the batches that counted.
    """
    from scipy.stats import rankdata

    batches = np.zeros(len(before), dtype=int) if batches is None else codes_of(batches)
    rhos, counted = [], np.zeros(len(before), dtype=bool)
    for batch in range(int(batches.max()) + 1):
        cells = batches == batch
        ranks = rankdata(before[cells]), rankdata(after[cells])
        if cells.sum() >= max(2, min_cells_per_batch) and all(np.ptp(rank) > 0 for rank in ranks):
            rhos.append(np.corrcoef(*ranks)[0, 1])
            counted |= cells
    return (float(np.mean(rhos)) + 1) / 2 if rhos else np.nan, counted


def trajectory_conservation(
    diffusion: DiffusionMap,
    labels: np.ndarray,
    before: np.ndarray,
    batches: np.ndarray | None = None,
    min_cells_per_batch: int = 2,
) -> Conservation:
    """Compare the order of an embedding with a known one.

    The start is the type with the smallest mean of `before`. Where none of its cells is in the
    largest component the review's value is 0; it is returned, and flagged as undefined, because
    it says that the graph fell apart and not that the order is wrong.

    Args:
        diffusion: the diffusion map of the n cells in the order.
        labels: (n,) cell types.
        before: (n,) the known pseudotime, without NaN.
        batches: (n,) or None.
        min_cells_per_batch: 2 as in scib; 10 is steadier (metrics.md section 5).
    """
    names, types = np.unique(labels, return_inverse=True)
    first = int((np.bincount(types, weights=before) / np.bincount(types)).argmin())
    nothing = np.zeros(len(labels), dtype=bool)
    start = np.flatnonzero(types[diffusion.cells] == first)
    if len(start) == 0:
        text = f"the start type '{names[first]}' lies outside the largest component"
        return Conservation(0.0, nothing, undefined=text)
    if diffusion.vectors.shape[1] < N_COMPONENTS:
        text = f"the largest component has {len(diffusion.cells)} cells, {N_COMPONENTS + 1} needed"
        return Conservation(np.nan, nothing, undefined=text)
    after = pseudotime(diffusion, root_cell(diffusion.vectors, start))
    value, counted = rank_agreement(before, after, batches, min_cells_per_batch)
    if np.isnan(value):
        text = f"no batch has {max(2, min_cells_per_batch)} cells that differ in the order"
        return Conservation(np.nan, nothing, undefined=text)
    slow = diffusion.values[1] >= STATIONARY
    caution = f"second eigenvalue >= {STATIONARY}: the order is doubtful" if slow else None
    return Conservation(value, counted, caution=caution)
