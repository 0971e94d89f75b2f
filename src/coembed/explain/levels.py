"""Decoded levels, and how two of them are compared whatever a system's unit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from coembed.models.generate import CHUNK

if TYPE_CHECKING:
    from coembed.models.base import Model

PSEUDOCOUNT = 0.1
"""Added to levels before their logarithm, in units of the mean level over all features."""


@torch.no_grad()
def decoded(model: Model, z: Tensor, codes: Tensor, role: str) -> np.ndarray:
    """Return the levels of `role` at points z (n, K) in batches codes (n,), (n, n_features)."""
    parts = zip(z.to(model.device).split(CHUNK), codes.to(model.device).split(CHUNK), strict=True)
    return np.concatenate([model.decode(*part, role).cpu().numpy() for part in parts])


def log2_fold(a: np.ndarray, b: np.ndarray, pseudocount: float = PSEUDOCOUNT) -> np.ndarray:
    """Return log2 of levels `a` over levels `b`, (..., n_features).

    The pseudocount is a share of the mean level of both, so that the result is the same for shares
    of a cell and for counts per 10,000, and a feature of next to no level has next to no change.
    """
    add = pseudocount * (a.mean() + b.mean()) / 2
    change: np.ndarray = np.log2(a + add) - np.log2(b + add)
    return change
