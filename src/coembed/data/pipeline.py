"""A pipeline of views: the steps by which modalities reach a network, fitted on training cells.

It is read like a method section: the steps of each modality in order, then those that join them.

    Pipeline(
        {
            "rna": [HighlyVariable(4000), LogNormalise(), Standardise(), PCs(50)],
            "atac": [TopPeaks(0.75), TFIDF(), PCs(50)],
        },
        joint=[Concatenate(), JointPCs(10)],
    )
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from coembed.data.cells import Cells
from coembed.errors import ModelFileError

Array = np.ndarray
Matrix = Any
"""A CSR matrix or a dense array; steps say which they return."""


@dataclass(frozen=True, eq=False)
class Block:
    """One modality on its way into a network.

    Attributes:
        x: (n_cells, n_features) CSR or dense; rows of cells that were not measured are zero.
        var: the features, in column order.
        totals: (n_cells,) sum of the raw counts over *all* features of the modality.
        present: (n_cells,) bool, whether the modality measured the cell.
    """

    x: Matrix
    var: pd.DataFrame
    totals: Array
    present: Array

    @property
    def measured(self) -> Matrix:
        """The rows of the measured cells: what a step is fitted on."""
        return self.x if self.present.all() else self.x[self.present]


class Step:
    """A transformation of one modality. `learnt` names the arrays that `fit` finds."""

    learnt: ClassVar[tuple[str, ...]] = ()

    def fit(self, block: Block) -> None:
        """Learn from the measured training cells."""

    def apply(self, block: Block) -> Block:
        """Return the transformed modality."""
        raise NotImplementedError


class JointStep:
    """A transformation of all modalities together."""

    learnt: ClassVar[tuple[str, ...]] = ()

    def fit(self, blocks: Mapping[str, Block]) -> None:
        """Learn from the training cells."""

    def apply(self, blocks: Mapping[str, Block]) -> dict[str, Block]:
        """Return the transformed modalities."""
        raise NotImplementedError


class Pipeline:
    """The steps of each modality in order, then the joint steps.

    Args:
        steps: role -> steps of that modality. An empty list passes raw counts.
        joint: steps that see all modalities.
    """

    def __init__(
        self, steps: Mapping[str, Sequence[Step]], joint: Sequence[JointStep] = ()
    ) -> None:
        self.steps, self.joint = steps, joint

    def fit(self, cells: Cells) -> dict[str, Block]:
        """Fit every step on `cells` and return the views of these cells."""
        return self._run(cells, fit=True)

    def apply(self, cells: Cells) -> dict[str, Block]:
        """Return the views of `cells` under the fitted steps."""
        return self._run(cells, fit=False)

    def _run(self, cells: Cells, *, fit: bool) -> dict[str, Block]:
        blocks = {}
        for role, steps in self.steps.items():
            blocks[role] = block_of(cells, role)
            for step in steps:
                if fit:
                    step.fit(blocks[role])
                blocks[role] = step.apply(blocks[role])
        for joint in self.joint:
            if fit:
                joint.fit(blocks)
            blocks = joint.apply(blocks)
        return blocks

    def _named(self) -> Iterator[tuple[str, Step | JointStep]]:
        for role, steps in self.steps.items():
            for i, step in enumerate(steps):
                yield f"{role}.{i}", step
        for i, joint in enumerate(self.joint):
            yield f"joint.{i}", joint

    def state(self) -> dict[str, Array]:
        """Return what was learnt, as arrays by name."""
        return {
            f"{name}.{part}": np.asarray(getattr(step, part))
            for name, step in self._named()
            for part in step.learnt
        }

    def load_state(self, state: Mapping[str, Array]) -> None:
        """Put back what `state` returned.

        Raises:
            ModelFileError: an array is missing.
        """
        for name, step in self._named():
            for part in step.learnt:
                if f"{name}.{part}" not in state:
                    raise ModelFileError(
                        f"the array '{name}.{part}' of the views is missing",
                        remedy="The file is damaged or of another version; save the model again",
                    )
                setattr(step, part, state[f"{name}.{part}"])


def block_of(cells: Cells, role: str) -> Block:
    """Return one modality of `cells` as raw counts."""
    counts = cells.counts[role]
    return Block(
        counts, cells.var[role], np.asarray(counts.sum(axis=1)).ravel(), cells.present[role]
    )
