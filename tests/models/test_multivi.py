"""MultiVI: the contract, and the closed forms of specs/multivi.md section 10."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest
import torch
from contract import without
from easy import batch_of, easy_cells, mosaic, neighbour_accuracy
from networks import NetworkContract
from scipy import stats

from coembed.data.minibatches import Batch, Inputs
from coembed.data.pipeline import block_of
from coembed.models.multivi import MultiVI
from coembed.nn.fusion import average_of_experts
from coembed.nn.posteriors import Gaussian
from coembed.train.stage import Clock, WarmUp

FLAGS = ("root_width", "adam", "no_batch", "lognorm_input", "feature_order_fault")


def built(widths: dict[str, int], n_batches: int = 1, **params: object) -> MultiVI:
    """A model with networks of the given widths and random weights, not trained."""
    kind = "all" if len(widths) == 3 else "cite" if "prot" in widths else "multiome"
    model = MultiVI(easy_cells(kind, 30), **params)
    model.n_features, model.batches = widths, [f"b{i}" for i in range(n_batches)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model._build()
    model.net.eval()
    return model


def lacking(batch: Batch, m: str, rows: list[int]) -> Batch:
    """The minibatch, of which some rows lack a modality."""
    x, present = batch.x[m].clone(), batch.present[m].clone()
    x[rows], present[rows] = 0, False
    return Batch({**batch.x, m: x}, {**batch.present, m: present}, batch.batch)


def gaussian(mean: list[float], variance: list[float]) -> Gaussian:
    return Gaussian(torch.tensor([mean]).float(), torch.tensor([variance]).log())


class TestMultiVI(NetworkContract):
    name = "multivi"
    params: ClassVar = {
        **{"n_hidden": 32, "max_epochs": 100, "batch_size": 50},
        **{"learning_rate": 1e-2, "validation_fraction": 0.1},
    }

    def terms(self, kind: str) -> dict[str, dict[str, float]]:
        roles = easy_cells(kind, 3).roles
        names = [*(f"reconstruction_{m}" for m in roles), "kl", "distance", "adversarial"]
        return {"elbo": dict.fromkeys(names, 1.0), "classifier": {"classification": 1.0}}

    def test_takes_three_modalities(self) -> None:
        cells = mosaic(easy_cells("all", 180))
        z = self.fit(cells).get_latent_representation()
        assert neighbour_accuracy(z, cells.labels) > 0.9


# -- section 10.1, 10.2: the average and the distance ---------------------------------------------


def test_average() -> None:
    p, q = gaussian([1, 0], [0.5, 1]), gaussian([3, 2], [0.2, 1])
    yes, no = torch.tensor([True]), torch.tensor([False])
    for experts in ([p, q], [q, p]):
        both = average_of_experts(experts, [yes, yes])
        torch.testing.assert_close(both.mean, torch.tensor([[2.0, 1.0]]))
        variance = torch.tensor([[0.7, 2.0]]) / 2**0.5
        torch.testing.assert_close(both.log_var.exp(), variance)
    assert variance.tolist()[0] == pytest.approx([0.4950, 1.4142], abs=1e-4)
    alone = average_of_experts([p, q], [yes, no])
    torch.testing.assert_close(alone.mean, p.mean)
    torch.testing.assert_close(alone.log_var, p.log_var)


def test_distance() -> None:
    p, q = gaussian([0], [1]), gaussian([1], [4])
    assert p.jeffreys(q).item() == pytest.approx(1.75)
    assert q.jeffreys(p).item() == pytest.approx(1.75)
    assert p.jeffreys(p).item() == 0
    rooted = [Gaussian(e.mean, e.log_var / 2) for e in (p, q)]
    assert rooted[0].jeffreys(rooted[1]).item() == pytest.approx(1.0), "HEAD's, whose sd is v^(1/4)"


# -- section 10.3: the likelihoods ----------------------------------------------------------------


def test_peaks_are_open_by_p_depth_and_region() -> None:
    """Section 10.3: all three 0.5 give 0.125."""
    widths = {"rna": 7, "atac": 2}
    model, batch = built(widths, n_latent=3), batch_of(widths, [0])
    batch.x["atac"][:] = torch.tensor([[3.0, 0.0]])
    with torch.no_grad():  # logits of 0
        for layer in (model.net.output["atac"], model.net.depth["atac"][1]):
            layer.weight.zero_()
            layer.bias.zero_()
    loss = model.reconstruction(torch.zeros(1, 3), batch, "atac").item()
    assert loss == pytest.approx(2.079442 + 0.133531, abs=1e-5)


def test_genes_are_zero_inflated_with_the_depth_of_the_cell() -> None:
    widths = {"rna": 7, "atac": 5}
    model, batch = built(widths, n_latent=3), batch_of(widths, [0, 0, 0])
    z = torch.randn(3, 3, generator=torch.Generator().manual_seed(2))
    h = model.decoded(z, batch.codes, "rna")
    share = model.decode(z, batch.codes, "rna")
    torch.testing.assert_close(share.sum(-1), torch.ones(3))
    x = batch.x["rna"].numpy()
    mean, gate, r = (
        tensor.detach().double().numpy()
        for tensor in (
            model.net.depth["rna"](batch.x["rna"]).exp() * share,
            model.net.gate(h).sigmoid(),
            model.net.free["rna"].exp(),
        )
    )
    log_prob = stats.nbinom.logpmf(x, r, r / (r + mean))
    zero = np.log(gate + (1 - gate) * np.exp(log_prob))
    expected = np.where(x > 0, np.log1p(-gate) + log_prob, zero).sum(1)
    ours = model.reconstruction(z, batch, "rna").item()
    assert ours == pytest.approx(-expected.mean(), rel=1e-4)


# -- section 10.4 ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_batches", "of_the_sheet"), [(1, 1_470_820), (3, 1_472_500)])
def test_number_of_parameters(n_batches: int, of_the_sheet: int) -> None:
    """The sheet's sum, without what no loss reaches, and with the classifier that it leaves out."""
    model = built({"rna": 1000, "atac": 5000}, n_batches, n_latent=8, n_hidden=70)
    width = 70 + 8 + (n_batches if n_batches > 1 else 0)
    dispersion_of_every_cell = 71_000
    protein_encoder = 5_110 + 568 + 568
    protein_trunks = 3 * ((width - 70 + 1) * 70 + (width - 8 + 1) * 70 - (width - 78) * 70)
    assert protein_trunks == 3 * {1: 5_600, 3: 5_810}[n_batches]
    deep = 3 * 3 * 70 if n_batches > 1 else 0  # every layer of a protein trunk sees the batch
    dead = dispersion_of_every_cell + protein_encoder + protein_trunks + deep
    classifier = 9 * 32 + 33 * 32 + 4 * 32 + 33 * n_batches if n_batches > 1 else 0
    count = sum(p.numel() for p in model.net.parameters())
    assert count == of_the_sheet - dead + classifier


