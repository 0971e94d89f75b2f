"""Layers that several systems share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, embedding

from coembed.nn.sparse import fused, run

Layer = Callable[[], nn.Module]
Norm = Callable[[int], nn.Module]
"""A width to a normalisation of that width."""


def mlp(
    sizes: Sequence[int],
    *,
    first: type[nn.Linear] = nn.Linear,
    norm: Norm | None = None,
    activation: Layer = nn.ReLU,
    dropout: float = 0.0,
    last: bool = True,
) -> nn.Sequential:
    """Return Linear - norm - activation - dropout, once per pair of `sizes`.

    Args:
        sizes: widths, input first: (b, sizes[0]) -> (b, sizes[-1]).
        first: the class of the first linear layer; `nn.sparse.Linear` takes CSR rows.
        norm: the normalisation that follows each linear layer, e.g. `nn.BatchNorm1d`.
        activation: the non-linearity.
        dropout: share of the activations that training drops; no layer at 0.
        last: whether the last linear layer is followed by the rest too.
    """
    layers: list[nn.Module] = []
    for i, (width_in, width_out) in enumerate(pairwise(sizes)):
        layers.append((nn.Linear if i else first)(width_in, width_out))
        if last or i < len(sizes) - 2:
            layers += _after(width_out, norm, activation, dropout)
    return nn.Sequential(*layers)


def _after(width: int, norm: Norm | None, activation: Layer, dropout: float) -> list[nn.Module]:
    layers = [norm(width)] if norm else []
    return [*layers, activation(), *([Dropout(dropout)] if dropout else [])]


class Dropout(nn.Dropout):
    """Dropout whose mask is hashed from one random number, on the CPU faster than drawn."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x with units dropped in training and the others scaled up."""
        if not self.training:
            return x
        if self.p == 1 or not fused(x):
            return super().forward(x)
        seed = int(torch.empty((), dtype=torch.int64).random_(2**32))
        level, scale = np.uint32(self.p * 2**32), np.float32(1 / (1 - self.p))
        mask = x.new_empty(x.shape)
        run("dropout", np.uint32(seed), level, scale, mask.view(-1))
        return x * mask


class ConditionalMLP(nn.Module):
    """`mlp` whose layers see a condition (a batch's one-hot) at the end of their input.

    Args:
        sizes: widths without the condition, input first.
        n_condition: width of the condition; 0 for none.
        deep: every layer sees the condition; otherwise the first alone.
        norm: as in `mlp`.
        activation: as in `mlp`.
        dropout: as in `mlp`.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        n_condition: int,
        *,
        deep: bool = True,
        norm: Norm | None = None,
        activation: Layer = nn.ReLU,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.deep = deep
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.Linear(width_in + (n_condition if deep or i == 0 else 0), width_out),
                *_after(width_out, norm, activation, dropout),
            )
            for i, (width_in, width_out) in enumerate(pairwise(sizes))
        )

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Return (b, sizes[-1]) for x (b, sizes[0]) and condition (b, n_condition)."""
        for i, layer in enumerate(self.layers):
            x = layer(torch.cat([x, condition], -1) if self.deep or i == 0 else x)
        return x


def batch_one_hot(codes: Tensor, n_batches: int) -> Tensor:
    """Return the (b, n_batches) one-hot of batch codes; (b, 0) where there is only one batch.

    Args:
        codes: (b,) int64; -1, a batch the model never saw, gets the mean of all batches.
        n_batches: number of batches the model knows.
    """
    if n_batches == 1:
        return torch.empty(len(codes), 0, device=codes.device)
    return rows_of_batches(torch.eye(n_batches, device=codes.device), codes)


def rows_of_batches(table: Tensor, codes: Tensor) -> Tensor:
    """Return the row of each cell's batch, (b, P).

    Args:
        table: (n_batches, P), a parameter of every batch.
        codes: (b,) int64; -1, a batch the model never saw, gets the mean of all rows.
    """
    table = torch.cat([table, table.mean(0, keepdim=True)])
    # Many times as fast as indexing where gradients go back.
    return embedding(torch.where(codes < 0, len(table) - 1, codes), table)


class DomainNorm(nn.Module):
    """Batch normalisation with statistics, weight and bias of each row's own domain (DSBN).

    A domain's only row in a minibatch passes unchanged in training: it has no variance
    (scalex.md section 4). The table of every parameter has a row per domain.

    Args:
        width: number of features.
        n_domains: number of domains; with one, this is `nn.BatchNorm1d`.
        eps: added to variances.
        momentum: weight of a minibatch in the running statistics.
    """

    def __init__(
        self, width: int, n_domains: int = 1, *, eps: float = 1e-5, momentum: float = 0.1
    ) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(n_domains, width))
        self.bias = nn.Parameter(torch.zeros(n_domains, width))
        self.running_mean: Tensor
        self.running_var: Tensor
        self.register_buffer("running_mean", torch.zeros(n_domains, width))
        self.register_buffer("running_var", torch.ones(n_domains, width))

    def forward(self, x: Tensor, codes: Tensor) -> Tensor:
        """Return (b, width) for x (b, width).

        Args:
            x: the activations.
            codes: (b,) int64 domain of each row. In evaluation -1, a domain never seen, gets the
                mean over the domains of every table; there are none in training.
        """
        if not self.training:
            mean, var, weight, bias = (
                rows_of_batches(table, codes)
                for table in (self.running_mean, self.running_var, self.weight, self.bias)
            )
            return (x - mean) * torch.rsqrt(var + self.eps) * weight + bias
        out = x.clone()
        for d in range(len(self.weight)):
            rows = codes == d
            if rows.sum() > 1:
                out[rows] = batch_norm(
                    *(x[rows], self.running_mean[d], self.running_var[d]),
                    *(self.weight[d], self.bias[d]),
                    training=True,
                    momentum=self.momentum,
                    eps=self.eps,
                )
        return out
