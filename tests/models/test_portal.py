"""Portal: the contract, and the closed forms of specs/portal.md section 10."""

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
from sklearn.neighbors import NearestNeighbors

from coembed.data.minibatches import Batch, Independent, Inputs
from coembed.data.pipeline import Block
from coembed.data.views import LogNormalise
from coembed.models.domains import other
from coembed.models.portal import Portal
from coembed.train.loop import Loop, seeded
from coembed.train.stage import Clock

CPU = torch.device("cpu")
EARLY, LATE = Clock(5, 2000), Clock(6, 2000)
PCS = 30


def built(**params: object) -> Portal:
    model = Portal(easy_cells("multiome", 30), **params)
    model.n_features = {"rna": PCS, "atac": PCS}
    with seeded(0, CPU):
        model._build()
    return model


def batch_of(a: torch.Tensor, b: torch.Tensor) -> Batch:
    x = {"rna": a, "atac": b}
    return Batch(
        x,
        {m: torch.ones(len(v), dtype=torch.bool) for m, v in x.items()},
        {m: torch.zeros(len(v), dtype=torch.int64) for m, v in x.items()},
    )


@pytest.fixture
def batch() -> Batch:
    a, b = torch.randn(2, 12, PCS, generator=torch.Generator().manual_seed(1))
    return batch_of(a, 0.5 * b)


def zero(*parts: torch.nn.Module) -> None:
    for part in parts:
        for weights in part.parameters():
            torch.nn.init.zeros_(weights)


class TestPortal(NetworkContract):
    name = "portal"
    params: ClassVar = {"max_epochs": 12, "batch_size": 24}
    kinds = ("multiome",)
    n_latent = 20
    validated = False

    def terms(self, kind: str) -> dict[str, dict[str, float]]:
        weights = {"adversarial": 1.0, "cosine": 20.0, "autoencoder": 10.0, "alignment": 10.0}
        return {
            "discriminators": {"discriminator_rna": 1.0, "discriminator_atac": 1.0},
            "translators": weights,
        }

    def test_needs_no_paired_cell(self) -> None:
        cells = easy_cells("multiome", 120)
        half = np.arange(120) < 60
        unpaired = without(without(cells, "rna", half), "atac", ~half)
        z = self.fit(unpaired, max_epochs=20).get_latent_representation()
        assert np.isfinite(z).all()
        assert neighbour_accuracy(z, cells.labels) > 0.9

    def test_a_paired_cell_lies_between_its_two_embeddings(self, kind: str) -> None:
        model = self.model(kind)
        rna, atac = (model.get_latent_representation(modality=m) for m in ("rna", "atac"))
        np.testing.assert_allclose(
            model.get_latent_representation(), (rna + atac) / 2, rtol=1e-4, atol=1e-5
        )


def test_number_of_parameters() -> None:
    assert sum(p.numel() for p in built().net.parameters()) == 662_630


def test_every_weight_and_bias_starts_with_a_deviation_of_a_tenth() -> None:
    for name, weights in built().net.named_parameters():
        n = weights.numel()
        if n > 15:
            assert weights.std().item() == pytest.approx(0.1, abs=0.4 / math.sqrt(n)), name
            assert abs(weights.mean().item()) < 0.5 / math.sqrt(n), name


# -- section 10.2: undecided discriminators, the margin -------------------------------------------


def test_losses_of_undecided_discriminators(batch: Batch) -> None:
    model = built()
    zero(model.net.discriminator)
    total = sum(model.discriminator_loss(batch, LATE).values())
    assert total.item() == pytest.approx(2.772589, abs=1e-6)
    adversarial = model.translator_loss(batch, LATE)["adversarial"]
    assert adversarial.item() == pytest.approx(1.386294, abs=1e-6)


@pytest.mark.parametrize(
    ("logit", "clock", "held"),
    [(7.0, LATE, 5.0), (7.0, EARLY, 7.0), (-9.0, LATE, -5.0), (3.0, LATE, 3.0),
     (80.0, EARLY, 50.0), (-80.0, EARLY, -50.0)],
)  # fmt: skip
def test_the_margin(batch: Batch, logit: float, clock: Clock, held: float) -> None:
    """A logit outside the margin counts as at its edge, and gives no gradient."""
    model = built()
    zero(model.net.discriminator)
    bias = model.net.discriminator["rna"][-1].bias
    torch.nn.init.constant_(bias, logit)
    x = batch.x["rna"].clone().requires_grad_()
    score = model.discriminate(x, "rna", clock)
    torch.testing.assert_close(score, torch.full((12, 1), held))
    real = torch.nn.functional.softplus(-score).mean()
    assert real.item() == pytest.approx(math.log1p(math.exp(-held)), rel=1e-5)
    real.backward()
    assert (bias.grad.item() == 0) == (held != logit)
    if (logit, held) == (7.0, 5.0):
        assert real.item() == pytest.approx(0.0067153, abs=1e-7)