def test_root_width() -> None:
    assert built({"rna": 100, "atac": 20_000}).n_hidden == 128
    assert built({"rna": 100, "atac": 20_000}, root_width=True).n_hidden == 141
    assert built({"rna": 100, "prot": 20}, root_width=True).n_hidden == 10


# -- section 10.5: cells that lack a modality -----------------------------------------------------

WIDTHS = {"rna": 7, "prot": 4, "atac": 9}


def test_an_absent_modality_changes_nothing_of_the_others() -> None:
    model, batch = built(WIDTHS), batch_of(WIDTHS, [0, 0, 0])
    absent = lacking(batch, "prot", [0, 1, 2])
    two = Batch(*(
        {m: part[m] for m in ("rna", "atac")} for part in (batch.x, batch.present, batch.batch)
    ))  # fmt: skip
    gradients = []
    for seen in (absent, two):
        model.net.zero_grad()
        torch.manual_seed(4)
        z = model.posterior(seen).sample()
        torch.manual_seed(4)
        terms = model.loss(seen, Clock(0, 1))
        assert terms.get("reconstruction_prot", torch.zeros(())).item() == 0
        torch.stack(list(terms.values())).sum().backward()
        parts = {name: p.grad for name, p in model.net.named_parameters() if "prot" not in name}
        gradients.append((z, terms["distance"], parts))
    (z, distance, parts), (z_two, distance_two, parts_two) = gradients
    torch.testing.assert_close(z, z_two)
    torch.testing.assert_close(distance, distance_two)
    for name, gradient in parts.items():
        torch.testing.assert_close(gradient, parts_two[name], rtol=1e-4, atol=1e-6)


