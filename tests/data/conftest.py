"""Simulated cells that the tests of features and views share."""

from __future__ import annotations

import pytest

from coembed.data.cells import Cells
from coembed.data.simulate import simulate


@pytest.fixture(scope="session")
def multiome() -> Cells:
    return simulate("multiome", 90, n_types=3, n_batches=2, n_sites=1, n_genes=80, n_peaks=200)


@pytest.fixture(scope="session")
def cite() -> Cells:
    return simulate(
        "cite", 90, n_types=3, n_batches=2, n_sites=1, n_genes=150, n_proteins=15, depth=4
    )
