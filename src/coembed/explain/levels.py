"""How two decoded levels are compared, whatever a system's unit."""

from __future__ import annotations

import numpy as np

PSEUDOCOUNT = 0.1
"""Added to levels before their logarithm, in units of the mean level over all features."""


def log2_fold(a: np.ndarray, b: np.ndarray, pseudocount: float = PSEUDOCOUNT) -> np.ndarray:
    """Return log2 of levels `a` over levels `b`, (..., n_features).

    The pseudocount is a share of the mean level of both, so that the result is the same for shares
    of a cell and for counts per 10,000, and a feature of next to no level has next to no change.
    """
    add = pseudocount * (a.mean() + b.mean()) / 2
    change: np.ndarray = np.log2(a + add) - np.log2(b + add)
    return change
