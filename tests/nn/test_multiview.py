"""scMVP's layers: what they are made of, and how a decoder puts shares and factors together."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn.functional import softmax

from coembed.nn.attention import Gated, SelfAttention
from coembed.nn.multiview import (
    HIDDEN,
    MIN_LOG_VARIANCE,
    Concatenator,
    Decoder,
    Genes,
    Joint,
    Peaks,
    Single,
    block,
    branch,
    cluster_gate,
    encode_twice,
    linears,
    posterior,
)
from coembed.nn.posteriors import Gaussian


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def counts(*shape: int) -> torch.Tensor:
    return torch.poisson(torch.full(shape, 2.0), generator=torch.Generator().manual_seed(0))


def kinds(module: nn.Module) -> list[str]:
    return [type(m).__name__ for m in module.modules() if not isinstance(m, nn.Sequential)]


def test_block_is_normalised_twice() -> None:
    """scmvp.md section 4 and 10.2."""
    plain = ["Linear", "LayerNorm", "BatchNorm1d", "LeakyReLU"]
    assert kinds(block(5)) == plain
    assert kinds(block(5, 0.1)) == [*plain, "Dropout"]
    assert kinds(block(5, active=True)) == [*plain[:2], "LeakyReLU", *plain[2:]]
    assert sum(p.numel() for p in block(5).parameters()) == 128 * 5 + 640


def test_linears_are_one_linear_map() -> None:
    layers, x = linears(4, 6, 3), noise(5, 4)
    first, _, second = layers
    weight, bias = second.weight @ first.weight, second.weight @ first.bias + second.bias
    torch.testing.assert_close(layers(x), x @ weight.T + bias)


def test_branches() -> None:
    genes, peaks = branch("rna", 5), branch("atac", 5)
    assert isinstance(genes[0], Gated)
    assert isinstance(peaks[-1], SelfAttention)
    for made in (genes, peaks):
        assert made(noise(3, 5)).shape == (3, HIDDEN)


def test_joint_sees_both() -> None:
    net = Joint({"rna": 5, "atac": 6}, 4).eval()
    x = {"rna": counts(3, 5), "atac": counts(3, 6)}
    out = net(x)
    heads = torch.cat([net.branches[kind](v.log1p()) for kind, v in x.items()], -1)
    for part, expected in zip(out, posterior(net.head(heads)), strict=True):
        assert part.shape == (3, 4)
        torch.testing.assert_close(part, expected)
    for kind in x:
        assert (net({**x, kind: x[kind] + 1}).mean != out.mean).all()


def test_variances_have_a_floor() -> None:
    mean, log_var = posterior(torch.tensor([[1.0, 2.0, -100.0, 3.0]]))
    assert mean.tolist() == [[1, 2]]
    expected = torch.tensor([[1e-4, math.exp(3) + 1e-4]]).log()
    torch.testing.assert_close(log_var, expected)
    assert log_var[0, 0].item() == pytest.approx(MIN_LOG_VARIANCE)


@pytest.mark.parametrize("kind", ["rna", "atac"])
def test_single_sees_the_logarithm_of_counts(kind: str) -> None:
    net, x = Single(kind, 5, 4).eval(), counts(3, 5)
    for part, expected in zip(net(x), posterior(net.layers(x.log1p())), strict=True):
        torch.testing.assert_close(part, expected)


def test_concatenator_is_one_map_of_means_and_of_log_variances() -> None:
    net = Concatenator(4)
    q = {kind: Gaussian(noise(3, 4) + i, noise(3, 4) - i) for i, kind in enumerate(("rna", "atac"))}
    for part, (first, second) in zip(net(q), zip(*q.values(), strict=True), strict=True):
        weight = net.linear.weight
        expected = first @ weight[:, :4].T + second @ weight[:, 4:].T + net.linear.bias
        torch.testing.assert_close(part, expected)


def test_both_versions_of_the_cells_pass_together() -> None:
    encoders = nn.ModuleDict({"rna": Single("rna", 5, 4).eval(), "atac": Single("atac", 6, 4)})
    x = {"rna": counts(3, 5), "atac": counts(3, 6)}
    again = {kind: v + 1 for kind, v in x.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        first, second = encode_twice(encoders, x, again)
        torch.manual_seed(1)
        both = encoders["atac"](torch.cat([x["atac"], again["atac"]]))
    for i in (0, 1):
        torch.testing.assert_close(first["rna"][i], encoders["rna"](x["rna"])[i])
        torch.testing.assert_close(second["rna"][i], encoders["rna"](again["rna"])[i])
        joined = torch.cat([first["atac"][i], second["atac"][i]])
        torch.testing.assert_close(joined, both[i])


def test_cluster_gate_opens_and_closes() -> None:
    gate = cluster_gate(6)(noise(3, 6).softmax(-1))
    assert gate.shape == (3, HIDDEN)
    assert ((gate > 0) & (gate < 1)).all()


def test_losses_are_likelihoods_and_distances() -> None:
    """scmvp.md section 6, by scipy."""
    x, mean, gate = counts(3, 5), noise(3, 5).exp(), noise(3, 5).flip(0)
    x[0, 0] = 0
    seen, mu, half = x.numpy(), mean.numpy(), 0.5 * (x - mean).abs().numpy() * (x > 0).numpy()
    log_r = noise(5)
    r = log_r.exp().numpy()
    expected = half - stats.nbinom.logpmf(seen, r, r / (r + mu))
    np.testing.assert_allclose(Genes(mean, log_r).loss(x), expected.sum(1), rtol=1e-5)
    s = gate.sigmoid().numpy()
    log_prob = np.log((1 - s) * stats.poisson.pmf(seen, mu) + s * (seen == 0))
    expected = half + 0.05 * mu * (seen == 0) - log_prob
    np.testing.assert_allclose(Peaks(mean, gate).loss(x), expected.sum(1), rtol=1e-5)


def test_draws_have_the_moments_of_the_likelihood() -> None:
    mean, gate, log_r = torch.tensor([[0.5, 4.0], [0.0, -1.0], [0.0, 1.0]])
    many = mean.expand(40_000, 2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        genes = Genes(many, log_r).draw()
        peaks = Peaks(many, gate.expand_as(many)).draw()
    torch.testing.assert_close(genes.mean(0), mean, rtol=0.05, atol=0)
    torch.testing.assert_close(genes.var(0), mean + mean**2 / log_r.exp(), rtol=0.1, atol=0)
    kept = 1 - gate.sigmoid()
    torch.testing.assert_close(peaks.mean(0), kept * mean, rtol=0.05, atol=0)
    zeros = (1 - kept) + kept * torch.exp(-mean)
    torch.testing.assert_close((peaks == 0).float().mean(0), zeros, rtol=0.05, atol=0)


@pytest.mark.parametrize("kind", ["rna", "atac"])
def test_decoder(kind: str) -> None:
    net, x = Decoder(kind, 4, 7).eval(), noise(3, 4)
    gate = torch.sigmoid(noise(3, HIDDEN))
    level, h = net(x, gate)
    torch.testing.assert_close(h, net.trunk(x) * gate)
    gated, free = net.gated(h), net.free(x)
    if kind == "rna":
        torch.testing.assert_close(level, softmax(gated, -1) * free.sigmoid())
    else:
        torch.testing.assert_close(level, gated.sigmoid() * softmax(free, -1))
