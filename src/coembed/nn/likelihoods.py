"""Log-likelihoods of counts. Most counts are 0, so what costs most is done for the others alone.

The formulas are the dense ones, rearranged: the log-probability of a 0 in closed form for every
feature and, for the counts that are not 0, how much more likely they are than a 0. Tests hold
both forms equal, in value and in gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributions import Multinomial, NegativeBinomial
from torch.nn.functional import logsigmoid, softplus

from coembed.nn.sparse import Entries, transposed

EPS = 1e-8
"""Added to means and dispersions before their logarithms."""

Counts = Tensor | Entries
"""(b, P) counts, dense or CSR, or their entries where several likelihoods share them."""


@dataclass(frozen=True, eq=False)
class LogLikelihood:
    """Log-probabilities of the counts of a minibatch, each feature on its own.

    Attributes:
        entries: where counts are not 0.
        zero: (b, P) log-probability of a 0.
        gain: (n,) by how much the log-probability of each entry is larger.
    """

    entries: Entries
    zero: Tensor
    gain: Tensor

    def sum(self) -> Tensor:
        """Return the log-probability of every cell, (b,)."""
        return self.zero.sum(-1) + self.entries.sum(self.gain)

    def dense(self) -> Tensor:
        """Return the log-probability of every count, (b, P)."""
        return self.entries.add_to(self.zero, self.gain)

    def zero_inflated(self, gate: Tensor) -> LogLikelihood:
        """Return them when a count is 0 with probability sigmoid(gate) besides; gate is (b, P)."""
        more = softplus(gate - self.zero)  # an entry gains less over a 0 of either kind
        gain = self.gain - self.entries.of(more)
        return replace(self, zero=self.zero + more - softplus(gate), gain=gain)


def negative_binomial(x: Counts, r: Tensor, logit: Tensor) -> LogLikelihood:
    """Return log NB(x; total count r, success probability sigmoid(logit)).

    Mean r exp(logit), variance mean (1 + exp(logit)) (scmm.md section 5).

    Args:
        x: the counts.
        r: broadcasts to (b, P).
        logit: (b, P).
    """
    entries = Entries.of_counts(x)
    gain = log_choose_few(entries.x, entries.of(r)) + entries.x * logsigmoid(entries.of(logit))
    return LogLikelihood(entries, -r * softplus(logit), gain)


def negative_binomial_mean(x: Counts, mean: Tensor, dispersion: Tensor) -> LogLikelihood:
    """Return log NB(x; mean, inverse dispersion): variance mean + mean^2 / dispersion.

    Args:
        x: the counts.
        mean: (b, P).
        dispersion: broadcasts to (b, P).
    """
    entries = Entries.of_counts(x)
    odds = (mean + EPS) * (dispersion + EPS).reciprocal()  # the exponential of the logit above
    seen = entries.of(odds)
    gain = log_choose_few(entries.x, entries.of(dispersion)) + entries.x * (
        seen.log() - seen.log1p()
    )
    return LogLikelihood(entries, -dispersion * odds.log1p(), gain)


def poisson(x: Counts, mean: Tensor) -> LogLikelihood:
    """Return log Poisson(x; mean), the mean (b, P) positive."""
    entries = Entries.of_counts(x)
    gain = entries.x * entries.of(mean).log() - torch.lgamma(entries.x + 1)
    return LogLikelihood(entries, -mean, gain)


def multinomial(x: Counts, logits: Tensor) -> Tensor:
    """Return the log-probability of every cell, (b,), without the combinatorial constant.

    Args:
        x: the counts.
        logits: (b, P), of the shares before the softmax.
    """
    entries = Entries.of_counts(x)
    total = torch.logsumexp(logits, -1, keepdim=True)
    return entries.sum(entries.x * (entries.of(logits) - entries.of(total)))


def bernoulli(x: Tensor, logit: Tensor) -> Tensor:
    """Return log Bernoulli(x; sigmoid(logit)) of every cell, (b,), for x in [0, 1], dense."""
    return (x * logit - softplus(logit)).sum(-1)


def scaled_bernoulli(
    x: Tensor,
    h: Tensor,
    head: nn.Linear,
    log_row: Tensor,
    log_column: Tensor,
    weights: Tensor,
) -> Tensor:
    """Return the weighted sum over cells of the log-probability of which features are open.

    A feature is open with probability sigmoid(head(h)) exp(log_row + log_column). There are so
    many that a minibatch of logits does not fit into a cache: value and gradients are computed for
    some features after the other, and only the gradients of the arguments are kept.

    Args:
        x: (b, P) counts, dense or CSR; open is what is not 0.
        h: (b, H), the decoder's last layer.
        head: H to P.
        log_row: (b,) log of each cell's factor, at most 0.
        log_column: (P,) log of each feature's factor, at most 0.
        weights: (b,) of the cells, without gradient.
    """
    arguments = (x, h, head.weight, head.bias, log_row, log_column, weights)
    value: Tensor = _ScaledBernoulli.apply(*arguments)
    return value


class _ScaledBernoulli(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        h: Tensor,
        weight: Tensor,
        bias: Tensor,
        log_row: Tensor,
        log_column: Tensor,
        weights: Tensor,
    ) -> Tensor:
        by_feature = Entries(transposed(x))
        row, column, shares = log_row.exp().unsqueeze(-1), log_column.exp(), weights.unsqueeze(-1)
        by_h, by_row = torch.zeros_like(h), torch.zeros_like(log_row)
        by_weight, by_bias = torch.empty_like(weight), torch.empty_like(bias)
        by_column, value = torch.empty_like(log_column), torch.zeros_like(log_row)
        size = max(1, CACHED // len(h))
        starts = torch.arange(0, len(weight) + size, size, device=h.device)
        ends = torch.searchsorted(by_feature.rows, starts).tolist()
        for k, start in enumerate(range(0, len(weight), size)):
            part, seen = slice(start, start + size), slice(ends[k], ends[k + 1])
            logit = torch.addmm(bias[part], h, weight[part].t())
            cells, features = by_feature.columns[seen], by_feature.rows[seen]
            at = cells * logit.shape[1] + features - start
            log_open = logsigmoid(logit.view(-1)[at])
            # With p a chance, d log(1 - p) / d log p = -p / (1 - p); log p itself has slope 1.
            open_ = logit.sigmoid_()
            slope = torch.mul(open_, column[part]).mul_(row).neg_().clamp_(min=-LARGEST)
            log_closed = slope.log1p()
            gain = log_open + log_row[cells] + log_column[features] - log_closed.view(-1)[at]
            value += log_closed.sum(-1).index_add_(0, cells, gain)
            slope.div_(slope + 1).view(-1).index_fill_(0, at, 1)
            slope.mul_(shares)
            by_column[part] = slope.sum(0)
            by_row += slope.sum(-1)
            by_logit = slope.mul_(open_.neg_().add_(1))
            by_h.addmm_(by_logit, weight[part])
            torch.mm(by_logit.t(), h, out=by_weight[part])
            by_bias[part] = by_logit.sum(0)
        ctx.gradients = by_h, by_weight, by_bias, by_row, by_column
        return value @ weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        plain = float(gradient) == 1  # as in a loss that is a plain sum of its terms
        gradients = [g if plain else g * gradient for g in ctx.gradients]
        del ctx.gradients  # a parameter takes over what nobody else holds, without a copy
        return None, *gradients, None


CACHED = 2**18
"""Numbers of a part of a minibatch that stay in a core's cache through a chain of operations."""

