"""Likelihoods by their mean, mixtures, and draws: against scipy and the sheets' numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

from coembed.nn.likelihoods import (
    bernoulli,
    draw_multinomial,
    draw_negative_binomial,
    gaussian_of_residuals,
    mixture,
    negative_binomial_mean,
    poisson,
    scaled_bernoulli,
)

counts = st.integers(0, 200)
positive = st.floats(1e-2, 1e3)


def double(*values: float) -> list[Tensor]:
    return [torch.tensor([v], dtype=torch.float64) for v in values]


@given(x=counts, mean=positive, dispersion=positive)
def test_negative_binomial_by_its_mean_equals_scipy(x: int, mean: float, dispersion: float) -> None:
    ours = negative_binomial_mean(*double(x, mean, dispersion)).dense().item()
    theirs = stats.nbinom.logpmf(x, dispersion, dispersion / (dispersion + mean))
    assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)


def test_numbers_of_totalvi() -> None:
    """totalvi.md 10.1."""
    x, mean, theta = double(3, 2, 1.5)
    assert negative_binomial_mean(x, mean, theta).dense().item() == pytest.approx(
        -2.167035, abs=1e-6
    )
    zero, gate = torch.zeros_like(x), torch.zeros_like(x)
    at_zero = negative_binomial_mean(zero, mean, theta).zero_inflated(gate).dense()
    assert at_zero.item() == pytest.approx(-0.445845, abs=1e-6)
    at_three = negative_binomial_mean(x, mean, theta).zero_inflated(gate).dense()
    assert at_three.item() == pytest.approx(-2.860182, abs=1e-6)
    y, back, fore, phi, logit = double(10, 2, 12, 3, 1)
    parts = [negative_binomial_mean(y, mu, phi).dense() for mu in (back, fore)]
    assert mixture(*parts, logit).item() == pytest.approx(-4.114136, abs=2e-6)
    exact = [stats.nbinom.logpmf(10, 3, 3 / (3 + mu)) for mu in (2, 12)]
    p = 1 / (1 + np.exp(-1))  # the sheet's last digit is float32's
    expected = np.log(p * np.exp(exact[0]) + (1 - p) * np.exp(exact[1]))
    assert mixture(*parts, logit).item() == pytest.approx(expected, rel=1e-8)


def test_numbers_of_scmvp() -> None:
    """scmvp.md 10.3: zero-inflated Poisson with m = 0.5, logit 0; NB with m = 0.5, theta 1."""
    x = torch.arange(3, dtype=torch.float64)
    half, one, zero = torch.full_like(x, 0.5), torch.ones_like(x), torch.zeros_like(x)
    np.testing.assert_allclose(
        poisson(x, half).zero_inflated(zero).dense(), [-0.219070, -1.886294, -3.272589], atol=1e-6
    )
    np.testing.assert_allclose(
        negative_binomial_mean(x, half, one).dense(), [-0.405465, -1.504077, -2.602690], atol=1e-6
    )


@given(x=counts, mean=positive)
def test_poisson_equals_scipy(x: int, mean: float) -> None:
    ours = poisson(*double(x, mean)).dense().item()
    assert ours == pytest.approx(stats.poisson.logpmf(x, mean), rel=1e-7, abs=1e-9)


@given(a=st.floats(-500, 0), b=st.floats(-500, 0), logit=st.floats(-30, 30))
def test_a_mixture_of_equals_is_itself_and_its_ends_are_its_parts(
    a: float, b: float, logit: float
) -> None:
    first, second, weight = double(a, b, logit)
    assert mixture(first, first, weight).item() == pytest.approx(a, abs=1e-9)
    torch.testing.assert_close(mixture(first, second, weight), mixture(second, first, -weight))
    assert min(a, b) - 1e-9 <= mixture(first, second, weight).item() <= max(a, b) + 1e-9


def test_bernoulli_by_its_logit() -> None:
    x, p = torch.tensor([[1.0, 0.0, 0.25]]), torch.tensor([[0.125, 0.125, 0.5]])
    ours = bernoulli(x, p.logit()).item()
    assert ours == pytest.approx(-2.079442 - 0.133531 - 0.693147, abs=1e-5)


def scaled(
    x: Tensor, h: Tensor, head: nn.Linear, log_row: Tensor, log_column: Tensor, weights: Tensor
) -> Tensor:
    """The dense formula of `scaled_bernoulli`."""
    p = head(h).sigmoid() * log_row.exp().unsqueeze(-1) * log_column.exp()
    return (torch.where(x > 0, p.log(), torch.log1p(-p)).sum(-1) * weights).sum()


@given(
    seed=st.integers(0, 2**31),
    density=st.floats(0, 1),
    csr=st.booleans(),
    double=st.booleans(),
    factor=st.sampled_from([1.0, -2.5]),
)
def test_scaled_bernoulli_is_the_dense_formula_in_value_and_gradient(
    seed: int, density: float, csr: bool, double: bool, factor: float
) -> None:
    random = torch.Generator().manual_seed(seed)
    dtype = torch.float64 if double else torch.float32
    draw = lambda *shape: torch.randn(*shape, generator=random, dtype=dtype)  # noqa: E731
    x = 3.0 * (torch.rand(5, 7, generator=random) < density).to(dtype)
    head, weights = nn.Linear(3, 7, dtype=dtype), draw(5)
    leaves = [draw(5, 3), -draw(5).abs(), -draw(7).abs()]
    for leaf in leaves:
        leaf.requires_grad_()
    leaves += list(head.parameters())
    given_x = x.to_sparse_csr() if csr else x
    ours = scaled_bernoulli(given_x, leaves[0], head, *leaves[1:3], weights)
    dense = scaled(x, leaves[0], head, *leaves[1:3], weights)
    near: Any = {"rtol": 1e-7, "atol": 1e-9} if double else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(ours, dense, **near)
    gradients = (torch.autograd.grad(factor * value, leaves) for value in (ours, dense))
    for mine, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, reference, **near)


def test_scaled_bernoulli_is_finite_where_the_chance_is_one_and_passes_nan_on() -> None:
    x, one = torch.tensor([[0.0, 2.0]]), torch.ones(1)
    head = nn.Linear(1, 2)
    nn.init.constant_(head.weight, 40.0)
    h = torch.ones(1, 1, requires_grad=True)
    value = scaled_bernoulli(x, h, head, one - 1, torch.zeros(2), one)
    value.backward()
    assert -20 < value.item() < -10
    assert h.grad is not None
    assert h.grad.isfinite().all()
    assert scaled_bernoulli(x, h * torch.nan, head, one - 1, torch.zeros(2), one).isnan()


def test_multinomial_draws_have_their_depth_and_their_shares() -> None:
    shares = torch.tensor([[0.7, 0.2, 0.1], [0.0, 0.5, 0.5], [1.0, 0.0, 0.0]])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x = draw_multinomial(shares, torch.tensor([20_000.0, 10_000.0, 0.0]))
    assert x.sum(1).tolist() == [20_000, 10_000, 0]
    np.testing.assert_allclose(x[0] / 20_000, shares[0], atol=0.02)
    assert x[1, 0] == 0


def test_negative_binomial_draws_have_its_mean_and_variance() -> None:
    r, mean = torch.tensor([0.5, 10.0]), torch.tensor([2.0, 5.0]).expand(40_000, 2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x = draw_negative_binomial(r, mean.log() - r.log())
    assert x.shape == mean.shape
    np.testing.assert_allclose(x.mean(0), mean[0], rtol=0.05)
    np.testing.assert_allclose(x.var(0), mean[0] + mean[0] ** 2 / r, rtol=0.1)


@pytest.mark.parametrize(
    ("variance", "flag", "value"),
    [(1.0, False, 1000.0), (1.0, True, 1000.0), (0.1, True, -22_025.85), (0.1, False, -1302.585)],
)
def test_likelihood_of_residuals_without_mean(variance: float, flag: bool, value: float) -> None:
    """davae.md 10.2, 10.3."""
    residuals = math.sqrt(variance) * torch.tensor([1.0, -1.0]).repeat(8, 1000)
    log_prob = gaussian_of_residuals(residuals, log_divided=flag)
    assert -log_prob.item() == pytest.approx(value, rel=1e-5)


def test_likelihood_of_residuals_is_gaussian_at_their_variance() -> None:
    r = torch.randn(20, 40, generator=torch.Generator().manual_seed(0)) + 0.3
    normal = torch.distributions.Normal(0, r.std(correction=0))
    expected = normal.log_prob(r).sum(1).mean() + 40 / 2 * math.log(2 * math.pi)
    torch.testing.assert_close(gaussian_of_residuals(r), expected)
