"""Differential features: closed forms, no discovery where there is none, markers found."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from markers import markers
from scipy import sparse
from scipy.stats import mannwhitneyu

from coembed.errors import CoembedError, CoembedWarning, ParameterError
from coembed.explain import differential_features
from coembed.explain.differential import counted, expected_fdr
from coembed.explain.levels import PSEUDOCOUNT
from coembed.models.system import System
from coembed.nn.sparse import dense

MODEL = ["effect", "probability", "fdr", "level_a", "level_b"]


def of_type(cells, *kinds: str) -> np.ndarray:
    return cells.obs["type"].isin(kinds).to_numpy()


@pytest.fixture
def known(trained, cells, monkeypatch: pytest.MonkeyPatch):
    """A model whose draws are known: z is what cells of type A have of rna0 .. rna4, and more."""

    def posterior(batch):
        rate = dense(batch.x["rna"])[:, :5].mean(dim=1) > 8  # eightfold up in type A: 16 against 2
        return SimpleNamespace(sample=lambda: rate.float().unsqueeze(1))

    def decode(z: torch.Tensor, codes: torch.Tensor, role: str) -> torch.Tensor:
        a, still = z[:, 0], torch.full_like(z[:, 0], 0.5)
        return torch.stack([0.2 + 0.6 * a, 0.8 - 0.6 * a, still, 0.1 + 0.8 * codes], dim=1)

    monkeypatch.setattr(trained, "posterior", posterior)
    monkeypatch.setattr(trained, "decode", decode)
    monkeypatch.setattr(trained, "decoded_features", {"rna": ["rna0", "rna9", "rna40", "batch"]})
    return trained


@pytest.fixture
def a_and_c(cells, known) -> tuple[np.ndarray, np.ndarray]:
    """Cells of type A and C on which the fixture's threshold is right."""
    mean = np.asarray(cells.counts["rna"][:, :5].mean(axis=1)).ravel()
    return of_type(cells, "A") & (mean > 8), of_type(cells, "C") & (mean <= 8)


def test_closed_forms(known, a_and_c) -> None:
    table = differential_features(known, "rna", *a_and_c, n_samples=50).set_index("feature")
    levels = {"rna0": (0.8, 0.2), "rna9": (0.2, 0.8), "rna40": (0.5, 0.5), "batch": (0.5, 0.5)}
    add = PSEUDOCOUNT * 0.5
    for name, (a, b) in levels.items():
        fold = np.log2((a + add) / (b + add))
        row = table.loc[name]
        assert row["effect"] == pytest.approx(fold, abs=1e-5)
        assert (row["level_a"], row["level_b"]) == (pytest.approx(a), pytest.approx(b))
        assert row["probability"] == (1 if a != b else 0)
        assert row["fdr"] == pytest.approx(0 if a != b else 0.5)
    assert list(table.index[:2]) in (["rna0", "rna9"], ["rna9", "rna0"])


def test_a_difference_is_in_the_unit_of_the_levels(known, a_and_c) -> None:
    table = differential_features(known, "rna", *a_and_c, effect="difference", n_samples=20)
    effect = table.set_index("feature")["effect"]
    np.testing.assert_allclose(effect[["rna0", "rna9", "rna40"]], [0.6, -0.6, 0], atol=1e-6)
    table = differential_features(
        known, "rna", *a_and_c, effect="difference", delta=0.7, n_samples=20
    )
    assert (table["probability"] == 0).all()


def test_batches_do_not_count_unless_asked_for(known, cells) -> None:
    """Group a is mostly of one batch, group b mostly of the other; 'batch' depends on it alone."""
    of_b1 = cells.batch == "b1"
    few = np.arange(240) % 8 == 0
    a, b = (of_b1 & ~few) | (~of_b1 & few), (~of_b1 & ~few) | (of_b1 & few)
    shared = differential_features(known, "rna", a, b).set_index("feature")
    assert (shared.loc["batch", "effect"], shared.loc["batch", "probability"]) == (0, 0)
    own = differential_features(known, "rna", a, b, batches="own").set_index("feature")
    assert own.loc["batch", "effect"] > 1
    assert own.loc["batch", "probability"] == pytest.approx(0.75, abs=0.12)
    with pytest.warns(CoembedWarning, match="no batch in common.*its own batch"):
        apart = differential_features(known, "rna", of_b1, ~of_b1).set_index("feature")
    assert apart.loc["batch", "probability"] == 1


