"""scMM: the contract, and the closed forms of specs/scmm.md section 10."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest
import torch
from easy import easy_cells
from networks import NetworkContract
from scipy import sparse, stats
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

from coembed.data.cells import Cells
from coembed.data.minibatches import Batch
from coembed.models.scmm import ScMM
from coembed.nn.posteriors import Laplace
from coembed.train.stage import Clock

SMALL = {"n_layers": 1, "hidden_rna": 100, "hidden_other": 20}
CITE = {"n_layers": 3, "hidden_rna": 200, "hidden_other": 200}
SHARE = {"n_layers": 3, "hidden_rna": 500, "hidden_other": 100}


def built(widths: dict[str, int], **params: object) -> ScMM:
    """A model with networks of the given widths and random weights, not trained."""
    model = ScMM(easy_cells("cite" if "prot" in widths else "multiome", 30), **params)
    model.n_features = widths
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model._build()
    return model


def batch_of(widths: dict[str, int], n: int = 4) -> Batch:
    random = np.random.default_rng(1)
    x = {m: torch.from_numpy(random.poisson(2, (n, p)).astype("f4")) for m, p in widths.items()}
    return Batch(
        x=x,
        present={m: torch.ones(n, dtype=torch.bool) for m in x},
        batch=dict.fromkeys(x, torch.zeros(n, dtype=torch.int64)),
    )


def numbers(*tensors: torch.Tensor) -> list[np.ndarray]:
    return [tensor.detach().double().numpy() for tensor in tensors]


class TestScMM(NetworkContract):
    name = "scmm"
    params: ClassVar = {
        **{"n_layers": 1, "hidden_rna": 32, "hidden_other": 32},
        **{"max_epochs": 40, "batch_size": 50, "learning_rate": 3e-3, "validation_fraction": 0.1},
    }

    def terms(self, kind: str) -> dict[str, dict[str, float]]:
        roles = easy_cells(kind, 3).roles
        return {"elbo": {**{f"reconstruction_{m}": 1.0 for m in roles}, "kl": 1.0}}


@pytest.mark.parametrize(
    ("widths", "params", "count"),
    [
        ({"rna": 1000, "atac": 5000}, SMALL, 721_360),
        ({"rna": 1000, "prot": 100}, SMALL, 312_560),
        ({"rna": 1000, "prot": 100}, CITE, 1_001_440),
        ({"rna": 1000, "atac": 5000}, SHARE, 4_585_840),
        ({"rna": 4000, "prot": 134}, CITE, 2_827_908),
    ],
)
def test_number_of_parameters(widths: dict[str, int], params: dict[str, int], count: int) -> None:
    """Section 10.5; the registered, never trained scale of the prior is not there."""
    assert sum(p.numel() for p in built(widths, **params).net.parameters()) == count


def test_scales_of_every_cell_and_expert_sum_to_the_latent_size() -> None:
    widths = {"rna": 7, "prot": 3}
    for n_latent in (10, 4):
        model = built(widths, n_latent=n_latent, **SMALL)
        for expert in model.experts(batch_of(widths)).values():
            np.testing.assert_allclose(
                expert.scale.sum(-1).detach(), n_latent * (1 + 1e-6), rtol=1e-5
            )


@pytest.mark.parametrize("widths", [{"rna": 7, "prot": 3}, {"rna": 7, "atac": 9}])
def test_every_expert_decodes_every_modality(
    widths: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss by scipy: a 2 x 2 grid of experts and modalities, each pair with equal weight."""
    model, batch = built(widths, **SMALL), batch_of(widths)  # batch norm tames the raw counts
    monkeypatch.setattr(Laplace, "sample", lambda self: self.mean)
    terms = model.loss(batch, Clock(0, 1))
    experts = model.experts(batch)
    kl = 0.0
    for m, x in batch.x.items():
        mean, scale = numbers(experts[m].mean, experts[m].scale)
        kl += (-np.log(scale) + np.abs(mean) + scale * np.exp(-np.abs(mean) / scale) - 1).sum() / 4
        grid = []
        for e in experts:
            h = model.net.decoder[m](experts[e].mean)
            log_r, logit = numbers(model.net.log_r[m](h), model.net.logit_p[m](h))
            r = np.exp(log_r) * x.numpy().sum(1, keepdims=True) / 1e4
            log_prob = stats.nbinom.logpmf(x.numpy(), r, 1 / (1 + np.exp(logit)))
            if m == "atac":
                (gate,) = numbers(model.net.gate[m](h).sigmoid())
                log_prob = np.where(
                    x.numpy() > 0,
                    np.log1p(-gate) + log_prob,
                    np.log(gate + (1 - gate) * np.exp(log_prob)),
                )
            ours = model.log_likelihood(experts[e].mean, batch, m)
            np.testing.assert_allclose(ours.detach(), log_prob.sum(1), rtol=1e-4)
            grid.append(-log_prob.sum(1).mean())
        assert terms[f"reconstruction_{m}"].item() == pytest.approx(np.mean(grid), rel=1e-4)
    assert terms["kl"].item() == pytest.approx(kl / 2, rel=1e-4)
    assert set(terms) == {"kl", *(f"reconstruction_{m}" for m in widths)}


