"""Cobolt: the contract, and the closed forms of specs/cobolt.md section 10."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest
import torch
from contract import without
from easy import batch_of, easy_cells, mosaic, neighbour_accuracy
from networks import NetworkContract
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score
from torch.nn.functional import log_softmax

from coembed.data.minibatches import Batch, Inputs
from coembed.data.pipeline import block_of
from coembed.errors import DataError
from coembed.models.bridge import bridge, subsets
from coembed.models.cobolt import Cobolt
from coembed.nn.posteriors import Gaussian
from coembed.train.stage import Clock, WarmUp


def built(widths: dict[str, int], n_batches: int = 1, **params: object) -> Cobolt:
    """A model with networks of the given widths and random weights, not trained."""
    kind = "cite" if "prot" in widths else "multiome"
    model = Cobolt(easy_cells(kind, 30), **params)
    model.n_features, model.batches = widths, [f"b{i}" for i in range(n_batches)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model._build()
    return model


class TestCobolt(NetworkContract):
    name = "cobolt"
    params: ClassVar = {"max_epochs": 15, "batch_size": 50, "validation_fraction": 0.1}

    def terms(self, kind: str) -> dict[str, dict[str, float]]:
        roles = easy_cells(kind, 3).roles
        return {"elbo": {**{f"reconstruction_{m}": 1.0 for m in roles}, "kl": 1.0}}

    def test_takes_three_modalities(self) -> None:
        cells = mosaic(easy_cells("all", 180))
        z = self.fit(cells, max_epochs=15).get_latent_representation()
        assert neighbour_accuracy(z, cells.labels) > 0.9

    def test_needs_some_paired_cells(self) -> None:
        cells = easy_cells("cite", 60)
        half = np.arange(60) < 30
        unpaired = without(without(cells, "rna", half), "prot", ~half)
        with pytest.raises(DataError, match=r"0 cells have all of rna, prot.*paired cells"):
            self.fit(unpaired).get_latent_representation()


# -- section 10.1, 10.2, 10.3 ---------------------------------------------------------------------


def test_prior() -> None:
    prior = built({"rna": 5, "prot": 3}).prior
    assert prior.log_var.exp().item() == pytest.approx(0.18)
    assert prior.mean.item() == 0
    k4 = built({"rna": 5, "prot": 3}, n_latent=4).prior
    assert k4.log_var.exp().item() == pytest.approx(4 / 50 * (1 - 1 / 4))


@pytest.mark.parametrize(
    ("widths", "n_batches", "count"),
    [
        ({"rna": 1000, "atac": 5000}, 1, 860_136),
        ({"rna": 1000, "atac": 5000}, 2, 872_136),
        ({"rna": 4000, "prot": 134}, 1, 598_896),
    ],
)
def test_number_of_parameters(widths: dict[str, int], n_batches: int, count: int) -> None:
    assert sum(p.numel() for p in built(widths, n_batches).net.parameters()) == count


def test_kl_of_the_loss_vanishes_at_the_prior() -> None:
    widths = {"rna": 5, "prot": 3}
    model = built(widths)
    model.posterior = lambda batch: Gaussian(  # type: ignore[method-assign]
        torch.zeros(2, 10), model.prior.log_var.expand(2, 10)
    )
    assert model.loss(batch_of(widths, [0, 0]), Clock(0, 1))["kl"].item() == pytest.approx(
        0, abs=1e-6
    )


# -- the decoder and the loss by hand -------------------------------------------------------------


def test_decoder_is_the_formula() -> None:
    widths = {"rna": 7, "prot": 3}
    model = built(widths, n_batches=3)
    z = torch.randn(4, 10, generator=torch.Generator().manual_seed(2))
    codes = torch.tensor([2, 0, -1, 1])
    theta = (z.exp() / z.exp().sum(1, keepdim=True)).numpy()
    for m in widths:
        loadings, slope, intercept = (
            part[m].detach().numpy()
            for part in (model.net.loadings, model.net.slope, model.net.intercept)
        )
        mine = model.decode(z, codes, m).detach().numpy()
        for i, d in enumerate(codes.tolist()):
            s, b = (slope[d], intercept[d]) if d >= 0 else (slope.mean(0), intercept.mean(0))
            score = (theta[i] @ loadings) * (1 + s) + b
            np.testing.assert_allclose(mine[i], np.exp(score) / np.exp(score).sum(), rtol=1e-4)


def test_decoder_does_not_see_a_shift_of_z() -> None:
    widths = {"rna": 7, "prot": 3}
    model, batch = built(widths), batch_of({"rna": 7, "prot": 3}, [0, 0])
    z = torch.randn(2, 10, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(
        model.decode(z, batch.codes, "rna"), model.decode(z + 3, batch.codes, "rna")
    )


def test_loss_is_the_mean_over_cells_of_the_sums_over_features(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    widths = {"rna": 7, "prot": 3}
    model, batch = built(widths), batch_of({"rna": 7, "prot": 3}, [0, 0, 0])
    model.net.eval()
    monkeypatch.setattr(Gaussian, "sample", lambda self: self.mean)
    terms = model.loss(batch, Clock(0, 1))
    posterior = model.posterior(batch)
    for m, x in batch.x.items():
        log_pi = log_softmax(model.logits(posterior.mean, batch.batch[m], m), -1)
        torch.testing.assert_close(terms[f"reconstruction_{m}"], -(x * log_pi).sum() / 3)
    normal = lambda q: torch.distributions.Normal(q.mean, (0.5 * q.log_var).exp())  # noqa: E731
    prior = Gaussian(torch.zeros(3, 10), model.prior.log_var.expand(3, 10))
    kl = torch.distributions.kl_divergence(normal(posterior), normal(prior)).sum() / 3
    torch.testing.assert_close(terms["kl"], kl, rtol=1e-4, atol=1e-5)


def test_posterior_counts_the_prior_once_and_leaves_out_what_is_absent() -> None:
    widths = {"rna": 7, "prot": 3}
    model = built(widths)
    model.net.eval()
    batch = batch_of(widths, [0, 0])
    alone = Batch(*({"rna": part["rna"]} for part in (batch.x, batch.present, batch.batch)))
    masked = Batch(batch.x, {**batch.present, "prot": torch.zeros(2, dtype=bool)}, batch.batch)
    torch.testing.assert_close(model.posterior(masked).mean, model.posterior(alone).mean)
    expert_precision = torch.exp(
        -model.net.log_var["rna"](model.net.trunk["rna"](batch.x["rna"].log1p()))
    )
    torch.testing.assert_close(
        torch.exp(-model.posterior(alone).log_var),
        expert_precision + 1 / 0.18,
        rtol=1e-4,
        atol=1e-4,
    )


# -- the plan -------------------------------------------------------------------------------------


def test_subsets_count_in_binary_with_the_last_modality_fastest() -> None:
    assert subsets(["rna", "atac"]) == [("atac",), ("rna",), ("rna", "atac")]
    three = subsets(["rna", "prot", "atac"])
    assert len(three) == len(set(three)) == 7
    assert three[:3] == [("atac",), ("prot",), ("prot", "atac")]
    assert three[-1] == ("rna", "prot", "atac")


def test_an_epoch_visits_every_combination_with_all_cells_that_have_it() -> None:
    """Section 7: a paired cell three times, a cell with one modality once."""
    cells = mosaic(easy_cells("cite", 60))
    model = Cobolt(cells, batch_size=16, max_epochs=100)
    model.n_features = {"rna": 60, "prot": 12}
    model._build()
    blocks = {role: block_of(cells, role) for role in cells.roles}
    inputs = Inputs(blocks, np.zeros(60, dtype=np.int64), torch.device("cpu"))
    (stage,) = model.stages(inputs, np.arange(60), np.arange(0))
    visits = np.zeros((60, 3), dtype=int)
    order = [("prot",), ("rna",), ("rna", "prot")]
    seen = []
    for draw in stage.sampler.epoch(np.random.default_rng(0)):
        seen.append(order.index(tuple(draw)))
        for rows in list(draw.values())[:1]:
            visits[rows, seen[-1]] += 1
    assert seen == sorted(seen)
    expected = np.column_stack([cells.present["prot"], cells.present["rna"], cells.paired])
    np.testing.assert_array_equal(visits, expected)
    (player,) = stage.players
    assert player.weights == {"kl": WarmUp(0.3)}
    assert (player.lr, stage.epochs) == (0.005, 100)


# -- bridging -------------------------------------------------------------------------------------


def test_bridge_moves_incomplete_cells_alone() -> None:
    cells = easy_cells("cite", 90)
    lacks = np.arange(90) >= 60
    partial = without(cells, "prot", lacks)
    inputs = Inputs(
        {role: block_of(partial, role) for role in partial.roles},
        np.zeros(90, dtype=np.int64),
        torch.device("cpu"),
    )
    random = np.random.default_rng(0)
    rna = random.uniform(size=(400, 2)).astype("f4")
    anchors = {"prot": rna, "rna": rna, "rna+prot": 2 * rna + 5}
    z = random.uniform(0.1, 0.9, size=(90, 2)).astype("f4")
    before = z.copy()
    moved = bridge(z, inputs, anchors)
    np.testing.assert_array_equal(z, before)
    np.testing.assert_array_equal(moved[~lacks], z[~lacks])
    np.testing.assert_allclose(moved[lacks], 2 * z[lacks] + 5, atol=0.2)
    np.testing.assert_array_equal(moved, bridge(z, inputs, anchors))
    with pytest.raises(DataError, match="no training cell has all"):
        bridge(z, inputs, {name: a[:0] for name, a in anchors.items()})


def test_embedding_is_centred_over_the_topics() -> None:
    model = Cobolt(easy_cells("cite", 60)).train(2, progress=False, device="cpu")
    np.testing.assert_allclose(model.get_latent_representation().sum(axis=1), 0, atol=1e-5)


def test_groups_are_found_from_paired_and_single_modality_cells() -> None:
    """Section 10.6: 300 paired cells and 300 of each modality, 30 epochs, k-means."""
    cells = easy_cells("multiome", 900, n_batches=1)
    third = np.arange(900) // 300
    cells = without(without(cells, "rna", third == 1), "atac", third == 2)
    model = Cobolt(cells).train(30, progress=False, device="cpu")
    z = model.get_latent_representation()
    clusters = KMeans(3, n_init=10, random_state=0).fit_predict(z)
    assert adjusted_rand_score(cells.labels.astype(str), clusters) > 0.95
    for part in range(3):
        rows = third == part
        assert adjusted_rand_score(cells.labels[rows].astype(str), clusters[rows]) > 0.9


# -- flags of the preset 'review' -----------------------------------------------------------------


def test_review_preset_sets_its_flags() -> None:
    params: ClassVar = Cobolt.resolve_params(easy_cells("cite", 30), "review")
    default = Cobolt.resolve_params(easy_cells("cite", 30))
    assert params["lognorm_input"]
    assert params["slice_normalisation"]
    assert (params["learning_rate"], params["n_latent"], params["max_epochs"]) == (0.005, 10, 100)
    assert params["validation_fraction"] == 0
    assert not default["lognorm_input"]
    assert not default["slice_normalisation"]


def test_lognorm_input() -> None:
    for kind in ("cite", "multiome"):
        cells = easy_cells(kind, 30)
        views = {
            flag: (model := Cobolt(cells, lognorm_input=flag)).pipeline(model.cells.var).fit(cells)
            for flag in (False, True)
        }
        other = cells.roles[1]
        for role in cells.roles:
            np.testing.assert_array_equal(
                views[False][role].x.toarray(), cells.counts[role].toarray()
            )
        total = cells.counts["rna"].sum(axis=1)
        expected = np.log1p(1e4 * cells.counts["rna"].toarray() / total)
        np.testing.assert_allclose(views[True]["rna"].x.toarray(), expected, rtol=1e-5)
        x = views[True][other].x
        if other == "atac":
            assert set(np.unique(x.toarray())) == {0, 1}
        else:
            assert (x != np.round(x)).any()


def test_slice_normalisation_makes_a_cell_depend_on_its_slice() -> None:
    """Section 10.5; the weights are those of a training without the flag."""
    cells = easy_cells("cite", 60)
    clean, sliced = (
        Cobolt(cells, slice_normalisation=flag).train(3, progress=False, device="cpu")
        for flag in (False, True)
    )
    for a, b in zip(clean.net.parameters(), sliced.net.parameters(), strict=True):
        assert torch.equal(a, b)
    first = cells.take(np.flatnonzero(cells.labels == "A"))
    rows = np.flatnonzero(cells.labels == "A")
    change = {
        model.params.slice_normalisation: np.abs(
            model.get_latent_representation(first) - model.get_latent_representation()[rows]
        ).max()
        for model in (clean, sliced)
    }
    assert change[False] < 1e-4
    assert change[True] > 0.05
    assert not sliced.net.training, "the networks are put back in evaluation mode"
