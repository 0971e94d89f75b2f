"""Small blocks for the tests of views and features."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy import sparse

from coembed.data.pipeline import Block, Step


def block(
    x: object,
    *,
    totals: object = None,
    present: object = None,
    names: list[str] | None = None,
    dense: bool = False,
) -> Block:
    values = np.asarray(x, dtype=np.float32)
    return Block(
        x=values if dense else sparse.csr_matrix(values),
        var=pd.DataFrame(index=names or [f"f{i}" for i in range(values.shape[1])]),
        totals=values.sum(axis=1) if totals is None else np.asarray(totals, dtype=np.float32),
        present=np.ones(len(values), bool) if present is None else np.asarray(present, bool),
    )


def values(x: object) -> np.ndarray:
    return x.toarray() if sparse.issparse(x) else np.asarray(x)


def fitted(step: Step, on: Block) -> Step:
    step.fit(on)
    return step


def run(step: Step, on: Block) -> np.ndarray:
    return values(fitted(step, on).apply(on).x)