def test_the_mean_loss_does_not_see_a_duplicated_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Section 10.4: with the same noise a sum over cells doubles, so a mean over cells stays."""
    widths = {"rna": 7, "prot": 3}
    model, batch = built(widths, **SMALL), batch_of(widths)
    model.net.eval()
    monkeypatch.setattr(Laplace, "sample", lambda self: self.mean + 0.3 * self.scale)
    twice = Batch(*(
        {m: torch.cat([v, v]) for m, v in part.items()}
        for part in (batch.x, batch.present, batch.batch)
    ))  # fmt: skip
    for name, value in model.loss(batch, Clock(0, 1)).items():
        torch.testing.assert_close(model.loss(twice, Clock(0, 1))[name], value)


def test_embedding_is_the_mean_of_the_locations() -> None:
    widths = {"rna": 7, "prot": 3}
    model, batch = built(widths, **SMALL), batch_of(widths)
    model.net.eval()
    rna, prot = (expert.mean for expert in model.experts(batch).values())
    torch.testing.assert_close(model.embed(batch), (rna + prot) / 2)


@pytest.mark.parametrize("role", ["rna", "atac"])
def test_decode_is_the_mean_of_the_likelihood_at_a_depth_of_ten_thousand(role: str) -> None:
    widths = {"rna": 7, "atac": 5}
    model, batch = built(widths, **SMALL), batch_of(widths)
    model.net.eval()
    z = torch.randn(4, 10, generator=torch.Generator().manual_seed(2))
    x = torch.arange(3000.0)
    h = model.net.decoder[role](z)
    log_r, logit = numbers(model.net.log_r[role](h), model.net.logit_p[role](h))
    p = stats.nbinom.pmf(x.numpy()[:, None, None], np.exp(log_r), 1 / (1 + np.exp(logit)))
    mean = (p * x.numpy()[:, None, None]).sum(0)
    if role == "atac":
        mean = mean * (1 - numbers(model.net.gate[role](h).sigmoid())[0])
    np.testing.assert_allclose(model.decode(z, batch.codes, role).detach(), mean, rtol=1e-4)


def test_a_cell_without_counts_is_finite() -> None:
    """The original divides by zero (section 9.5)."""
    widths = {"rna": 7, "prot": 3}
    model, batch = built(widths, **SMALL), batch_of(widths)
    batch.x["prot"][0] = 0
    assert all(value.isfinite() for value in model.loss(batch, Clock(0, 1)).values())


def test_clusters_are_found_and_crossed_means_follow_them() -> None:
    """Section 10.6, with narrower networks: k-means on the embedding, crossed reconstruction."""
    cells = easy_cells("multiome", 600)
    model = ScMM(cells, max_epochs=50, learning_rate=1e-3, batch_size=128, n_layers=1,
                 hidden_rna=64, hidden_other=64)  # fmt: skip
    model.train(progress=False, device="cpu")
    labels = cells.labels.astype(str)
    z = model.get_latent_representation()
    clusters = KMeans(3, n_init=10, random_state=0).fit_predict(z)
    assert adjusted_rand_score(labels, clusters) > 0.95
    for source, target in (("rna", "atac"), ("atac", "rna")):
        predicted = model.translate(target, source=source)
        counts = cells.counts[target].toarray()
        share = counts / counts.sum(axis=1, keepdims=True)
        for kind in "ABC":
            rows = labels == kind
            assert np.corrcoef(predicted[rows].mean(0), share[rows].mean(0))[0, 1] > 0.9


# -- presets and flags ----------------------------------------------------------------------------


def test_presets_follow_the_data() -> None:
    cite, multiome = easy_cells("cite", 30), easy_cells("multiome", 30)
    default = ScMM.resolve_params(multiome)
    assert (default["hidden_rna"], default["hidden_other"], default["n_layers"]) == (500, 100, 3)
    assert not default["all_peaks"]
    assert not default["sticky_lr"]
    review = ScMM.resolve_params(multiome, "review")
    assert review["all_peaks"]
    assert (review["learning_rate"], review["batch_size"], review["max_epochs"]) == (1e-4, 64, 100)
    assert (review["min_steps"], review["validation_fraction"]) == (0, 0.0)
    review = ScMM.resolve_params(cite, "review")
    assert not review["all_peaks"]
    assert (review["batch_size"], review["max_epochs"], review["warm_up"]) == (200, 50, 0.5)


def test_sticky_lr() -> None:
    for flag, rate in ((False, 2e-3), (True, 2e-4)):
        model = built({"rna": 7, "prot": 3}, sticky_lr=flag, learning_rate=2e-3, **SMALL)
        (stage,) = model.stages(None, np.arange(20), np.arange(20, 30))
        (player,) = stage.players
        assert player.lr == rate
        assert player.amsgrad


def test_all_peaks() -> None:
    """More peaks than are thinned at all, half of them with a single fragment."""
    easy = easy_cells("multiome", 30)
    n_peaks = 24_000
    random = np.random.default_rng(0)
    peaks = np.zeros((30, n_peaks), dtype=np.float32)
    peaks[random.integers(30, size=n_peaks), np.arange(n_peaks)] = np.arange(n_peaks) % 4
    atac = sparse.csr_matrix(peaks)
    var = (
        easy.var["atac"]
        .iloc[np.zeros(n_peaks, dtype=int)]
        .set_axis([f"peak{i}" for i in range(n_peaks)])
    )
    cells = Cells({**easy.counts, "atac": atac}, easy.present, {**easy.var, "atac": var}, easy.obs)
    width = {}
    for flag in (False, True):
        model = ScMM(cells, all_peaks=flag)
        width[flag] = model.pipeline(cells.var).fit(cells)["atac"].x.shape[1]
    assert width == {False: 18_000, True: 24_000}, "empty peaks go, and with the flag they stay"
