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
from torch.utils.weak import WeakTensorKeyDictionary

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
            self.starts, self.columns = x.crow_indices(), x.col_indices()
            self.x = x.values().detach()  # a view of its own: it would keep the minibatch
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

    @cached_property
    def by_column(self) -> tuple[Tensor, Tensor, Tensor]:
        """Column after column: int32 starts and rows, values; what products take."""
        starts, columns, x = self.csr
        width = self.shape[-1]
        parts = min(4, torch.get_num_threads())  # more would take longer to add up
        place = columns.new_zeros(parts, width)
        sorted_ = columns.new_empty(width + 1), torch.empty_like(columns), torch.empty_like(x)
        run("sort_by_column", starts, columns, x, place, *sorted_)
        return sorted_

    @classmethod
    def of_counts(cls, x: Tensor | Entries) -> Entries:
        """Return the entries of a minibatch, once for all who ask; or entries as they are."""
        if isinstance(x, Entries):
            return x
        if x.layout != torch.sparse_csr:  # it may yet be written to
            return cls(x)
        found = _known.get(x)
        if found is None:
            found = _known[x] = cls(x)
        return found

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


_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""CSR minibatch to its entries, as long as there is the minibatch."""


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
        if not fused(weight):
            return x @ weight
        parts = weight.new_empty(torch.get_num_threads(), x.shape[0], weight.shape[1])
        run("product", *Entries.of_counts(x).by_column, weight, parts)
        return parts.sum(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        if not fused(gradient):
            return None, ctx.x.transpose(0, 1).to_sparse_csr() @ gradient
        starts, rows, values = Entries.of_counts(ctx.x).by_column
        # A sum over bags of embeddings is the fastest of PyTorch's ways to say x^T @ gradient.
        by_weight = embedding_bag(
            rows, gradient, starts, mode="sum", per_sample_weights=values, include_last_offset=True
        )
        return None, by_weight


def _as_scipy(x: Tensor) -> sparse.csr_matrix:
    parts = (x.values().numpy(), x.col_indices().numpy(), x.crow_indices().numpy())
    return sparse.csr_matrix(parts, shape=(x.shape[0], x.shape[1]))
