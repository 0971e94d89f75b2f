"""Log-likelihoods of counts, (b, n_features) in and out; sums over features are the caller's."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Multinomial, NegativeBinomial
from torch.nn.functional import binary_cross_entropy, log_softmax, logsigmoid, softplus

EPS = 1e-8
"""Added to means and dispersions before their logarithms."""


def multinomial(x: Tensor, logits: Tensor) -> Tensor:
    """Return x_j log softmax_j(logits), the multinomial without its combinatorial constant."""
    return x * log_softmax(logits, dim=-1)


def draw_multinomial(shares: Tensor, depth: Tensor) -> Tensor:
    """Return counts, (b, n_features), of which cell i has round(depth_i), by `shares`."""
    draws = zip(shares, depth.round().int().tolist(), strict=True)
    return torch.stack([Multinomial(n, p).sample() if n else p * 0 for p, n in draws])


def negative_binomial(x: Tensor, r: Tensor, logit: Tensor) -> Tensor:
    """Return log NB(x; total count r, success probability sigmoid(logit)).

    Mean r exp(logit), variance mean (1 + exp(logit)) (scmm.md section 5).
    """
    seen = x.nonzero(as_tuple=True)  # at x = 0 the binomial coefficient is 1: most of the counts
    # In float32 the difference of two large lgammas is off by 0.05 at r = 1e5 and by 1 at 1e6.
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    x_seen, r_seen = x[seen].to(wide), r[seen].to(wide)
    choose = torch.lgamma(x_seen + r_seen) - torch.lgamma(r_seen) - torch.lgamma(x_seen + 1)
    log_prob = x * logit - (x + r) * softplus(logit)
    return log_prob.index_put(seen, choose.to(log_prob.dtype), accumulate=True)


def draw_negative_binomial(r: Tensor, logit: Tensor) -> Tensor:
    """Return counts of `negative_binomial`; log mean - log r is the logit of a given mean."""
    return NegativeBinomial(r, logits=logit).sample()


def zero_inflated(x: Tensor, log_prob: Tensor, gate: Tensor) -> Tensor:
    """Return the log-likelihood when a count is 0 with probability sigmoid(gate) besides.

    Args:
        x: the counts.
        log_prob: their log-likelihood without inflation.
        gate: logit of the extra zero.
    """
    kept = log_prob - softplus(gate)
    return torch.where(x > 0, kept, torch.logaddexp(logsigmoid(gate), kept))


def negative_binomial_mean(x: Tensor, mean: Tensor, dispersion: Tensor) -> Tensor:
    """Return log NB(x; mean, inverse dispersion): variance mean + mean^2 / dispersion."""
    dispersion = dispersion.expand_as(mean)
    logit = torch.log(mean + EPS) - torch.log(dispersion + EPS)
    return negative_binomial(x, dispersion, logit)


def mixture(first: Tensor, second: Tensor, logit: Tensor) -> Tensor:
    """Return the log-likelihood of two components, the first with probability sigmoid(logit)."""
    return torch.logaddexp(first + logsigmoid(logit), second + logsigmoid(-logit))


def poisson(x: Tensor, mean: Tensor) -> Tensor:
    """Return log Poisson(x; mean), the mean positive."""
    return torch.xlogy(x, mean) - mean - torch.lgamma(x + 1)


def bernoulli(x: Tensor, p: Tensor) -> Tensor:
    """Return log Bernoulli(x; p) for x in [0, 1]; logarithms are not taken below -100."""
    known = p.nan_to_num(nan=0.0)  # torch refuses NaN, which is the guard's to see
    return torch.where(p.isnan(), p, -binary_cross_entropy(known, x, reduction="none"))


def gaussian_of_residuals(residuals: Tensor, *, log_divided: bool = False) -> Tensor:
    """Return a row's mean log-likelihood, a scalar, up to a constant (davae.md section 6).

    The variance V is one for all rows and features: that of the residuals themselves.

    Args:
        residuals: (b, D), the values less their expectation.
        log_divided: divide log V by V, as DAVAE's code does.
    """
    variance = residuals.var(correction=0)
    log_variance = variance.log() / variance if log_divided else variance.log()
    scaled = residuals.square().mean() / variance
    return -residuals.shape[1] / 2 * (scaled + log_variance)
