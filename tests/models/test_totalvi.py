"""totalVI: the contract, and the closed forms of specs/totalvi.md section 10."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from contract import without
from easy import easy_cells, neighbour_accuracy
from networks import NetworkContract
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

from coembed.data.cells import Cells
from coembed.data.minibatches import Batch, Inputs
from coembed.models.background import background_prior
from coembed.models.totalvi import TotalVI
from coembed.nn.posteriors import Gaussian
from coembed.train.stage import Clock, CoolDown, Plateau, WarmUp

WIDTHS = {"rna": 7, "prot": 4}
ANNEALED = {"kl", "kl_background"}


def built(widths: dict[str, int] = WIDTHS, n_batches: int = 1, **params: object) -> TotalVI:
    """A model with networks of the given widths and random weights, not trained."""
    model = TotalVI(easy_cells("cite", 30, n_batches=n_batches), **params)
    model.n_features = widths
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model._build()
    model.net.eval()
    return model


def batch_of(n: int = 6, n_batches: int = 1, widths: dict[str, int] = WIDTHS) -> Batch:
    random = np.random.default_rng(1)
    x = {m: torch.from_numpy(random.poisson(3, (n, p)).astype("f4")) for m, p in widths.items()}
    codes = torch.arange(n) % n_batches
    return Batch(x, {m: torch.ones(n, dtype=torch.bool) for m in x}, dict.fromkeys(x, codes))


def lacking(batch: Batch, m: str, rows: list[int]) -> Batch:
    """The minibatch, of which some rows lack a modality."""
    x, present = batch.x[m].clone(), batch.present[m].clone()
    x[rows], present[rows] = 0, False
    return Batch({**batch.x, m: x}, {**batch.present, m: present}, batch.batch)


@pytest.fixture
def no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gaussian, "sample", lambda q: q.mean)


class TestTotalVI(NetworkContract):
    name = "totalvi"
    kinds = ("cite",)
    n_latent = 20
    params: ClassVar = {
        **{"n_hidden": 32, "max_epochs": 60, "batch_size": 50, "learning_rate": 1e-2},
        **{"warm_up": 0.3, "validation_fraction": 0.1},
    }

    def terms(self, kind: str) -> dict[str, dict[str, float]]:
        names = (
            *("reconstruction_rna", "reconstruction_prot", "kl", "kl_background"),
            *("efficiency", "pull"),
        )
        return {"elbo": dict.fromkeys(names, 1.0)}


# -- section 10.3: parameters ---------------------------------------------------------------------


@pytest.mark.parametrize(("n_batches", "count"), [(1, 1_331_586), (3, 1_344_762)])
@pytest.mark.parametrize("equations", ["paper", "1.3.1"])
def test_number_of_parameters(n_batches: int, count: int, equations: str) -> None:
    """The sheet's sum less the library encoder and the zero inflation, which no loss reaches."""
    model = built({"rna": 1000, "prot": 100}, n_batches, equations=equations)
    library = {1: 282_368, 3: 283_136}[n_batches] + 257 + 257
    zero_inflation = {1: 277_000, 3: 280_000}[n_batches]
    efficiency = 0 if equations == "1.3.1" else 100 * n_batches
    ours = sum(p.numel() for p in model.net.parameters())
    assert ours == count - library - zero_inflation - efficiency


# -- sections 10.2, 10.4: terms and invariances ---------------------------------------------------


def test_shares_sum_to_one_and_foreground_is_above_background() -> None:
    model = built(n_batches=3)
    z, codes = torch.randn(50, 20), torch.arange(50) % 4 - 1
    torch.testing.assert_close(model.shares(z, codes).sum(-1), torch.ones(50))
    assert (model.proteins(z, codes).fold >= 1).all()


def test_efficiency_and_pull(no_noise: None) -> None:
    """-log LogNormal(0, 1) at 1 and 2, and the pull at logit 0, per protein."""
    model, batch = built(equations="1.3.1"), batch_of()
    head = model.net.proteins.mixing.heads[0]
    for efficiency, value in ((1.0, 0.918939), (2.0, 1.852312)):
        with torch.no_grad():
            model.net.efficiency.log.fill_(np.log(efficiency))
            head.weight.zero_()
            head.bias.zero_()
        terms = model.loss(batch, Clock(0, 1))
        assert terms["efficiency"].item() == pytest.approx(4 * value, rel=1e-5)
        assert terms["pull"].item() == pytest.approx(4 * 0.000693147, rel=1e-5)


