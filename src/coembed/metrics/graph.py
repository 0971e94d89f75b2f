"""The neighbour graph of an embedding and its Louvain partitions, as scanpy makes them."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import sparse

RESOLUTIONS = tuple(step / 10 for step in range(1, 21))
"""The Louvain resolutions the review searched: 0.1, 0.2, ..., 2.0 (metrics.md section 2)."""

EXACT_UP_TO = 50_000
"""Up to this many cells the neighbours are exact; above it, scanpy's own approximate choice."""


def neighbours(embedding: np.ndarray, k: int = 15, seed: int = 0) -> sparse.csr_matrix:
    """Return the UMAP connectivities of the k-nearest-neighbour graph.

    This is `scanpy.pp.neighbors` (metrics.md section 0): Euclidean distances, `k` neighbours with
    the cell itself among them, the fuzzy union of UMAP. Fewer than `k` cells: k = 1 + n // 2.

    Args:
        embedding: (n, d), n >= 2.
        k: number of neighbours, the cell itself included.
        seed: of the approximate search above `EXACT_UP_TO` cells; exact search needs none.

    Returns:
        (n, n) symmetric, float32, in (0, 1] where two cells are neighbours.
    """
    from anndata import AnnData
    from threadpoolctl import threadpool_limits

    scanpy = _import_quietly("scanpy")
    cells = AnnData(np.asarray(embedding))
    # numba raises the number of threads of every OpenMP library, torch's among them; a training
    # that follows in this process would have other bits and, on a busy machine, crawl.
    with threadpool_limits(), warnings.catch_warnings():
        # of identical cells, for which scanpy alters a sparse matrix, slowly
        warnings.simplefilter("ignore", sparse.SparseEfficiencyWarning)
        scanpy.pp.neighbors(
            cells,
            n_neighbors=k,
            use_rep="X",
            transformer="sklearn" if cells.n_obs <= EXACT_UP_TO else None,
            random_state=seed,
        )
    return cells.obsp["connectivities"]


def louvain_partitions(
    connectivities: sparse.csr_matrix,
    resolutions: Sequence[float] = RESOLUTIONS,
    seed: int = 0,
) -> np.ndarray:
    """Return the Louvain clusters at each resolution, on one graph built once.

    This is `scanpy.tl.louvain` (metrics.md section 2): the package of Traag, RBConfiguration,
    every edge in both directions, weights not used.

    Args:
        connectivities: (n, n) symmetric graph.
        resolutions: the resolution parameters.
        seed: of the optimiser; the review's is 0.

    Returns:
        (len(resolutions), n) int, cluster of each cell.
    """
    import igraph

    louvain = _import_quietly("louvain")
    edges = np.column_stack(connectivities.nonzero())
    graph = igraph.Graph(n=connectivities.shape[0], edges=edges, directed=True)
    rule = louvain.RBConfigurationVertexPartition
    return np.array(
        [
            louvain.find_partition(graph, rule, resolution_parameter=r, seed=seed).membership
            for r in resolutions
        ]
    )


def _import_quietly(name: str) -> Any:
    """Import without warnings: scanpy imports louvain, and that the deprecated pkg_resources."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)
