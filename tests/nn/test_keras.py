"""What Keras does by default: batch normalisation without gain, Glorot's weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from coembed.nn.keras import ShiftedNorm, start_as_keras
from coembed.nn.layers import mlp


def test_normalisation_shifts_without_gain() -> None:
    norm, x = ShiftedNorm(3), torch.randn(50, 3) * 0.01 + 5
    torch.nn.init.constant_(norm.bias, 2.0)
    variance = x.var(0, correction=0)
    expected = (x - x.mean(0)) / (variance + 1e-3).sqrt() + 2
    torch.testing.assert_close(norm(x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(norm.running_mean, 0.01 * x.mean(0))
    assert [name for name, _ in norm.named_parameters()] == ["bias"]


def test_starting_weights_of_every_linear_layer() -> None:
    net = nn.ModuleDict({"a": mlp((40, 30, 20)), "b": nn.Linear(50, 60)})
    start_as_keras(net)
    layers = [layer for layer in net.modules() if isinstance(layer, nn.Linear)]
    assert len(layers) == 3
    for layer in layers:
        bound = math.sqrt(6 / (layer.in_features + layer.out_features))
        assert layer.weight.abs().max() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
        assert not layer.bias.any()
