"""scMVP: the contract, and the closed forms of specs/scmvp.md section 10."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from easy import easy_cells
from networks import NetworkContract
from scipy import sparse, stats
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from coembed.data.minibatches import Batch
from coembed.errors import CoembedWarning
from coembed.models.scmvp import WEIGHTS, ScMVP
from coembed.nn.likelihoods import negative_binomial_mean, poisson
from coembed.nn.mixture import cluster_loss
from coembed.nn.posteriors import Gaussian
from coembed.train.stage import Clock, WarmUp

WIDTHS = {"rna": 7, "atac": 9}
FAULTS = (
    "variance_as_log_variance",
    "improper_mixture",
    "reversed_entropy",
    "rare_peaks",
    "no_batch",
    "noisy_embedding",
)


def built(widths: dict[str, int] = WIDTHS, *, n_batches: int = 1, **params: object) -> ScMVP:
    """A model with networks of the given widths and random weights, in evaluation mode."""
    model = ScMVP(easy_cells("multiome", 60, n_batches=n_batches), **params)
    model.n_features = widths
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model._build()
        for parameter in model.net.mixture.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.net.eval()
    return model


def batch_of(widths: dict[str, int] = WIDTHS, n: int = 4) -> Batch:
    random = np.random.default_rng(1)
    counts = {"rna": random.poisson(2, (n, widths["rna"])),
              "atac": random.integers(2, size=(n, widths["atac"]))}  # fmt: skip
    x = {m: torch.from_numpy(v.astype("f4")) for m, v in counts.items()}
    return Batch(
        x=x,
        present={m: torch.ones(n, dtype=torch.bool) for m in x},
        batch=dict.fromkeys(x, torch.zeros(n, dtype=torch.int64)),
    )


def count(*modules: torch.nn.Module | torch.Tensor) -> int:
    return sum(
        m.numel() if isinstance(m, torch.Tensor) else sum(p.numel() for p in m.parameters())
        for m in modules
    )


class TestScMVP(NetworkContract):
    name = "scmvp"
    kinds = ("multiome",)
    params: ClassVar = {
        **{"max_epochs": 60, "batch_size": 50, "learning_rate": 5e-3, "validation_fraction": 0.1},
        **{"n_components": 5},
    }

    def terms(self, kind: str) -> dict[str, dict[str, float]]:
        return {"elbo": {**WEIGHTS, "kl": 1.0, "single_rna": 0.1, "single_atac": 0.1}}


# -- section 10 -----------------------------------------------------------------------------------


def test_number_of_parameters() -> None:
    """10.1 and 10.2: 8,064,614 without the 1,695,716 that no loss reaches."""
    genes, peaks = 1000, 5000
    net = built({"rna": genes, "atac": peaks}, n_components=20).net
    trunk = 128 * genes + 640 + (128 * genes + 128 + 16_512)
    attending = 128 * peaks + 640 + 49_536
    heads = 2 * (128 * 10 + 10)
    assert count(net.single["rna"]) == trunk + heads == 275_860
    assert (
        count(net.single["atac"]) == attending + heads == 1_349_652 - 656_896
    )  # unused gate, norm
    assert count(net.joint) == trunk + attending + 32_896 + 256 + heads == 999_188
    assert count(net.concatenator) == 210
    assert count(net.gate) == 128 * 20 + 640
    rna = 1_920 + (128 * 256 + 256 + 257 * genes) + (1_408 + 129 * genes)
    atac = 1_920 + 49_536 + (128 * 512 + 512 + 513 * peaks) + (1_408 + 129 * peaks)
    assert count(net.decoder["rna"]) == rna
    assert count(net.decoder["atac"]) == atac
    assert count(net.extra_zero) == 129 * peaks
    assert count(net.mixture, net.log_dispersion) == 6_420 - peaks  # no dispersion per peak
    assert count(net) == 8_064_614 - 1_695_716 == 6_368_898


def test_log_likelihoods() -> None:
    """10.3."""
    x, half = torch.arange(3.0), torch.full((3,), 0.5)
    zip_ = poisson(x, half).zero_inflated(torch.zeros(3)).dense()
    torch.testing.assert_close(zip_, torch.tensor([-0.219070, -1.886294, -3.272589]))
    nb = negative_binomial_mean(x, half, torch.ones(3)).dense()
    torch.testing.assert_close(nb, torch.tensor([-0.405465, -1.504077, -2.602690]))


def test_cluster_term_at_uniform_responsibilities() -> None:
    """10.8, K = 5, and the balance that the corrected sign rewards."""
    uniform = torch.full((6, 5), -math.log(5))
    published = 0.5 * cluster_loss(uniform, uniform, reverse=True).item()
    assert published == pytest.approx(0.5 * (2.502012 - 10 + 80.471896), abs=1e-5)
    assert published == pytest.approx(36.486954, abs=1e-5)
    corrected = 0.5 * cluster_loss(uniform, uniform).item()
    assert corrected == pytest.approx(0.5 * (2.502012 - 10 - 80.471896), abs=1e-5)


def test_balanced_confident_clusters_are_best_and_a_lone_one_worst_unless_reversed() -> None:
    sure = torch.log_softmax(50 * torch.eye(3), -1)
    alone = sure[:1].expand(3, 3)
    unsure = torch.zeros(3, 3) - math.log(3)
    assert cluster_loss(sure, sure) < cluster_loss(unsure, unsure)
    assert cluster_loss(sure, sure) < cluster_loss(alone, alone)
    assert cluster_loss(sure, sure, reverse=True) > cluster_loss(alone, alone, reverse=True)
    assert cluster_loss(sure, sure) < cluster_loss(sure, sure.flip(0))


def test_levels_are_shares_times_factors() -> None:
    """10.7: a share sums to 1, so levels sum to less; means never exceed the depth."""
    model, batch = built(), batch_of()
    z = torch.randn(4, 10, generator=torch.Generator().manual_seed(2))
    for m in WIDTHS:
        level = model.decode(z, batch.codes, m)
        assert (level > 0).all()
        assert (level.sum(-1) < 1).all()
        decoder = model.net.decoder[m]
        shares = (decoder.gated[-1], decoder.free[-1])[m == "atac"]
        other = (decoder.free[-1], decoder.gated[-1])[m == "atac"]
        for layer, bias in ((shares, 0.0), (other, 100.0)):  # equal shares, factors of 1
            torch.nn.init.zeros_(layer.weight)
            torch.nn.init.constant_(layer.bias, bias)
        expected = torch.full((4, WIDTHS[m]), 1 / WIDTHS[m])
        torch.testing.assert_close(model.decode(z, batch.codes, m), expected)


def test_loss_by_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = built(), batch_of()
    net = model.net
    monkeypatch.setattr(Gaussian, "sample", lambda self: self.mean)
    terms = model.loss(batch, Clock(0, 1))
    q, again = model.posterior(batch), {}
    for m, x in batch.x.items():
        level, h = model.decoded(q.mean, batch.codes, m)
        mean = level * x.sum(-1, keepdim=True)
        again[m], mu, seen = mean, mean.detach().double().numpy(), x.numpy()
        distance = 0.5 * np.abs(seen - mu)[seen > 0].sum()
        if m == "rna":
            r = net.log_dispersion.exp().detach().double().numpy()
            nll = -stats.nbinom.logpmf(seen, r, r / (r + mu)).sum()
        else:
            s = net.extra_zero(h).sigmoid().detach().double().numpy()
            p = (1 - s) * stats.poisson.pmf(seen, mu) + s * (seen == 0)
            nll = -np.log(p).sum() + 0.05 * mu[seen == 0].sum()
        value = terms[f"reconstruction_{m}"].item()
        assert value == pytest.approx((nll + distance) / 4, rel=1e-4), m
    singles, cycled = ({m: net.single[m](v) for m, v in seen.items()} for seen in (batch.x, again))
    joined, cycle = net.concatenator(singles), net.concatenator(cycled)
    expected = {
        "concatenated": q.kl(joined),
        "cycle": joined.kl(cycle),
        **{f"single_{m}": q.kl(q_m) for m, q_m in singles.items()},
        "kl": net.mixture.kl(q, net.mixture.log_responsibilities(q.mean)),
        "clusters": cluster_loss(
            *(net.mixture.log_responsibilities(p.mean) for p in (q, cycle))
        ),
    }  # fmt: skip
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value.mean(), rtol=1e-4, atol=1e-4)
    assert set(terms) == {*expected, "reconstruction_rna", "reconstruction_atac"}


def test_draws_have_the_mean_of_the_likelihood() -> None:
    model = built()
    model.net.log_dispersion.data.fill_(1.0)
    n, depth = 40_000, 30.0
    z = torch.randn(1, 10, generator=torch.Generator().manual_seed(2)).expand(n, -1)
    codes = torch.zeros(n, dtype=torch.int64)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for m in WIDTHS:
            level, h = model.decoded(z[:1], codes[:1], m)
            kept = 1 - model.net.extra_zero(h).sigmoid() if m == "atac" else 1.0
            drawn = model.draw(z, codes, m, torch.full((n,), depth))
            torch.testing.assert_close(
                drawn.mean(0), (level * depth * kept)[0], rtol=0.05, atol=0.02
            )


@pytest.mark.parametrize("faulty", [False, True])
def test_clusters_are_found(faulty: bool) -> None:
    """10.9, corrected and published; the clusters of the fitted mixture are the types."""
    cells = easy_cells("multiome", 200)
    flags = dict.fromkeys(FAULTS, True) | {"warm_up": 0.0, "single_weight": 0.0} if faulty else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CoembedWarning)  # no rare peaks
        model = ScMVP(cells, max_epochs=30, learning_rate=5e-3, n_components=3, **flags)
        model.train(progress=False, device="cpu")
    z, labels = model.get_latent_representation(), cells.labels.astype(str)
    clusters = KMeans(3, n_init=10, random_state=0).fit_predict(z)
    assert adjusted_rand_score(labels, clusters) > 0.9
    if not faulty:
        with torch.no_grad():
            gamma = model.net.mixture.log_responsibilities(torch.from_numpy(z))
        assert normalized_mutual_info_score(labels, gamma.argmax(1).numpy()) > 0.9


# -- presets, flags and few cells -----------------------------------------------------------------


def test_presets() -> None:
    cells = easy_cells("multiome", 60)
    default, review = (ScMVP.resolve_params(cells, preset) for preset in ("default", "review"))
    assert not any(default[name] for name in FAULTS)
    assert all(review[name] for name in FAULTS)
    assert (review["learning_rate"], review["max_epochs"], review["min_steps"]) == (5e-4, 30, 0)
    assert {review[k] for k in ("warm_up", "single_weight", "validation_fraction")} == {0.0}
    assert (review["n_latent"], review["n_components"], review["batch_size"]) == (10, 10, 64)


def test_plan_and_optimiser() -> None:
    model = built(max_epochs=9, learning_rate=3e-3, warm_up=0.4)
    first, second = model.stages(None, np.arange(50), np.arange(50, 60))
    assert (first.epochs, second.epochs) == (2, 7)
    assert first.begin is None
    assert second.begin is not None
    (player,) = second.players
    assert (player.lr, player.eps, player.weight_decay) == (3e-3, 0.01, 1e-6)
    assert player.weights["kl"] == WarmUp(0.4)
    (only,) = built(max_epochs=9, improper_mixture=True).stages(None, np.arange(50), np.arange(0))
    assert (only.epochs, only.begin) == (9, None)


def test_variance_as_log_variance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gaussian, "sample", lambda self: self.mean)
    batch = batch_of()
    good, bad = (built(variance_as_log_variance=flag) for flag in (False, True))
    q, mixture = good.posterior(batch), good.net.mixture
    faulty = mixture.kl(q._replace(log_var=q.log_var.exp()), mixture.log_responsibilities(q.mean))
    expected = {**good.loss(batch, Clock(0, 1)), "kl": faulty.mean()}
    for name, value in bad.loss(batch, Clock(0, 1)).items():
        torch.testing.assert_close(value, expected[name])


def test_improper_mixture() -> None:
    good, bad = (built(improper_mixture=flag).net.mixture for flag in (False, True))
    assert (good.normalised, good.floor, bad.normalised, bad.floor) == (True, 0.0, False, 1e-10)


def test_reversed_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gaussian, "sample", lambda self: self.mean)
    batch = batch_of()
    good, bad = (
        built(reversed_entropy=flag).loss(batch, Clock(0, 1)) for flag in (False, True)
    )  # fmt: skip
    model = built()
    gamma = model.net.mixture.log_responsibilities(model.posterior(batch).mean).exp().mean(0)
    entropy = -(gamma * gamma.log()).sum()
    torch.testing.assert_close(bad["clusters"] - good["clusters"], 100 * entropy)
    assert {name for name in good if good[name] != bad[name]} == {"clusters"}


def test_rare_peaks() -> None:
    cells = easy_cells("multiome", 60)
    peaks = np.zeros((60, 90), dtype="f4")
    for peak in range(90):
        peaks[:peak, peak] = 2  # peak j is open in the first min(j, 60) cells
    cells = replace(cells, counts={**cells.counts, "atac": sparse.csr_matrix(peaks)})
    kept = {}
    for flag in (False, True):
        model = ScMVP(cells, rare_peaks=flag)
        block = model.pipeline(cells.var).fit(cells)["atac"]
        kept[flag] = list(block.var.index)
        assert set(np.unique(block.x.toarray())) == {0, 1}
    assert kept[True] == [f"atac{i}" for i in range(1, 7)]
    assert kept[False] == [f"atac{i}" for i in range(1, 90)]
    easy = easy_cells("multiome", 60)
    views = ScMVP(easy, rare_peaks=True).pipeline(easy.var)
    with pytest.warns(CoembedWarning, match="no peak is open in 0.001 to 0.1 of the cells"):
        blocks = views.fit(easy)
    assert blocks["atac"].x.shape[1] == 90


def test_no_batch() -> None:
    z, codes = torch.zeros(3, 10), torch.tensor([0, 1, -1])
    told, blind = (built(n_batches=2, no_batch=flag) for flag in (False, True))
    for m in WIDTHS:
        first, second, unseen = told.decode(z, codes, m)
        assert (first != second).any()
        assert unseen.isfinite().all()
        first, second, unseen = blind.decode(z, codes, m)
        torch.testing.assert_close(first, second)
        torch.testing.assert_close(first, unseen)


def test_noisy_embedding() -> None:
    cells = easy_cells("multiome", 80)
    made = {
        flag: ScMVP(cells, max_epochs=2, noisy_embedding=flag).train(progress=False, device="cpu")
        for flag in (False, True)
    }
    z = {flag: model.get_latent_representation() for flag, model in made.items()}
    assert np.abs(z[True] - z[False]).max() > 0.01
    weights = [model.net.state_dict() for model in made.values()]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    np.testing.assert_array_equal(z[True], made[True].get_latent_representation())
    assert made[True].get_latent_representation(cells.take(np.arange(1))).shape == (1, 10)


def test_more_components_than_the_cells_can_tell_apart() -> None:
    cells = easy_cells("multiome", 12)
    with pytest.warns(CoembedWarning, match="10 components are too many for 12 cells; 4 are used"):
        model = ScMVP(cells, max_epochs=4)
    model.train(progress=False, device="cpu")
    assert model.params.n_components == len(model.net.mixture.logits) == 4
    assert np.isfinite(model.get_latent_representation()).all()
