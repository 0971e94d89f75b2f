"""Kernels, in single precision, against the formulas in double, in value and in gradient."""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import sparse
from torch import Tensor, nn

from coembed.data.rows import as_csr
from coembed.nn import likelihoods
from coembed.nn.likelihoods import (
    multinomial,
    negative_binomial,
    negative_binomial_mean,
    scaled_bernoulli,
)
from coembed.nn.sparse import Entries, Linear

N_CELLS, N_FEATURES = 7, 45  # more features than a vector has numbers, and not a multiple

Case = Callable[[Tensor, list[Tensor], Tensor], Tensor]


def bernoulli_of_peaks(x: Tensor, leaves: list[Tensor], weights: Tensor) -> Tensor:
    a, b, _ = leaves
    head = nn.Linear(3, N_FEATURES).to(a.dtype)
    head.weight, head.bias = nn.Parameter(b.T[:, :3].contiguous()), nn.Parameter(b[4])
    factors = nn.functional.logsigmoid(a[:, 4]), nn.functional.logsigmoid(a[0])
    value = scaled_bernoulli(x, a[:, :3], head, *factors, weights)
    return value + 0 * head.weight.sum()


def bernoulli_of_some_peaks_at_a_time(x: Tensor, leaves: list[Tensor], weights: Tensor) -> Tensor:
    with patch.object(likelihoods, "BLOCK", 6 * N_CELLS):
        return bernoulli_of_peaks(x, leaves, weights)


CASES: dict[str, Case] = {
    "negative binomial": lambda x, p, w: negative_binomial(x, p[0].exp(), p[1]).sum() @ w,
    "negative binomial by its mean": lambda x, p, w: (
        negative_binomial_mean(x, p[0].exp(), p[1][0].exp()).sum() @ w
    ),
    "one total count for all": lambda x, p, w: (
        negative_binomial(x, p[0][0, 0].exp(), p[1]).sum() @ w
    ),
    "zero-inflated negative binomial": lambda x, p, w: (
        negative_binomial(x, p[0].exp(), p[1]).zero_inflated(p[2]).sum() @ w
    ),
    "multinomial": lambda x, p, w: multinomial(x, p[0]) @ w,
    "Bernoulli of peaks": bernoulli_of_peaks,
    "Bernoulli of some peaks at a time": bernoulli_of_some_peaks_at_a_time,
}


def counts(seed: int, density: float, layout: str) -> Tensor:
    random = np.random.default_rng(seed)
    shape = N_CELLS, N_FEATURES
    x = random.negative_binomial(0.5, 0.05, shape) * (random.random(shape) < density)
    x = x.astype(np.float32)
    return torch.from_numpy(x) if layout == "dense" else as_csr(sparse.csr_matrix(x))


@pytest.mark.parametrize("layout", ["dense", "csr"])
@pytest.mark.parametrize("name", CASES)
@given(seed=st.integers(0, 2**31), density=st.floats(0, 1), spread=st.floats(0.1, 4))
@example(seed=10703, density=0.0, spread=3.5)  # chances close to 1
def test_a_kernel_is_the_formula(
    name: str, layout: str, seed: int, density: float, spread: float
) -> None:
    x, case = counts(seed, density, layout), CASES[name]
    random = torch.Generator().manual_seed(seed)
    start = [spread * torch.randn(N_CELLS, N_FEATURES, generator=random) for _ in range(3)]
    weights = torch.rand(N_CELLS, generator=random)
    single = [p.clone().requires_grad_() for p in start]
    double = [p.double().requires_grad_() for p in start]
    ours, exact = case(x, single, weights), case(x.double(), double, weights.double())
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-4)
    ours.backward()
    exact.backward()
    for mine, reference in zip(single, double, strict=True):
        assert (mine.grad is None) == (reference.grad is None)
        if mine.grad is not None and reference.grad is not None:
            scale = float(reference.grad.abs().max())
            torch.testing.assert_close(
                mine.grad.double(), reference.grad, rtol=1e-4, atol=1e-5 * (1 + scale)
            )


