"""Simulated cells with known markers."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy import sparse

from coembed.data.cells import Cells, Keys

WIDTHS = {"rna": 60, "prot": 20}
N_MARKERS = 5
TYPES = ("A", "B", "C")


def markers(role: str, kind: str) -> list[str]:
    """The features that are up in cells of a type."""
    first = N_MARKERS * TYPES.index(kind)
    return [f"{role}{j}" for j in range(first, first + N_MARKERS)]


def marked_cells() -> Cells:
    """240 simulated cells of three types, each with five markers, eightfold up; two batches."""
    random = np.random.default_rng(0)
    kind, batch = np.arange(240) % 3, random.integers(2, size=240)
    counts = {}
    for role, width in WIDTHS.items():
        owner = np.arange(width) // N_MARKERS
        depth = random.lognormal(0, 0.3, (240, 1))
        mean = depth * np.where(owner == kind[:, None], 16.0, 2.0)
        counts[role] = sparse.csr_matrix(random.poisson(mean).astype(np.float32))
    obs = pd.DataFrame(
        {"type": np.array(TYPES)[kind], "batch": [f"b{b}" for b in batch]},
        index=[f"cell{i}" for i in range(240)],
    )
    return Cells(
        counts=counts,
        present={role: np.ones(240, dtype=bool) for role in counts},
        var={
            role: pd.DataFrame(index=[f"{role}{j}" for j in range(n)]) for role, n in WIDTHS.items()
        },
        obs=obs,
        keys=Keys(batch="batch", label="type"),
        name="sim-markers",
        about={"simulated": True},
    )