def test_a_dead_discriminator_gives_the_translators_no_gradient(batch: Batch) -> None:
    model = built()
    zero(model.net.discriminator)
    for m in model.roles:
        torch.nn.init.constant_(model.net.discriminator[m][-1].bias, -7.0)
    loss = model.translator_loss(batch, LATE)["adversarial"]
    assert loss.item() == pytest.approx(2 * 5.0067, abs=1e-3)
    loss.backward()
    parts = [*model.net.encoder.parameters(), *model.net.generator.parameters()]
    assert all(p.grad is None or not p.grad.any() for p in parts)


# -- section 10.3: the terms ----------------------------------------------------------------------


def test_terms_of_translators_that_are_zero(batch: Batch) -> None:
    model = built()
    zero(model.net.encoder, model.net.generator)
    terms = model.translator_loss(batch, LATE)
    square = sum(x.square().mean() for x in batch.x.values())
    torch.testing.assert_close(terms["autoencoder"], square)
    assert terms["alignment"].item() == 0
    assert terms["cosine"].item() == pytest.approx(2, abs=1e-6), "1 per side"


@pytest.mark.parametrize(
    ("factor", "cosine"), [(1.0, 0.0), (7.0, 0.0), (1e-3, 0.0), (-1.0, 4.0), (-5.0, 4.0)]
)
def test_the_cosine_term_sees_the_direction_alone(
    batch: Batch, factor: float, cosine: float
) -> None:
    model = built()
    z = {m: torch.zeros(12, 20) for m in model.roles}
    model.translated = lambda b: (z, {m: factor * x for m, x in b.x.items()})  # type: ignore[method-assign]
    assert model.translator_loss(batch, LATE)["cosine"].item() == pytest.approx(cosine, abs=1e-5)


def test_terms_by_hand(batch: Batch) -> None:
    model, (a, b) = built(), batch.x.values()
    e, g = model.net.encoder, model.net.generator
    z_a, z_b = e["rna"](a), e["atac"](b)
    ab, ba = g["atac"](z_a), g["rna"](z_b)
    terms = model.translator_loss(batch, EARLY)
    cos = lambda u, v: (u * v).sum(1) / u.norm(dim=1) / v.norm(dim=1)  # noqa: E731
    expected = {
        "autoencoder": (g["rna"](z_a) - a).square().mean() + (g["atac"](z_b) - b).square().mean(),
        "alignment": (e["atac"](ab) - z_a).square().mean() + (e["rna"](ba) - z_b).square().mean(),
        "cosine": (1 - cos(ab, a)).mean() + (1 - cos(ba, b)).mean(),
        "adversarial": sum(
            torch.log1p(torch.exp(-model.discriminate(fake, m, EARLY))).mean()
            for m, fake in (("atac", ab), ("rna", ba))
        ),
    }
    assert set(terms) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-4, atol=1e-5)
    judged = model.discriminator_loss(batch, EARLY)
    for m, real, fake in (("rna", a, ba), ("atac", b, ab)):
        softplus = torch.nn.functional.softplus
        value = softplus(-model.discriminate(real, m, EARLY)).mean()
        value = value + softplus(model.discriminate(fake, m, EARLY)).mean()
        torch.testing.assert_close(judged[f"discriminator_{m}"], value)


# -- section 10.4, 10.5: symmetry and players -----------------------------------------------------


def test_swapping_the_domains_swaps_the_roles(batch: Batch) -> None:
    model, swapped = built(), built()
    swapped.net.load_state_dict(
        {
            name.replace(f".{m}.", f".{other(m)}."): value
            for m in model.roles
            for name, value in model.net.state_dict().items()
            if f".{m}." in name
        }
    )
    mirrored = batch_of(batch.x["atac"], batch.x["rna"])
    for name, value in model.translator_loss(batch, LATE).items():
        torch.testing.assert_close(swapped.translator_loss(mirrored, LATE)[name], value)
    judged, again = (
        model.discriminator_loss(batch, LATE),
        swapped.discriminator_loss(mirrored, LATE),
    )
    for m in model.roles:
        torch.testing.assert_close(again[f"discriminator_{other(m)}"], judged[f"discriminator_{m}"])


def toy_inputs(n: int = 1000) -> tuple[Inputs, np.ndarray]:
    """Section 10.7: five types in 30 dimensions; B is A's paired copy, shrunk, moved and noisy."""
    random = np.random.default_rng(0)
    types = random.integers(5, size=n)
    a = random.normal(size=(5, PCS))[types] + 0.4 * random.normal(size=(n, PCS))
    b = 0.8 * a + 0.5 * random.normal(size=PCS) + 0.3 * random.normal(size=(n, PCS))
    var = pd.DataFrame(index=[f"PC{i}" for i in range(PCS)])
    blocks = {
        m: Block(x.astype(np.float32), var, np.ones(n), np.ones(n, bool))
        for m, x in (("rna", a), ("atac", b))
    }
    return Inputs(blocks, np.zeros(n, dtype=np.int64), CPU), types


