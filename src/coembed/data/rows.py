"""Rows of a view as minibatches: sparse or dense, sent to the device or gathered on it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy import sparse as sp

from coembed.data.pipeline import Matrix

Rows = Callable[[np.ndarray], torch.Tensor]
"""Takes (b,) int row numbers; returns (b, n_features) float32 on the device."""


def rows_of(x: Matrix, device: torch.device, *, sparse: bool) -> Rows:
    """Return what gives the minibatches of a view.

    Args:
        x: (n_cells, n_features), CSR or dense.
        device: where minibatches go.
        sparse: whether those of a CSR view stay CSR.
    """
    if sparse and isinstance(x, sp.csr_matrix):
        if fits(x, device):
            return ResidentRows(x, device)
        return lambda rows: as_csr(single(x[rows])).to(device)
    if isinstance(x, sp.csr_matrix):
        return lambda rows: send(single(x[rows]).toarray(), device)
    return lambda rows: send(single(x[rows]), device)


def single(x: Matrix) -> Matrix:
    """Return an array or a CSR matrix in single precision."""
    return x.astype(np.float32, copy=False)


def send(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Return an array on the device."""
    return torch.from_numpy(array).to(device, non_blocking=True)


def as_csr(x: sp.csr_matrix) -> torch.Tensor:
    """Return a scipy CSR matrix as a torch one; they share memory."""
    rows, columns, values = (torch.from_numpy(part) for part in (x.indptr, x.indices, x.data))
    return torch.sparse_csr_tensor(rows, columns, values, x.shape, check_invariants=False)


def fits(x: sp.csr_matrix, device: torch.device) -> bool:
    """Say whether half of what a GPU has left holds a whole CSR matrix."""
    if device.type != "cuda":
        return False
    return 2 * (x.data.nbytes + x.indices.nbytes) < torch.cuda.mem_get_info(device)[0]


class ResidentRows:
    """Rows of a CSR matrix that lies on the device; minibatches are gathered there.

    Args:
        x: (n_cells, n_features).
        device: where it is put.
    """

    def __init__(self, x: sp.csr_matrix, device: torch.device) -> None:
        self.starts, self.lengths = x.indptr[:-1].astype(np.int64), np.diff(x.indptr)
        self.columns = send(x.indices.astype(np.int32, copy=False), device)
        self.values = send(single(x.data), device)
        self.width, self.device = x.shape[1], device

    def __call__(self, rows: np.ndarray) -> torch.Tensor:
        """Return `rows` as a CSR tensor, (b, n_features)."""
        lengths = self.lengths[rows]
        ends = np.concatenate([[0], lengths.cumsum()])
        # An entry's place in the whole matrix less that in the minibatch is one number per row.
        shift, each, first = (
            send(part, self.device)
            for part in (self.starts[rows] - ends[:-1], lengths, ends.astype(np.int32))
        )
        size = int(ends[-1])  # known here, so that the host does not wait for the device
        places = torch.arange(size, device=self.device)
        places += torch.repeat_interleave(shift, each, output_size=size)
        columns, values = self.columns[places], self.values[places]
        shape = (len(rows), self.width)
        return torch.sparse_csr_tensor(first, columns, values, shape, check_invariants=False)
