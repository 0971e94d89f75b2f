"""Log-likelihoods of counts. Most counts are 0, so what costs most is done for the others alone.

The formulas are the dense ones, rearranged: the log-probability of a 0 in closed form for every
feature and, for the counts that are not 0, how much more likely they are than a 0. On the CPU, in
single precision, `kernels` computes the same and its gradients in one pass. Tests hold all equal.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributions import Multinomial, NegativeBinomial
from torch.nn.functional import logsigmoid, pad, softplus

from coembed.nn.sparse import Entries, fused, run

EPS = 1e-8
"""Added to means and dispersions before their logarithms."""

Counts = Tensor | Entries
"""(b, P) counts, dense or CSR, or their entries where several likelihoods share them."""


@dataclass(frozen=True, eq=False)
class LogLikelihood:
    """Log-probabilities of the counts of a minibatch, each feature on its own.

    Attributes:
        entries: where counts are not 0.
        gate: (b, P), a count is 0 with probability sigmoid(gate) besides; None for never.
    """

    entries: Entries
    gate: Tensor | None

    def zero(self) -> Tensor:
        """Return the log-probability of a 0, (b, P), but for the gate."""
        raise NotImplementedError

    def gain(self) -> Tensor:
        """Return by how much that of each entry is larger, (n,)."""
        raise NotImplementedError

    def zero_inflated(self, gate: Tensor) -> LogLikelihood:
        """Return them when a count is 0 with probability sigmoid(gate) besides; gate is (b, P)."""
        return replace(self, gate=gate)

    def sum(self) -> Tensor:
        """Return the log-probability of every cell, (b,)."""
        zero, gain = self._parts()
        return zero.sum(-1) + self.entries.sum(gain)

    def dense(self) -> Tensor:
        """Return the log-probability of every count, (b, P)."""
        return self.entries.add_to(*self._parts())

    def _parts(self) -> tuple[Tensor, Tensor]:
        """Return `zero` and `gain` with the gate."""
        zero, gain = self.zero(), self.gain()
        if self.gate is None:
            return zero, gain
        more = softplus(self.gate - zero)  # an entry gains less over a 0 of either kind
        return zero + more - softplus(self.gate), gain - self.entries.of(more)


@dataclass(frozen=True, eq=False)
class _NegativeBinomial(LogLikelihood):
    """NB(r, p) with odds p / (1 - p), (b, P); r broadcasts to it."""

    r: Tensor
    odds: Tensor

    def zero(self) -> Tensor:
        return -self.r * self.odds.log1p()

    def gain(self) -> Tensor:
        x, seen = self.entries.x, self.entries.of(self.odds)
        return log_choose(x, self.entries.of(self.r)) + x * (seen.log() - seen.log1p())

    def sum(self) -> Tensor:
        if not fused(self.odds):
            return super().sum()
        r = self.r.unsqueeze(0) if self.r.dim() == 1 else self.r.expand_as(self.odds)
        return _rowwise("negative_binomial", self.entries, r, self.odds, self.gate)


def _rowwise(kernel: str, entries: Entries, *arguments: Tensor | None) -> Tensor:
    """Return what a kernel computes of every cell, (b,), from entries and (b, P) or (1, P)."""
    value: Tensor = _Rowwise.apply(kernel, entries, *arguments)
    return value


class _Rowwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernel: str, entries: Entries, *arguments: Tensor | None) -> Tensor:
        given = [a if a is None else a.contiguous() for a in arguments]
        value = entries.x.new_empty(entries.shape[0])
        gradients = [a if a is None else a.new_empty(entries.shape) for a in arguments]
        run(kernel, *entries.csr, *given, value, *gradients)
        ctx.gradients = [
            None if a is None else (a.shape, by) for a, by in zip(arguments, gradients, strict=True)
        ]
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows = gradient.unsqueeze(-1)
        found = [
            None if part is None else part[1].mul_(rows).sum_to_size(part[0])
            for part in ctx.gradients
        ]
        del ctx.gradients  # they hold the gradient times `rows` by now
        return None, None, *found


def negative_binomial(x: Counts, r: Tensor, logit: Tensor) -> LogLikelihood:
    """Return log NB(x; total count r, success probability sigmoid(logit)).

    Mean r exp(logit), variance mean (1 + exp(logit)) (scmm.md section 5).

    Args:
        x: the counts.
        r: broadcasts to (b, P).
        logit: (b, P).
    """
    return _NegativeBinomial(Entries.of_counts(x), None, r, logit.exp())


def negative_binomial_mean(x: Counts, mean: Tensor, dispersion: Tensor) -> LogLikelihood:
    """Return log NB(x; mean, inverse dispersion): variance mean + mean^2 / dispersion.

    Args:
        x: the counts.
        mean: (b, P).
        dispersion: broadcasts to (b, P).
    """
    odds = (mean + EPS) * (dispersion + EPS).reciprocal()
    return _NegativeBinomial(Entries.of_counts(x), None, dispersion, odds)


@dataclass(frozen=True, eq=False)
class _Poisson(LogLikelihood):
    """Poisson with a mean, (b, P)."""

    mean: Tensor

    def zero(self) -> Tensor:
        return -self.mean

    def gain(self) -> Tensor:
        x = self.entries.x
        return x * self.entries.of(self.mean).log() - torch.lgamma(x + 1)


def poisson(x: Counts, mean: Tensor) -> LogLikelihood:
    """Return log Poisson(x; mean), the mean (b, P) positive."""
    return _Poisson(Entries.of_counts(x), None, mean)


def multinomial(x: Counts, logits: Tensor) -> Tensor:
    """Return the log-probability of every cell, (b,), without the combinatorial constant.

    Args:
        x: the counts.
        logits: (b, P), of the shares before the softmax.
    """
    entries = Entries.of_counts(x)
    if fused(logits):
        return _rowwise("multinomial", entries, logits)
    total = torch.logsumexp(logits, -1, keepdim=True)
    return entries.sum(entries.x * (entries.of(logits) - entries.of(total)))


def bernoulli(x: Tensor, logit: Tensor) -> Tensor:
    """Return log Bernoulli(x; sigmoid(logit)) of every cell, (b,), for x in [0, 1], dense."""
    return (x * logit - softplus(logit)).sum(-1)


def scaled_bernoulli(
    x: Counts,
    h: Tensor,
    head: nn.Linear,
    log_row: Tensor,
    log_column: Tensor,
    weights: Tensor,
) -> Tensor:
    """Return the weighted sum over cells of the log-probability of which features are open.

    A feature is open with probability sigmoid(head(h)) exp(log_row + log_column). There are so
    many that the gradients of their logits take the place of the logits where they can.

    Args:
        x: (b, P) counts; open is what is not 0.
        h: (b, H), the decoder's last layer.
        head: H to P.
        log_row: (b,) log of each cell's factor, at most 0.
        log_column: (P,) log of each feature's factor, at most 0.
        weights: (b,) of the cells, without gradient.
    """
    entries = Entries.of_counts(x)
    arguments = (h, head.weight, head.bias, log_row, log_column)
    if fused(h):
        value: Tensor = _FusedBernoulli.apply(entries, weights, *arguments)
        return value
    log_factor = log_row.unsqueeze(-1) + log_column
    log_open = logsigmoid(head(h)) + log_factor
    log_closed = (-log_open.exp().clamp(max=LARGEST)).log1p()
    gain = entries.of(log_open) - entries.of(log_closed)
    return (log_closed.sum(-1) + entries.sum(gain)) @ weights


BLOCK = 2**16
"""Logits at a time in a thread of `scaled_bernoulli`, which stay in its second cache: 256 kB."""

LANES = 8
"""A minibatch is filled up with cells of weight 0 to a multiple of this: whole vectors."""

LARGEST = 1 - 2**-20
"""Largest chance, for which a 0 still has a logarithm that single precision can tell."""


class _FusedBernoulli(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        entries: Entries,
        weights: Tensor,
        h: Tensor,
        weight: Tensor,
        bias: Tensor,
        log_row: Tensor,
        log_column: Tensor,
    ) -> Tensor:
        b, (first, rows, _) = len(h), entries.by_column
        spare = -b % LANES
        filled, log_filled, shares = (
            pad(h, (0, 0, 0, spare)), pad(log_row, (0, spare)), pad(weights, (0, spare))
        )  # fmt: skip
        weighted = shares.unsqueeze(-1) * filled
        size = max(1, BLOCK // max(1, b + spare))
        by_h = h.new_zeros(torch.get_num_threads(), *filled.shape)
        by_row, value = h.new_zeros(2, *by_h.shape[:2])
        features = weight, bias, log_column
        by_weight, by_bias, by_column = found = [torch.empty_like(x) for x in features]
        given = (x.contiguous() for x in (filled, log_filled, shares, weighted, *features))
        limits = np.float32(1 - LARGEST), size
        run("scaled_bernoulli", first, rows, *given, *limits, by_h, by_row, *found, value)
        by_cells = by_h.sum(0)[:b] * weights.unsqueeze(-1)
        ctx.gradients = by_cells, by_weight, by_bias, by_row.sum(0)[:b] * weights, by_column
        return value.sum(0) @ shares

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        plain = float(gradient) == 1  # as in a loss that is a plain sum of its terms
        gradients = [g if plain else g * gradient for g in ctx.gradients]
        del ctx.gradients  # a parameter takes over what nobody else holds, without a copy
        return None, None, *gradients


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
    if r.device.type == "cpu":
        value: Tensor = _FusedLogChoose.apply(x, r)
        return value
    wide = torch.float32 if r.device.type == "mps" else torch.float64
    x, lower = x.to(wide), r.to(wide)
    return (torch.lgamma(x + lower) - torch.lgamma(lower) - torch.lgamma(x + 1)).to(r.dtype)


class _FusedLogChoose(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, r: Tensor) -> Tensor:
        ctx.shape = r.shape
        x, r = (part.contiguous() for part in torch.broadcast_tensors(x.to(r.dtype), r))
        value, ctx.slope = torch.empty_like(r), torch.empty_like(r)
        run("log_choose", *(part.view(-1) for part in (x, r, value, ctx.slope)))
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, (gradient * ctx.slope).sum_to_size(ctx.shape)
