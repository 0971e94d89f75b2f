"""Minibatches of counts that are mostly zeros: products and sums over their entries alone.

A minibatch is a dense tensor or a `torch.sparse_csr` one; what is here takes both and gives the
same numbers.
"""

from __future__ import annotations

import warnings
from functools import cached_property
from typing import Any

import torch
from scipy import sparse
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

from coembed.data.minibatches import as_csr

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")


def fused(x: Tensor) -> bool:
    """Say whether `kernels` can compute with a tensor: on the CPU, in single precision."""
    return x.device.type == "cpu" and x.dtype == torch.float32


def run(kernel: str, *arguments: Any) -> None:
    """Call one of the `kernels`, which are imported, with numba, when the first is needed."""
    from coembed.nn import kernels

    kernels.run(getattr(kernels, kernel), *arguments)


class Entries:
    """Where a minibatch is not 0.

    Args:
        x: (b, P), dense or CSR.

    Attributes:
        x: (n,) the values that are not 0, row by row.
        shape: (b, P).
    """

    def __init__(self, x: Tensor) -> None:
        self.shape = x.shape
        if x.layout == torch.sparse_csr:
            self.starts, self.columns, self.x = x.crow_indices(), x.col_indices(), x.values()
            return
        self.index = x.flatten().nonzero().squeeze(-1)
        self.x = x.flatten()[self.index]

    @cached_property
    def index(self) -> Tensor:
        """(n,) int64, the place of every entry, row after row."""
        return self.rows * self.shape[-1] + self.columns

    @cached_property
    def rows(self) -> Tensor:
        """(n,) int64, the row of every entry."""
        if "starts" in vars(self):
            return torch.repeat_interleave(self.starts.diff().long(), output_size=len(self.x))
        return torch.div(self.index, self.shape[-1], rounding_mode="floor")

    @cached_property
    def columns(self) -> Tensor:
        """(n,) integers, the column of every entry."""
        return self.index - self.rows * self.shape[-1]

    @cached_property
    def starts(self) -> Tensor:
        """(b + 1,) integers, where the entries of every row start."""
        each = torch.bincount(self.rows, minlength=self.shape[0])
        return torch.cat([each.new_zeros(1), each.cumsum(0)])

    @property
    def csr(self) -> tuple[Tensor, Tensor, Tensor]:
        """int32 starts and columns, values: what kernels take."""
        return self.starts.int(), self.columns.int(), self.x

    @classmethod
    def of_counts(cls, x: Tensor | Entries) -> Entries:
        """Return the entries of a minibatch; entries are returned as they are."""
        return x if isinstance(x, Entries) else cls(x)

    def of(self, values: Tensor) -> Tensor:
        """Return the values at the entries, (n,), of a tensor that broadcasts to (b, P)."""
        if values.shape == self.shape:
            return values.flatten().index_select(0, self.index)
        if values.dim() == 2 and values.shape[-1] == 1:
            return values.squeeze(-1).index_select(0, self.rows)
        return values.flatten().expand(self.shape[-1]).index_select(0, self.columns)

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over every row, (b,), of one value per entry, (n,)."""
        return values.new_zeros(self.shape[0]).index_add(0, self.rows, values)

    def add_to(self, x: Tensor, values: Tensor) -> Tensor:
        """Return x (b, P) with one value per entry added, (n,)."""
        return x.flatten().index_add(0, self.index, values).view(x.shape)


def row_sums(x: Tensor) -> Tensor:
    """Return the sum of every row of a dense or CSR tensor, (b,)."""
    if x.layout != torch.sparse_csr:
        return x.sum(-1)
    return torch.segment_reduce(x.values(), "sum", offsets=x.crow_indices().long(), initial=0)


def scale_rows(x: Tensor, factor: Tensor) -> Tensor:
    """Return a dense or CSR tensor (b, P) whose rows are multiplied by a factor each, (b,)."""
    if x.layout != torch.sparse_csr:
        return x * factor.unsqueeze(-1)
    values = x.values() * factor.repeat_interleave(x.crow_indices().diff().long())
    where = x.crow_indices(), x.col_indices()
    return torch.sparse_csr_tensor(*where, values, size=x.shape, check_invariants=False)


def dense(x: Tensor) -> Tensor:
    """Return a tensor as it is, or a CSR one made dense."""
    if x.layout != torch.sparse_csr:
        return x
    if x.device.type != "cpu":
        return x.to_dense()
    return torch.from_numpy(_as_scipy(x).toarray())  # several times as fast as torch


SPARSE = 0.15
"""Density up to which products over the entries are faster than dense ones, by measurement."""


class Linear(nn.Linear):
    """A linear layer that also takes CSR rows; where few, the weights of their entries alone count.

    Its weight is (in_features, out_features), so that those of one feature lie side by side.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.weight = nn.Parameter(self.weight.detach().t().contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """Return (b, out_features) for x (b, in_features), dense or CSR."""
        if x.layout == torch.sparse_csr and x.values().numel() < SPARSE * x.numel():
            product: Tensor = _SparseProduct.apply(x, self.weight)
            return product + self.bias
        return torch.addmm(self.bias, dense(x), self.weight)


class _SparseProduct(torch.autograd.Function):
    """x @ weight for CSR x, with the gradient of the weight alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.x = x
        if x.device.type != "cpu":
            return x @ weight
        return embedding_bag(
            x.col_indices(),
            weight,
            x.crow_indices(),
            mode="sum",
            per_sample_weights=x.values(),
            include_last_offset=True,
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        if not fused(gradient):
            return None, transposed(ctx.x) @ gradient
        by_weight = gradient.new_empty(ctx.x.shape[1], gradient.shape[1])
        run("transposed_product", *Entries(ctx.x).csr, gradient.contiguous(), by_weight)
        return None, by_weight


def transposed(x: Tensor) -> Tensor:
    """Return a dense or CSR tensor transposed, of the same layout."""
    if x.layout != torch.sparse_csr:
        return x.t()
    # On the CPU scipy is several times as fast as torch.
    if x.device.type != "cpu":
        return x.transpose(0, 1).to_sparse_csr()
    return as_csr(_as_scipy(x).T.tocsr())


def _as_scipy(x: Tensor) -> sparse.csr_matrix:
    parts = (x.values().numpy(), x.col_indices().numpy(), x.crow_indices().numpy())
    return sparse.csr_matrix(parts, shape=(x.shape[0], x.shape[1]))
