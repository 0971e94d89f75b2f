"""Scores of a translation: translation_metrics.md section 6, scipy and scikit-learn, errors."""

from __future__ import annotations

from functools import cache

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse, stats
from sklearn.metrics import average_precision_score, roc_auc_score

from coembed.errors import DataError, ParameterError
from coembed.metrics import (
    clr,
    correlation_matrix_distance,
    log_normalised,
    score_translation,
    translation,
)

COLUMNS = [
    "metric",
    "value",
    "value_defined",
    "baseline",
    "null",
    "depth_only",
    "n_scored",
    "n_undefined",
    "reason",
]
SCORES = ["value", "value_defined", "baseline", "null", "depth_only"]
CONTINUOUS = [
    "rmse",
    "pearson_overall",
    "pearson_per_feature",
    "spearman_per_feature",
    "pearson_per_cell",
    "spearman_per_cell",
    "skill",
]
BINARY = [
    "auroc_per_feature",
    "auroc_per_cell",
    "auroc_overall",
    "average_precision_overall",
    "normalised_average_precision_overall",
]


def table(truth, prediction, kind="continuous", baseline=None, **more) -> pd.DataFrame:
    """The table by metric; the baseline is the mean of the truth unless one is given."""
    if baseline is None:
        baseline = np.asarray(truth.mean(axis=0)).ravel()
    return score_translation(truth, prediction, kind=kind, baseline=baseline, **more).set_index(
        "metric"
    )


def simulated(n: int = 60, f: int = 25, ties: bool = False) -> tuple[np.ndarray, ...]:
    """Simulated truth, a fair prediction of it, and means of other cells of the same kind."""
    rng = np.random.default_rng(0)
    level, signal = rng.gamma(1, 2, f), rng.normal(size=(2 * n, f))
    cells = np.maximum(level + signal + rng.normal(size=(2 * n, f)), 0)
    prediction = np.maximum(level + signal[:n], 0) + 0.3 * rng.normal(size=(n, f))
    if ties:
        cells, prediction = np.floor(cells), np.floor(prediction)
    return cells[:n], prediction, cells[n:].mean(axis=0)


@pytest.fixture(params=[400, translation.BLOCK], ids=["many blocks", "one block"])
def blocks(request, monkeypatch):
    monkeypatch.setattr(translation, "BLOCK", request.param)


# -- continuous targets ---------------------------------------------------------------------------


@cache
def of_scipy(ties: bool) -> dict[str, dict[str, float]]:
    """Column -> metric -> value for the simulated cells, permuted with seed 3."""
    truth, prediction, mean = simulated(ties=ties)
    shuffled = truth[np.random.default_rng(3).permutation(len(truth))]
    expected = {}
    for column, t, p in (
        ("value", truth, prediction),
        ("null", shuffled, prediction),
        ("baseline", truth, np.tile(mean, (len(truth), 1))),
    ):
        expected[column] = {
            "rmse": np.sqrt(((t - p) ** 2).mean()),
            "pearson_overall": stats.pearsonr(t.ravel(), p.ravel())[0],
            "pearson_per_feature": 0.0,
            "spearman_per_feature": 0.0,
            "pearson_per_cell": mean_over_rows(stats.pearsonr, t, p),
            "spearman_per_cell": mean_over_rows(stats.spearmanr, t, p),
            "skill": 1 - ((t - p) ** 2).sum() / ((truth - mean) ** 2).sum(),
        }
        if column != "baseline":
            expected[column] |= {
                "pearson_per_feature": mean_over_rows(stats.pearsonr, t.T, p.T),
                "spearman_per_feature": mean_over_rows(stats.spearmanr, t.T, p.T),
            }
    return expected


def mean_over_rows(function, t: np.ndarray, p: np.ndarray) -> float:
    return float(np.mean([function(*rows)[0] for rows in zip(t, p, strict=True)]))


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix, sparse.csc_array])
def test_continuous_scores_are_those_of_scipy(form, ties):
    truth, prediction, mean = simulated(ties=ties)
    got = table(form(truth), prediction, baseline=mean, seed=3)
    assert list(got.index) == CONTINUOUS
    assert list(got.reset_index().columns) == COLUMNS
    for column, expected in of_scipy(ties).items():
        for metric, value in expected.items():
            assert got.loc[metric, column] == pytest.approx(value, abs=1e-12), (metric, column)
    assert (got["value"] == got["value_defined"]).all()
    assert got["n_scored"].tolist() == [1500, 1500, 25, 25, 60, 60, 1500]
    assert (got["n_undefined"] == 0).all()
    assert (got["reason"] == "").all()
    assert got["depth_only"].isna().all()


