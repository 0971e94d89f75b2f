from __future__ import annotations

import sys
from pathlib import Path

import pytest

# The workers' server imports the fake executors by this name too.
sys.path.insert(0, str(Path(__file__).parent))

import fakes

from coembed.data.cells import Cells


@pytest.fixture
def cells() -> Cells:
    return fakes.small_cells()


@pytest.fixture
def fake_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let plans resolve the parameters of the fakes' models."""
    monkeypatch.setattr("coembed.study.plan.resolve_params", fakes.resolve_params)
