"""Views: every formula by hand on tiny matrices, fitted on the measured training cells alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from blocks import block, fitted, run, values
from scipy import sparse

from coembed.data.cells import Cells
from coembed.data.features import GeneActivity, HighlyVariable, SharedFeatures, TopPeaks
from coembed.data.pipeline import Pipeline, Step, block_of
from coembed.data.views import (
    CLR,
    TFIDF,
    Binarise,
    Concatenate,
    JointPCs,
    LogNormalise,
    MaxAbs,
    PCs,
    Standardise,
    StandardiseCells,
    TruncatedSVD,
    UnitVariance,
    counts,
    normalised,
)
from coembed.errors import ModelFileError

# -- formulas -------------------------------------------------------------------------------------


def test_log_normalise_divides_by_the_total_over_all_features() -> None:
    # The second cell's total of 10 includes features that were dropped before.
    x = run(LogNormalise(), block([[1, 3], [2, 0], [0, 0]], totals=[4, 10, 0]))
    expected = [[np.log1p(2500), np.log1p(7500)], [np.log1p(2000), 0], [0, 0]]
    np.testing.assert_allclose(x, expected, rtol=1e-6)
    half = run(LogNormalise(scale=2), block([[1, 1]]))
    np.testing.assert_allclose(half, np.log1p([[1, 1]]), rtol=1e-6)


def test_binarise() -> None:
    np.testing.assert_array_equal(
        run(Binarise(), block([[0, 1, 7], [2, 0, 0]])), [[0, 1, 1], [1, 0, 0]]
    )


def test_clr_is_the_variant_that_keeps_zeros() -> None:
    # mean of log1p(1, 3, 0) = (ln 2 + ln 4) / 3 = ln 2, so x is halved before log1p.
    x = run(CLR(), block([[1, 3, 0], [0, 0, 0]]))
    np.testing.assert_allclose(x, [[np.log(1.5), np.log(2.5), 0], [0, 0, 0]], rtol=1e-6)


def test_clr_twice_normalised_divides_by_the_total_of_the_new_values() -> None:
    clr = CLR().apply(block([[1, 3, 0], [0, 0, 0]]))
    np.testing.assert_allclose(clr.totals, values(clr.x).sum(axis=1), rtol=1e-6)


@pytest.mark.parametrize("dense", [True, False])
def test_max_abs_scales_by_the_largest_training_value_and_cuts_others_off(dense: bool) -> None:
    train = block([[2, 0, -4], [1, 0, 2], [9, 9, 9]], present=[1, 1, 0], dense=dense)
    step = fitted(MaxAbs(), train)
    other = block([[1, 0, 2], [3, 0.5, -8], [0, 0, 0]], dense=dense)
    np.testing.assert_allclose(
        values(step.apply(other).x), [[0.5, 0, 0.5], [1, 0.5, -1], [0, 0, 0]]
    )
    assert values(step.apply(train).x).dtype == np.float32


def test_tfidf_is_signacs_formula() -> None:
    # idf = 3 cells / (2, 1, 0 -> 1) cells with the peak; tf = x / total.
    x = run(TFIDF(), block([[1, 0, 0], [1, 2, 0], [0, 0, 0]], totals=[2, 4, 0]))
    expected = np.log1p([[1e4 / 2 * 1.5, 0, 0], [1e4 / 4 * 1.5, 1e4 / 2 * 3, 0], [0, 0, 0]])
    np.testing.assert_allclose(x, expected, rtol=1e-6)


@pytest.mark.parametrize("dense", [True, False])
def test_standardise(dense: bool) -> None:
    # Column 0: mean 2, sd 2 (ddof 1). Column 1 is constant and goes to 0.
    x = run(Standardise(), block([[0, 0], [2, 0], [4, 0]], dense=dense))
    np.testing.assert_allclose(x, [[-1, 0], [0, 0], [1, 0]], atol=1e-6)


def test_standardise_clips_above_and_on_request_below() -> None:
    train = block([[0], [2], [4]])
    far = block([[-100], [100]])
    both = fitted(Standardise(clip=10), train).apply(far).x
    np.testing.assert_allclose(both, [[-10], [10]])
    above = fitted(Standardise(clip=10, two_sided=False), train).apply(far).x
    np.testing.assert_allclose(above, [[-51], [10]])
    free = fitted(Standardise(clip=None), train).apply(far).x
    np.testing.assert_allclose(free, [[-51], [49]])


def test_standardise_of_one_cell_is_zero() -> None:
    np.testing.assert_array_equal(run(Standardise(), block([[3, 5]])), [[0, 0]])
    np.testing.assert_array_equal(run(Standardise(), block([[3, 5]], dense=True)), [[0, 0]])


@pytest.mark.parametrize("dense", [True, False])
def test_standardise_takes_a_constant_non_zero_feature_to_zero(dense: bool) -> None:
    constant = block(np.full((1000, 1), 3.3), dense=dense)
    step = fitted(Standardise(), constant)
    np.testing.assert_allclose(step.apply(constant).x, 0, atol=1e-4)
    np.testing.assert_allclose(step.apply(block([[3.4]])).x, 0.1, atol=1e-3)


def test_standardise_cells() -> None:
    x = run(StandardiseCells(), block([[1, 3], [5, 5], [0, 0]], present=[1, 1, 0]))
    np.testing.assert_allclose(x, [[-1, 1], [0, 0], [0, 0]])


def test_unit_variance_gives_the_block_a_total_variance_of_one() -> None:
    x = np.random.default_rng(0).normal(size=(50, 4)) * [1, 2, 3, 4]
    scaled = run(UnitVariance(), block(x, dense=True))
    assert scaled.var(axis=0).sum() == pytest.approx(1, rel=1e-5)
    np.testing.assert_allclose(scaled / x, np.full_like(x, (scaled / x)[0, 0]), rtol=1e-4)


@pytest.mark.parametrize("dense", [True, False])
def test_pcs_are_those_of_a_singular_value_decomposition(dense: bool) -> None:
    x = np.random.default_rng(1).poisson(2, (30, 8)).astype(np.float32)
    scores = run(PCs(3), block(x, dense=dense))
    left, singular, _ = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)
    expected = left[:, :3] * singular[:3]
    signs = np.sign((scores * expected).sum(axis=0))
    np.testing.assert_allclose(scores, expected * signs, atol=1e-3)


def test_truncated_svd_does_not_centre() -> None:
    x = np.random.default_rng(2).poisson(2, (30, 8)).astype(np.float32)
    scores = run(TruncatedSVD(3), block(x))
    left, singular, _ = np.linalg.svd(x, full_matrices=False)
    expected = left[:, :3] * singular[:3]
    signs = np.sign((scores * expected).sum(axis=0))
    np.testing.assert_allclose(scores, expected * signs, atol=1e-3)


def test_pcs_are_fewer_where_cells_are_few() -> None:
    x = np.random.default_rng(3).poisson(2, (5, 8))
    out = fitted(PCs(50), block(x)).apply(block(x))
    assert out.x.shape == (5, 4)
    assert list(out.var.index) == ["PC1", "PC2", "PC3", "PC4"]


# -- joining modalities ---------------------------------------------------------------------------


@pytest.mark.parametrize("dense", [True, False])
def test_joint_pcs_are_those_of_the_stacked_cells(dense: bool) -> None:
    rng = np.random.default_rng(4)
    a, b = rng.poisson(2, (12, 6)), rng.poisson(4, (12, 6))
    step = JointPCs(3)
    blocks = {"a": block(a, dense=dense), "b": block(b, dense=dense)}
    step.fit(blocks)
    out = step.apply(blocks)
    alone = run(PCs(3), block(np.vstack([a, b]), dense=dense))
    np.testing.assert_allclose(np.vstack([out["a"].x, out["b"].x]), alone, atol=1e-5)


def test_joint_pcs_leave_unmeasured_cells_out_of_the_fit() -> None:
    rng = np.random.default_rng(5)
    a, b = rng.poisson(2, (12, 6)), rng.poisson(4, (12, 6))
    has = np.arange(12) < 8
    full, part = JointPCs(3), JointPCs(3)
    full.fit({"a": block(a * has[:, None], present=has), "b": block(b)})
    part.fit({"a": block(a[has]), "b": block(b)})
    np.testing.assert_array_equal(full.loadings, part.loadings)
    np.testing.assert_array_equal(full.centre, part.centre)


def test_concatenate() -> None:
    blocks = {"a": block([[1, 2], [0, 0]], names=["x", "y"], present=[1, 0]),
              "b": block([[3], [4]], names=["z"], dense=True)}  # fmt: skip
    joint = Concatenate().apply(blocks)["joint"]
    np.testing.assert_array_equal(joint.x, [[1, 2, 3], [0, 0, 4]])
    np.testing.assert_array_equal(joint.totals, [6, 4])
    assert list(joint.var.index) == ["x", "y", "z"]
    assert joint.present.all()


# -- what holds for every step --------------------------------------------------------------------

STEPS: dict[str, Callable[[], list[Step]]] = {
    "variable": lambda: [HighlyVariable(20)],
    "variable seurat": lambda: [HighlyVariable(20, flavour="seurat_v3")],
    "peaks": lambda: [TopPeaks(0.75, minimum=10)],
    "lognormalise": lambda: [LogNormalise()],
    "binarise": lambda: [Binarise()],
    "clr": lambda: [CLR()],
    "tfidf": lambda: [TFIDF()],
    "standardise": lambda: [Standardise()],
    "standardise dense": lambda: [CLR(), Standardise()],
    "standardise one side": lambda: [LogNormalise(), Standardise(two_sided=False)],
    "cells": lambda: [StandardiseCells()],
    "pcs": lambda: [PCs(5)],
    "svd": lambda: [TruncatedSVD(5)],
    "unit variance": lambda: [PCs(5), UnitVariance()],
    "pca's genes": lambda: [HighlyVariable(20), LogNormalise(), Standardise(), PCs(5)],
    "pca's peaks": lambda: [TopPeaks(), TFIDF(), PCs(5), UnitVariance()],
}


def some_measured(cells: Cells, seed: int = 0) -> Cells:
    """The same cells, a third of them without RNA."""
    has = np.random.default_rng(seed).random(cells.n_cells) < 2 / 3
    rna = sparse.csr_matrix(cells.counts["rna"].multiply(has[:, None])).astype(np.float32)
    return replace(
        cells, counts={**cells.counts, "rna": rna}, present={**cells.present, "rna": has}
    )


@pytest.mark.parametrize("name", STEPS)
def test_unmeasured_cells_are_zero_and_are_not_fitted_on(name: str, cite: Cells) -> None:
    if "seurat" in name:
        pytest.importorskip("skmisc")
    mosaic = some_measured(cite)
    has = mosaic.present["rna"]
    mixed, alone = Pipeline({"rna": STEPS[name]()}), Pipeline({"rna": STEPS[name]()})
    out = mixed.fit(mosaic)["rna"]
    only = alone.fit(mosaic.take(has))["rna"]
    assert not has.all()
    assert not values(out.x)[~has].any()
    np.testing.assert_allclose(values(out.x)[has], values(only.x), atol=1e-5)
    for key, array in alone.state().items():
        np.testing.assert_array_equal(mixed.state()[key], array, err_msg=key)
    np.testing.assert_array_equal(out.present, has)


@pytest.mark.parametrize("name", STEPS)
def test_held_out_cells_change_nothing(name: str, cite: Cells) -> None:
    if "seurat" in name:
        pytest.importorskip("skmisc")
    pipeline = Pipeline({"rna": STEPS[name]()})
    train = pipeline.fit(cite.take(np.arange(60)))["rna"]
    before = {key: array.copy() for key, array in pipeline.state().items()}
    wild = replace(cite, counts={**cite.counts, "rna": cite.counts["rna"] * np.float32(50)})
    alone = pipeline.apply(cite.take(np.arange(60, 90)))["rna"]
    together = pipeline.apply(cite)["rna"]
    pipeline.apply(wild)
    np.testing.assert_allclose(values(together.x)[:60], values(train.x), atol=1e-5)
    np.testing.assert_allclose(values(together.x)[60:], values(alone.x), atol=1e-5)
    for key, array in pipeline.state().items():
        np.testing.assert_array_equal(array, before[key])


def everything(cells: Cells) -> list[Pipeline]:
    """Pipelines that between them use every step."""
    roles = cells.roles
    alone = [Pipeline({"rna": make()}) for make in STEPS.values()]
    usual = [
        Pipeline(view(roles, n_top_genes=20, all_peaks=all_peaks))
        for view in (counts, normalised)
        for all_peaks in (True, False)
    ]
    dense = {
        role: [*steps, StandardiseCells()]
        for role, steps in normalised(roles, n_top_genes=20).items()
    }
    joint = [Pipeline(dense, joint=[Concatenate(), JointPCs(4)])]
    if "atac" not in roles:
        return [*alone, *usual, *joint]
    genes: list[Step] = [LogNormalise(), Standardise()]
    activity = [GeneActivity(cells.var["rna"]), LogNormalise(), Standardise()]
    shared = Pipeline({"rna": genes, "atac": activity}, joint=[SharedFeatures(5), JointPCs(4)])
    return [*alone, *usual, *joint, shared]


@pytest.mark.parametrize("kind", ["cite", "multiome"])
def test_state_round_trip(kind: str, request: pytest.FixtureRequest) -> None:
    cells: Cells = request.getfixturevalue(kind)
    pytest.importorskip("skmisc")
    for made, fresh in zip(everything(cells), everything(cells), strict=True):
        fitted_blocks = made.fit(cells)
        state = made.state()
        assert all(isinstance(array, np.ndarray) for array in state.values())
        fresh.load_state({key: array.copy() for key, array in state.items()})
        for name, out in fresh.apply(cells).items():
            np.testing.assert_allclose(values(out.x), values(fitted_blocks[name].x), atol=1e-5)
            np.testing.assert_array_equal(
                values(out.x), values(made.apply(cells)[name].x), err_msg="bit for bit"
            )
        for key in state:
            with pytest.raises(ModelFileError, match=f"'{key}' of the views is missing"):
                fresh.load_state({k: v for k, v in state.items() if k != key})


def test_a_fit_returns_what_apply_does(multiome: Cells) -> None:
    for pipeline in everything(multiome):
        first = pipeline.fit(multiome)
        for name, out in pipeline.apply(multiome).items():
            np.testing.assert_array_equal(values(out.x), values(first[name].x))


def test_the_usual_views(cite: Cells, multiome: Cells) -> None:
    raw = Pipeline(counts(cite.roles, n_top_genes=4000)).fit(cite)
    np.testing.assert_array_equal(values(raw["rna"].x), values(cite.counts["rna"]))
    np.testing.assert_array_equal(values(raw["prot"].x), values(cite.counts["prot"]))
    peaks = Pipeline(counts(multiome.roles, n_top_genes=4000)).fit(multiome)["atac"]
    np.testing.assert_array_equal(values(peaks.x), values(multiome.counts["atac"]))
    one_scale = Pipeline(normalised(multiome.roles, n_top_genes=4000)).fit(multiome)
    assert set(np.unique(values(one_scale["atac"].x))) == {0, 1}
    assert values(one_scale["rna"].x).max() < np.log1p(1e4)
    clr = Pipeline(normalised(cite.roles, n_top_genes=4000)).fit(cite)["prot"]
    np.testing.assert_allclose(clr.x, run(CLR(), block_of(cite, "prot")))