def test_the_null_permutes_cells_of_the_prediction():
    """Section 6: it must destroy per-feature scores; `null` is a score of shuffled cells."""
    truth, prediction, mean = simulated(n=800)
    got = table(truth, prediction, baseline=mean, seed=1)
    features = ["pearson_per_feature", "spearman_per_feature"]
    assert (got.loc[features, "value"] > 0.45).all()
    assert (got.loc[features, "null"].abs() < 0.02).all()
    assert got.loc["skill", "null"] < 0 < got.loc["skill", "value"]
    # The same pairs of cells, the prediction permuted in place of the truth.
    order = np.argsort(np.random.default_rng(1).permutation(len(truth)))
    again = table(truth, prediction[order], baseline=mean)
    np.testing.assert_allclose(again["value"], got["null"], rtol=1e-10)
    assert (table(truth, prediction, baseline=mean, seed=1) == got).loc[:, "null"].all()
    assert (
        table(truth, prediction, baseline=mean, seed=2).loc["rmse", "null"]
        != got.loc["rmse", "null"]
    )


@pytest.mark.usefixtures("blocks")
def test_a_prediction_that_ignores_its_input_is_the_baseline():
    truth, _, mean = simulated()
    got = table(truth, np.tile(mean, (len(truth), 1)), baseline=mean)
    np.testing.assert_allclose(got["value"], got["baseline"], rtol=1e-12)
    np.testing.assert_allclose(got["null"], got["baseline"], rtol=1e-12)
    assert got.loc["skill", "value"] == 0
    features = got.loc[["pearson_per_feature", "spearman_per_feature"]]
    assert (features["value"] == 0).all()
    assert features["value_defined"].isna().all()
    assert features["n_undefined"].tolist() == [25, 25]
    assert features["n_scored"].tolist() == [0, 0]
    assert set(features["reason"]) == {
        "the prediction is constant in 25 features; these count as 0"
    }
    # Why it must stand beside a model: the means alone correlate over entries and within cells.
    assert (
        got.loc[["pearson_overall", "pearson_per_cell", "spearman_per_cell"], "value"] > 0.3
    ).all()


def test_undefined_correlations_count_as_0_and_are_counted():
    """openproblems' convention in `value`, Polarbear's in `value_defined` (section 0, 4)."""
    truth, prediction, mean = simulated()
    truth[:, :5] = truth[:2] = 0
    prediction[:, 4:7] = prediction[2] = 0.1
    got = table(truth, prediction, baseline=mean)
    for metric, function in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr)):
        row, whole = got.loc[f"{metric}_per_feature"], range(7, 25)
        defined = [function(truth[:, j], prediction[:, j])[0] for j in whole]
        assert row["value_defined"] == pytest.approx(np.mean(defined), abs=1e-12)
        assert row["value"] == pytest.approx(np.sum(defined) / 25, abs=1e-12)
        assert (row["n_scored"], row["n_undefined"]) == (18, 7)
        assert row["reason"] == (
            "the truth is constant in 5 features; the prediction is constant in 2 features; "
            "these count as 0"
        )
        row = got.loc[f"{metric}_per_cell"]
        assert (row["n_scored"], row["n_undefined"]) == (57, 3)
        assert row["value"] == pytest.approx(row["value_defined"] * 57 / 60, abs=1e-12)
        assert row["reason"] == (
            "the truth is constant in 2 cells; the prediction is constant in 1 cells; "
            "these count as 0"
        )


def test_a_constant_with_digits_that_do_not_add_up_is_still_constant():
    truth, prediction, mean = simulated()
    prediction[:] = 0.1
    got = table(truth, prediction.astype(np.float32), baseline=mean)
    metrics = [metric for metric in CONTINUOUS if "_" in metric]
    assert (got.loc[metrics, "value"] == 0).all()
    assert got.loc["pearson_overall", "n_undefined"] == truth.size