LARGEST = 1 - 2**-20
"""Largest chance, for which a 0 still has a logarithm that single precision can tell."""


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


def draw_negative_binomial(r: Tensor, logit: Tensor) -> Tensor:
    """Return counts drawn from `negative_binomial`, (b, P)."""
    return NegativeBinomial(r, logits=logit).sample()


def draw_negative_binomial_mean(mean: Tensor, dispersion: Tensor) -> Tensor:
    """Return counts drawn from `negative_binomial_mean`, (b, P)."""
    return draw_negative_binomial(dispersion, (mean + EPS).log() - (dispersion + EPS).log())


def draw_multinomial(shares: Tensor, depth: Tensor) -> Tensor:
    """Return counts, (b, n_features), of which cell i has round(depth_i), by `shares`."""
    draws = zip(shares, depth.round().int().tolist(), strict=True)
    return torch.stack([Multinomial(n, p).sample() if n else p * 0 for p, n in draws])


def mixture(first: Tensor, second: Tensor, logit: Tensor) -> Tensor:
    """Return the log-likelihood of two components, the first with probability sigmoid(logit)."""
    return torch.logaddexp(first + logsigmoid(logit), second + logsigmoid(-logit))


def log_choose(x: Tensor, r: Tensor) -> Tensor:
    """Return log of Gamma(x + r) / (Gamma(r) x!), the binomial coefficient of NB counts.

    In double precision inside: in single, the difference of two log-gammas is off by 0.05 at
    r = 1e5. The gradient is that of r alone.

    Args:
        x: counts of any size, whole or not.
        r: above 0; x and r broadcast.
    """
    value: Tensor = _LogChoose.apply(x, r)
    return value


