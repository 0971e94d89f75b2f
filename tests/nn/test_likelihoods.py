"""Likelihoods of counts against scipy and the sheets' numbers, in value and in gradient."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from coembed.nn.likelihoods import multinomial, negative_binomial

count_lists = st.lists(st.integers(0, 300), min_size=1, max_size=6)
positive = st.floats(1e-3, 1e3)
logits = st.floats(-8, 8)


def double(*values: object) -> list[Tensor]:
    return [torch.tensor(v, dtype=torch.float64) for v in values]


def scipy_nb(x: np.ndarray, r: float, logit: float) -> np.ndarray:
    """scipy counts failures before r successes; ours is the success probability of a count."""
    return stats.nbinom.logpmf(x, r, 1 / (1 + np.exp(logit)))


@given(x=count_lists, r=positive, logit=logits)
def test_negative_binomial_equals_scipy(x: list[int], r: float, logit: float) -> None:
    ours = negative_binomial(*double(x, [r] * len(x), [logit] * len(x))).dense()
    np.testing.assert_allclose(ours, scipy_nb(np.array(x), r, logit), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(("r", "logit"), [(2.0, -0.5), (0.3, 1.5)])
def test_negative_binomial_sums_to_one_with_the_mean_and_variance_it_states(
    r: float, logit: float
) -> None:
    x = torch.arange(3000, dtype=torch.float64)
    p = negative_binomial(x, torch.full_like(x, r), torch.full_like(x, logit)).dense().exp()
    mean = (p * x).sum()
    assert p.sum().item() == pytest.approx(1, abs=1e-9)
    assert mean.item() == pytest.approx(r * np.exp(logit), rel=1e-9)
    variance = (p * (x - mean) ** 2).sum().item()
    assert variance == pytest.approx(mean.item() * (1 + np.exp(logit)), rel=1e-8)


def test_numbers_of_the_sheet() -> None:
    """scmm.md 10.2: r = 2, p = 0.3, gate 0.4."""
    x, r = double([0.0, 3.0], [2.0, 2.0])
    logit, gate = (torch.logit(torch.full_like(x, p)) for p in (0.3, 0.4))
    log_prob = negative_binomial(x, r, logit)
    assert log_prob.dense()[1].item() == pytest.approx(-2.938974, abs=1e-6)
    inflated = log_prob.zero_inflated(gate).dense()
    np.testing.assert_allclose(inflated, [-0.365283, -3.449800], atol=1e-6)
    assert (r * logit.exp())[0].item() == pytest.approx(0.857143, abs=1e-6)


@given(x=count_lists, r=positive, logit=logits, gate=st.floats(-30, 30))
def test_zero_inflation_is_the_mixture_with_a_point_at_zero(
    x: list[int], r: float, logit: float, gate: float
) -> None:
    counts, rs, ls, gs = double(x, [r] * len(x), [logit] * len(x), [gate] * len(x))
    ours = negative_binomial(counts, rs, ls).zero_inflated(gs).dense()
    zero, kept = -np.logaddexp(0, -gate), -np.logaddexp(0, gate)
    plain = kept + scipy_nb(np.array(x), r, logit)
    expected = np.where(np.array(x) > 0, plain, np.logaddexp(zero, plain))
    np.testing.assert_allclose(ours, expected, rtol=1e-7, atol=1e-8)
    assert (ours <= 1e-12).all(), "a probability is at most 1"


def test_zero_inflation_sums_to_one() -> None:
    x = torch.arange(2000, dtype=torch.float64)
    log_prob = negative_binomial(x, torch.full_like(x, 1.3), torch.full_like(x, 0.7))
    p = log_prob.zero_inflated(torch.full_like(x, -0.4)).dense().exp()
    assert p.sum().item() == pytest.approx(1, abs=1e-9)


@given(
    x=st.lists(st.integers(0, 40), min_size=2, max_size=6),
    scores=st.lists(logits, min_size=6, max_size=6),
)
def test_multinomial_equals_scipy_but_for_the_constant(x: list[int], scores: list[float]) -> None:
    counts, score = double([x], [scores[: len(x)]])
    ours = multinomial(counts, score).item()
    p = np.exp(score[0].numpy() - np.logaddexp.reduce(score[0].numpy()))
    n = sum(x)
    lgamma = lambda k: float(torch.lgamma(torch.tensor(k + 1.0, dtype=torch.float64)))  # noqa: E731
    constant = lgamma(n) - sum(lgamma(k) for k in x)
    expected = stats.multinomial.logpmf(x, n, p / p.sum())
    assert ours + constant == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_multinomial_does_not_see_a_shift_of_the_logits() -> None:
    x, score = double([[3.0, 0.0, 2.0]], [[1.0, -2.0, 0.5]])
    torch.testing.assert_close(multinomial(x, score), multinomial(x, score + 7))


def test_multinomial_is_finite_where_a_softmax_underflows() -> None:
    """0 * log 0 in the original's form (cobolt.md section 6)."""
    value = multinomial(torch.tensor([[0.0, 5.0]]), torch.tensor([[-1000.0, 1000.0]]))
    torch.testing.assert_close(value, torch.zeros(1))


