"""The networks of scMVP, of genes and peaks, and what they say of counts (sections 4 to 6)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import softmax

from coembed.nn.attention import Gated, SelfAttention
from coembed.nn.layers import mlp
from coembed.nn.likelihoods import (
    draw_negative_binomial_mean,
    negative_binomial_mean,
    poisson,
)
from coembed.nn.posteriors import Gaussian
from coembed.nn.sparse import Entries, Linear, dense

HIDDEN = 128
MIN_LOG_VARIANCE = math.log(1e-4)


def block(n_in: int, dropout: float = 0.0, *, active: bool = False) -> nn.Sequential:
    """Return scMVP's layer: two normalisations, with `active` a non-linearity between them."""

    def norm(width: int) -> nn.Module:
        between = [nn.LeakyReLU()] if active else []
        last = nn.BatchNorm1d(width, eps=1e-4, momentum=0.01)
        return nn.Sequential(nn.LayerNorm(width, eps=1e-4), *between, last)

    return mlp((n_in, HIDDEN), first=Linear, norm=norm, activation=nn.LeakyReLU, dropout=dropout)


def linears(*sizes: int, first: type[nn.Linear] = nn.Linear) -> nn.Sequential:
    """Return linear layers with nothing between them."""
    return mlp(sizes, first=first, activation=nn.Identity, last=False)


def branch(kind: str, n_features: int) -> nn.Sequential:
    """Return (b, n_features) to (b, HIDDEN): gated for genes ('rna'), self-attending for peaks."""
    if kind == "rna":
        gate = linears(n_features, HIDDEN, HIDDEN, first=Linear)
        return nn.Sequential(Gated(block(n_features, 0.1), gate))
    return block(n_features, 0.1).append(SelfAttention(HIDDEN, dropout=0.1))


def posterior(heads: Tensor) -> Gaussian:
    """Return the (b, K) Gaussian of mean and log-variance side by side, (b, 2 K)."""
    mean, log_var = heads.chunk(2, -1)
    return Gaussian(mean, torch.logaddexp(log_var, torch.full_like(log_var, MIN_LOG_VARIANCE)))


class Single(nn.Module):
    """The encoder of genes alone or of peaks alone.

    Args:
        kind: 'rna' for genes, else peaks.
        n_features: number of features.
        n_latent: K.
    """

    def __init__(self, kind: str, n_features: int, n_latent: int) -> None:
        super().__init__()
        self.layers = branch(kind, n_features).append(nn.Linear(HIDDEN, 2 * n_latent))

    def forward(self, x: Tensor) -> Gaussian:
        """Return the (b, K) posterior for counts (b, n_features)."""
        return posterior(self.layers(torch.log1p(x)))


class Joint(nn.Module):
    """The encoder of genes and peaks together.

    Args:
        widths: kind to number of features.
        n_latent: K.
    """

    def __init__(self, widths: Mapping[str, int], n_latent: int) -> None:
        super().__init__()
        self.branches = nn.ModuleDict({kind: branch(kind, n) for kind, n in widths.items()})
        self.head = nn.Sequential(
            nn.Linear(len(widths) * HIDDEN, HIDDEN),
            nn.LayerNorm(HIDDEN),
            nn.Linear(HIDDEN, 2 * n_latent),
        )

    def forward(self, x: Mapping[str, Tensor]) -> Gaussian:
        """Return the (b, K) posterior for the counts of every kind."""
        parts = [self.branches[kind](torch.log1p(v)) for kind, v in x.items()]
        return posterior(self.head(torch.cat(parts, -1)))


class Concatenator(nn.Module):
    """One linear map from the posteriors of both kinds to one; it serves means and log-variances.

    Args:
        n_latent: K.
    """

    def __init__(self, n_latent: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * n_latent, n_latent)

    def forward(self, singles: Mapping[str, Gaussian]) -> Gaussian:
        """Return the (b, K) posterior for those of genes and of peaks, in this order."""
        parts = zip(*singles.values(), strict=True)
        return Gaussian(*(self.linear(torch.cat(part, -1)) for part in parts))