def test_encoder_sees_counts_over_their_mean_in_the_newer_equations() -> None:
    deep, scaled = batch_of(), {}
    deep.x["rna"].mul_(1000)
    for equations in ("paper", "1.3.1"):
        model = built(equations=equations)
        seen: list[torch.Tensor] = []
        model.net.encoder.register_forward_hook(lambda net, args, out, s=seen: s.append(args[0]))
        model.posterior(deep)
        scaled[equations] = seen[0][:, :7]
    x = deep.x["rna"]
    torch.testing.assert_close(scaled["paper"], torch.log(1 + x))
    torch.testing.assert_close(scaled["1.3.1"], torch.log(1 + x / (1 + x.mean(1, keepdim=True))))


def test_what_is_masked_does_not_matter(no_noise: None) -> None:
    """Section 10.4, and the same for a cell without genes."""
    model, batch = built(n_batches=2), batch_of(6, 2)
    model.net.measured.prot[0, 1] = 0
    before = model.loss(batch, Clock(0, 1))
    with torch.no_grad():
        model.net.prior.mean[0, 1] = 5
        for part, head in (("background", 0), ("background", 1), ("mixing", 0)):
            layer = getattr(model.net.proteins, part).heads[head]
            layer.bias[1] += torch.tensor(0.7)
            model.net.free["log_phi"][1] += 0.1
    after = model.loss(batch, Clock(0, 1))
    assert after["reconstruction_prot"] != before["reconstruction_prot"], "batch 1 measured it"
    model.net.measured.prot[:, 1] = 0
    masked = model.loss(batch, Clock(0, 1))
    with torch.no_grad():
        model.net.proteins.background.heads[0].bias[1] += 0.7
        model.net.prior.mean[:, 1] = 2
        model.net.free["log_phi"][1] += 0.1
    for name, value in model.loss(batch, Clock(0, 1)).items():
        torch.testing.assert_close(value, masked[name])
    for role, other in (("rna", "prot"), ("prot", "rna")):
        some = lacking(batch, role, [0, 1, 2, 3, 4, 5])
        terms = model.loss(some, Clock(0, 1))
        assert terms[f"reconstruction_{role}"] == 0
        assert terms[f"reconstruction_{other}"] > 0
        assert (terms["kl_background"] > 0) == (role == "rna")


def test_decoding_leaves_the_background_out(no_noise: None) -> None:
    model = built(n_batches=2, equations="1.3.1")
    z, codes = torch.randn(5, 20), torch.tensor([0, 1, 0, 1, -1])
    p = model.proteins(z, codes)
    foreground = p.background.mean.exp() * p.fold * (1 - p.logit.sigmoid())
    torch.testing.assert_close(model.decode(z, codes, "prot"), foreground)
    torch.testing.assert_close(model.decode(z, codes, "rna"), model.shares(z, codes))
    model.net.measured.prot[1] = 0
    average = torch.tensor([0, -1, 0, -1, -1])
    torch.testing.assert_close(
        model.decode(z, codes, "prot"), model.decode(z, average, "prot"),
        msg="a batch that did not measure proteins is decoded as the average batch",
    )  # fmt: skip


