"""Fusion: the product and the mean of experts, on paper and by their symmetries."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from coembed.nn.fusion import mean_of_experts, product_of_experts
from coembed.nn.posteriors import Gaussian

B, K = 5, 3
seeds = st.integers(0, 2**31)


def experts(seed: int, n: int) -> list[Gaussian]:
    random = torch.Generator().manual_seed(seed)
    draw = torch.randn(n, 2, B, K, dtype=torch.float64, generator=random)
    return [Gaussian(mean, log_var) for mean, log_var in draw]


def prior() -> Gaussian:
    v = torch.tensor(0.18, dtype=torch.float64)
    return Gaussian(torch.zeros_like(v), v.log())


def close(a: Gaussian, b: Gaussian) -> None:
    torch.testing.assert_close(a.mean, b.mean.expand_as(a.mean))
    torch.testing.assert_close(a.log_var, b.log_var.expand_as(a.log_var))


def mask(text: str) -> Tensor:
    return torch.tensor([c == "1" for c in text])


def test_two_gaussians_on_paper() -> None:
    """cobolt.md 10.1: (mean 1, variance 0.5) times (2, 0.25), with the prior N(0, 0.18) or not."""
    two = [
        Gaussian(torch.full((1, 1), m, dtype=torch.float64), torch.full((1, 1), v).double().log())
        for m, v in ((1.0, 0.5), (2.0, 0.25))
    ]
    with_prior, without = product_of_experts(two, prior=prior()), product_of_experts(two)
    assert with_prior.mean.item() == pytest.approx(0.8654, abs=5e-5)
    assert with_prior.log_var.exp().item() == pytest.approx(0.08654, abs=5e-6)
    assert without.mean.item() == pytest.approx(5 / 3, rel=1e-9)
    assert without.log_var.exp().item() == pytest.approx(1 / 6, rel=1e-9)


def test_the_product_is_the_product_of_the_densities() -> None:
    a, b = experts(0, 2)
    fused = product_of_experts([a, b])
    x = torch.linspace(-3, 3, 7, dtype=torch.float64)[:, None, None]

    def log_density(q: Gaussian) -> Tensor:
        return torch.distributions.Normal(q.mean, (0.5 * q.log_var).exp()).log_prob(x)

    gap = log_density(a) + log_density(b) - log_density(fused)
    torch.testing.assert_close(gap, gap[:1].expand_as(gap))  # a constant, the normaliser


@given(seed=seeds, n=st.integers(1, 4))
def test_order_does_not_matter(seed: int, n: int) -> None:
    some = experts(seed, n)
    close(product_of_experts(some, prior=prior()), product_of_experts(some[::-1], prior=prior()))


@given(seed=seeds)
def test_one_expert_alone_is_itself(seed: int) -> None:
    (only,) = experts(seed, 1)
    close(product_of_experts([only]), only)


@given(seed=seeds, n=st.integers(2, 4), data=st.data())
def test_an_absent_expert_is_left_out(seed: int, n: int, data: st.DataObject) -> None:
    some = experts(seed, n)
    out = data.draw(st.integers(0, n - 1))
    present = [torch.full((B,), i != out) for i in range(n)]
    rest = some[:out] + some[out + 1 :]
    close(product_of_experts(some, present=present), product_of_experts(rest))
    close(
        product_of_experts(some, prior=prior(), present=present),
        product_of_experts(rest, prior=prior()),
    )


def test_absence_is_of_a_cell() -> None:
    a, b = experts(1, 2)
    fused = product_of_experts([a, b], prior=prior(), present=[mask("11100"), mask("10110")])
    cell = lambda q, i: Gaussian(q.mean[i : i + 1], q.log_var[i : i + 1])  # noqa: E731
    for i, here in enumerate([[a, b], [a], [a, b], [b], []]):
        expected = (
            product_of_experts([cell(q, i) for q in here], prior=prior()) if here else prior()
        )
        close(cell(fused, i), expected)


@given(seed=seeds)
def test_the_prior_is_counted_once(seed: int) -> None:
    a, b = experts(seed, 2)
    fused = product_of_experts([a, b], prior=prior())
    precision = sum(torch.exp(-q.log_var) for q in (a, b)) + 1 / 0.18
    torch.testing.assert_close(torch.exp(-fused.log_var), precision)
    with_prior = Gaussian(*(field.expand(B, K) for field in prior()))
    close(fused, product_of_experts([a, b, with_prior]))


def test_more_experts_are_never_less_sure() -> None:
    some = experts(2, 4)
    variances = [product_of_experts(some[:n], prior=prior()).log_var for n in range(1, 5)]
    assert all((after < before).all() for before, after in pairwise(variances))


def test_product_gradients_are_those_of_finite_differences() -> None:
    present = [mask("11100"), mask("10110")]
    leaves = tuple(field.clone().requires_grad_() for q in experts(3, 2) for field in q)

    def fused(*fields: Tensor) -> Gaussian:
        pair = [Gaussian(*fields[:2]), Gaussian(*fields[2:])]
        return product_of_experts(pair, prior=prior(), present=present)

    assert torch.autograd.gradcheck(fused, leaves)


def test_mean_of_experts() -> None:
    a, b = (q.mean for q in experts(4, 2))
    torch.testing.assert_close(mean_of_experts([a, b]), (a + b) / 2)
    torch.testing.assert_close(mean_of_experts([a, b]), mean_of_experts([b, a]))
    torch.testing.assert_close(mean_of_experts([a]), a)
    mixed = mean_of_experts([a, b], present=[mask("11100"), mask("10011")])
    expected = torch.stack([(a[0] + b[0]) / 2, a[1], a[2], b[3], b[4]])
    torch.testing.assert_close(mixed, expected)