def test_a_truth_without_variation_leaves_nothing_to_score():
    _, prediction, _ = simulated()
    got = table(np.full_like(prediction, 2.0), prediction)
    for metric in CONTINUOUS[1:]:
        assert np.isnan(got.loc[metric, "value"])
        assert got.loc[metric, "n_scored"] == 0
    assert got.loc["pearson_per_cell", "reason"] == "the truth is constant in 60 cells"
    assert got.loc["skill", "reason"] == "the baseline has no error"
    one = table(prediction[:1], prediction[:1] + 1)
    assert np.isnan(one.loc["pearson_per_feature", "value"])
    assert one.loc["pearson_per_cell", "value"] == pytest.approx(1)


def test_a_perfect_prediction():
    truth, _, mean = simulated()
    got = table(sparse.csr_matrix(truth), truth, baseline=mean)["value"]
    np.testing.assert_allclose(got, [0, 1, 1, 1, 1, 1, 1], atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10_000), st.floats(0.01, 100), st.floats(-50, 50), st.booleans(), st.booleans()
)
def test_correlations_know_neither_scale_nor_shift(seed, scale, shift, few_values, wide):
    rng = np.random.default_rng(seed)
    truth, prediction = rng.normal(size=(2, *((6, 15) if wide else (15, 6))))
    if few_values:
        truth, prediction = np.round(truth), np.round(prediction)
    first = table(truth, prediction)
    moved = table(truth, scale * prediction + shift)
    correlations = CONTINUOUS[1:-1]
    np.testing.assert_allclose(
        first.loc[correlations, SCORES[:2]].astype(float),
        moved.loc[correlations, SCORES[:2]].astype(float),
        atol=1e-9,
    )
    flipped = table(truth, -prediction)
    np.testing.assert_allclose(
        first.loc[correlations, "value"], -flipped.loc[correlations, "value"], atol=1e-9
    )
    ranks = [metric for metric in correlations if metric.startswith("spearman")]
    bent = table(truth, np.exp(prediction))
    np.testing.assert_allclose(first.loc[ranks, "value"], bent.loc[ranks, "value"], atol=1e-9)
    turned = table(truth.T, prediction.T)
    np.testing.assert_allclose(
        first.loc["pearson_per_cell", "value"], turned.loc["pearson_per_feature", "value"]
    )


# -- binary targets -------------------------------------------------------------------------------


def accessibility(n: int = 40, f: int = 16, ties: bool = False) -> dict:
    """Simulated counts of peaks, a fair score, the cells' depths and the open share elsewhere."""
    rng = np.random.default_rng(0)
    depth, level = rng.gamma(4, 0.25, (2 * n, 1)), rng.gamma(0.5, 0.6, f)
    signal = rng.normal(size=(2 * n, f))
    counts = rng.poisson(depth * level * np.exp(signal - 0.5))
    score = 1 - np.exp(-level * np.exp(0.5 * signal[:n] + 0.5 * rng.normal(size=(n, f))))
    return {
        "truth": counts[:n],
        "prediction": np.round(score, 1) if ties else score,
        "baseline": (counts[n:] > 0).mean(axis=0),
        "depth": np.floor(100 * depth[:n, 0]),
    }


@cache
def of_sklearn(ties: bool) -> dict[str, dict[str, float]]:
    """Column -> metric -> value for the simulated cells, permuted with seed 3."""
    truth, prediction, baseline, depth = accessibility(ties=ties).values()
    open_ = truth > 0
    shuffled = open_[np.random.default_rng(3).permutation(len(truth))]
    expected = {}
    for column, t, score in (
        ("value", open_, prediction),
        ("null", shuffled, prediction),
        ("baseline", open_, np.broadcast_to(baseline, truth.shape)),
        ("depth_only", open_, np.broadcast_to(depth[:, None], truth.shape)),
    ):
        pi, precision = t.mean(), average_precision_score(t.ravel(), score.ravel())
        expected[column] = {
            "auroc_per_feature": mean_auroc(t.T, score.T),
            "auroc_per_cell": mean_auroc(t, score),
            "auroc_overall": roc_auc_score(t.ravel(), score.ravel()),
            "average_precision_overall": precision,
            "normalised_average_precision_overall": (precision - pi) / (1 - pi),
        }
    return expected


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix, sparse.csr_array])
def test_binary_scores_are_those_of_sklearn(form, ties):
    data = accessibility(ties=ties)
    got = table(**data | {"truth": form(data["truth"])}, kind="binary", seed=3)
    assert list(got.index) == BINARY
    assert list(got.reset_index().columns) == COLUMNS
    for column, expected in of_sklearn(ties).items():
        for metric, value in expected.items():
            assert got.loc[metric, column] == pytest.approx(value, abs=1e-12), (metric, column)
    # What each of them knows, and what it does not.
    assert got.loc["auroc_per_feature", "baseline"] == 0.5
    assert got.loc["auroc_per_cell", "depth_only"] == 0.5
    assert got.loc["auroc_per_cell", "baseline"] > 0.6
    assert got.loc["auroc_per_feature", "depth_only"] > 0.55


