"""Trajectory conservation: metrics.md section 9, T1-T4, and equality with scanpy."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from anndata import AnnData
from scipy import sparse

from coembed.metrics import (
    diffusion_map,
    neighbours,
    rank_agreement,
    score,
    trajectory_conservation,
)
from coembed.metrics.trajectory import pseudotime, root_cell


def curve(
    sd: float, n: int = 300, noise_dims: int = 8
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cells on (3t, sin 3t) with noise: embedding, t, five types along t."""
    rng = np.random.default_rng(0)
    t = np.sort(rng.random(n))
    x = np.c_[3 * t, np.sin(3 * t), np.zeros((n, noise_dims))] + rng.normal(
        0, sd, (n, noise_dims + 2)
    )
    return x, t, np.array(["abcde"[int(5 * one)] for one in t])


def conserve(x, labels, before, batches=None):
    return trajectory_conservation(diffusion_map(neighbours(x)), labels, before, batches)


def test_t1_mean_over_batches():
    before, after = np.array([1, 2, 3, 4] * 2), np.array([1, 2, 3, 4, 2, 1, 4, 3])
    batches = np.repeat(["x", "y"], 4)
    value, counted = rank_agreement(before, after, batches)
    assert value == pytest.approx(0.9, abs=1e-12)
    assert counted.all()
    assert rank_agreement(before[4:], after[4:])[0] == pytest.approx(0.8, abs=1e-12)


def test_t1_batches_that_cannot_be_ranked_do_not_count():
    before, after = np.array([1, 2, 3, 4, 5, 1, 2]), np.array([1, 2, 3, 4, 9, 7, 7])
    batches = np.array(list("xxxxyzz"))  # y has one cell, z a constant order
    value, counted = rank_agreement(before, after, batches)
    assert value == 1
    np.testing.assert_array_equal(counted, batches == "x")
    value, counted = rank_agreement(before, after, batches, min_cells_per_batch=5)
    assert np.isnan(value)
    assert not counted.any()


def test_t2_an_unreachable_cell_has_time_0():
    value, _ = rank_agreement(np.array([1, 2, 3, 4]), np.array([0.1, 0.2, 0.3, 0]))
    assert value == pytest.approx(0.4, abs=1e-12)


def test_t3_start_outside_the_largest_component():
    rng = np.random.default_rng(0)
    x = np.r_[rng.normal(0, 1, (20, 2)), rng.normal(500, 1, (40, 2))]
    labels, before = np.repeat(["start", "end"], [20, 40]), np.arange(60.0)
    lost = conserve(x, labels, before)
    assert lost.value == 0
    assert lost.undefined == "the start type 'start' lies outside the largest component"
    assert conserve(x, labels, -before).undefined is None
    row = score(x, labels=labels, pseudotime={"gex": before}).set_index("metric").loc["trajectory"]
    assert row["value"] == 0
    assert row["undefined"]
    assert "outside the largest component" in row["reason"]
    assert np.isnan(row["normalised"])


@pytest.mark.parametrize("direction", [1, -1])
def test_t4_a_curve_is_ordered_in_either_direction(direction):
    x, t, labels = curve(sd=0.05)
    assert conserve(x, labels, direction * t).value >= 0.99


def test_t4_a_random_embedding_is_at_one_half():
    _, t, labels = curve(sd=0.05)
    values = [
        conserve(np.random.default_rng(seed).normal(size=(300, 10)), labels, t).value
        for seed in range(10)
    ]
    assert 0.45 <= np.mean(values) <= 0.55


def test_a_thin_path_is_flagged():
    x, t, labels = curve(sd=0.01)
    thin = conserve(x, labels, t)
    assert thin.undefined is None
    assert "0.9994" in thin.caution
    assert conserve(*(curve(sd=0.05)[part] for part in (0, 2, 1))).caution is None