@given(seed=st.integers(0, 2**31), density=st.floats(0, 0.1))
def test_a_first_layer_and_its_gradient_are_the_dense_products(seed: int, density: float) -> None:
    x = counts(seed, density, "csr")
    layer, ahead = Linear(N_FEATURES, 5), torch.randn(N_CELLS, 5)
    h = layer(x)
    torch.testing.assert_close(h, torch.addmm(layer.bias, x.to_dense(), layer.weight))
    h.backward(ahead)
    torch.testing.assert_close(layer.weight.grad, x.to_dense().T @ ahead, rtol=1e-5, atol=1e-5)


@given(seed=st.integers(0, 2**31), density=st.floats(0, 1), threads=st.integers(1, 3))
def test_entries_are_sorted_by_column(seed: int, density: float, threads: int) -> None:
    x, before = counts(seed, density, "csr"), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        first, rows, values = Entries(x).by_column
    finally:
        torch.set_num_threads(before)
    expected = sparse.csc_matrix(x.to_dense().numpy())
    assert first.tolist() == expected.indptr.tolist()
    assert rows.tolist() == expected.indices.tolist()
    assert values.tolist() == expected.data.tolist()


def test_threads_do_not_change_what_is_computed() -> None:
    x, start = counts(1, 0.3, "csr"), [torch.randn(N_CELLS, N_FEATURES) for _ in range(3)]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            leaves = [p.clone().requires_grad_() for p in start]
            value = CASES["Bernoulli of peaks"](x, leaves, torch.ones(N_CELLS))
            value.backward()
            found.append([value.detach(), *(p.grad for p in leaves if p.grad is not None)])
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(*found)


def test_no_cell_and_no_entry() -> None:
    empty = torch.zeros(0, 3, requires_grad=True)
    negative_binomial(empty.detach(), empty + 1, empty).sum().sum().backward()
    assert empty.grad is not None
    assert empty.grad.shape == (0, 3)
    zeros, r = torch.zeros(2, 3), torch.full((2, 3), 2.0)
    torch.testing.assert_close(
        negative_binomial(zeros, r, zeros).sum(), torch.full((2,), -6 * np.log(2))
    )


def test_extreme_parameters_stay_finite() -> None:
    x = torch.tensor([[0.0, 3.0, 0.0, 5000.0] * 4])
    for log_r in (-12.0, 12.0):
        for logit in (-18.42, 18.42):
            for gate in (-100.0, 0.0, 100.0):
                leaves = [torch.full_like(x, v).requires_grad_() for v in (log_r, logit, gate)]
                log_p = negative_binomial(x, leaves[0].exp(), leaves[1]).zero_inflated(leaves[2])
                value = log_p.sum()
                value.sum().backward()
                assert value.isfinite().all()
                assert all(leaf.grad.isfinite().all() for leaf in leaves if leaf.grad is not None)
                torch.testing.assert_close(value, log_p.dense().sum(-1), rtol=1e-4, atol=1e-3)


def test_what_is_not_a_number_is_passed_on() -> None:
    x, good = torch.tensor([[0.0, 3.0, 0.0]]), torch.ones(1, 3)
    for where in range(3):
        arguments = [good.clone() for _ in range(3)]
        arguments[where][0, 2] = torch.nan
        r, logit, gate = arguments
        assert negative_binomial(x, r, logit).zero_inflated(gate).sum().isnan()
        assert where or multinomial(x, r).isnan()
        if where < 2:
            assert negative_binomial(x, r, logit).sum().isnan()


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_a_peaks_logit_that_is_not_a_number_is_passed_on(density: float) -> None:
    x, leaves = counts(1, density, "csr"), [torch.randn(N_CELLS, N_FEATURES) for _ in range(3)]
    leaves[1][4, -1] = torch.nan  # the bias of the last one
    assert bernoulli_of_peaks(x, leaves, torch.ones(N_CELLS)).isnan()
