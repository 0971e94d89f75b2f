"""scMVP's layers: what they are made of, and how a decoder puts shares and factors together."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import softmax

from coembed.nn.attention import Gated, SelfAttention
from coembed.nn.multiview import HIDDEN, Decoder, Joint, block, branch, linears


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def kinds(module: nn.Module) -> list[str]:
    return [type(m).__name__ for m in module.modules() if not isinstance(m, nn.Sequential)]


def test_block_is_normalised_twice() -> None:
    """scmvp.md section 4 and 10.2."""
    plain = ["Linear", "LayerNorm", "BatchNorm1d", "LeakyReLU"]
    assert kinds(block(5)) == plain
    assert kinds(block(5, 0.1)) == [*plain, "Dropout"]
    assert kinds(block(5, active=True)) == [*plain[:2], "LeakyReLU", *plain[2:]]
    assert sum(p.numel() for p in block(5).parameters()) == 128 * 5 + 640


def test_linears_are_one_linear_map() -> None:
    layers, x = linears(4, 6, 3), noise(5, 4)
    first, _, second = layers
    weight, bias = second.weight @ first.weight, second.weight @ first.bias + second.bias
    torch.testing.assert_close(layers(x), x @ weight.T + bias)


def test_branches() -> None:
    genes, peaks = branch("rna", 5), branch("atac", 5)
    assert isinstance(genes[0], Gated)
    assert isinstance(peaks[-1], SelfAttention)
    for made in (genes, peaks):
        assert made(noise(3, 5)).shape == (3, HIDDEN)


def test_joint_sees_both() -> None:
    net = Joint({"rna": 5, "atac": 6}, 4).eval()
    x = {"rna": noise(3, 5), "atac": noise(3, 6)}
    out = net(x)
    assert out.shape == (3, 8)
    for kind in x:
        assert (net({**x, kind: x[kind] + 1}) != out).all()


@pytest.mark.parametrize("kind", ["rna", "atac"])
def test_decoder(kind: str) -> None:
    net, x = Decoder(kind, 4, 7).eval(), noise(3, 4)
    gate = torch.sigmoid(noise(3, HIDDEN))
    level, h = net(x, gate)
    torch.testing.assert_close(h, net.trunk(x) * gate)
    gated, free = net.gated(h), net.free(x)
    if kind == "rna":
        torch.testing.assert_close(level, softmax(gated, -1) * free.sigmoid())
    else:
        torch.testing.assert_close(level, gated.sigmoid() * softmax(free, -1))
