"""Posteriors: divergences against torch.distributions and the sheets, samples by their moments."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from torch import distributions as D

from coembed.nn.posteriors import Gaussian, Laplace

location = st.floats(-5, 5)
spread = st.floats(0.05, 5)
K = 4
N = 200_000


def same(value: float) -> Tensor:
    return torch.full((3, K), value, dtype=torch.float64)


@given(location, spread, location, spread)
def test_gaussian_kl(mean: float, sd: float, prior_mean: float, prior_sd: float) -> None:
    q = Gaussian(same(mean), same(2 * math.log(sd)))
    p = Gaussian(same(prior_mean), same(2 * math.log(prior_sd)))
    expected = D.kl_divergence(
        D.Normal(same(mean), same(sd)), D.Normal(same(prior_mean), same(prior_sd))
    )
    torch.testing.assert_close(q.kl(p), expected.sum(-1))


@given(location, spread, location, spread)
def test_laplace_kl(mean: float, scale: float, prior_mean: float, prior_scale: float) -> None:
    q, p = Laplace(same(mean), same(scale)), Laplace(same(prior_mean), same(prior_scale))
    expected = D.kl_divergence(
        D.Laplace(same(mean), same(scale)), D.Laplace(same(prior_mean), same(prior_scale))
    )
    torch.testing.assert_close(q.kl(p), expected.sum(-1))


def test_numbers_of_the_sheets() -> None:
    one = torch.ones(1, dtype=torch.float64)
    kl = Laplace(one, 0.5 * one).kl(Laplace(0 * one, one))
    assert kl.item() == pytest.approx(math.log(2) + 1 + 0.5 * math.exp(-2) - 1, abs=1e-12)
    assert kl.item() == pytest.approx(0.760815, abs=1e-6)  # scmm.md 10.1
    ten, v = torch.ones(10, dtype=torch.float64), torch.tensor(0.18, dtype=torch.float64)
    prior = Gaussian(torch.zeros_like(v), v.log())
    assert Gaussian(0 * ten, v.log() * ten).kl(prior).item() == pytest.approx(0, abs=1e-12)
    off = Gaussian(0.3 * ten, math.log(0.1) * ten).kl(prior)  # cobolt.md 10.3
    assert off.item() == pytest.approx(3.2167, abs=5e-5)


@pytest.mark.parametrize("kind", [Gaussian, Laplace])
def test_kl_is_zero_at_the_prior_and_has_the_right_gradient(kind: type) -> None:
    values = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mean, width = values[0], values[1].exp()
    q = kind(mean, width)
    torch.testing.assert_close(q.kl(q), torch.zeros(3, dtype=torch.float64))
    prior = kind(torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64))
    leaves = (mean.requires_grad_(), width.requires_grad_())
    assert torch.autograd.gradcheck(lambda m, w: kind(m, w).kl(prior), leaves)


@pytest.mark.parametrize(
    "q",
    [
        Gaussian(torch.tensor([1.5, -2.0]), torch.tensor([0.5, -3.0])),
        Laplace(torch.tensor([1.5, -2.0]), torch.tensor([0.4, 3.0])),
    ],
)
def test_samples_follow_the_distribution(q: Gaussian | Laplace) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        draws = type(q)(*(field.expand(N, 2) for field in q)).sample().double().numpy()
    for k in range(2):
        if isinstance(q, Gaussian):
            law = stats.norm(q.mean[k].item(), math.exp(0.5 * q.log_var[k].item()))
        else:
            law = stats.laplace(q.mean[k].item(), q.scale[k].item())
        column = draws[:, k]
        assert abs(column.mean() - law.mean()) < 5 * law.std() / math.sqrt(N)
        kurtosis = law.stats(moments="k").item() + 3
        assert abs(column.var() / law.var() - 1) < 5 * math.sqrt((kurtosis - 1) / N)
        assert stats.kstest(column, law.cdf).pvalue > 1e-4


@pytest.mark.parametrize("kind", [Gaussian, Laplace])
def test_samples_carry_gradients_to_both_parameters(kind: type) -> None:
    mean = torch.zeros(1000, 2, requires_grad=True)
    width = torch.ones(1000, 2, requires_grad=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        draw = kind(mean, width).sample()
    draw.sum().backward()
    torch.testing.assert_close(mean.grad, torch.ones_like(mean))
    # d sample / d scale is the standardised draw; of log-variance half the deviation.
    expected = draw.detach() * (0.5 if kind is Gaussian else 1.0)
    torch.testing.assert_close(width.grad, expected, rtol=1e-4, atol=1e-5)


def test_a_laplace_draw_is_finite_at_the_ends_of_the_unit_interval(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ends = torch.tensor([0.0, 0.5, 1 - 2**-24])
    monkeypatch.setattr(torch, "rand_like", lambda mean: ends)
    draw = Laplace(torch.zeros(3), torch.ones(3)).sample()
    assert draw.isfinite().all()
    assert draw[1] == 0
    assert draw[0] < -15 < 15 < draw[2]