def test_draws_follow_the_likelihood() -> None:
    model, n = built(n_batches=2, equations="1.3.1"), 20_000
    with torch.no_grad():
        model.net.efficiency.log[1] = 0.5
        model.net.free["log_theta"].zero_()
        model.net.proteins.background.heads[1].weight.zero_()
        model.net.proteins.background.heads[1].bias.fill_(-3)
        z = torch.randn(1, 20, generator=torch.Generator().manual_seed(1)).expand(n, -1)
        codes, depth = torch.ones(n, dtype=torch.int64), torch.full((n,), 300.0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            genes, proteins = (model.draw(z, codes, m, depth) for m in WIDTHS)
        p = model.proteins(z[:1], codes[:1])
        background = (p.background.mean + p.background.log_var.exp() / 2).exp()
        mean = background * (p.logit.sigmoid() + (1 - p.logit.sigmoid()) * p.fold) * np.exp(0.5)
        rho = 300 * model.shares(z[:1], codes[:1])
        spread = rho + rho.square() / model.net.free["log_theta"].exp()
        np.testing.assert_allclose(proteins.mean(0), mean[0], rtol=0.05)
        np.testing.assert_allclose(genes.mean(0), rho[0], rtol=0.05)
        np.testing.assert_allclose(genes.var(0), spread[0], rtol=0.15)


# -- section 5: the prior of the background -------------------------------------------------------


def test_background_prior() -> None:
    """100 cells of two well-parted normals on the log scale: the lower one's mean, and its sd."""
    random = np.random.default_rng(0)
    low, high = random.normal(2, 0.2, (50, 60)), random.normal(6, 0.3, (50, 40))
    y = np.expm1(np.hstack([low, high]))
    mean, sd = background_prior(y, np.random.default_rng(0))
    assert mean == pytest.approx(2, abs=0.02)
    assert sd == pytest.approx(0.2 / np.sqrt(100), rel=0.05), "of the mean of 100 cells"
    assert background_prior(y[:, :4], random) == (0.0, 0.05), "fewer than five proteins"
    assert background_prior(y[:0], random) == (0.0, 0.05), "no cell"
    mean, sd = background_prior(np.zeros((5, 60)), random)
    assert (mean, sd) == (0, pytest.approx(0.005)), "cells without a count"


def test_background_prior_is_set_per_batch_where_there_are_proteins_enough() -> None:
    for n_proteins in (12, 10):
        cells = easy_cells("cite", 60)
        kept = np.arange(n_proteins)
        cells = replace(
            cells,
            counts={**cells.counts, "prot": cells.counts["prot"][:, kept]},
            var={**cells.var, "prot": cells.var["prot"].iloc[kept]},
        )
        model = TotalVI(cells, max_epochs=1, learning_rate=1e-12, equations="paper")
        model.train(progress=False, device="cpu")
        mean = model.net.prior.mean.detach()
        per_batch_alone = bool((mean.std(1) < 1e-6).all())
        assert per_batch_alone == (n_proteins > 10)


# -- section 7: the warm-up, the classifier, missing proteins -------------------------------------


def plan(cells: Cells, **params: object) -> tuple[TotalVI, list]:
    model = TotalVI(cells, **params)
    views = model.pipeline(cells.var).fit(cells)
    model.n_features = {m: block.x.shape[1] for m, block in views.items()}
    inputs = Inputs(views, np.unique(cells.batch, return_inverse=True)[1], model.device)
    model._build()
    return model, list(model.stages(inputs, np.arange(cells.n_cells), np.arange(0)))


def test_partial_kl() -> None:
    """Section 10.5: step / int(0.75 n); 100 epochs on 500 cells end at 200/375."""
    cells = easy_cells("cite", 500)
    for flag in (False, True):
        _, (stage,) = plan(cells, preset="review", partial_kl=flag)
        assert stage.planned_steps == 200
        (player,) = stage.players
        for step in (0, 30, 199, 200):
            weight = player.weight("kl", Clock(step, 200))
            assert weight == pytest.approx(step / 375 if flag else min(1, step / 106))
            assert player.weight("kl_background", Clock(step, 200)) == weight
            assert player.weight("reconstruction_prot", Clock(step, 200)) == 1


def test_protein_in_genes() -> None:
    plain, faulty = built(), built(protein_in_genes=True)
    batch = batch_of()
    assert plain.counts(batch)[0].shape == (6, 7)
    x, y = faulty.counts(batch)
    torch.testing.assert_close(x, torch.cat([batch.x["rna"], batch.x["prot"]], -1))
    torch.testing.assert_close(y, batch.x["prot"])
    assert faulty.net.encoder.layers[0][0].in_features == 7 + 4 + 4, "twice in the encoder"
    z = torch.randn(6, 20)
    assert faulty.shares(z, batch.codes).shape == (6, 11)
    assert faulty.decode(z, batch.codes, "rna").shape == (6, 7)
    assert faulty.draw(z, batch.codes, "rna", torch.full((6,), 9.0)).shape == (6, 7)


def test_the_newer_equations_warm_up_the_proteins_too() -> None:
    for equations in ("paper", "1.3.1"):
        _, (stage,) = plan(easy_cells("cite", 60), equations=equations)
        assert stage.plateau == Plateau(0.6, 30)
        weights = stage.players[0].weights
        rising = {name for name, w in weights.items() if type(w) is WarmUp}
        newer = {"reconstruction_prot", "efficiency", "pull"}
        assert rising == ANNEALED | (newer if equations == "1.3.1" else set())
        assert weights["adversarial"] == CoolDown(0.53)


def test_a_classifier_where_batches_differ_in_what_they_measured() -> None:
    cells = easy_cells("cite", 90)
    first = np.asarray(cells.batch) == "b0"
    _, (stage,) = plan(cells)
    assert len(stage.players) == 1
    some = cells.counts["prot"].tolil()
    some[np.flatnonzero(first), 2] = 0
    panel = replace(cells, counts={**cells.counts, "prot": some.tocsr()})
    for incomplete in (panel, without(cells, "prot", first), without(cells, "rna", first)):
        model, (stage,) = plan(incomplete)
        names = [player.name for player in stage.players]
        assert names == ["elbo", "classifier"]
        elbo, classifier = stage.players
        assert (classifier.lr, classifier.eps) == (1e-3, 0.01)
        shared = {id(p) for p in elbo.parameters} & {id(p) for p in classifier.parameters}
        assert not shared
        assert model.net.measured.prot[1].all()
    one = easy_cells("cite", 90, n_batches=1)
    _, (stage,) = plan(without(one, "prot", first))
    assert len(stage.players) == 1, "one batch has no other"


@pytest.mark.parametrize("role", ["rna", "prot"])
def test_a_batch_without_a_modality_is_embedded_and_imputed(role: str, tmp_path: Path) -> None:
    cells = easy_cells("cite", 200)
    first = np.asarray(cells.batch) == "b0"
    model = TotalVI(without(cells, role, first), n_hidden=32, max_epochs=50, batch_size=64)
    model.train(progress=False, device="cpu")
    history = model.history
    assert {"train_adversarial", "train_classification"} <= set(history.columns)
    assert not hasattr(model.net, "classifier"), "it serves the training alone"
    assert model.n_parameters[1] == model.n_parameters[0]
    z = model.get_latent_representation()
    assert neighbour_accuracy(z, cells.labels) > 0.9
    predicted = model.impute(role)
    assert list(predicted.index) == list(cells.obs.index[first])
    own = np.array(["A", "B", "C"])[np.arange(predicted.shape[1]) % 60 % 3]
    up = own == cells.labels[first][:, None]
    means = [np.nanmean(np.where(mask, predicted, np.nan), axis=1) for mask in (up, ~up)]
    assert (means[0] > 1.5 * means[1]).mean() > 0.9
    model.save(tmp_path / "model")
    loaded = TotalVI.load(tmp_path / "model", model.cells)
    assert torch.equal(loaded.net.measured.prot, model.net.measured.prot)
    np.testing.assert_array_equal(loaded.impute(role), predicted)


# -- section 10.6: easy data ----------------------------------------------------------------------


def test_foreground_is_told_from_background() -> None:
    """Two types, a marker protein each: background 2, foreground 50."""
    cells = easy_cells("cite", 300, n_batches=1)
    kind = np.arange(300) % 2
    random = np.random.default_rng(0)
    mean = np.where(kind[:, None] == [0, 1], 50.0, 2.0)
    counts = type(cells.counts["prot"])(random.poisson(mean).astype(np.float32))
    cells = replace(
        cells,
        counts={**cells.counts, "prot": counts},
        var={**cells.var, "prot": cells.var["prot"].iloc[:2]},
    )
    rna = np.random.default_rng(1).poisson(1 + 4 * (np.arange(60) % 2 == kind[:, None]))
    cells.counts["rna"] = type(counts)(rna.astype(np.float32))
    model = TotalVI(cells, n_hidden=32, max_epochs=400, batch_size=75, n_latent=5)
    model.train(progress=False, device="cpu")
    clusters = KMeans(2, n_init=10, random_state=0).fit_predict(model.get_latent_representation())
    assert adjusted_rand_score(kind, clusters) > 0.95
    p = model.protein_foreground()
    right = kind[:, None] == [0, 1]
    assert p[right].mean() > 0.9
    assert p[~right].mean() < 0.1


def test_presets() -> None:
    cells = easy_cells("cite", 30)
    default = TotalVI.resolve_params(cells)
    assert (default["n_latent"], default["equations"], default["max_epochs"]) == (20, "1.3.1", 100)
    review = TotalVI.resolve_params(cells, "review")
    assert (review["n_latent"], review["max_epochs"], review["batch_size"]) == (10, 100, 256)
    assert (review["equations"], review["validation_fraction"], review["min_steps"]) == (
        *("paper", 0.0, 0),
    )
    assert review["protein_in_genes"]
    assert review["partial_kl"]
