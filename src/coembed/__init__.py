"""Joint embeddings of single-cell multi-omics data, and how many cells they need.

    import coembed

    model = coembed.Cobolt("cells.h5mu", batch_key="batch")
    model.train()
    model.get_latent_representation()

Names are imported when they are first used, so that `import coembed` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "PCA": "coembed.models.pca",
    "SVD": "coembed.models.svd",
    "Cobolt": "coembed.models.cobolt",
    "Portal": "coembed.models.portal",
    "ScMM": "coembed.models.scmm",
    "TotalVI": "coembed.models.totalvi",
    "MultiVI": "coembed.models.multivi",
    "SCALEX": "coembed.models.scalex",
    "ScMVP": "coembed.models.scmvp",
    "DAVAE": "coembed.models.davae",
    "Model": "coembed.models.base",
    "get_model": "coembed.models",
    "load_model": "coembed.models.saving",
    "Cells": "coembed.data.cells",
    "as_cells": "coembed.data.read",
    "load_pilot": "coembed.data.pilots",
    "simulate": "coembed.data.simulate",
    "to_mudata": "coembed.data.write",
    "score": "coembed.metrics",
    "score_translation": "coembed.metrics",
    "foscttm": "coembed.metrics",
    "archetypes": "coembed.explain",
    "traversal": "coembed.explain",
    "differential_features": "coembed.explain",
    "Plan": "coembed.study",
    "run_study": "coembed.study",
    "build_report": "coembed.report",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'coembed' has no attribute '{name}'")
    attribute = "run" if name == "run_study" else name
    return getattr(import_module(_HOME[name]), attribute)


def __dir__() -> list[str]:
    return __all__