def mean_auroc(open_: np.ndarray, scores: np.ndarray) -> float:
    """Mean over rows, those of one class left out, as scikit-learn has no value for them."""
    mixed = [i for i in range(len(open_)) if 0 < open_[i].sum() < open_.shape[1]]
    return float(np.mean([roc_auc_score(open_[i], scores[i]) for i in mixed]))


@pytest.mark.parametrize(
    ("shape", "unit"), [((1, 5), "auroc_per_cell"), ((5, 1), "auroc_per_feature")]
)
def test_vector_of_the_note(shape, unit):
    truth, score = np.array([1, 0, 1, 0, 0]), np.array([0.9, 0.8, 0.7, 0.1, 0.1])
    got = table(truth.reshape(shape), score.reshape(shape), kind="binary")["value"]
    for metric in (unit, "auroc_overall", "average_precision_overall"):
        assert got[metric] == pytest.approx(0.833333, abs=5e-7)
    assert got["normalised_average_precision_overall"] == pytest.approx(0.722222, abs=5e-7)


def test_peaks_of_one_class_are_left_out_and_counted():
    data = accessibility()
    data["truth"][:, :3], data["truth"][:, 3] = 0, 1
    data["prediction"][:, 4] = 0.5
    got = table(**data, kind="binary").loc["auroc_per_feature"]
    never = int(((data["truth"] > 0).sum(axis=0) == 0).sum())
    assert never >= 3
    assert got["n_undefined"] == never + 1
    assert got["n_scored"] == 16 - never - 1
    assert got["reason"] == (
        f"{never + 1} features are open throughout or closed throughout and are left out"
    )
    # A constant prediction is a defined score of 1/2 in its peak.
    only = table(data["truth"][:, [4]], data["prediction"][:, [4]], kind="binary")
    assert only.loc["auroc_per_feature", "value"] == 0.5


def test_a_prediction_that_ignores_its_input_is_the_baseline_of_binary_targets():
    data = accessibility()
    constant = np.tile(data["baseline"], (40, 1))
    got = table(**data | {"prediction": constant}, kind="binary")
    np.testing.assert_allclose(got["value"], got["baseline"], rtol=1e-12)
    overall = BINARY[2:]
    np.testing.assert_allclose(got.loc[overall, "null"], got.loc[overall, "value"], rtol=1e-12)
    assert got.loc["auroc_overall", "value"] > 0.6  # high, and it knows nothing


@pytest.mark.parametrize(
    ("count", "precision", "reason"),
    [(0, np.nan, "no entry is open"), (2, 1, "every entry is open")],
)
def test_truth_of_one_class(count, precision, reason):
    got = table(np.full((4, 3), count), np.random.default_rng(0).random((4, 3)), kind="binary")
    assert got["value"].drop("average_precision_overall").isna().all()
    assert got.loc["average_precision_overall", "value"] == pytest.approx(precision, nan_ok=True)
    assert set(got.loc[BINARY[2:], "reason"]) == {reason}


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 100), st.floats(-50, 50), st.booleans())
def test_areas_know_only_the_order(seed, scale, shift, few_values):
    rng = np.random.default_rng(seed)
    truth, score = rng.integers(2, size=(12, 7)), rng.normal(size=(12, 7))
    score = np.round(score) if few_values else score
    first = table(truth, score, kind="binary")["value"]
    for same_order in (scale * score, score + np.round(shift), np.exp(score)):
        np.testing.assert_allclose(table(truth, same_order, kind="binary")["value"], first)
    areas = BINARY[:3]
    reverse = table(truth, -score, kind="binary")["value"]
    np.testing.assert_allclose(reverse[areas], 1 - first[areas], atol=1e-12)
    np.testing.assert_allclose(
        table(7 * truth, score, kind="binary", baseline=np.zeros(7))["value"], first
    )


# -- value spaces, structure, errors --------------------------------------------------------------


