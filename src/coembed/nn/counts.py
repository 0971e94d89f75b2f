"""Counts of a cell: their sum, and a distribution that they are drawn from."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from coembed.nn.likelihoods import draw_negative_binomial, negative_binomial
from coembed.nn.sparse import row_sums


def depth_of(x: Tensor) -> Tensor:
    """Return the counts of each cell, (b,), at least 1, for x (b, n_features)."""
    return row_sums(x).clamp_min(1)


class NegativeBinomialCounts(NamedTuple):
    """What counts are drawn from; tensors are (b, n_features).

    Attributes:
        r: total count; with p the success probability, the mean is r p / (1 - p).
        logit: of p.
        gate: logit of an extra zero; None where there are none.
    """

    r: Tensor
    logit: Tensor
    gate: Tensor | None = None

    @property
    def kept(self) -> Tensor:
        """Probability that a count is not an extra zero."""
        return torch.ones_like(self.r) if self.gate is None else 1 - self.gate.sigmoid()

    def mean(self) -> Tensor:
        """Return the expected counts."""
        return self.r * self.logit.exp() * self.kept

    def draw(self) -> Tensor:
        """Return counts drawn from it."""
        return draw_negative_binomial(self.r, self.logit) * torch.bernoulli(self.kept)

    def log_likelihood(self, x: Tensor) -> Tensor:
        """Return log p(x), (b,), of counts (b, n_features), dense or CSR."""
        counts = negative_binomial(x, self.r, self.logit)
        return (counts if self.gate is None else counts.zero_inflated(self.gate)).sum()
