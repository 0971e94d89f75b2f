"""Where Keras differs from torch by default, for systems that were written in it (DAVAE)."""

from __future__ import annotations

from torch import nn


class ShiftedNorm(nn.BatchNorm1d):
    """Batch normalisation with a shift and no gain, with Keras's constants."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-3, momentum=0.01)
        self.register_parameter("weight", None)


def start_as_keras(net: nn.Module) -> None:
    """Give every linear layer of `net` Glorot's uniform weights and biases of 0."""
    for layer in net.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
