"""The table of scores: rows, nulls, counts, reasons, errors."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from coembed.errors import DataError, ParameterError
from coembed.metrics import score

METRICS = [
    "nmi",
    "ari",
    "ami",
    "asw_label",
    "trajectory",
    "asw_batch",
    "asw_site",
    "graph_connectivity",
]


def simulated(n: int = 400, types: int = 8, batches: int = 4, spread: float = 3.0) -> dict:
    """Simulated cells: Gaussian types, no batch effect, types 0-2 along a path."""
    rng = np.random.default_rng(0)
    kind, batch = rng.integers(types, size=n), rng.integers(batches, size=n)
    x = spread * rng.normal(size=(types, 10))[kind] + rng.normal(size=(n, 10))
    time = np.where(kind < 3, kind / 3 + rng.random(n) / 3, np.nan)
    path = kind < 3
    x[path] = rng.normal(0, 0.5, size=(int(path.sum()), 10))
    x[path, 0] += 20 + 9 * time[path]
    return {
        "embedding": x,
        "labels": kind.astype(str).astype(object),
        "batch": batch.astype(str),
        "site": (batch % 2).astype(str),
        "pseudotime": {"gex": time},
    }


def table(**cells) -> pd.DataFrame:
    return score(cells.pop("embedding"), **cells).set_index("metric")


@pytest.fixture(scope="module")
def good() -> pd.DataFrame:
    return table(**simulated())


def test_one_row_per_metric_with_its_columns(good):
    assert list(good.index) == METRICS
    assert list(good.columns) == [
        "value",
        "null",
        "null_sd",
        "normalised",
        "n_scored",
        "n_left_out",
        "n_labels",
        "n_batches",
        "undefined",
        "reason",
    ]
    assert not good["undefined"].any()
    assert (good["reason"] == "").all()
    assert good[["value", "null", "null_sd", "normalised"]].notna().all(axis=None)


def test_a_good_embedding_is_far_above_its_null(good):
    biology = ["nmi", "ari", "ami", "asw_label", "trajectory", "graph_connectivity"]
    assert (good.loc[biology, "value"] > good.loc[biology, "null"] + 0.15).all()
    assert good.loc["trajectory", "value"] > 0.95
    assert good.loc["trajectory", "null"] == pytest.approx(0.5, abs=0.1)
    assert (good.loc[["ari", "ami"], "null"].abs() < 0.02).all()
    # There is no batch effect: the width is that of its null.
    width = good.loc["asw_batch"]
    assert abs(width["value"] - width["null"]) < 4 * width["null_sd"]
    assert width["normalised"] == pytest.approx(width["value"] / width["null"])
    nmi = good.loc["nmi"]
    assert nmi["normalised"] == pytest.approx((nmi["value"] - nmi["null"]) / (1 - nmi["null"]))


def test_counts(good):
    assert (good["n_scored"] + good["n_left_out"] == 400).all()
    assert good.loc["nmi", ["n_scored", "n_labels", "n_batches"]].tolist() == [400, 8, 4]
    path = np.isfinite(simulated()["pseudotime"]["gex"]).sum()
    assert good.loc["trajectory", ["n_scored", "n_labels", "n_batches"]].tolist() == [path, 3, 4]
    assert good.loc["asw_site", "n_batches"] == 2


def test_same_seed_same_table_and_the_seed_moves_the_null_alone(good):
    pd.testing.assert_frame_equal(good, table(**simulated()))
    other = table(**simulated(), seed=1)
    pd.testing.assert_series_equal(good["value"], other["value"])
    assert (good["null"] != other["null"]).all()


def test_a_random_embedding_scores_as_its_null():
    cells = simulated()
    cells["embedding"] = np.random.default_rng(1).normal(size=(400, 10))
    rows = table(**cells)
    assert ((rows["value"] - rows["null"]).abs() < 4 * rows["null_sd"]).all()
    assert 0.02 < rows.loc["nmi", "null"] < 0.15  # not 0: NMI is not adjusted for chance
    assert abs(rows.loc["ami", "value"]) < 0.03


def test_cells_without_a_label_are_left_out_and_counted(good):
    cells = simulated()
    noise = np.random.default_rng(2).normal(0, 30, size=(50, 10))
    more = {
        "embedding": np.r_[cells["embedding"], noise],
        "labels": np.r_[cells["labels"], [None, np.nan] * 25],
        "batch": np.r_[cells["batch"], ["9"] * 50],
        "site": np.r_[cells["site"], ["9"] * 50],
        "pseudotime": {"gex": np.r_[cells["pseudotime"]["gex"], np.full(50, 0.5)]},
    }
    rows = table(**more)
    pd.testing.assert_frame_equal(rows.drop(columns="n_left_out"), good.drop(columns="n_left_out"))
    np.testing.assert_array_equal(rows["n_left_out"], good["n_left_out"] + 50)


def test_further_orders_have_rows_of_their_own():
    cells = simulated(n=150)
    cells["pseudotime"]["atac"] = -cells["pseudotime"]["gex"]
    rows = table(**cells)
    assert list(rows.index[4:6]) == ["trajectory", "trajectory_atac"]
    assert rows["value"].iloc[5] > 0.9


@pytest.mark.parametrize(
    ("change", "reasons"),
    [
        ({"labels": None}, dict.fromkeys(METRICS, "no cell has a label")),
        (
            {"labels": np.array(["a"] * 2 + [None] * 58, dtype=object)},
            dict.fromkeys(METRICS, "fewer than 3 cells have a label"),
        ),
        (
            {"labels": np.full(60, "a", dtype=object)},
            dict.fromkeys(["nmi", "ari", "ami", "asw_label"], "fewer than two labels"),
        ),
        (
            {"labels": np.arange(60).astype(str).astype(object)},
            {
                "asw_label": "every cell has a label of its own",
                "asw_batch": "no cell type has two batch groups and more cells than these",
            },
        ),
        ({"batch": None}, {"asw_batch": "no batch is named"}),
        ({"batch": np.full(60, "b")}, {"asw_batch": "one batch only"}),
        ({"site": None}, {"asw_site": "no site is named"}),
        ({"site": np.full(60, "s")}, {"asw_site": "one site only"}),
        ({"pseudotime": None}, {"trajectory": "no labelled cell has a pseudotime"}),
        (
            {"pseudotime": {"gex": np.full(60, np.nan)}},
            {"trajectory": "no labelled cell has a pseudotime"},
        ),
        (
            {
                "embedding": np.random.default_rng(0).normal(size=(60, 5)),
                "pseudotime": {"gex": np.ones(60)},
            },
            {"trajectory": "no batch has 2 cells that differ in the order"},
        ),
    ],
)
def test_what_cannot_be_scored_says_why(change, reasons):
    rows = table(**{**simulated(n=60), **change})
    assert [name for name in METRICS if name in rows.index] == METRICS
    for metric, reason in reasons.items():
        row = rows.loc[metric]
        assert row["undefined"]
        assert row["reason"] == reason
        assert np.isnan(row["value"])
        assert row["n_scored"] == 0
    assert (rows.loc[rows["value"].isna(), "reason"] != "").all()


@pytest.mark.parametrize("n", [1, 3, 4, 6, 12, 20])
@pytest.mark.parametrize("constant", [False, True])
def test_no_size_and_no_collapse_raises(n, constant):
    cells = simulated(n=n, types=3, batches=2)
    if constant:
        cells["embedding"] = np.ones((n, 2))
    rows = table(**cells)
    assert list(rows.index) == METRICS
    nothing = rows[["value", "null", "null_sd", "normalised"]].isna().any(axis=1)
    assert (rows.loc[nothing, "reason"] != "").all()
    values = rows["value"].dropna()
    assert ((values >= -0.5) & (values <= 1)).all()


def test_a_collapsed_embedding_is_not_a_perfect_one():
    cells = simulated(n=200)
    cells["embedding"] = np.zeros((200, 5))
    rows = table(**cells)
    assert rows.loc["asw_batch", "value"] == 1
    assert rows.loc["asw_label", "value"] == 0.5
    assert rows.loc["asw_label", "normalised"] == 0


@pytest.mark.parametrize("scale", [1e-12, 1e15])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_scale_of_the_embedding_does_not_matter(good, scale, dtype):
    cells = simulated()
    cells["embedding"] = (cells["embedding"] * scale).astype(dtype)
    rows = table(**cells, n_permutations=2)
    np.testing.assert_allclose(rows["value"], good["value"], atol=0.02)


def test_without_permutations_there_is_no_null(good):
    rows = table(**simulated(), n_permutations=0)
    pd.testing.assert_series_equal(rows["value"], good["value"])
    assert rows[["null", "null_sd", "normalised"]].isna().all(axis=None)
    assert (rows["reason"] == "no null: fewer than two permutations can be scored").all()
    assert not rows["undefined"].any()


@pytest.mark.parametrize("bad", [np.nan, -np.inf, 1e200, 2e19])
def test_a_value_that_is_not_finite_or_too_large_names_the_first_cell(bad):
    cells = simulated(n=60)
    cells["embedding"][[17, 40], 3] = bad
    with pytest.raises(DataError, match=r"2 of 60 cells .* first is cell 17"):
        table(**cells)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"embedding": np.zeros(60)}, "shape"),
        ({"embedding": np.zeros((60, 0))}, "shape"),
        ({"labels": np.full(59, "a")}, r"labels: .*\(59,\).* 60 cells"),
        ({"batch": np.full(61, "a")}, "batch: "),
        ({"site": np.full(61, "a")}, "site: "),
        ({"batch": np.array([None] + ["b"] * 59)}, "batch: missing for 1 cells.* cell 0"),
        ({"pseudotime": {"gex": np.zeros(7)}}, "gex: "),
        ({"pseudotime": {"gex": np.full(60, np.inf)}}, "gex: infinite"),
        ({"pseudotime": {"gex": np.full(60, "early")}}, "gex: "),
    ],
)
def test_wrong_input_is_refused(change, match):
    with pytest.raises(DataError, match=match):
        table(**{**simulated(n=60), **change})


def test_one_permutation_is_refused():
    with pytest.raises(ParameterError, match="n_permutations"):
        table(**simulated(n=60), n_permutations=1)


def test_on_real_cells():
    """Proteins of 600 bone-marrow cells: far above the null, though only one site and few cells."""
    folder = Path(os.environ.get("COEMBED_DATA", Path(__file__).parents[3] / "shared" / "data"))
    path = folder / "bmmc_cite_600.h5mu"
    if not path.exists():
        pytest.skip(f"{path} is not there: set COEMBED_DATA")
    import mudata

    cells = mudata.read_h5mu(path)
    x = np.log1p(np.asarray(cells["prot"].X.todense(), dtype=float))
    x = x - x.mean(axis=1, keepdims=True)
    x = x - x.mean(axis=0)
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    orders = {
        name: cells.obs[name].to_numpy(dtype=float)
        for name in cells.obs.columns
        if name.startswith("pseudotime_order")
    }
    rows = table(
        embedding=u[:, :10] * s[:10],
        labels=cells.obs["cell_type"].astype(object).to_numpy(),
        batch=cells.obs["batch"].astype(str).to_numpy(),
        pseudotime=orders,
    )
    for metric in ("nmi", "ami", "asw_label", "graph_connectivity"):
        row = rows.loc[metric]
        assert row["value"] > row["null"] + 5 * row["null_sd"]
    assert 0.4 < rows.loc["nmi", "value"] < 0.95
    assert rows.loc["asw_site", "undefined"]
