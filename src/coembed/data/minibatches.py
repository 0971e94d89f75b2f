"""Minibatches: which cells a step sees, and how their rows reach the device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from scipy import sparse

from coembed.data.pipeline import Block
from coembed.data.rows import Rows, rows_of, send

Draw = Mapping[str, np.ndarray]
"""Input name -> rows to gather. Paired systems draw the same rows for every input."""


@dataclass(frozen=True)
class Batch:
    """One minibatch on the device; every field maps an input's name to its tensor.

    Attributes:
        x: (b, n_features) float32, dense or, of `Inputs` that allow it, CSR.
        present: (b,) bool, whether the modality measured the cell.
        batch: (b,) int64, code of the technical batch; -1 where the model never saw it.
        drawn: what a player leaves to those that follow it on this minibatch.
    """

    x: Mapping[str, torch.Tensor]
    present: Mapping[str, torch.Tensor]
    batch: Mapping[str, torch.Tensor]
    drawn: dict[str, torch.Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return max(len(x) for x in self.x.values())

    @property
    def codes(self) -> torch.Tensor:
        """(b,) int64, the batch of each cell where every input has the same cells."""
        return next(iter(self.batch.values()))


class Inputs:
    """The views of a set of cells, ready to be gathered row by row.

    Sparse views stay sparse; only the rows of a minibatch are made dense, if that.

    Args:
        blocks: input name -> view, all over the same cells.
        batch: (n_cells,) int codes of the technical batch.
        device: where minibatches go.
        sparse: whether the minibatches of sparse views stay CSR.
    """

    def __init__(
        self,
        blocks: Mapping[str, Block],
        batch: np.ndarray,
        device: torch.device,
        *,
        sparse: bool = False,
    ) -> None:
        self.blocks, self.batch, self.device = blocks, batch, device
        self.n_cells = len(batch)
        self.sparse = sparse and device.type in ("cpu", "cuda")

    @property
    def present(self) -> dict[str, np.ndarray]:
        """Input name -> (n_cells,) bool, which cells have it."""
        return {name: block.present for name, block in self.blocks.items()}

    def having(self, names: Sequence[str], rows: np.ndarray) -> np.ndarray:
        """Return those of `rows` that have every one of the inputs `names`."""
        return rows[np.logical_and.reduce([self.blocks[name].present[rows] for name in names])]

    def counted(self, name: str, rows: np.ndarray, n_batches: int) -> np.ndarray:
        """Return (n_batches, n_features) bool: whether a batch's `rows` have a count of a feature.

        True where a batch has none of the rows: nothing is known of it.
        """
        codes = self.batch[rows]
        members = sparse.csr_matrix(
            (np.ones(len(rows)), (codes, rows)), shape=(n_batches, self.n_cells)
        )
        sums = members @ self.blocks[name].x  # without a copy of the counts
        found: np.ndarray = (sums.toarray() if isinstance(sums, sparse.csr_matrix) else sums) > 0
        found[np.isin(np.arange(n_batches), codes, invert=True)] = True
        return found

    def take(self, names: Sequence[str], rows: np.ndarray) -> Inputs:
        """Return some inputs of some cells."""
        blocks = {
            name: replace(
                self.blocks[name],
                x=self.blocks[name].x[rows],
                totals=self.blocks[name].totals[rows],
                present=self.blocks[name].present[rows],
            )
            for name in names
        }
        return Inputs(blocks, self.batch[rows], self.device, sparse=self.sparse)

    def gather(self, draw: Draw) -> Batch:
        """Return the minibatch of `draw` on the device."""
        x, present, batch = {}, {}, {}
        for name, rows in draw.items():
            x[name] = self._rows[name](rows)
            present[name] = send(self.blocks[name].present[rows], self.device)
            batch[name] = send(self.batch[rows], self.device)
        return Batch(x, present, batch)

    @cached_property
    def _rows(self) -> dict[str, Rows]:
        return {
            name: rows_of(block.x, self.device, sparse=self.sparse)
            for name, block in self.blocks.items()
        }

    def chunks(self, rows: np.ndarray, size: int = 1024) -> Iterator[Batch]:
        """Yield `rows` of every input in order, in even parts of at most `size`."""
        for part in slices(rows, size):
            yield self.gather(dict.fromkeys(self.blocks, part))


def slices(rows: np.ndarray, size: int) -> list[np.ndarray]:
    """Return `rows` in order, in even parts of at most `size`."""
    return np.array_split(rows, max(1, -(-len(rows) // size)))


class Sampler(Protocol):
    """An endless source of draws, one epoch at a time.

    Attributes:
        steps_per_epoch: draws in an epoch.
        batch_size: the cells asked for in a draw.
        when_larger: what is drawn when that is more than there are.
    """

    steps_per_epoch: int
    batch_size: int
    when_larger: str

    @property
    def largest(self) -> int:
        """Cells in the largest group that is drawn from."""
        ...

    def epoch(self, rng: np.random.Generator) -> Iterator[Draw]:
        """Yield the draws of one epoch."""
        ...


class Shuffled:
    """Groups of cells, each shuffled and cut into even minibatches; the groups follow in turn.

    Even minibatches differ by one cell at most, so a remainder of a single cell (on which batch
    normalisation fails) cannot arise.

    Args:
        groups: (input names, rows) of each group. A paired system has one group.
        batch_size: the largest minibatch (3 where it is 2 and the group is odd); a batch larger
            than its group is the whole group.
    """

    when_larger = "every step uses all of them"

    def __init__(self, groups: Sequence[tuple[Sequence[str], np.ndarray]], batch_size: int) -> None:
        self.groups, self.batch_size = [g for g in groups if len(g[1])], batch_size
        self.steps_per_epoch = sum(self._parts(rows) for _, rows in self.groups)

    @property
    def largest(self) -> int:
        """Cells in the largest group."""
        return max((len(rows) for _, rows in self.groups), default=0)

    def _parts(self, rows: np.ndarray) -> int:
        return max(1, min(-(-len(rows) // self.batch_size), len(rows) // 2))

    def epoch(self, rng: np.random.Generator) -> Iterator[Draw]:
        """Yield every cell of every group once."""
        for names, rows in self.groups:
            for part in np.array_split(rng.permutation(rows), self._parts(rows)):
                yield dict.fromkeys(names, part)

    def sweep(self) -> list[Draw]:
        """Return the draws of one pass in the given order, for validation."""
        return [
            dict.fromkeys(names, part)
            for names, rows in self.groups
            for part in np.array_split(rows, self._parts(rows))
        ]


class Independent:
    """Each input's cells drawn on their own with replacement: unpaired domains (Portal).

    Args:
        rows: input name -> the cells of that domain.
        batch_size: cells per domain and step.
    """

    when_larger = "a step draws some of them more than once"

    def __init__(self, rows: Mapping[str, np.ndarray], batch_size: int) -> None:
        self.rows, self.batch_size = rows, batch_size
        self.steps_per_epoch = -(-self.largest // batch_size)

    @property
    def largest(self) -> int:
        """Cells in the largest domain."""
        return max(map(len, self.rows.values()))

    def epoch(self, rng: np.random.Generator) -> Iterator[Draw]:
        """Yield as many draws as would visit the larger domain once."""
        for _ in range(self.steps_per_epoch):
            yield {
                name: rows[rng.integers(len(rows), size=self.batch_size)]
                for name, rows in self.rows.items()
            }
