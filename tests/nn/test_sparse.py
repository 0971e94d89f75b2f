"""What is done over entries alone equals what is done densely, in value and in gradient."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse, stats
from torch import Tensor, nn

from coembed.data.rows import as_csr
from coembed.nn.likelihoods import (
    log_choose,
    multinomial,
    negative_binomial,
    negative_binomial_mean,
    poisson,
)
from coembed.nn.sparse import Entries, Linear, row_sums, scale_rows

seeds = st.integers(0, 2**31)
densities = st.floats(0, 1)


def minibatch(seed: int, density: float, shape: tuple[int, int] = (6, 9)) -> tuple[Tensor, Tensor]:
    """Return the same counts dense and CSR, in double precision."""
    random = np.random.default_rng(seed)
    x = random.poisson(3, shape) * (random.random(shape) < density).astype(float)
    return torch.from_numpy(x), as_csr(sparse.csr_matrix(x))


def leaf(seed: int, *shape: int) -> Tensor:
    values = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return values.requires_grad_()


@given(seed=seeds, density=densities)
def test_entries_sums_and_scales_of_csr_rows_are_those_of_dense_rows(
    seed: int, density: float
) -> None:
    dense, csr = minibatch(seed, density)
    a, b = Entries(dense), Entries(csr)
    for name in ("x", "index", "rows", "columns", "starts"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), check_dtype=False)
    for values in (leaf(seed, 6, 9), leaf(seed, 6, 1), leaf(seed, 9)):
        torch.testing.assert_close(a.of(values), values.expand(6, 9)[dense > 0])
    torch.testing.assert_close(a.sum(a.x), dense.sum(-1))
    torch.testing.assert_close(row_sums(csr), dense.sum(-1))
    factor = leaf(seed, 6).detach()
    scaled = scale_rows(csr, factor)
    torch.testing.assert_close(scaled.to_dense(), scale_rows(dense, factor))


def test_the_entries_of_a_csr_minibatch_are_found_once_while_there_is_one() -> None:
    dense, csr = minibatch(1, 0.5)
    entries = Entries.of_counts(csr)
    assert Entries.of_counts(csr) is entries
    assert Entries.of_counts(entries) is entries
    assert Entries.of_counts(dense) is not Entries.of_counts(dense)  # it may have changed since
    gone = weakref.ref(entries)
    del csr, entries
    assert gone() is None


@given(seed=seeds, density=densities)
def test_a_linear_layer_takes_csr_rows(seed: int, density: float) -> None:
    dense, csr = minibatch(seed, density)
    torch.manual_seed(seed)
    layer = Linear(9, 4).double()
    plain = nn.Linear(9, 4).double()
    with torch.no_grad():
        plain.weight.copy_(layer.weight.t())
        plain.bias.copy_(layer.bias)
    ahead = leaf(seed, 6, 4).detach()
    for x in (dense, csr):
        layer.zero_grad()
        plain.zero_grad()
        torch.testing.assert_close(layer(x), plain(dense))
        layer(x).backward(ahead)
        plain(dense).backward(ahead)
        torch.testing.assert_close(layer.weight.grad.t(), plain.weight.grad)
        torch.testing.assert_close(layer.bias.grad, plain.bias.grad)


def test_a_linear_layer_starts_as_torch_s_does() -> None:
    torch.manual_seed(3)
    ours = Linear(5, 2)
    torch.manual_seed(3)
    torch.testing.assert_close(ours.weight.t(), nn.Linear(5, 2).weight)


LIKELIHOODS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "negative binomial": (
        lambda x, a, b, g: negative_binomial(x, a.exp(), b).sum(),
        lambda x, a, b, g: nb(x, a.exp(), b).sum(-1),
    ),
    "negative binomial by its mean": (
        lambda x, a, b, g: negative_binomial_mean(x, a.exp(), b[0].exp()).sum(),
        lambda x, a, b, g: nb(x, b[0].exp().expand_as(a), a - b[0]).sum(-1),
    ),
    "zero-inflated negative binomial": (
        lambda x, a, b, g: negative_binomial(x, a.exp(), b).zero_inflated(g).sum(),
        lambda x, a, b, g: inflated(x, nb(x, a.exp(), b), g).sum(-1),
    ),
    "Poisson": (
        lambda x, a, b, g: poisson(x, a.exp()).sum(),
        lambda x, a, b, g: (x * a - a.exp() - torch.lgamma(x + 1)).sum(-1),
    ),
    "multinomial": (
        lambda x, a, b, g: multinomial(x, a),
        lambda x, a, b, g: (x * a.log_softmax(-1)).sum(-1),
    ),
}
"""Ours, and the dense formula."""


def nb(x: Tensor, r: Tensor, logit: Tensor) -> Tensor:
    choose = torch.lgamma(x + r) - torch.lgamma(r) - torch.lgamma(x + 1)
    return choose + x * logit - (x + r) * nn.functional.softplus(logit)


def inflated(x: Tensor, log_p: Tensor, gate: Tensor) -> Tensor:
    kept = log_p + nn.functional.logsigmoid(-gate)
    return torch.where(x > 0, kept, torch.logaddexp(nn.functional.logsigmoid(gate), kept))


@pytest.mark.parametrize("csr", [False, True], ids=["dense", "csr"])
@pytest.mark.parametrize("name", LIKELIHOODS)
@given(seed=seeds, density=densities)
def test_a_likelihood_over_entries_is_the_dense_formula_in_value_and_gradient(
    name: str, csr: bool, seed: int, density: float
) -> None:
    dense, rows = minibatch(seed, density)
    leaves, weights = [leaf(seed + i, 6, 9) for i in range(3)], leaf(seed, 6).detach()
    ours, formula = LIKELIHOODS[name]
    values = ours(rows if csr else dense, *leaves), formula(dense, *leaves)
    torch.testing.assert_close(*values, rtol=1e-6, atol=1e-6)  # the 1e-8 beside a mean
    gradients = (
        torch.autograd.grad((value * weights).sum(), leaves, allow_unused=True) for value in values
    )
    for mine, reference in zip(*gradients, strict=True):
        assert (mine is None) == (reference is None)
        if mine is not None:
            torch.testing.assert_close(mine, reference, rtol=1e-6, atol=1e-6)


@given(
    x=st.lists(st.one_of(st.integers(1, 10_000), st.floats(0.01, 50)), min_size=1, max_size=8),
    log_r=st.floats(-14, 16),
)
def test_binomial_coefficients_and_their_slopes(x: list[float], log_r: float) -> None:
    counts = torch.tensor(x, dtype=torch.float64)
    r = torch.full_like(counts, float(np.exp(log_r))).requires_grad_()
    exact = torch.lgamma(counts + r) - torch.lgamma(r) - torch.lgamma(counts + 1)
    slope = torch.digamma(counts + r) - torch.digamma(r)
    ours = log_choose(counts, r)
    scale = 1e-9 * (1 + float(r.detach().max()))  # torch's own differences lose digits
    torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-9 + scale)
    (gradient,) = torch.autograd.grad(ours.sum(), r)
    torch.testing.assert_close(gradient, slope, rtol=1e-7, atol=1e-9)


def test_binomial_coefficients_keep_their_digits_in_single_precision() -> None:
    x = torch.tensor([1.0, 2, 5, 8, 9, 300])
    for r in (1e-6, 0.3, 50.0, 1e5, 1e7):
        r = float(np.float32(r))
        exact = stats.nbinom.logpmf(x.numpy(), r, 0.5) - (r + x.numpy()) * np.log(0.5)
        ours = log_choose(x, torch.full_like(x, r))
        np.testing.assert_allclose(ours, exact, rtol=2e-6, atol=2e-6 + 1e-8 * r)


def test_binomial_coefficients_broadcast_and_sum_their_gradient() -> None:
    x = torch.arange(6, dtype=torch.float64).view(2, 3)
    r = torch.tensor([0.5, 2.0, 30.0], dtype=torch.float64, requires_grad=True)
    exact = torch.lgamma(x + r) - torch.lgamma(r) - torch.lgamma(x + 1)
    torch.testing.assert_close(log_choose(x, r), exact)
    (gradient,) = torch.autograd.grad(log_choose(x, r).sum(), r)
    expected = (torch.digamma(x + r) - torch.digamma(r)).sum(0)
    torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-10)
