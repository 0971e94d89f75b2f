"""Gated and self-attending layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout


class Gated(nn.Module):
    """A trunk whose units are opened and closed by a gate: trunk(x) * sigmoid(gate(x)).

    Args:
        trunk: (b, n) to (b, width).
        gate: (b, n) to (b, width), the logits.
    """

    def __init__(self, trunk: nn.Module, gate: nn.Module) -> None:
        super().__init__()
        self.trunk, self.gate = trunk, gate

    def forward(self, x: Tensor) -> Tensor:
        """Return (b, width) for x (b, n)."""
        return self.trunk(x) * torch.sigmoid(self.gate(x))


class SelfAttention(nn.Module):
    """Attention among the units of a layer, each head's units being positions of width one.

    Without residual, projection of the output or normalisation (scmvp.md section 4).

    Args:
        width: number of units, a multiple of `n_heads`.
        n_heads: number of heads, of width / n_heads positions.
        dropout: share of the attention weights that training drops.
    """

    def __init__(self, width: int, n_heads: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        self.n_heads, self.dropout = n_heads, dropout
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, h: Tensor) -> Tensor:
        """Return (b, width) for h (b, width)."""
        query, key, value = self.qkv(h).view(len(h), 3, self.n_heads, -1).unbind(1)
        return self.attend(query, key, value).flatten(1)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return the values averaged by the weights, (b, heads, positions) in and out."""
        weights = dropout(attention_weights(query, key), self.dropout, self.training)
        return (weights @ value.unsqueeze(-1)).squeeze(-1)


def attention_weights(query: Tensor, key: Tensor) -> Tensor:
    """Return softmax_j(q_i k_j), (b, heads, positions, positions), for (b, heads, positions)."""
    return torch.softmax(query.unsqueeze(-1) * key.unsqueeze(-2), -1)
