"""How networks grow for new batches: old parts stand, new ones start at their mean and learn."""

from __future__ import annotations

import torch
from torch import nn

from coembed.models.query import _grow
from coembed.nn.layers import ConditionalMLP


class Net(nn.Module):
    """A table with a row per batch, a layer that sees their one-hot, and one that does not."""

    def __init__(self, n_batches: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(n_batches, 5))
        self.layer = ConditionalMLP((3, 4), n_batches if n_batches > 1 else 0)
        self.plain = nn.Linear(3, 4)
        if n_batches > 1:
            self.classifier = nn.Linear(4, n_batches)


def grown(n_old: int, n_new: int) -> tuple[Net, dict[str, torch.Tensor]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        old, net = Net(n_old), Net(n_old + n_new)
    assert _grow(net, old.state_dict(), n_old, n_new) == bool(n_new)
    return net, old.state_dict()


def test_new_parts_start_at_the_mean_of_the_old_ones() -> None:
    net, old = grown(2, 2)
    torch.testing.assert_close(net.table[:2], old["table"])
    torch.testing.assert_close(net.table[2:], old["table"].mean(0).expand(2, 5))
    weight, before = net.layer.layers[0][0].weight, old["layer.layers.0.0.weight"]
    torch.testing.assert_close(weight[:, :5], before)
    torch.testing.assert_close(weight[:, 5:], before[:, 3:].mean(1, keepdim=True).expand(4, 2))
    torch.testing.assert_close(net.plain.weight, old["plain.weight"])


def test_from_one_batch_the_condition_starts_at_nothing() -> None:
    net, old = grown(1, 1)
    weight = net.layer.layers[0][0].weight
    torch.testing.assert_close(weight[:, :3], old["layer.layers.0.0.weight"])
    assert not weight[:, 3:].any()
    x, condition = torch.randn(6, 3), torch.eye(2)[torch.zeros(6, dtype=torch.long)]
    before = Net(1)
    before.load_state_dict(old)
    torch.testing.assert_close(
        net.layer(x, condition), before.layer(x, torch.empty(6, 0)), msg="the old batch stands"
    )
    assert not net.classifier.weight.requires_grad, "what one batch did not have is not trained"


def test_only_new_parts_learn() -> None:
    net, old = grown(2, 1)
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trained == {
        *("table", "layer.layers.0.0.weight"),
        *("classifier.weight", "classifier.bias"),
    }
    optimiser = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        h = net.layer(torch.randn(6, 3), torch.eye(3)[torch.arange(6) % 3]) + net.table[:, :4].sum()
        (net.classifier(h).square().sum() + net.plain(h[:, :3]).sum()).backward()
        optimiser.step()
    torch.testing.assert_close(net.table[:2], old["table"])
    assert (net.table[2] != old["table"].mean(0)).any()
    weight = net.layer.layers[0][0].weight
    torch.testing.assert_close(weight[:, :5], old["layer.layers.0.0.weight"])
    torch.testing.assert_close(net.plain.weight, old["plain.weight"])


def test_without_new_batches_nothing_learns() -> None:
    net, _ = grown(3, 0)
    assert not any(p.requires_grad for p in net.parameters())