class _LogChoose(torch.autograd.Function):
    """By Stirling's series 8 steps up, faster than torch's log-gammas and as exact."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, r: Tensor) -> Tensor:
        wide = torch.float32 if r.device.type == "mps" else torch.float64
        x, lower = x.to(wide), r.to(wide)
        upper = lower + x
        ctx.save_for_backward(upper, lower)
        value = _log_gamma(upper) - _log_gamma(lower) - _log_gamma(x + 1)
        return (value + _log_gamma(x.new_ones(()))).to(r.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        upper, lower = ctx.saved_tensors
        slope = gradient * (_digamma(upper) - _digamma(lower))
        return None, slope.sum_to_size(lower.shape).to(gradient.dtype)


def log_choose_few(x: Tensor, r: Tensor) -> Tensor:
    """Return `log_choose` of (n,) counts above 0 and as many r: fast where most counts are few."""
    value: Tensor = _LogChooseSmall.apply(x, r)
    others = ((x > SMALL) | (x != x.round())).nonzero().squeeze(-1)
    return value.index_copy(0, others, log_choose(x[others], r[others])) if len(others) else value


SMALL = 8
"""Counts up to this are so many that their binomial coefficients are products."""


class _LogChooseSmall(torch.autograd.Function):
    """log of the product of (r + k) / (k + 1) for k below min(x, SMALL): exact as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, r: Tensor) -> Tensor:
        # Factor k is 1 + (r - 1) / (k + 1); the first, r itself, every count has.
        product, total, slope, above = r.clone(), torch.zeros_like(r), r.reciprocal(), r - 1
        for k in range(1, min(SMALL, int(x.max()) if len(x) else 0)):
            within = (x - k).clamp_(0, 1)
            slope.addcdiv_(within, r + k)
            product.addcmul_(product, within.mul_(above).div_(k + 1))
            if k % 4 == 3:  # before it overflows, from r = 1e9 on
                total.add_(product.log())
                product.fill_(1)
        total.add_(product.log_())
        ctx.save_for_backward(slope)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        (slope,) = ctx.saved_tensors
        return None, gradient * slope


def _log_gamma(y: Tensor) -> Tensor:
    """Return log Gamma(y), up to a constant, for y > 0."""
    u = y * (y + 7)
    rising = u * (u + 6) * (u + 10) * (u + 12)  # y (y + 1) ... (y + 7)
    y = y + 8
    inverse = y.reciprocal()
    square = inverse.square()
    series = inverse * (1 / 12 - square * (1 / 360 - square * (1 / 1260 - square / 1680)))
    return (y - 0.5) * y.log() - y + series - rising.log()


def _digamma(y: Tensor) -> Tensor:
    """Return the derivative of log Gamma at y > 0."""
    u = y * (y + 7)
    rising = u.reciprocal() + (u + 6).reciprocal() + (u + 10).reciprocal() + (u + 12).reciprocal()
    slope = 2 * y + 7
    y = y + 8
    inverse = y.reciprocal()
    square = inverse.square()
    series = square * (1 / 12 - square * (1 / 120 - square * (1 / 252 - square / 240)))
    return y.log() - 0.5 * inverse - series - slope * rising