def test_players_own_their_parts_and_move_nothing_else() -> None:
    model, (inputs, _) = built(batch_size=20), toy_inputs(40)
    (stage,) = model.stages(inputs, np.arange(40), np.arange(0))
    assert isinstance(stage.sampler, Independent)
    judges, translators = stage.players
    own = {p.name: {id(w) for w in p.parameters} for p in stage.players}
    assert not own["discriminators"] & own["translators"]
    assert set.union(*own.values()) == {id(w) for w in model.net.parameters()}
    batch = inputs.gather(next(iter(stage.sampler.epoch(np.random.default_rng(0)))))
    sum(judges.loss(batch, LATE).values()).backward()
    assert all(w.grad is None for w in translators.parameters), "fakes are detached"
    assert all(w.grad is not None for w in judges.parameters)


def played(n: int, batch_size: int, steps: int) -> tuple[pd.DataFrame, float, float, float]:
    """Train on the toy; return history, label transfer, FOSCTTM, and mixing (0.5 is perfect)."""
    model = built(batch_size=batch_size, max_epochs=1, min_steps=steps)
    inputs, types = toy_inputs(n)
    with seeded(0, CPU):
        stages = model.stages(inputs, np.arange(n), np.arange(0))
        outcome, history = Loop(model.net, stages, inputs, seed=0).run()
    assert outcome.steps >= steps
    z = {m: model.latent(inputs.take([m], np.arange(n))) for m in ("rna", "atac")}
    nearest = NearestNeighbors(n_neighbors=1).fit(z["rna"]).kneighbors(z["atac"])[1][:, 0]
    distance = np.linalg.norm(z["rna"][:, None] - z["atac"][None], axis=-1)
    both = np.concatenate(list(z.values()))
    near = NearestNeighbors(n_neighbors=21).fit(both).kneighbors(both)[1][:, 1:]
    return (
        pd.DataFrame(history),
        float((types[nearest] == types).mean()),
        float((distance < np.diag(distance)[:, None]).mean()),
        float(((near >= n) != (np.arange(2 * n) >= n)[:, None]).mean()),
    )


def test_aligns_the_toy_in_few_steps() -> None:
    _, transfer, foscttm, _ = played(600, batch_size=64, steps=150)
    assert transfer > 0.99
    assert foscttm < 0.06


@pytest.mark.slow
def test_reaches_the_numbers_of_the_sheet() -> None:
    """Section 10.7: 1,000 cells, batch 300, 600 steps."""
    history, transfer, foscttm, mixing = played(1000, batch_size=300, steps=600)
    assert transfer > 0.995
    assert foscttm < 0.004
    assert mixing == pytest.approx(0.44, abs=0.06)
    last = history.iloc[-5:].mean(numeric_only=True)
    assert last["train_loss_discriminators"] == pytest.approx(2.27, abs=0.4)
    assert 1.3 < last["train_adversarial"] < 3.4
    assert 10 * last["train_autoencoder"] == pytest.approx(1.3, abs=0.5)
    assert 20 * last["train_cosine"] == pytest.approx(3.95, abs=0.9)
    assert 10 * last["train_alignment"] == pytest.approx(0.12, abs=0.08)


# -- presets and flags ----------------------------------------------------------------------------


def test_review_preset() -> None:
    for n, size in ((30, 3), (150, 15)):
        params = Portal.resolve_params(easy_cells("multiome", n), "review")
        assert params["batch_size"] == size
        assert (params["lambda_cos"], params["min_steps"]) == (10.0, 2000)
        assert params["double_lognorm"]
    assert not Portal.resolve_params(easy_cells("multiome", 30))["double_lognorm"]


def test_double_lognorm() -> None:
    cells = easy_cells("multiome", 60)
    views = {}
    for flag in (False, True):
        model = Portal(cells, double_lognorm=flag)
        pipeline = model.pipeline(cells.var)
        count = {
            m: sum(isinstance(s, LogNormalise) for s in pipeline.steps[m]) for m in model.roles
        }
        assert count == {"rna": 1 + flag, "atac": 1}
        views[flag] = pipeline.fit(cells)["rna"].x
    assert np.abs(views[True] - views[False]).max() > 0.1


def test_steps_are_those_of_the_original_where_cells_are_few() -> None:
    model, (inputs, _) = built(), toy_inputs(300)
    model.params = model.params.model_copy(update={"batch_size": 500})
    (stage,) = model.stages(inputs, np.arange(300), np.arange(0))
    assert stage.planned_steps == model.params.min_steps, "300 cells, batches of 500"
    draw = next(iter(stage.sampler.epoch(np.random.default_rng(0))))
    assert {len(rows) for rows in draw.values()} == {500}
