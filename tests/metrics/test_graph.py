"""The neighbour graph and its clusters are scanpy's."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import scanpy as sc
from anndata import AnnData

from coembed.metrics import louvain_partitions, neighbours
from coembed.metrics.graph import RESOLUTIONS


@pytest.fixture(scope="module")
def blobs() -> np.ndarray:
    rng = np.random.default_rng(0)
    return (
        rng.normal(size=(6, 10))[rng.integers(6, size=240)] + rng.normal(size=(240, 10))
    ).astype(np.float32)


def test_neighbours_are_those_of_scanpy(blobs):
    cells = AnnData(np.zeros((240, 1)), obsm={"X_emb": blobs})
    sc.pp.neighbors(cells, use_rep="X_emb")
    graph = neighbours(blobs)
    assert (graph != cells.obsp["connectivities"]).nnz == 0
    assert abs(graph - graph.T).max() == 0
    # k = 15 with the cell itself: 14 others, and those who chose this cell.
    assert graph.getnnz(axis=1).min() >= 14


def test_partitions_are_those_of_scanpy(blobs):
    cells = AnnData(np.zeros((240, 1)), obsm={"X_emb": blobs})
    sc.pp.neighbors(cells, use_rep="X_emb")
    partitions = louvain_partitions(cells.obsp["connectivities"])
    assert len(RESOLUTIONS) == len(partitions) == 20
    assert RESOLUTIONS[2] == 0.3
    for resolution, partition in zip(RESOLUTIONS, partitions, strict=True):
        sc.tl.louvain(cells, resolution=resolution)
        np.testing.assert_array_equal(partition, cells.obs["louvain"].astype(int))
    assert len(np.unique(partitions[-1])) > len(np.unique(partitions[0]))


@pytest.mark.parametrize("n", [3, 4, 8, 15, 16, 40])
def test_few_or_identical_cells_have_a_graph(n):
    rng = np.random.default_rng(n)
    for x in (rng.normal(size=(n, 2)), np.ones((n, 2))):
        graph = neighbours(x)
        assert graph.shape == (n, n)
        assert graph.nnz > 0
        assert louvain_partitions(graph).shape == (20, n)


def test_neighbours_leave_the_number_of_threads_alone():
    """Numba raises it on its first call, torch's too: in a fresh process, as users start."""
    code = """
import numpy as np, torch
from coembed.metrics.graph import neighbours
torch.set_num_threads(1)
neighbours(np.random.default_rng(0).standard_normal((60, 3)))
assert torch.get_num_threads() == 1, torch.get_num_threads()
"""
    subprocess.run([sys.executable, "-c", code], check=True)