def test_features_that_were_not_counted_have_no_counts(known, a_and_c) -> None:
    table = differential_features(known, "rna", *a_and_c, n_samples=20).set_index("feature")
    assert table.loc["batch"].drop(MODEL).isna().all()
    assert table.drop("batch").notna().all(axis=None)


@pytest.mark.parametrize("role", ["rna", "prot"])
def test_simulated_markers_are_found_and_nothing_else(trained, cells, role: str) -> None:
    """A has its markers up against B, and those of B down; those of C are alike in both."""
    a, b = of_type(cells, "A"), of_type(cells, "B")
    table = differential_features(trained, role, a, b)
    found = table[table["fdr"] <= 0.05]
    up, down = found[found["effect"] > 0], found[found["effect"] < 0]
    assert set(up["feature"]) == set(markers(role, "A"))
    assert set(down["feature"]) == set(markers(role, "B"))
    by_counts = table[table["wilcoxon_q"] < 1e-6]
    assert set(by_counts["feature"]) == set(found["feature"]), "counts and model agree"
    assert (np.sign(found["effect"]) == np.sign(found["mean_a"] - found["mean_b"])).all()
    assert found["effect"].abs().between(1.5, 4).all(), "eightfold is 3, less the pseudocount"
    probable = table["probability"].to_numpy()
    assert (np.diff(probable) <= 0).all()
    assert (np.diff(table["fdr"]) >= -1e-12).all()


@pytest.mark.parametrize("role", ["rna", "prot"])
def test_what_counts_do_not_support_is_not_a_marker(trained, cells, role: str) -> None:
    """At a smaller delta a model of few cells believes chance; the columns beside it say so."""
    a, b = of_type(cells, "A"), of_type(cells, "B")
    table = differential_features(trained, role, a, b, delta=0.25)
    found = table[(table["fdr"] <= 0.05) & (table["wilcoxon_q"] <= 0.05)]
    assert set(found["feature"]) == {*markers(role, "A"), *markers(role, "B")}


@pytest.mark.parametrize("role", ["rna", "prot"])
@pytest.mark.parametrize("kinds", [("A",), ("A", "B", "C")])
def test_random_halves_do_not_differ(trained, cells, role: str, kinds: tuple[str, ...]) -> None:
    """Of one type, and of all: two random cells then do differ, one way as often as the other."""
    rows = np.random.default_rng(0).permutation(np.flatnonzero(of_type(cells, *kinds)))
    half = len(rows) // 2
    table = differential_features(trained, role, rows[:half], rows[half:])
    assert (table["fdr"] > 0.3).all()
    assert table["probability"].max() < 0.6
    assert (table["wilcoxon_q"] > 0.01).all()


def test_the_rest_is_every_other_cell(trained, cells) -> None:
    a = of_type(cells, "A")
    rest = differential_features(trained, "rna", a)
    pd.testing.assert_frame_equal(rest, differential_features(trained, "rna", a, ~a))
    rows = np.flatnonzero(a)
    pd.testing.assert_frame_equal(rest, differential_features(trained, "rna", rows))


def test_swapped_groups_turn_the_sign(trained, cells) -> None:
    a, b = of_type(cells, "A"), of_type(cells, "B")
    one = differential_features(trained, "prot", a, b).set_index("feature")
    two = differential_features(trained, "prot", b, a).set_index("feature").loc[one.index]
    strong = one["fdr"] <= 0.05
    np.testing.assert_allclose(one["effect"][strong], -two["effect"][strong], atol=0.3)
    np.testing.assert_array_equal(one["mean_a"], two["mean_b"])
    np.testing.assert_allclose(one["wilcoxon_p"], two["wilcoxon_p"])


def test_the_seed_decides_and_nothing_outside_is_moved(trained, cells) -> None:
    a, b = of_type(cells, "A"), of_type(cells, "B")
    before = torch.get_rng_state()
    one = differential_features(trained, "rna", a, b, seed=1, n_samples=100)
    assert torch.equal(torch.get_rng_state(), before)
    pd.testing.assert_frame_equal(
        one, differential_features(trained, "rna", a, b, seed=1, n_samples=100)
    )
    other = differential_features(trained, "rna", a, b, seed=2, n_samples=100)
    assert not one["level_a"].equals(other["level_a"])


def test_expected_fdr_by_hand() -> None:
    p = np.array([0.5, 0.99, 0.9, 0.9])
    np.testing.assert_allclose(expected_fdr(p), [0.71 / 4, 0.01, 0.21 / 3, 0.21 / 3])


