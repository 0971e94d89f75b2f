"""Layers and adversarial criteria."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from coembed.nn.adversary import (
    confusion_loss,
    discriminator_loss,
    generator_loss,
    reverse_gradient,
)
from coembed.nn.layers import Dropout, mlp


def names(net: nn.Sequential) -> list[str]:
    return [type(layer).__name__ for layer in net]


def test_mlp_layout() -> None:
    unit, normed = ["Linear", "ReLU"], ["Linear", "BatchNorm1d", "LeakyReLU"]
    assert names(mlp((3, 4, 5))) == unit * 2
    assert names(mlp((3, 4, 5), last=False)) == [*unit, "Linear"]
    assert names(mlp((3, 4, 5), norm=nn.BatchNorm1d, activation=nn.LeakyReLU)) == normed * 2
    assert names(mlp((3, 4, 5), norm=nn.BatchNorm1d, activation=nn.LeakyReLU, last=False)) == [
        *normed,
        "Linear",
    ]
    assert names(mlp((3, 4), last=False)) == ["Linear"]
    assert names(mlp((3,))) == []


def test_mlp_widths() -> None:
    net = mlp((3, 4, 5), norm=nn.BatchNorm1d)
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


def test_confusion_is_the_cross_entropy_to_the_other_classes() -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5], [0.0, 0.0, 0.0]])
    log_p = logits.log_softmax(-1)
    expected = torch.stack([-(log_p[0, 0] + log_p[0, 2]) / 2, -(log_p[1, 1] + log_p[1, 2]) / 2])
    torch.testing.assert_close(confusion_loss(logits, torch.tensor([1, 0])), expected)
    two = torch.tensor([[3.0, -1.0]])
    sure = confusion_loss(two, torch.tensor([0])), confusion_loss(two, torch.tensor([1]))
    assert sure[0] > sure[1], "a classifier that is right is what the encoder must change"


def test_reversed_gradients_are_the_negative_ones() -> None:
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    torch.testing.assert_close(reverse_gradient(x), x)
    (plain,) = torch.autograd.grad(x.pow(3).sum(), x)
    (reversed_,) = torch.autograd.grad(reverse_gradient(x).pow(3).sum(), x)
    assert torch.equal(reversed_, -plain)


def test_dropout_drops_its_share_scales_the_rest_and_rests_in_evaluation() -> None:
    layer, x = Dropout(0.2), torch.ones(201, 499, requires_grad=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dropped = layer(x)
        again = layer(x)
    share = (dropped == 0).float()
    assert share.mean().item() == pytest.approx(0.2, abs=0.005)
    assert share.mean(0).std().item() == pytest.approx((0.16 / 201) ** 0.5, rel=0.15)
    torch.testing.assert_close(dropped[dropped > 0], torch.full_like(dropped[dropped > 0], 1.25))
    agreement = ((dropped == 0) == (again == 0)).float().mean().item()
    assert agreement == pytest.approx(0.68, abs=0.01), "every call draws anew"
    (gradient,) = torch.autograd.grad(dropped.sum(), x)
    torch.testing.assert_close(gradient, dropped.detach())
    assert layer.eval()(x) is x
    assert layer.train()(x[:0]).shape == (0, 499)
