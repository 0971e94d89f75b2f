"""Traversal: closed forms with a decoder of our own, and markers on simulated cells."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch
from markers import N_MARKERS, TYPES, markers

from coembed.errors import CoembedError, ParameterError
from coembed.explain import traversal
from coembed.explain.levels import PSEUDOCOUNT, log2_fold
from coembed.explain.traversal import spearman


@pytest.fixture
def known(trained, monkeypatch: pytest.MonkeyPatch):
    """A model whose decoder is known: levels exp(z0), exp(-z1), a constant, and the batch."""

    def decode(z: torch.Tensor, codes: torch.Tensor, role: str) -> torch.Tensor:
        still = torch.full_like(z[:, 0], 0.3)
        return torch.stack([z[:, 0].exp(), (-z[:, 1]).exp(), still, still * (1 + codes)], dim=1)

    monkeypatch.setattr(trained, "decode", decode)
    names = ["up", "down", "still", "batch"]
    monkeypatch.setattr(trained, "decoded_features", {"rna": names})
    return trained


def test_a_known_decoder_gives_closed_forms(known) -> None:
    z = known.get_latent_representation()
    table = traversal(known, "rna", steps=5).set_index(["dimension", "feature"])
    low, high = np.quantile(z, (0.05, 0.95), axis=0)
    assert len(table) == 4 * z.shape[1]
    up, down = table.loc[(0, "up")], table.loc[(1, "down")]
    assert (up["spearman"], down["spearman"]) == (pytest.approx(1), pytest.approx(-1))
    assert up["low"] == pytest.approx(np.exp(low[0]), rel=1e-5)
    assert up["high"] == pytest.approx(np.exp(high[0]), rel=1e-5)
    assert down["high"] == pytest.approx(np.exp(-high[1]), rel=1e-5)
    middle = np.median(z, axis=0)
    ends = [[np.exp(x), np.exp(-middle[1]), 0.3, 0.45] for x in (low[0], high[0])]
    add = PSEUDOCOUNT * np.mean(ends)
    change = np.log2(np.exp(high[0]) + add) - np.log2(np.exp(low[0]) + add)
    assert up["change"] == pytest.approx(change, rel=1e-5)


def test_features_that_do_not_depend_on_a_dimension_have_nothing(known) -> None:
    table = traversal(known, "rna").set_index(["dimension", "feature"])
    depends = {(0, "up"), (1, "down")}
    rest = table.loc[[key for key in table.index if key not in depends]]
    assert (rest["spearman"] == 0).all()
    np.testing.assert_allclose(rest["change"], 0, atol=1e-6)
    of_batch = table.xs("batch", level="feature")
    np.testing.assert_allclose(of_batch[["low", "high"]], 0.45, rtol=1e-6)  # mean of both batches


def test_given_cells_keep_their_other_dimensions_and_their_batch(known, cells) -> None:
    z = known.get_latent_representation()
    rows = np.array([3, 50, 77])
    table = traversal(known, "rna", at=rows).set_index(["dimension", "feature"])
    codes = (cells.batch[rows] == "b1").astype(int)
    assert table.loc[(2, "batch"), "low"] == pytest.approx(0.3 * (1 + codes).mean(), rel=1e-5)
    assert table.loc[(2, "up"), "high"] == pytest.approx(np.exp(z[rows, 0]).mean(), rel=1e-5)


@pytest.mark.parametrize("role", ["rna", "prot"])
def test_markers_follow_a_dimension(trained, role: str) -> None:
    table = traversal(trained, role)
    n = len(trained.decoded_features[role])
    assert len(table) == n * trained.n_latent
    assert np.isfinite(table.drop(columns="feature").to_numpy(dtype=float)).all()
    assert table["spearman"].between(-1, 1).all()
    sizes = table["change"].abs()
    assert sizes.groupby(table["dimension"]).is_monotonic_decreasing.all()
    marker = [name for kind in TYPES for name in markers(role, kind)]
    is_marker = table["feature"].isin(marker)
    assert sizes[is_marker].max() > 1.5
    strongest = table.loc[sizes.sort_values(ascending=False).index[:N_MARKERS]]
    assert strongest["feature"].isin(marker).all()
    assert (strongest["spearman"].abs() > 0.8).all()
    assert (np.sign(strongest["spearman"]) == np.sign(strongest["change"])).all()
    # The null on simulated cells: what is no marker moves far less than what is one, wherever.
    largest = sizes.groupby(table["feature"]).max()
    of_marker = largest.index.isin(marker)
    assert largest[~of_marker].max() < 0.5 * largest[of_marker].min()


def test_other_cells_say_what_the_range_is(trained, cells) -> None:
    whole = traversal(trained, "rna")
    one_type = traversal(trained, "rna", cells.take(cells.obs["type"] == "A"))
    assert one_type["change"].abs().max() < whole["change"].abs().max()


def test_spearman_is_scipys() -> None:
    random = np.random.default_rng(0)
    levels = random.normal(size=(12, 30))
    levels[:, ::3] = levels[:, ::3].round()  # with ties
    expected = [scipy.stats.spearmanr(np.arange(12), column)[0] for column in levels.T]
    np.testing.assert_allclose(spearman(levels), expected)
    noise = 1 + 1e-7 * random.normal(size=(12, 4))
    np.testing.assert_array_equal(spearman(np.hstack([noise, np.zeros((12, 1))])), 0)


def test_fold_does_not_depend_on_the_unit() -> None:
    a, b = np.random.default_rng(1).exponential(size=(2, 5, 8))
    np.testing.assert_allclose(log2_fold(1e4 * a, 1e4 * b), log2_fold(a, b))
    np.testing.assert_allclose(log2_fold(a, b), -log2_fold(b, a))
    assert np.abs(log2_fold(a, b)).max() < np.abs(np.log2(a / b)).max(), "it shrinks"


def test_what_cannot_be(trained, linear) -> None:
    with pytest.raises(CoembedError, match=r"cannot decode features.*cobolt"):
        traversal(linear, "rna")
    with pytest.raises(ParameterError, match="no modality 'atac'"):
        traversal(trained, "atac")
    with pytest.raises(ParameterError, match="no path"):
        traversal(trained, "rna", steps=2)
    with pytest.raises(ParameterError, match="no path"):
        traversal(trained, "rna", quantiles=(0.9, 0.1))
    with pytest.raises(ParameterError, match="no cell to start from"):
        traversal(trained, "rna", at=np.array([], dtype=int))
