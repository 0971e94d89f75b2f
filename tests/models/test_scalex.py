"""SCALEX: the contract, and the closed forms of specs/scalex.md section 10."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from easy import easy_cells, neighbour_accuracy
from networks import NetworkContract

from coembed.data.cells import Cells
from coembed.data.minibatches import Batch, Inputs
from coembed.data.views import dense
from coembed.models.scalex import SCALEX
from coembed.nn.posteriors import Gaussian
from coembed.train.stage import Clock


def built(width: int, n_batches: int = 1, **params: Any) -> SCALEX:
    """A model with networks for `width` features and random weights, not trained."""
    model = SCALEX(easy_cells("cite", 30), **params)
    model.n_features, model.batches = {"joint": width}, [f"b{i}" for i in range(n_batches)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model._build()
    return model


def batch_of(width: int, codes: list[int], seed: int = 1) -> Batch:
    x = np.random.default_rng(seed).uniform(size=(len(codes), width)).astype("f4")
    return Batch(
        x={"joint": torch.from_numpy(x)},
        present={"joint": torch.ones(len(codes), dtype=torch.bool)},
        batch={"joint": torch.tensor(codes)},
    )


def views_of(cells: Cells, **params: Any) -> np.ndarray:
    """What reaches the network."""
    model = SCALEX(cells, **params)
    return dense(model.pipeline(cells.var).fit(cells)["joint"].x)


class TestSCALEX(NetworkContract):
    name = "scalex"
    kinds = ("cite",)
    params: ClassVar = {"max_epochs": 40, "batch_size": 50, "validation_fraction": 0.1}

    def terms(self, kind: str) -> dict[str, dict[str, float]]:
        return {"elbo": {"reconstruction": 1.0, "kl": 0.5}}


# -- section 10 -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "n_batches", "count"),
    [
        (1000, 1, 1_060_572),
        (1000, 3, 1_064_572),
        (2000, 2, 2_101_572),
        (6000, 1, 6_245_572),
        (4134, 1, 4_310_530),
    ],
)
def test_number_of_parameters(width: int, n_batches: int, count: int) -> None:
    """1024 x + 1024, the norm's 2,048, two heads of 10,250, 11 x, and 2 x for each batch."""
    model = built(width, n_batches)
    assert sum(p.numel() for p in model.net.parameters()) == count
    assert count == 1024 * width + 1024 + 2048 + 20_500 + 11 * width + 2 * width * n_batches


def test_one_set_of_batch_parameters_without_batches() -> None:
    flagged = built(1000, 3, no_batch=True)
    assert sum(p.numel() for p in flagged.net.parameters()) == 1_060_572


