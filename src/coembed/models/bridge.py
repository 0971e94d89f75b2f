"""Bridge: cells that lack a modality are moved to where the joint posterior would put them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np

from coembed.data.minibatches import Inputs
from coembed.errors import DataError


def subsets(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the non-empty subsets in binary counting, the last name fastest, all names last."""
    chosen = (
        tuple(name for name, take in zip(names, bits, strict=True) if take)
        for bits in product((False, True), repeat=len(names))
    )
    return [subset for subset in chosen if subset]


def bridge(z: np.ndarray, inputs: Inputs, anchors: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return `z` with incomplete cells predicted into the joint space (cobolt.md section 8).

    One gradient-boosted regression per dimension maps the mean under a subset of modalities to
    the joint mean, learnt on paired cells.

    Args:
        z: (n_cells, K) means under the modalities each cell has.
        inputs: the cells, for what each has.
        anchors: subset ('rna', 'rna+atac', ...) -> (n_paired, K) means of the paired cells under
            it; the last subset is the joint one.
    """
    from sklearn.ensemble import HistGradientBoostingRegressor

    joint = max(anchors, key=lambda subset: subset.count("+"))
    z = z.copy()
    for names in subsets(list(inputs.blocks)):
        subset = "+".join(names)
        has = [inputs.present[name] == (name in names) for name in inputs.blocks]
        rows = np.flatnonzero(np.logical_and.reduce(has))
        if subset == joint or not len(rows):
            continue
        if not len(anchors[joint]):
            raise DataError(
                f"no training cell has all of {joint}, so cells with {subset} alone have no place",
                remedy="Add paired cells to the training data",
            )
        source = z[rows].copy()
        for k in range(z.shape[1]):
            model = HistGradientBoostingRegressor(random_state=0)
            model.fit(anchors[subset], anchors[joint][:, k])
            z[rows, k] = model.predict(source)
    return z
