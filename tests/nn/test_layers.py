"""Layers and adversarial criteria."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from coembed.nn.adversary import discriminator_loss, generator_loss
from coembed.nn.layers import mlp


def names(net: nn.Sequential) -> list[str]:
    return [type(layer).__name__ for layer in net]


def test_mlp_layout() -> None:
    unit, normed = ["Linear", "ReLU"], ["Linear", "BatchNorm1d", "LeakyReLU"]
    assert names(mlp((3, 4, 5))) == unit * 2
    assert names(mlp((3, 4, 5), last=False)) == [*unit, "Linear"]
    assert names(mlp((3, 4, 5), norm=True, activation=nn.LeakyReLU)) == normed * 2
    assert names(mlp((3, 4, 5), norm=True, activation=nn.LeakyReLU, last=False)) == [
        *normed,
        "Linear",
    ]
    assert names(mlp((3, 4), last=False)) == ["Linear"]
    assert names(mlp((3,))) == []


def test_mlp_widths() -> None:
    net = mlp((3, 4, 5), norm=True)
    assert [(m.in_features, m.out_features) for m in net if isinstance(m, nn.Linear)] == [
        (3, 4),
        (4, 5),
    ]
    assert [m.num_features for m in net if isinstance(m, nn.BatchNorm1d)] == [4, 5]
    assert net(torch.zeros(7, 3)).shape == (7, 5)
    assert sum(p.numel() for p in net.parameters()) == (3 * 4 + 4 + 8) + (4 * 5 + 5 + 10)


def test_criteria_at_an_undecided_discriminator() -> None:
    zero = torch.zeros(6, 1)
    assert discriminator_loss(zero, zero).item() == pytest.approx(2 * math.log(2))
    assert generator_loss(zero).item() == pytest.approx(math.log(2))


def test_criteria_are_the_logistic_loss() -> None:
    real, fake = torch.tensor([3.0, -1.0]), torch.tensor([0.5, -2.0])
    bce = nn.functional.binary_cross_entropy_with_logits
    expected = bce(real, torch.ones(2)) + bce(fake, torch.zeros(2))
    torch.testing.assert_close(discriminator_loss(real, fake), expected)
    torch.testing.assert_close(generator_loss(fake), bce(fake, torch.ones(2)))
