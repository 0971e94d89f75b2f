"""Negative binomial counts with and without extra zeros, against scipy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from coembed.nn.counts import NegativeBinomialCounts, depth_of

R = torch.tensor([[0.5, 3.0, 20.0]])
LOGIT = torch.tensor([[1.0, -0.5, -2.0]])
GATE = torch.tensor([[-1.0, 0.0, 2.0]])
X = torch.arange(2000.0)[:, None]


def probabilities(gate: Tensor | None) -> np.ndarray:
    """p(x) of x = 0, 1, ... for every feature, by scipy."""
    p = stats.nbinom.pmf(X.numpy(), R.numpy(), 1 / (1 + np.exp(LOGIT.numpy())))
    if gate is None:
        return p
    extra = 1 / (1 + np.exp(-gate.numpy()))
    return (1 - extra) * p + extra * (X.numpy() == 0)


def test_depth_is_at_least_one() -> None:
    assert depth_of(torch.tensor([[2.0, 3.0], [0.0, 0.0]])).tolist() == [5, 1]


@pytest.mark.parametrize("gate", [None, GATE])
def test_mean_and_likelihood(gate: Tensor | None) -> None:
    counts, p = NegativeBinomialCounts(R, LOGIT, gate), probabilities(gate)
    np.testing.assert_allclose(counts.mean()[0], (X.numpy() * p).sum(0), rtol=1e-5)
    few = X[:60]
    ours = NegativeBinomialCounts(*(v if v is None else v.expand(60, 3) for v in counts))
    log_prob = ours.log_likelihood(few.expand(60, 3))
    np.testing.assert_allclose(log_prob, np.log(p[:60]).sum(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gate", [None, GATE])
def test_draws_have_the_mean_and_the_zeros(gate: Tensor | None) -> None:
    many = (None if v is None else v.expand(40_000, 3) for v in (R, LOGIT, gate))
    counts, p = NegativeBinomialCounts(*many), probabilities(gate)  # type: ignore[arg-type]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x = counts.draw()
    np.testing.assert_allclose(x.mean(0), counts.mean()[0], rtol=0.05)
    np.testing.assert_allclose((x == 0).float().mean(0), p[0], rtol=0.05, atol=0.005)