# -- gradients ------------------------------------------------------------------------------------

X = torch.tensor([[0.0, 1.0, 0.0, 7.0], [3.0, 0.0, 250.0, 0.0]], dtype=torch.float64)


def of_shape(seed: int, positive_only: bool = False) -> Tensor:
    values = torch.randn(X.shape, dtype=X.dtype, generator=torch.Generator().manual_seed(seed))
    return (values.exp() if positive_only else values).requires_grad_()


CASES: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "multinomial": (lambda s: multinomial(X, s), (of_shape(0),)),
    "negative binomial": (
        lambda r, s: negative_binomial(X, r, s).dense(),
        (of_shape(1, True), of_shape(2)),
    ),
    "zero inflated": (
        lambda r, s, g: negative_binomial(X, r, s).zero_inflated(g).dense(),
        (of_shape(3, True), of_shape(4), of_shape(5)),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    function, inputs = CASES[name]
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("x", [0.0, 1.0, 5000.0])
@pytest.mark.parametrize("log_r", [-12.0, 0.0, 12.0])
@pytest.mark.parametrize("logit", [-18.42, 0.0, 18.42])
@pytest.mark.parametrize("gate", [-100.0, 0.0, 100.0])
def test_values_and_gradients_are_finite_at_the_bounds_of_scmm(
    x: float, log_r: float, logit: float, gate: float
) -> None:
    counts = torch.tensor([[x]])
    leaves = [torch.tensor([[v]], requires_grad=True) for v in (log_r, logit, gate)]
    value = negative_binomial(counts, leaves[0].exp(), leaves[1]).zero_inflated(leaves[2]).sum()
    value.backward()
    assert value.isfinite().all()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)


@given(x=count_lists, r=st.floats(1e-2, 100.0), logit=st.floats(-5, 5))
def test_single_precision_is_close(x: list[int], r: float, logit: float) -> None:
    arguments = (v.float() for v in double(x, [r] * len(x), [logit] * len(x)))
    ours = negative_binomial(*arguments).dense()
    np.testing.assert_allclose(ours, scipy_nb(np.array(x), r, logit), rtol=2e-5, atol=2e-3)


def test_an_empty_and_an_all_zero_minibatch() -> None:
    empty = torch.zeros(0, 3)
    assert negative_binomial(empty, empty + 1, empty).dense().shape == (0, 3)
    zeros = torch.zeros(2, 3)
    r = torch.tensor([[1.0, 2.0, 3.0]]).expand(2, 3)
    torch.testing.assert_close(negative_binomial(zeros, r, zeros).dense(), -r * np.log(2))


@pytest.mark.parametrize("total_count", [1e2, 1e4, 1e6, 1e7])
def test_negative_binomial_in_float32_keeps_its_digits_at_large_total_counts(
    total_count: float,
) -> None:
    x = torch.tensor([[0.0, 1.0, 3.0, 20.0, 200.0]])
    r = torch.full_like(x, total_count)
    logit = torch.log((x + 1) / r)
    p = torch.sigmoid(logit.double()).numpy()
    expected = stats.nbinom.logpmf(x.numpy(), total_count, 1 - p)
    np.testing.assert_allclose(negative_binomial(x, r, logit).dense(), expected, atol=2e-3)
