"""What every batch measured: a feature without a count in a batch was not (totalVI)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from coembed.data.minibatches import Inputs


class Measured(nn.Module):
    """A table for every modality, (n_batches, n_features): 1 where a batch measured a feature.

    Args:
        n_batches: number of batches.
        n_features: modality to number of features.
    """

    def __init__(self, n_batches: int, n_features: Mapping[str, int]) -> None:
        super().__init__()
        self.n_batches, self.roles = n_batches, tuple(n_features)
        for role, n in n_features.items():
            self.register_buffer(role, torch.ones(n_batches, n))

    def note(self, inputs: Inputs, rows: np.ndarray) -> bool:
        """Fill the tables from the training cells; say whether batches differ in them.

        A gene can be silent in a batch; only a batch without any gene did not measure them.
        """
        found = {role: inputs.counted(role, rows, self.n_batches) for role in self.roles}
        for role, table in found.items():
            self.get_buffer(role).copy_(torch.from_numpy(table))
        each = [t.any(axis=1) if role == "rna" else t for role, t in found.items()]
        measured = np.column_stack(each)
        return bool((measured != measured[:1]).any())

    def of(self, role: str, codes: Tensor) -> Tensor:
        """Return the mask of the features of `role` for the batch of each cell, (b, n_features)."""
        return self.get_buffer(role)[codes]

    def or_average(self, role: str, codes: Tensor) -> Tensor:
        """Return the codes with -1, the average batch, for a batch that did not measure `role`."""
        return torch.where(self.get_buffer(role).any(-1)[codes], codes, -1)