def test_distance_counts_pairs_of_measured_modalities() -> None:
    model, batch = built(WIDTHS), batch_of(WIDTHS, [0, 0])
    one = lacking(lacking(batch, "prot", [0, 1]), "atac", [0, 1])
    assert model.loss(one, Clock(0, 1))["distance"].item() == 0
    two = lacking(batch, "prot", [1])
    e = model.experts(two)
    pairs = (("rna", "prot"), ("rna", "atac"), ("prot", "atac"))
    first = sum(e[m].jeffreys(e[n])[0] for m, n in pairs)
    second = e["rna"].jeffreys(e["atac"])[1]
    torch.testing.assert_close(model.loss(two, Clock(0, 1))["distance"], (first + second) / 2)


def test_single_modality_cells_lie_beside_paired_ones() -> None:
    """Section 10.6: held-out cells from genes and from peaks have neighbours of their type."""
    cells, held_out = easy_cells("multiome", 300), easy_cells("multiome", 90, seed=9)
    third = np.arange(300) // 100
    cells = without(without(cells, "rna", third == 1), "atac", third == 2)
    model = MultiVI(cells, n_hidden=32, learning_rate=1e-2, max_epochs=50)
    model.train(progress=False, device="cpu")
    rna, atac = (model.get_latent_representation(held_out, modality=m) for m in ("rna", "atac"))
    nearest = ((rna[:, None] - atac[None]) ** 2).sum(-1).argmin(1)
    assert (held_out.labels[nearest] == held_out.labels).mean() > 0.95


# -- decoding and drawing -------------------------------------------------------------------------


def test_draws_have_the_means_of_the_likelihood() -> None:
    model = built(WIDTHS, n_latent=3)
    n, depth = 20_000, 50.0
    z = torch.randn(1, 3, generator=torch.Generator().manual_seed(2)).expand(n, 3)
    codes, depths = torch.zeros(n, dtype=torch.int64), torch.full((n,), depth)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        x = {m: model.draw(z, codes, m, depths) for m in WIDTHS}
        shallow = model.draw(z, codes, "atac", torch.ones(n))
        h = model.decoded(z[:1], codes[:1], "rna")
        kept = (-model.net.gate(h)).sigmoid()[0]
        share, p = (model.decode(z[:1], codes[:1], m)[0] for m in ("rna", "atac"))
        mixture = model.decoded(z[:1], codes[:1], "prot")
        fore = model.decode(z[:1], codes[:1], "prot")[0]
    torch.testing.assert_close(x["rna"].mean(0), depth * share * kept, rtol=0.15, atol=0.05)
    assert set(x["atac"].unique().tolist()) == {0, 1}
    torch.testing.assert_close(x["atac"].mean(0), p * 0.5, rtol=0.05, atol=0.01)
    assert shallow.sum(1).mean().item() == pytest.approx(1, rel=0.05)
    level, back = mixture.background.mean.exp()[0], mixture.logit.sigmoid()[0]
    torch.testing.assert_close(fore, (1 - back) * level * mixture.fold[0])
    spread = (0.5 * mixture.background.log_var.exp()[0]).exp()  # of a log-normal level
    mean = (back + (1 - back) * mixture.fold[0]) * level * spread
    torch.testing.assert_close(x["prot"].mean(0), mean, rtol=0.1, atol=0.05)


def test_a_batch_never_seen_is_decoded_with_the_mean_of_the_batches() -> None:
    model = built(WIDTHS, n_batches=2, n_hidden=16)
    z = torch.randn(1, 10, generator=torch.Generator().manual_seed(2)).expand(3, 10)
    for m in WIDTHS:
        first, second, new = model.decode(z, torch.tensor([0, 1, -1]), m).detach()
        assert not torch.allclose(first, second)
        assert not torch.allclose(first, new)
        assert new.isfinite().all()


# -- the plan -------------------------------------------------------------------------------------