def encode_twice(
    encoders: Mapping[str, nn.Module], x: Mapping[str, Tensor], again: Mapping[str, Tensor]
) -> tuple[dict[str, Gaussian], dict[str, Gaussian]]:
    """Return the posteriors of two versions of the same cells under the encoder of every kind.

    They pass together, so that batch normalisation treats both alike.
    """
    first, second = {}, {}
    for kind, encoder in encoders.items():
        means, log_vars = (
            part.chunk(2) for part in encoder(torch.cat([dense(x[kind]), again[kind]]))
        )
        first[kind], second[kind] = map(Gaussian, means, log_vars)
    return first, second


def cluster_gate(n_components: int) -> nn.Sequential:
    """Return responsibilities (b, n_components) to the gate of every `Decoder`, (b, HIDDEN)."""
    return block(n_components, active=True).append(nn.Sigmoid())


class Decoder(nn.Module):
    """The level of every feature: its share, times a factor below 1 without the cluster's gate.

    Genes have shares that sum to 1 from the gated layer and factors from the input; with peaks it
    is the factors' part that sums to 1.

    Args:
        kind: 'rna' for genes, else peaks, which attend to themselves.
        n_in: width of latent variable and batch.
        n_features: number of features.
    """

    def __init__(self, kind: str, n_in: int, n_features: int) -> None:
        super().__init__()
        self.kind, self.trunk = kind, block(n_in)
        if kind != "rna":
            self.trunk.append(SelfAttention(HIDDEN, dropout=0.01))
        wider = HIDDEN * (2 if kind == "rna" else 4)
        self.gated, self.free = (
            linears(HIDDEN, wider, n_features),
            linears(n_in, HIDDEN, n_features),
        )

    def forward(self, x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        """Return levels (b, n_features), their sum below 1, and the gated layer (b, HIDDEN).

        Args:
            x: (b, n_in).
            gate: (b, HIDDEN), in (0, 1).
        """
        h = self.trunk(x) * gate
        gated, free = self.gated(h), self.free(x)
        if self.kind == "rna":
            return softmax(gated, -1) * torch.sigmoid(free), h
        return torch.sigmoid(gated) * softmax(free, -1), h


class Genes(NamedTuple):
    """What counts of genes are drawn from: negative binomial.

    Attributes:
        mean: (b, n_features).
        log_dispersion: log of the inverse dispersion, (n_features,).
    """

    mean: Tensor
    log_dispersion: Tensor

    def draw(self) -> Tensor:
        """Return counts drawn from it, (b, n_features)."""
        return draw_negative_binomial_mean(self.mean, self.log_dispersion.exp())

    def loss(self, x: Tensor) -> Tensor:
        """Return the negative log-likelihood plus half the distance of non-zero counts, (b,)."""
        entries = Entries.of_counts(x)
        counts = negative_binomial_mean(entries, self.mean, self.log_dispersion.exp())
        return distance(entries, self.mean) - counts.sum()


class Peaks(NamedTuple):
    """What open peaks are drawn from: Poisson with extra zeros.

    Attributes:
        mean: (b, n_features), without the extra zeros.
        gate: logit of an extra zero.
    """

    mean: Tensor
    gate: Tensor

    def draw(self) -> Tensor:
        """Return counts drawn from it, (b, n_features)."""
        return torch.poisson(self.mean) * torch.bernoulli(1 - self.gate.sigmoid())

    def loss(self, x: Tensor) -> Tensor:
        """Return as `Genes.loss`; a mean where the count is zero costs a twentieth of itself."""
        entries = Entries.of_counts(x)
        counts = poisson(entries, self.mean).zero_inflated(self.gate)
        at_zeros = self.mean.sum(-1) - entries.sum(entries.of(self.mean))
        return distance(entries, self.mean) + 0.05 * at_zeros - counts.sum()


Counts = Genes | Peaks


def distance(entries: Entries, mean: Tensor) -> Tensor:
    """Return half the sum of the absolute differences of non-zero counts and means, (b,)."""
    return 0.5 * entries.sum((entries.x - entries.of(mean)).abs())
