"""Simulated cells with known markers, and systems trained on them."""

from __future__ import annotations

import pytest
from markers import marked_cells

from coembed.data.cells import Cells
from coembed.models import get_model
from coembed.models.base import Model


@pytest.fixture(scope="session")
def cells() -> Cells:
    return marked_cells()


@pytest.fixture(scope="session", params=["cobolt", "scmm"])
def trained(request: pytest.FixtureRequest, cells: Cells) -> Model:
    model = get_model(request.param)(cells, n_latent=4, max_epochs=150)
    return model.train(progress=False, device="cpu")


@pytest.fixture(scope="session")
def linear(cells: Cells) -> Model:
    """A system without decoder or posterior."""
    return get_model("pca")(cells, n_latent=3).train(progress=False)
