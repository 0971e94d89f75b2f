"""The layers of scMVP: a branch for genes, one for peaks, and their decoders (section 4)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import softmax

from coembed.nn.attention import Gated, SelfAttention
from coembed.nn.layers import mlp

HIDDEN = 128


def block(n_in: int, dropout: float = 0.0, *, active: bool = False) -> nn.Sequential:
    """Return scMVP's layer: two normalisations, with `active` a non-linearity between them."""

    def norm(width: int) -> nn.Module:
        between = [nn.LeakyReLU()] if active else []
        last = nn.BatchNorm1d(width, eps=1e-4, momentum=0.01)
        return nn.Sequential(nn.LayerNorm(width, eps=1e-4), *between, last)

    return mlp((n_in, HIDDEN), norm=norm, activation=nn.LeakyReLU, dropout=dropout)


def linears(*sizes: int) -> nn.Sequential:
    """Return linear layers with nothing between them."""
    return mlp(sizes, activation=nn.Identity, last=False)


def branch(kind: str, n_features: int) -> nn.Sequential:
    """Return (b, n_features) to (b, HIDDEN): gated for genes ('rna'), self-attending for peaks."""
    if kind == "rna":
        gate = linears(n_features, HIDDEN, HIDDEN)
        return nn.Sequential(Gated(block(n_features, 0.1), gate))
    return block(n_features, 0.1).append(SelfAttention(HIDDEN, dropout=0.1))


class Joint(nn.Module):
    """The encoder of genes and peaks together.

    Args:
        widths: kind to number of features.
        n_latent: K; mean and log-variance come side by side.
    """

    def __init__(self, widths: Mapping[str, int], n_latent: int) -> None:
        super().__init__()
        self.branches = nn.ModuleDict({kind: branch(kind, n) for kind, n in widths.items()})
        self.head = nn.Sequential(
            nn.Linear(len(widths) * HIDDEN, HIDDEN),
            nn.LayerNorm(HIDDEN),
            nn.Linear(HIDDEN, 2 * n_latent),
        )

    def forward(self, x: Mapping[str, Tensor]) -> Tensor:
        """Return (b, 2 K) for the features of every kind."""
        return self.head(torch.cat([self.branches[kind](v) for kind, v in x.items()], -1))


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
