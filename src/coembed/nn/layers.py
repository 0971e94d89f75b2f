"""Layers that several systems share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import nn


def mlp(
    sizes: Sequence[int],
    *,
    norm: bool = False,
    activation: Callable[[], nn.Module] = nn.ReLU,
    last: bool = True,
) -> nn.Sequential:
    """Return Linear - BatchNorm (with `norm`) - activation, once per pair of `sizes`.

    Args:
        sizes: widths, input first: (b, sizes[0]) -> (b, sizes[-1]).
        norm: whether batch normalisation follows each linear layer.
        activation: the non-linearity.
        last: whether the last linear layer is followed by norm and activation too.
    """
    layers: list[nn.Module] = []
    for i, (width_in, width_out) in enumerate(pairwise(sizes)):
        layers.append(nn.Linear(width_in, width_out))
        if last or i < len(sizes) - 2:
            if norm:
                layers.append(nn.BatchNorm1d(width_out))
            layers.append(activation())
    return nn.Sequential(*layers)
