"""Gated and self-attending layers: closed forms of scmvp.md section 10, and a loop over heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from coembed.nn.attention import Gated, SelfAttention, attention_weights


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def layer(dropout: float = 0.0) -> SelfAttention:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SelfAttention(128, n_heads=8, dropout=dropout)


def test_weights_are_a_distribution_over_positions() -> None:
    weights = attention_weights(noise(3, 8, 16), noise(3, 8, 16) + 1)
    assert weights.shape == (3, 8, 16, 16)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 8, 16))


def test_constant_values_come_back() -> None:
    value = torch.full((3, 8, 16), 0.7)
    torch.testing.assert_close(layer().attend(noise(3, 8, 16), noise(3, 8, 16) - 1, value), value)


def test_every_head_attends_to_its_own_positions() -> None:
    attention, h = layer(), noise(5, 128)
    query, key, value = attention.qkv(h).chunk(3, -1)
    expected = torch.zeros(5, 128)
    for cell in range(5):
        for head in range(8):
            at = slice(16 * head, 16 * (head + 1))
            weights = torch.softmax(torch.outer(query[cell, at], key[cell, at]), -1)
            expected[cell, at] = weights @ value[cell, at]
    torch.testing.assert_close(attention(h), expected)
    torch.testing.assert_close(attention(h[:1]), expected[:1])


def test_dropout_of_the_weights_is_training_alone() -> None:
    attention, h = layer(dropout=0.5), noise(5, 128)
    attention.eval()
    torch.testing.assert_close(attention(h), layer()(h))
    attention.train()
    with torch.random.fork_rng(devices=[]):
        assert (attention(h) != layer()(h)).any()


def test_number_of_parameters() -> None:
    assert sum(p.numel() for p in layer().parameters()) == 49_536  # scmvp.md 10.2


def test_a_gate_opens_and_closes() -> None:
    gate = nn.Linear(4, 3)
    nn.init.zeros_(gate.weight)
    gate.bias.data = torch.tensor([0.0, 100.0, -100.0])
    trunk, x = nn.Linear(4, 3), noise(6, 4)
    expected = trunk(x) * torch.tensor([0.5, 1.0, 0.0])
    torch.testing.assert_close(Gated(trunk, gate)(x), expected)
