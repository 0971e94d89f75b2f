"""Distributions of the latent variable, without the weight of distribution objects."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Gaussian(NamedTuple):
    """Independent normals. Fields are (..., K) or broadcast to it.

    Attributes:
        mean: the mean.
        log_var: log of the variance.
    """

    mean: Tensor
    log_var: Tensor

    def sample(self) -> Tensor:
        """Return one reparameterised draw, (..., K)."""
        return self.mean + torch.randn_like(self.mean) * torch.exp(0.5 * self.log_var)

    def kl(self, prior: Gaussian) -> Tensor:
        """Return KL(self || prior) summed over the K dimensions, (...,)."""
        log_ratio = self.log_var - prior.log_var
        gap = (self.mean - prior.mean).square() * torch.exp(-prior.log_var)
        return 0.5 * (log_ratio.exp() + gap - 1 - log_ratio).sum(-1)

    def jeffreys(self, other: Gaussian) -> Tensor:
        """Return KL(self || other) + KL(other || self), (...,)."""
        return self.kl(other) + other.kl(self)

    def log_prob(self, z: Tensor) -> Tensor:
        """Return the log-density at z (..., K), summed over the K dimensions, (...,)."""
        gap = (z - self.mean).square() * torch.exp(-self.log_var)
        return -0.5 * (math.log(2 * math.pi) + self.log_var + gap).sum(-1)


class Laplace(NamedTuple):
    """Independent Laplace distributions. Fields are (..., K) or broadcast to it.

    Attributes:
        mean: the location.
        scale: the scale b; the variance is 2 b^2.
    """

    mean: Tensor
    scale: Tensor

    def sample(self) -> Tensor:
        """Return one reparameterised draw, (..., K), by the inverse CDF."""
        u = torch.rand_like(self.mean) - 0.5
        tail = torch.clamp_min(1 - 2 * u.abs(), torch.finfo(u.dtype).tiny)
        return self.mean - self.scale * u.sign() * tail.log()

    def kl(self, prior: Laplace) -> Tensor:
        """Return KL(self || prior) summed over the K dimensions, (...,) (scmm.md section 6)."""
        gap = (self.mean - prior.mean).abs()
        ratio = self.scale / prior.scale
        terms = -ratio.log() + gap / prior.scale + ratio * torch.exp(-gap / self.scale) - 1
        return terms.sum(-1)
