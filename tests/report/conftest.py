from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session", autouse=True)
def flat_umaps() -> Iterator[None]:
    """Take the first two columns for a UMAP, whose functions take long to compile."""
    from coembed.report import umaps

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(umaps, "_umap", lambda embedding: embedding[:, :2].astype(np.float32))
        yield