def test_counts_are_compared_feature_by_feature(cells) -> None:
    """Against one scipy call per feature, with a constant feature and cells that lack RNA."""
    lacks = np.arange(240) % 10 == 0
    x = cells.counts["rna"].toarray()
    x[:, 7] = 0
    x[lacks] = 0
    spoilt = replace(
        cells,
        counts={**cells.counts, "rna": sparse.csr_matrix(x)},
        present={**cells.present, "rna": ~lacks},
    )
    a, b = (np.flatnonzero(of_type(cells, kind)) for kind in "AB")
    table = counted(spoilt, "rna", a, b)
    of_a, of_b = ([row for row in rows if not lacks[row]] for rows in (a, b))
    x = np.log1p(1e4 * x / np.maximum(x.sum(axis=1, keepdims=True), 1))
    np.testing.assert_allclose(table["mean_a"], x[of_a].mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(table["mean_b"], x[of_b].mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(table["detected_b"], (x[of_b] > 0).mean(axis=0))
    varied = [j for j in range(60) if j != 7]
    p = [mannwhitneyu(x[of_a, j], x[of_b, j], method="asymptotic").pvalue for j in varied]
    np.testing.assert_allclose(table["wilcoxon_p"].iloc[varied], p, rtol=1e-3)
    assert table["wilcoxon_p"].iloc[7] == 1
    order = np.argsort(table["wilcoxon_p"].to_numpy())
    steps = table["wilcoxon_p"].to_numpy()[order] * 60 / np.arange(1, 61)
    q = np.minimum.accumulate(steps[::-1])[::-1]
    np.testing.assert_allclose(table["wilcoxon_q"].to_numpy()[order], q)


def test_a_group_without_the_modality_has_no_test(cells) -> None:
    a, b = (np.flatnonzero(of_type(cells, kind)) for kind in "AB")
    present = ~of_type(cells, "A")
    x = cells.counts["rna"].multiply(present[:, None]).tocsr().astype(np.float32)
    none = replace(cells, counts={**cells.counts, "rna": x}, present={"rna": present})
    table = counted(none, "rna", a, b)
    assert table[["mean_a", "detected_a", "wilcoxon_p", "wilcoxon_q"]].isna().all(axis=None)
    assert table["mean_b"].notna().all()


def test_groups_that_cannot_be_compared(trained, cells) -> None:
    a = of_type(cells, "A")
    for group, says in (
        (np.zeros(240, dtype=bool), "group a does not name two or more"),
        (np.array([5]), "group a does not name two or more"),
        (np.array([1, 240]), "group a does not name two or more of the 240 cells"),
        (np.array([-1, 3]), "group a does not name two or more"),
        (a[:100], "mask of group a has shape .100,., the data have 240"),
    ):
        with pytest.raises(ParameterError, match=says):
            differential_features(trained, "rna", group)
    with pytest.raises(ParameterError, match="group b does not name"):
        differential_features(trained, "rna", np.ones(240, dtype=bool))
    with pytest.raises(ParameterError, match="80 cells are in both groups"):
        differential_features(trained, "rna", a, np.ones(240, dtype=bool))


def test_settings_that_cannot_be(trained, cells) -> None:
    a = of_type(cells, "A")
    with pytest.raises(ParameterError, match="no modality 'atac'"):
        differential_features(trained, "atac", a)
    with pytest.raises(ParameterError, match="Did you mean 'fold'"):
        differential_features(trained, "rna", a, effect="folds")
    with pytest.raises(ParameterError, match="Did you mean 'own'"):
        differential_features(trained, "rna", a, batches="owns")
    for wrong in ({"n_samples": 0}, {"delta": -1.0}, {"pseudocount": 0.0}):
        with pytest.raises(ParameterError, match="not allowed"):
            differential_features(trained, "rna", a, **wrong)
    with pytest.raises(ParameterError, match=r"no difference can pass 1e\+09.*Compare by 'fold'"):
        differential_features(trained, "rna", a, effect="difference", delta=1e9)


def test_systems_that_cannot(linear, trained, cells, monkeypatch: pytest.MonkeyPatch) -> None:
    a = of_type(cells, "A")
    with pytest.raises(CoembedError, match=r"cannot decode features.*cobolt"):
        differential_features(linear, "rna", a)
    monkeypatch.setattr(type(trained), "posterior", System.posterior)
    other = {"cobolt": "scmm", "scmm": "cobolt"}[trained.card.name]
    with pytest.raises(CoembedError, match=f"no posterior to draw from.*{other}"):
        differential_features(trained, "rna", a)
