"""Protein counts as a mixture of background and foreground (totalVI, MultiVI)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from coembed.nn.layers import ConditionalMLP, Layer, Norm
from coembed.nn.likelihoods import EPS, draw_negative_binomial_mean, log_choose, mixture
from coembed.nn.posteriors import Gaussian


def log_softplus(h: Tensor) -> Tensor:
    """Return the log of softplus(h) + 1e-8: a head to the log of a standard deviation."""
    return (softplus(h) + EPS).log()


class SkipDecoder(nn.Module):
    """A conditional trunk, and linear heads on the trunk, its input and the condition.

    Args:
        sizes: widths of the trunk, input first.
        n_condition: width of the condition; 0 for none.
        n_out: width of every head.
        n_heads: number of heads.
        norm: of the trunk, as in `mlp`.
        activation: of the trunk, as in `mlp`.
        dropout: of the trunk, as in `mlp`.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        n_condition: int,
        n_out: int,
        n_heads: int = 1,
        *,
        norm: Norm | None = None,
        activation: Layer = nn.ReLU,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.trunk = ConditionalMLP(
            sizes, n_condition, norm=norm, activation=activation, dropout=dropout
        )
        width = sizes[-1] + sizes[0] + n_condition
        self.heads = nn.ModuleList(nn.Linear(width, n_out) for _ in range(n_heads))

    def forward(self, z: Tensor, condition: Tensor) -> list[Tensor]:
        """Return (b, n_out) per head, for z (b, sizes[0]) and condition (b, n_condition)."""
        h = torch.cat([self.trunk(z, condition), z, condition], -1)
        return [head(h) for head in self.heads]


class ProteinMixture(NamedTuple):
    """What a cell's protein counts are drawn from; tensors are (b, P).

    Attributes:
        background: posterior of the log of the background's mean count.
        fold: foreground mean over background mean, at least 1.
        logit: of the probability that a count is background.
    """

    background: Gaussian
    fold: Tensor
    logit: Tensor

    def log_likelihood(self, y: Tensor, log_background: Tensor, dispersion: Tensor) -> Tensor:
        """Return log p(y), (b, P).

        Args:
            y: the counts.
            log_background: (b, P) log of the background's mean count, drawn from `background`.
            dispersion: inverse dispersion of both components, (P,) or broadcast to (b, P).
        """
        # Few proteins have no count, so nothing is done for zeros apart (as in `likelihoods`).
        choose = log_choose(y, dispersion)
        level = log_background.exp()
        inverse = (dispersion + EPS).reciprocal()
        odds = [(mean + EPS) * inverse for mean in (level, level * self.fold)]
        background, foreground = (choose + y * o.log() - (y + dispersion) * o.log1p() for o in odds)
        return mixture(background, foreground, self.logit)

    def foreground_mean(self) -> Tensor:
        """Return the expected count without background, at the background's median level."""
        return (-self.logit).sigmoid() * self.background.mean.exp() * self.fold

    def draw(self, dispersion: Tensor, shift: Tensor | float = 0.0) -> Tensor:
        """Return counts drawn from the mixture; `dispersion` as in `log_likelihood`.

        `shift` is added to the log of the background's mean count, (b, P).
        """
        background = torch.bernoulli(self.logit.sigmoid()).bool()
        level = (self.background.sample() + shift).exp()
        mean = torch.where(background, level, level * self.fold)
        return draw_negative_binomial_mean(mean, dispersion)


class ProteinDecoder(nn.Module):
    """z to a `ProteinMixture`: one `SkipDecoder` each for background, foreground and mixing.

    Args:
        sizes: widths of a trunk, input first.
        n_condition: width of the condition; 0 for none.
        n_proteins: P.
        log_sd: the background's second head to the log of its standard deviation.
        norm: of the trunks, as in `mlp`.
        dropout: of the trunks, as in `mlp`.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        n_condition: int,
        n_proteins: int,
        *,
        log_sd: Callable[[Tensor], Tensor] = lambda h: h,
        norm: Norm | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.log_sd = log_sd
        self.background, self.foreground, self.mixing = (
            SkipDecoder(sizes, n_condition, n_proteins, n_heads, norm=norm, dropout=dropout)
            for n_heads in (2, 1, 1)
        )

    def forward(self, z: Tensor, condition: Tensor) -> ProteinMixture:
        """Return the mixture for z (b, K) and condition (b, n_condition)."""
        mean, spread = self.background(z, condition)
        (fold,), (logit,) = self.foreground(z, condition), self.mixing(z, condition)
        return ProteinMixture(Gaussian(mean, 2 * self.log_sd(spread)), fold.relu() + 1, logit)
