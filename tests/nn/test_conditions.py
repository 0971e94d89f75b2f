"""Batch conditions: where the one-hot enters, and what an unseen batch gets."""

from __future__ import annotations

import torch
from torch import nn

from coembed.nn.layers import ConditionalMLP, Dropout, batch_one_hot, mlp, rows_of_batches


def test_one_hot_of_batches() -> None:
    hot = batch_one_hot(torch.tensor([1, 0, -1]), 2)
    torch.testing.assert_close(hot, torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.5, 0.5]]))
    assert batch_one_hot(torch.tensor([0, 0, -1]), 1).shape == (3, 0)


def test_every_layer_or_the_first_sees_the_condition() -> None:
    def widths(net: nn.Module) -> list[tuple[int, int]]:
        return [(m.in_features, m.out_features) for m in net.modules() if isinstance(m, nn.Linear)]

    assert widths(ConditionalMLP((3, 4, 5), 2)) == [(5, 4), (6, 5)]
    assert widths(ConditionalMLP((3, 4, 5), 2, deep=False)) == [(5, 4), (4, 5)]
    assert widths(ConditionalMLP((3, 4, 5), 0)) == [(3, 4), (4, 5)]


def test_without_a_condition_it_is_an_mlp() -> None:
    options = {"norm": nn.LayerNorm, "activation": nn.LeakyReLU, "dropout": 0.1}
    conditional, plain = ConditionalMLP((3, 4, 5), 0, **options), mlp((3, 4, 5), **options)
    for mine, theirs in zip(conditional.parameters(), plain.parameters(), strict=True):
        theirs.data.copy_(mine)
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    conditional.eval(), plain.eval()
    torch.testing.assert_close(conditional(x, torch.empty(6, 0)), plain(x))
    assert [type(layer) for layer in conditional.layers[0]] == [
        nn.Linear,
        nn.LayerNorm,
        nn.LeakyReLU,
        Dropout,
    ]


def test_the_condition_is_at_the_end_of_every_input() -> None:
    net = ConditionalMLP((2, 3, 1), 2, activation=nn.Identity)
    x, condition = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 1.0]])
    first, second = (layer[0] for layer in net.layers)
    hidden = first.weight @ torch.tensor([1.0, 2.0, 0.0, 1.0]) + first.bias
    expected = second.weight @ torch.cat([hidden, condition[0]]) + second.bias
    torch.testing.assert_close(net(x, condition)[0], expected)


def test_rows_of_batches_and_their_gradient() -> None:
    table = torch.tensor([[1.0, 2.0], [3.0, 6.0]], requires_grad=True)
    rows = rows_of_batches(table, torch.tensor([1, -1, 1]))
    torch.testing.assert_close(rows, torch.tensor([[3.0, 6.0], [2.0, 4.0], [3.0, 6.0]]))
    (gradient,) = torch.autograd.grad(rows.sum(), table)
    torch.testing.assert_close(gradient, torch.tensor([[0.5, 0.5], [2.5, 2.5]]))