def test_counts_and_decoded_profiles_come_into_one_space():
    counts = np.array([[1, 3, 0], [0, 0, 0], [2, 2, 4]])
    expected = np.log1p([[2500, 7500, 0], [0, 0, 0], [2500, 2500, 5000]])
    for form in (np.asarray, sparse.csr_matrix):
        got = log_normalised(form(counts))
        np.testing.assert_allclose(got.toarray() if sparse.issparse(got) else got, expected)
        assert sparse.issparse(got) == (form is not np.asarray)
    shares = np.array([[0.25, 0.75, 0]], dtype=np.float32)
    for unit in (1, 1e4, 17):
        np.testing.assert_allclose(log_normalised(unit * shares), expected[:1], rtol=1e-6)
    np.testing.assert_allclose(
        log_normalised(counts, totals=np.array([8, 8, 8]), scale=8), np.log1p(counts)
    )


def test_clr_of_seurat():
    counts = np.array([[1.0, 3, 0], [0, 0, 0]])
    centre = np.exp(np.log([2, 4, 1]).mean())
    for form in (np.asarray, sparse.csr_matrix):
        np.testing.assert_allclose(clr(form(counts)), [np.log1p(counts[0] / centre), [0, 0, 0]])


@pytest.mark.parametrize("shape", [(30, 8), (8, 30)])
def test_correlation_matrix_distance(shape):
    truth, prediction = np.random.default_rng(0).normal(size=(2, *shape))
    assert correlation_matrix_distance(truth, 3 * truth + 1) == pytest.approx(0, abs=1e-12)
    r, s = np.corrcoef(truth.T), np.corrcoef(prediction.T)
    expected = 1 - np.trace(r @ s) / (np.linalg.norm(r) * np.linalg.norm(s))
    assert 0.01 < expected < 1
    got = correlation_matrix_distance(sparse.csr_matrix(truth), prediction)
    assert got == pytest.approx(expected, abs=1e-12)
    # A constant feature correlates with nothing; if all do there is no structure.
    one, both = truth.copy(), np.c_[truth, np.ones(len(truth))]
    assert correlation_matrix_distance(both, np.c_[one, np.zeros(len(one))]) == pytest.approx(
        0, abs=1e-12
    )
    assert np.isnan(correlation_matrix_distance(np.ones(shape), truth))


TRUTH = np.arange(12.0).reshape(4, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"truth": TRUTH[0]}, r"truth: has shape \(3,\)"),
        ({"truth": np.zeros((0, 3))}, r"truth: has shape \(0, 3\)"),
        ({"truth": np.where(TRUTH > 9, np.nan, TRUTH)}, "truth: 2 values are not finite"),
        ({"truth": TRUTH.astype(str)}, "truth: has type"),
        ({"prediction": TRUTH.T}, r"prediction: has shape \(3, 4\), not \(4, 3\)"),
        ({"prediction": TRUTH / [1, 1, np.inf] - np.inf}, "prediction: 12 values"),
        ({"prediction": TRUTH * 1e101}, "prediction: 11 values .* too large"),
        ({"baseline": np.zeros(4)}, r"baseline: has shape \(4,\), not \(3,\)"),
        ({"baseline": np.array([0, 1, np.nan])}, "baseline: 1 values"),
        ({"depth": np.zeros(3), "kind": "binary"}, r"depth: has shape \(3,\), not \(4,\)"),
    ],
)
def test_data_that_cannot_be_scored(change, message):
    whole = {"truth": TRUTH, "prediction": TRUTH, "baseline": np.zeros(3), "kind": "continuous"}
    with pytest.raises(DataError, match=message):
        score_translation(**whole | change)


def test_parameters_that_do_not_exist():
    with pytest.raises(ParameterError, match=r"no kind 'binry'.*Did you mean 'binary'"):
        table(TRUTH, TRUTH, kind="binry")
    with pytest.raises(ParameterError, match="depth"):
        table(TRUTH, TRUTH, depth=np.ones(4))


def test_helpers_refuse_values_that_are_no_counts():
    for helper in (log_normalised, clr):
        with pytest.raises(DataError, match="negative"):
            helper(-TRUTH)
        with pytest.raises(DataError, match="not finite"):
            helper(np.full((2, 2), np.inf))
    with pytest.raises(DataError, match=r"totals: has shape \(3,\), not \(4,\)"):
        log_normalised(TRUTH, totals=np.ones(3))
    with pytest.raises(DataError, match="prediction: has shape"):
        correlation_matrix_distance(TRUTH, TRUTH[:, :2])