def plan(n_batches: int = 2, **params: object) -> list:
    cells = mosaic(easy_cells("cite", 60, n_batches=n_batches))
    model = MultiVI(cells, n_hidden=8, batch_size=16, **params)
    model.n_features = {"rna": 60, "prot": 12}
    model._build()
    blocks = {role: block_of(cells, role) for role in cells.roles}
    inputs = Inputs(blocks, np.zeros(60, dtype=np.int64), torch.device("cpu"))
    (stage,) = model.stages(inputs, np.arange(60), np.arange(0))
    draws = list(stage.sampler.epoch(np.random.default_rng(0)))
    assert all(set(draw) == {"rna", "prot"} for draw in draws)
    assert sorted(np.concatenate([draw["rna"] for draw in draws])) == list(range(60))
    return list(stage.players)


def test_the_classifier_plays_only_against_several_batches() -> None:
    vae, classifier = plan()
    assert vae.weights == {"kl": WarmUp(0.1)}
    assert (classifier.lr, classifier.eps) == (1e-3, 0.01)
    assert not {id(p) for p in vae.parameters} & {id(p) for p in classifier.parameters}
    assert len(plan(n_batches=1)) == 1


# -- flags ----------------------------------------------------------------------------------------


def test_review_preset_sets_its_flags() -> None:
    review = MultiVI.resolve_params(easy_cells("multiome", 30), "review")
    assert all(review[flag] for flag in FLAGS)
    assert (review["learning_rate"], review["max_epochs"], review["min_steps"]) == (1e-4, 100, 0)
    assert (review["validation_fraction"], review["patience"]) == (0.1, 50)
    assert (review["n_latent"], review["batch_size"], review["warm_up"]) == (10, 128, 0.5)
    cite = MultiVI.resolve_params(easy_cells("cite", 30), "review")
    assert [flag for flag in FLAGS if cite[flag]] == ["root_width", "adam"], (
        "the review ran Multiome"
    )
    default = MultiVI.resolve_params(easy_cells("multiome", 30))
    assert not any(default[flag] for flag in FLAGS)


def test_adam() -> None:
    now, then = plan(adam=False)[0], plan(adam=True)[0]
    assert (now.eps, now.weight_decay, now.decoupled) == (1e-8, 1e-3, True)
    assert (then.eps, then.weight_decay, then.decoupled) == (0.01, 1e-3, False)


def test_no_batch() -> None:
    model = built(WIDTHS, n_batches=2, no_batch=True)
    assert "classifier" not in dict(model.net.named_children())
    shapes = [p.shape for p in model.net.parameters()]
    assert shapes == [p.shape for p in built(WIDTHS, n_batches=1).net.parameters()]
    z = torch.ones(2, 10)
    for m in WIDTHS:
        first, second = model.decode(z, torch.tensor([0, 1]), m)
        torch.testing.assert_close(first, second)


def test_lognorm_input() -> None:
    cells = easy_cells("multiome", 30)
    views = {
        flag: MultiVI(cells, lognorm_input=flag).pipeline(cells.var).fit(cells)
        for flag in (False, True)
    }
    for role in cells.roles:
        np.testing.assert_array_equal(views[False][role].x.toarray(), cells.counts[role].toarray())
    total = cells.counts["rna"].sum(axis=1)
    expected = np.log1p(1e4 * cells.counts["rna"].toarray() / total)
    np.testing.assert_allclose(views[True]["rna"].x.toarray(), expected, rtol=1e-5)
    assert set(np.unique(views[True]["atac"].x.toarray())) == {0, 1}


def test_feature_order_fault() -> None:
    """The first 60 of [90 peaks, 60 genes] are taken for genes."""
    cells = easy_cells("multiome", 30)
    views = MultiVI(cells, feature_order_fault=True).pipeline(cells.var).fit(cells)
    peaks, genes = (cells.counts[role].toarray() for role in ("atac", "rna"))
    np.testing.assert_array_equal(views["rna"].x.toarray(), peaks[:, :60])
    np.testing.assert_array_equal(views["atac"].x.toarray(), np.hstack([peaks[:, 60:], genes]))
    assert list(views["rna"].var.index) == [f"atac{i}" for i in range(60)]
    cite = easy_cells("cite", 30)
    same = MultiVI(cite, feature_order_fault=True).pipeline(cite.var).fit(cite)
    np.testing.assert_array_equal(same["rna"].x.toarray(), cite.counts["rna"].toarray())
