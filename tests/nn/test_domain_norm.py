"""Domain-specific batch normalisation: scalex.md section 10.3 and 10.5, and torch's own layer."""

from __future__ import annotations

import torch
from torch import nn

from coembed.nn.layers import DomainNorm


def filled(layer: DomainNorm) -> DomainNorm:
    """The layer with random tables."""
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for table in layer.state_dict(keep_vars=True).values():
            table.copy_(torch.rand(table.shape, generator=random) + 0.5)
    return layer


def test_rows_of_a_fresh_layer_in_training() -> None:
    """Section 10.3: each domain on its own, and a domain's only row unchanged."""
    x = torch.tensor([[1.0, 2, 3], [3, 2, 1], [5, 5, 5]])
    out = DomainNorm(3, 2)(x, torch.tensor([0, 0, 1]))
    expected = torch.tensor([[-1.0, 0, 1], [1, 0, -1], [5, 5, 5]])
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=0)


def test_it_is_one_batch_norm_per_domain() -> None:
    layer, codes = DomainNorm(4, 3), torch.tensor([0, 2, 0, 1, 2, 0, 1])
    alone = [nn.BatchNorm1d(4) for _ in range(3)]
    random = torch.Generator().manual_seed(1)
    for _ in range(5):
        x = torch.randn(7, 4, generator=random)
        out = layer(x, codes)
        for d, norm in enumerate(alone):
            torch.testing.assert_close(out[codes == d], norm(x[codes == d]))
    for d, norm in enumerate(alone):
        torch.testing.assert_close(layer.running_mean[d], norm.running_mean)
        torch.testing.assert_close(layer.running_var[d], norm.running_var)
    out = layer.eval()(x, codes)
    for d, norm in enumerate(alone):
        torch.testing.assert_close(out[codes == d], norm.eval()(x[codes == d]))


def test_gradients_are_those_of_batch_norm() -> None:
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(2)).requires_grad_()
    layer, norm = DomainNorm(3), nn.BatchNorm1d(3)
    mine = torch.autograd.grad(layer(x, torch.zeros(6, dtype=torch.long)).pow(3).sum(), x)
    torch.testing.assert_close(mine, torch.autograd.grad(norm(x).pow(3).sum(), x))


def test_an_only_row_leaves_the_running_statistics() -> None:
    layer = filled(DomainNorm(3, 2))
    before = layer.running_mean.clone(), layer.running_var.clone()
    layer(torch.ones(3, 3), torch.tensor([0, 0, 1]))
    for table, old in zip((layer.running_mean, layer.running_var), before, strict=True):
        assert torch.equal(table[1], old[1])
        assert not torch.equal(table[0], old[0])


def test_in_evaluation_a_row_does_not_depend_on_its_companions() -> None:
    layer = filled(DomainNorm(3, 2)).eval()
    x, codes = torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1])
    torch.testing.assert_close(layer(x[:1], codes[:1]), layer(x, codes)[:1])


def test_a_domain_never_seen_gets_the_mean_of_every_table() -> None:
    layer, mean = filled(DomainNorm(3, 2)).eval(), DomainNorm(3).eval()
    with torch.no_grad():
        for name, table in mean.state_dict(keep_vars=True).items():
            table.copy_(layer.state_dict()[name].mean(0, keepdim=True))
    x = torch.randn(4, 3)
    unseen = layer(x, torch.full((4,), -1))
    torch.testing.assert_close(unseen, mean(x, torch.zeros(4, dtype=torch.long)))


def test_permuted_domains_and_codes_give_the_same_rows() -> None:
    layer, other, codes = (
        filled(DomainNorm(3, 3)),
        DomainNorm(3, 3),
        torch.tensor([0, 0, 1, 1, 2, 2]),
    )
    order = torch.tensor([2, 0, 1])
    other.load_state_dict({name: table[order] for name, table in layer.state_dict().items()})
    x = torch.randn(6, 3)
    torch.testing.assert_close(layer(x, codes), other(x, torch.argsort(order)[codes]))