def test_losses_of_a_model_that_knows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Section 10.2: levels of a half cost D log 2 whatever x is; mu = v = 1 costs 0.5 * 5."""
    model, batch = built(2000), batch_of(2000, [0, 0, 0])
    monkeypatch.setattr(model, "logits", lambda z, codes: torch.zeros(3, 2000))
    monkeypatch.setattr(
        model, "posterior", lambda batch: Gaussian(torch.ones(3, 10), torch.zeros(3, 10))
    )
    terms = model.loss(batch, Clock(0, 1))
    assert terms["reconstruction"].item() == pytest.approx(1386.294361, rel=1e-6)
    inputs = Inputs({}, np.zeros(3, dtype=np.int64), torch.device("cpu"))
    (stage,) = model.stages(inputs, np.arange(3), np.arange(0))
    (player,) = stage.players
    total = player.total(terms, Clock.end()).item()
    assert total == pytest.approx(2000 * math.log(2) + 2.5, rel=1e-6)


def test_reconstruction_is_the_sum_over_features_of_the_cross_entropy() -> None:
    model, batch = built(30, 2), batch_of(30, [0, 1, 1, 0])
    torch.manual_seed(3)
    terms = model.loss(batch, Clock(0, 1))
    torch.manual_seed(3)
    p = model.logits(model.posterior(batch).sample(), batch.codes).sigmoid()
    x = batch.x["joint"]
    entropy = -(x * p.log() + (1 - x) * (1 - p).log()).sum(1).mean()
    torch.testing.assert_close(terms["reconstruction"], entropy)


def test_a_cell_depends_on_its_companions_in_training_alone() -> None:
    """Section 10.4."""
    model, batch, other = built(30), batch_of(30, [0] * 64), batch_of(30, [0] * 64, seed=2)
    other.x["joint"][0] = batch.x["joint"][0]
    model.net.train()
    change = (model.posterior(batch).mean[0] - model.posterior(other).mean[0]).abs().max()
    assert change > 0.01
    model.net.eval()
    torch.testing.assert_close(model.posterior(batch).mean[0], model.posterior(other).mean[0])


def test_the_encoder_does_not_see_the_batch_and_the_decoder_does() -> None:
    """Section 10.5: batches permuted together with their parameters give the same loss."""
    model, other = built(30, 3), built(30, 3)
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, table in model.net.domains.state_dict(keep_vars=True).items():
            table.copy_(torch.rand(table.shape, generator=random) + 0.5)
            other.net.domains.state_dict(keep_vars=True)[name].copy_(table[[2, 0, 1]])
    first, second = batch_of(30, [0, 1, 2, 0, 1, 2]), batch_of(30, [1, 2, 0, 1, 2, 0])
    torch.testing.assert_close(model.posterior(first).mean, model.posterior(second).mean)

    def reconstruction(of: SCALEX, batch: Batch) -> torch.Tensor:
        torch.manual_seed(0)
        return of.loss(batch, Clock(0, 1))["reconstruction"]

    torch.testing.assert_close(reconstruction(model, first), reconstruction(other, second))
    assert reconstruction(model, first) != reconstruction(model, second)


def shifted(n: int = 240) -> Cells:
    """Easy cells whose second batch has half of the genes five times higher."""
    cells = easy_cells("cite", n)
    factors = np.where(np.arange(60) % 2 == 0, 5.0, 1.0)
    second = (cells.obs["batch"] == "b1").to_numpy()[:, None]
    counts = cells.counts["rna"].multiply(np.where(second, factors, 1.0)).tocsr().astype("f4")
    return replace(cells, counts={**cells.counts, "rna": counts})


def test_batches_mix_with_their_own_parameters_and_less_without() -> None:
    """Section 10.6."""
    cells = shifted()
    same = {}
    for no_batch in (False, True):
        model = SCALEX(cells, no_batch=no_batch, min_steps=400).train(progress=False, device="cpu")
        z = model.get_latent_representation()
        assert neighbour_accuracy(z, cells.labels) > 0.95
        same[no_batch] = np.mean([
            neighbour_accuracy(z[cells.labels == t], cells.batch[cells.labels == t]) for t in "ABC"
        ])  # fmt: skip
    assert same[False] < 0.65, "near the half of chance"
    assert same[True] > same[False] + 0.1


# -- views and levels -----------------------------------------------------------------------------


def test_views_are_log_normalised_levels_over_their_maximum() -> None:
    cells = easy_cells("cite", 30)
    parts = []
    for role in cells.roles:
        x = cells.counts[role].toarray()
        level = np.log1p(1e4 * x / x.sum(1, keepdims=True))
        parts.append(level / level.max(0))
    np.testing.assert_allclose(views_of(cells), np.hstack(parts), rtol=1e-5)


def test_levels_are_shares_of_the_maximum_and_those_of_the_role() -> None:
    model = SCALEX(easy_cells("cite", 60)).train(2, progress=False, device="cpu")
    z, codes = torch.randn(4, 10), torch.tensor([0, 1, -1, 0])
    with torch.no_grad():
        rna, prot = (model.decode(z, codes, role) for role in ("rna", "prot"))
        torch.testing.assert_close(torch.cat([rna, prot], 1), model.logits(z, codes).sigmoid())
    assert rna.shape[1] == len(model.decoded_features["rna"])
    assert prot.shape == (4, 12)
    assert ((rna > 0) & (rna < 1)).all()


def test_the_plan() -> None:
    model = built(72, 2)
    inputs = Inputs({}, np.zeros(500, dtype=np.int64), torch.device("cpu"))
    (stage,) = model.stages(inputs, np.arange(500), np.arange(0))
    (player,) = stage.players
    assert (player.lr, player.weight_decay, player.weights) == (5e-3, 5e-4, {"kl": 0.5})
    assert stage.sampler.steps_per_epoch == 8
    assert stage.planned_steps == 2000
    assert stage.validation == []


def test_a_batch_of_one_cell_trains() -> None:
    cells = easy_cells("cite", 60)
    batch = np.where(np.arange(60) == 7, "alone", cells.batch)
    cells = replace(cells, obs=cells.obs.assign(batch=batch))
    model = SCALEX(cells).train(2, progress=False, device="cpu")
    assert np.isfinite(model.get_latent_representation()).all()
    assert np.isfinite(model.get_normalized_expression("rna").to_numpy()).all()


# -- flags of the preset 'review' -----------------------------------------------------------------


def test_review_preset_sets_its_flags() -> None:
    cells = easy_cells("cite", 30)
    review, default = (SCALEX.resolve_params(cells, preset) for preset in ("review", "default"))
    for flag in ("no_batch", "double_lognorm", "minibatch_statistics"):
        assert review[flag]
        assert not default[flag]
    assert (review["learning_rate"], review["min_steps"], review["batch_size"]) == (
        2e-4,
        11_000,
        64,
    )
    assert (review["n_top_genes"], default["n_top_genes"]) == (4000, 2000)


def test_double_lognorm() -> None:
    cells = easy_cells("cite", 30)
    rna, prot = (cells.counts[role].toarray() for role in cells.roles)

    def log_normalised(x: np.ndarray) -> np.ndarray:
        return np.log1p(1e4 * x / x.sum(1, keepdims=True))

    clr = np.log1p(prot / np.exp(np.log1p(prot).mean(1, keepdims=True)))
    parts = log_normalised(log_normalised(rna)), log_normalised(clr)
    expected = np.hstack([part / part.max(0) for part in parts])
    np.testing.assert_allclose(views_of(cells, double_lognorm=True), expected, rtol=1e-4)


def test_no_batch_decodes_every_batch_alike() -> None:
    cells = easy_cells("cite", 60)
    z = torch.randn(1, 10).expand(3, 10)
    for flag in (False, True):
        model = SCALEX(cells, no_batch=flag).train(2, progress=False, device="cpu")
        with torch.no_grad():
            levels = model.decode(z, torch.tensor([0, 1, -1]), "rna")
        assert torch.allclose(levels[0].expand(3, -1), levels, atol=1e-6) == flag


def test_minibatch_statistics_make_a_cell_depend_on_its_slice() -> None:
    """Section 9; the weights are those of a training without the flag."""
    cells = easy_cells("cite", 120)
    clean, sliced = (
        SCALEX(cells, minibatch_statistics=flag).train(5, progress=False, device="cpu")
        for flag in (False, True)
    )
    for a, b in zip(clean.net.parameters(), sliced.net.parameters(), strict=True):
        assert torch.equal(a, b)
    rows = np.flatnonzero(cells.labels == "A")
    change = [
        np.abs(
            model.get_latent_representation(cells.take(rows))
            - model.get_latent_representation()[rows]
        ).max()
        for model in (clean, sliced)
    ]
    assert change[0] < 1e-4
    assert change[1] > 0.05
    assert not sliced.net.training, "the networks are put back in evaluation mode"
    assert np.isfinite(sliced.get_latent_representation(cells.take(rows[:1]))).all()


def test_slices_are_of_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    cells, seen = easy_cells("cite", 120), []
    model = SCALEX(cells, minibatch_statistics=True).train(2, progress=False, device="cpu")
    embed = model.embed

    def noting(batch: Batch) -> torch.Tensor:
        seen.append((len(batch), len(batch.codes.unique())))
        return embed(batch)

    monkeypatch.setattr(model, "embed", noting)
    model.get_latent_representation()
    assert sum(size for size, _ in seen) == 120
    assert all(size <= 64 and n_batches == 1 for size, n_batches in seen)
