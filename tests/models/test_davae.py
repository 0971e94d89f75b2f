"""DAVAE: the contract, and the closed forms of specs/davae.md section 10."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from contract import without
from easy import easy_cells, neighbour_accuracy
from networks import NetworkContract
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.neighbors import KNeighborsClassifier

from coembed.data.minibatches import Batch, Independent, Inputs
from coembed.data.pipeline import Block
from coembed.models.davae import DAVAE
from coembed.nn.likelihoods import gaussian_of_residuals
from coembed.nn.posteriors import Gaussian
from coembed.train.loop import Loop, seeded
from coembed.train.stage import Clock, Player

CPU = torch.device("cpu")
NOW = Clock(0, 1)
GENES = 40


def built(genes: int = GENES, **params: object) -> DAVAE:
    model = DAVAE(easy_cells("multiome", 30), **params)
    model.n_features = {"rna": genes, "atac": genes}
    with seeded(0, CPU):
        model._build()
    return model


@pytest.fixture
def batch() -> Batch:
    rna, atac = torch.rand(2, 12, GENES, generator=torch.Generator().manual_seed(1))
    x = {"rna": rna, "atac": 2 * atac}
    return Batch(
        x,
        {m: torch.ones(len(v), dtype=torch.bool) for m, v in x.items()},
        {m: torch.zeros(len(v), dtype=torch.int64) for m, v in x.items()},
    )


class TestDAVAE(NetworkContract):
    name = "davae"
    params: ClassVar = {"max_epochs": 60, "batch_size": 64}
    kinds = ("multiome",)
    validated = False

    def terms(self, kind: str) -> dict[str, dict[str, float]]:
        weight = -60 * DAVAE.Params().domain_weight
        return {
            "classifier": {"classifier": 1.0},
            "autoencoder": {"reconstruction": 1.0, "kl": 1.0, "adversarial": weight},
        }

    def test_needs_no_paired_cell(self) -> None:
        cells = easy_cells("multiome", 120)
        half = np.arange(120) < 60
        unpaired = without(without(cells, "rna", half), "atac", ~half)
        z = self.fit(unpaired, max_epochs=100, batch_size=40).get_latent_representation()
        assert np.isfinite(z).all()
        assert neighbour_accuracy(z[half], cells.labels[half]) > 0.9
        assert neighbour_accuracy(z[~half], cells.labels[~half]) > 0.9

    def test_a_paired_cell_lies_between_its_two_embeddings(self, kind: str) -> None:
        model = self.model(kind)
        rna, atac = (model.get_latent_representation(modality=m) for m in ("rna", "atac"))
        np.testing.assert_allclose(
            model.get_latent_representation(), (rna + atac) / 2, rtol=1e-4, atol=1e-5
        )

    def test_levels_differ_between_the_domains_as_the_data_do(self, kind: str) -> None:
        """Half of the genes have two peaks, half one: activity is not expression."""
        model = self.model(kind)
        views = model.views.apply(easy_cells(kind))
        tables = [model.get_normalized_expression(m) for m in model.roles]
        assert list(tables[0].columns) == list(tables[1].columns)
        decoded, observed = (
            np.subtract(*(np.asarray(x.mean(axis=0)).ravel() for x in pair))
            for pair in (tables, [views[m].x for m in model.roles])
        )
        assert np.corrcoef(decoded, observed)[0, 1] > 0.9


# -- section 10.1: parameters ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("conditional", "latent", "encoder", "decoder", "classifier"),
    [
        (False, 5, 139_018, 139_848, 146),
        (True, 5, 139_274, 139_912, 146),
        (True, 10, 139_604, 140_072, 226),
    ],
)
def test_number_of_parameters(
    conditional: bool, latent: int, encoder: int, decoder: int, classifier: int
) -> None:
    net = built(1000, conditional=conditional, n_latent=latent).net
    parts = {
        encoder: (net.encoder, net.mean, net.log_var),
        decoder: (net.decoder, net.level),
        classifier: (net.classifier,),
    }
    for expected, modules in parts.items():
        assert sum(p.numel() for m in modules for p in m.parameters()) == expected
    total = sum(p.numel() for p in net.parameters())
    assert total == {146: 279_012 if not conditional else 279_332, 226: 279_902}[classifier]
    running = [b.numel() for name, b in net.named_buffers() if "running" in name]
    assert sum(running) == 928


def test_starting_weights() -> None:
    for layer in built().net.modules():
        if isinstance(layer, torch.nn.Linear):
            bound = math.sqrt(6 / (layer.in_features + layer.out_features))
            assert layer.weight.abs().max() <= bound
            assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.2)
            assert not layer.bias.any()


# -- section 10.2, 10.3: the terms ----------------------------------------------------------------


def test_an_undecided_classifier(batch: Batch) -> None:
    model = built(2000, domain_weight=3.0)
    for weights in model.net.classifier.parameters():
        torch.nn.init.zeros_(weights)
    x = torch.rand(12, 2000)
    wide = Batch({"rna": x, "atac": x}, batch.present, batch.batch)
    term = model.autoencoder_loss(wide, NOW)["adversarial"]
    _, autoencoder = plan(model, toy_inputs(20, 2000)[0])
    weighted = autoencoder.weight("adversarial", NOW) * term
    assert weighted.item() == pytest.approx(-3 * 1386.294, abs=0.01)


def plan(model: DAVAE, inputs: Inputs) -> list[Player]:
    (stage,) = model.stages(inputs, np.arange(inputs.n_cells), np.arange(0))
    assert isinstance(stage.sampler, Independent)
    assert stage.sampler.batch_size == model.params.batch_size // 2
    return list(stage.players)


def test_terms_by_hand(batch: Batch) -> None:
    model = built()
    model.net.eval()
    with seeded(3, CPU):
        terms = model.autoencoder_loss(batch, NOW)
    x = torch.cat(list(batch.x.values()))
    told = torch.eye(2).repeat_interleave(12, 0)
    h = model.net.encoder(x, told)
    mean, log_var = model.net.mean(h), model.net.log_var(h)
    with seeded(3, CPU):
        z = mean + torch.randn_like(mean) * torch.exp(log_var / 2)
    level = model.net.level(model.net.decoder(z, told))
    r = x - torch.log1p(torch.exp(level))
    log_shares = model.net.classifier(z).log_softmax(1)
    expected = {
        "reconstruction": GENES / 2 * (r.square().mean() / r.var(correction=0))
        + GENES / 2 * r.var(correction=0).log(),
        "kl": 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum(1).mean(),
        "adversarial": -(log_shares[:12, 0].sum() + log_shares[12:, 1].sum()) / 24,
    }
    assert set(terms) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-4, atol=1e-5)


# -- section 10.4: the classifier learns what the encoder unlearns ---------------------------------


def test_the_encoder_goes_up_the_slope_that_the_classifier_goes_down(batch: Batch) -> None:
    model = built(domain_weight=2.0)
    model.net.eval()
    judge, autoencoder = plan(model, toy_inputs(20)[0])
    own = [{id(w) for w in player.parameters} for player in (judge, autoencoder)]
    assert not own[0] & own[1]
    assert own[0] | own[1] == {id(w) for w in model.net.parameters()}
    with seeded(3, CPU):
        (learnt,) = judge.loss(batch, NOW).values()
    with seeded(3, CPU):
        adversarial = autoencoder.loss(batch, NOW)["adversarial"]
    torch.testing.assert_close(learnt, adversarial)
    learnt.backward()
    assert all(w.grad is None for w in autoencoder.parameters), "the encoder is not moved"
    plain, reversed_ = (
        torch.autograd.grad(loss, autoencoder.parameters, retain_graph=True, allow_unused=True)
        for loss in (adversarial, autoencoder.total({"adversarial": adversarial}, NOW))
    )
    assert any(g is not None and g.any() for g in plain)
    for a, b in zip(plain, reversed_, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(b, -2.0 * GENES * a)


# -- section 10.7: two domains that differ by a shift of every gene -------------------------------


def toy_inputs(n: int, genes: int = GENES) -> tuple[Inputs, np.ndarray]:
    """Four types; the second domain is another draw, shifted gene by gene (simulated)."""
    random = np.random.default_rng(0)
    types = random.integers(4, size=n)
    centres, shift = random.uniform(0, 2, (4, genes)), random.uniform(0, 1, genes)
    var = pd.DataFrame(index=[f"g{i}" for i in range(genes)])
    blocks = {
        m: Block(
            (centres[types] + move + 0.3 * random.normal(size=(n, genes))).clip(0).astype("f4"),
            var, np.ones(n), np.ones(n, bool),
        )
        for m, move in (("rna", 0), ("atac", shift))
    }  # fmt: skip
    return Inputs(blocks, np.zeros(n, dtype=np.int64), CPU), types


def readable(**params: object) -> tuple[float, float]:
    """Train on the toy; return how well fresh classifiers, linear and not, read the domain from z.

    z is drawn from the posterior, as the model's own classifier sees it.
    """
    n = 400
    inputs, types = toy_inputs(n)
    model = built(**params, min_steps=700)  # at 500 one number stood on its bound
    with seeded(0, CPU):
        Loop(model.net, model.stages(inputs, np.arange(n), np.arange(0)), inputs, seed=0).run()
    model.net.eval()
    batch = inputs.gather({m: np.arange(n) for m in model.roles})
    with seeded(0, CPU), torch.no_grad():
        posterior = model.encode(torch.cat(list(batch.x.values())), torch.arange(2 * n) // n)
        z = posterior.sample().numpy()
    assert neighbour_accuracy(posterior.mean.numpy(), np.tile(types, 2)) > 0.95
    domain = np.arange(2 * n) >= n
    fresh = LogisticRegression(max_iter=500), KNeighborsClassifier(15)
    linear, local = (float(cross_val_score(c, z, domain, cv=5).mean()) for c in fresh)
    return linear, local


def test_the_adversary_hides_the_domain_and_telling_it_removes_it() -> None:
    """Section 10.7. A decoder that is not told the domain needs it in z, whatever lambda."""
    linear, local = readable(conditional=False, domain_weight=0, learning_rate=0.003)
    assert min(linear, local) > 0.95
    linear, local = readable(conditional=False, domain_weight=0.1, learning_rate=0.003)
    assert linear < 0.75
    linear, local = readable()
    assert max(linear, local) < 0.6


# -- presets and flags ----------------------------------------------------------------------------


def test_review_preset() -> None:
    review = DAVAE.resolve_params(easy_cells("multiome", 30), "review")
    default = DAVAE.resolve_params(easy_cells("multiome", 30))
    assert (review["batch_size"], review["max_epochs"], review["min_steps"]) == (100, 100, 0)
    assert (review["learning_rate"], review["domain_weight"]) == (0.01, 6.0)
    assert (review["n_latent"], review["n_top_genes"]) == (10, 4000)
    assert review["conditional"]
    for flag in ("one_reference", "log_v_over_v"):
        assert review[flag]
        assert not default[flag]


def test_conditional(batch: Batch) -> None:
    x = batch.x["rna"]
    for flag in (False, True):
        model = built(conditional=flag)
        model.net.eval()
        means = [model.encode(x, model.domain(m, 12)).mean for m in model.roles]
        levels = [model.decode(means[0], torch.zeros(12), m) for m in model.roles]
        for a, b in (means, levels):
            assert torch.equal(a, b) != flag


def test_one_reference(batch: Batch) -> None:
    """Section 10.5: with z held fixed, the values of the other modality do not matter."""
    moved = Batch({**batch.x, "atac": batch.x["atac"] + 1}, batch.present, batch.batch)
    certain = Gaussian(torch.randn(24, 10), torch.full((24, 10), -80.0))
    for flag in (False, True):
        model = built(one_reference=flag)
        model.net.eval()
        model.encode = lambda x, domains: certain  # type: ignore[method-assign]
        first, second = model.autoencoder_loss(batch, NOW), model.autoencoder_loss(moved, NOW)
        assert torch.equal(first["reconstruction"], second["reconstruction"]) == flag
        for term in ("kl", "adversarial"):
            assert torch.equal(first[term], second[term])
    of_genes = batch.x["rna"] - model.decode(certain.mean[:12], torch.zeros(12), "rna")
    padded = torch.cat([of_genes, torch.zeros(12, GENES)])
    torch.testing.assert_close(first["reconstruction"], -gaussian_of_residuals(padded))


def test_log_v_over_v(batch: Batch) -> None:
    values = {}
    for flag in (False, True):
        model = built(log_v_over_v=flag)
        model.net.eval()
        with seeded(3, CPU):
            values[flag] = model.autoencoder_loss(batch, NOW)
    for name in ("kl", "adversarial"):
        assert torch.equal(values[True][name], values[False][name])
    x = torch.cat(list(batch.x.values()))
    with seeded(3, CPU), torch.no_grad():
        z = model.encode(x, torch.arange(24) // 12).sample()
        residuals = x - model.level(z, torch.arange(24) // 12)
    for flag, terms in values.items():
        expected = -gaussian_of_residuals(residuals, log_divided=flag)
        torch.testing.assert_close(terms["reconstruction"], expected)
    assert values[True]["reconstruction"] != values[False]["reconstruction"]