def test_diffusion_and_pseudotime_are_those_of_scanpy():
    x, _, _ = curve(sd=0.1)
    cells = AnnData(x)
    sc.pp.neighbors(cells, use_rep="X")
    sc.tl.diffmap(cells)
    diffusion = diffusion_map(cells.obsp["connectivities"])
    np.testing.assert_allclose(diffusion.values, cells.uns["diffmap_evals"][:10], atol=1e-6)
    np.testing.assert_allclose(diffusion.vectors, cells.obsm["X_diffmap"][:, :10], atol=1e-5)
    cells.uns["iroot"] = 17
    sc.tl.dpt(cells)
    np.testing.assert_allclose(pseudotime(diffusion, 17), cells.obs["dpt_pseudotime"], atol=1e-4)


def test_the_whole_is_the_recipe_of_the_sheet_on_scanpy():
    """A part of the graph of all cells, a lost group, three votes, scanpy's order, two batches."""
    x, t, labels = curve(sd=0.1, n=150)
    rng = np.random.default_rng(1)
    x = np.r_[x, rng.normal(50, 0.1, (20, 10)), rng.normal(1, 0.3, (60, 10))]
    before = np.r_[t, rng.random(20), np.full(60, np.nan)]
    labels = np.r_[labels, rng.choice(list("abcde"), 20), np.full(60, "f")]
    batches = rng.choice(["x", "y"], len(x))

    cells = AnnData(x)
    sc.pp.neighbors(cells, use_rep="X")
    path = cells[np.isfinite(before)].copy()
    lost = np.arange(path.n_obs) >= 150
    kept = path[~lost].copy()
    start = pd.Series(before[:170]).groupby(labels[:170]).mean().idxmin()
    candidates = np.flatnonzero(labels[:150] == start)
    sc.tl.diffmap(kept)
    votes = []
    for axis in kept.obsm["X_diffmap"][:, :3].T:
        low = axis[candidates].mean() < axis.mean()
        votes.append(candidates[axis[candidates].argmin() if low else axis[candidates].argmax()])
    kept.uns["iroot"] = max(sorted(votes), key=votes.count)
    sc.tl.dpt(kept)
    order = pd.DataFrame(
        {"before": before[:170], "after": np.r_[kept.obs["dpt_pseudotime"], [0] * 20]}
    )
    rhos = [part.corr("spearman").iloc[0, 1] for _, part in order.groupby(batches[:170])]

    ordered = np.isfinite(before)
    diffusion = diffusion_map(neighbours(x)[ordered][:, ordered])
    np.testing.assert_array_equal(diffusion.cells, np.arange(150))
    got = trajectory_conservation(diffusion, labels[ordered], before[ordered], batches[ordered])
    assert got.value == pytest.approx((np.mean(rhos) + 1) / 2, abs=1e-6)
    rows = score(x, labels=labels, batch=batches, pseudotime={"gex": before}, n_permutations=0)
    assert rows.set_index("metric").loc["trajectory", "value"] == got.value


def test_root_has_most_votes_and_ties_go_to_the_first_cell():
    vectors = np.array([[5.0, 0, 0], [-1, 9, 9], [0, 0, 0], [0, 8, 8]])
    assert root_cell(vectors, np.array([0, 1])) == 1  # 0 wins the first component, 1 two others
    vectors = np.array([[0.0, 2, 0], [1, 0, 0], [2, 1, 5], [9, 9, 9]])
    assert root_cell(vectors, np.array([0, 1, 2])) == 0  # the lowest on the first and the third
    vectors[:3, 2] = 1, 1, 0  # now each of the three is the lowest once
    assert root_cell(vectors, np.array([0, 1, 2])) == 0


def test_cells_outside_the_largest_component_have_time_0():
    x, _, _ = curve(sd=0.05, n=80)
    graph = neighbours(x)
    graph = sparse.csr_matrix(sparse.block_diag([graph, sparse.csr_matrix(np.ones((4, 4)))]))
    diffusion = diffusion_map(graph)
    np.testing.assert_array_equal(diffusion.cells, np.arange(80))
    after = pseudotime(diffusion, root=0)
    assert (after[80:] == 0).all()
    assert after.max() == 1


def test_few_cells_are_undefined_with_a_reason():
    x, t, labels = curve(sd=0.05, n=10)
    few = conserve(x, labels, t)
    assert np.isnan(few.value)
    assert few.undefined == "the largest component has 10 cells, 11 needed"
