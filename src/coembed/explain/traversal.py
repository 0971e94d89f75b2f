"""Latent traversal: what each dimension of a trained model means in features."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import rankdata

from coembed.errors import ParameterError
from coembed.explain.levels import log2_fold
from coembed.models.generate import decoded, require

if TYPE_CHECKING:
    from coembed.models.base import Model

ROUNDING = 1e-5
"""A path whose levels differ by less than this share of the largest is constant: float32."""


def traversal(
    model: Model,
    role: str,
    data: Any = None,
    *,
    at: np.ndarray | None = None,
    steps: int = 20,
    quantiles: tuple[float, float] = (0.05, 0.95),
) -> pd.DataFrame:
    """Move each latent dimension through the cells' range and say which features follow.

    After scMM's pseudocells (Minoura et al. 2021; specs/scmm.md section 8), with two differences:
    the path is where the cells are, not 5 prior standard deviations about 0, and what a feature
    gains on it stands beside the correlation. Along a path nearly every feature is monotone, so a
    high correlation alone says little: read `spearman` together with `change`.

    Args:
        model: a trained model that decodes features.
        role: the modality to decode.
        data: the cells that say what the range is; None for the training cells.
        at: (m,) rows of cells that keep their other dimensions and their batch; levels are means
            over them. None is one point at the cells' median, mean over the batches they are of.
        steps: points on each path, 3 or more.
        quantiles: of the cells' positions, where each path begins and ends.

    Returns:
        One row per dimension and feature, in each dimension the largest |change| first:
        `dimension` (from 0), `feature`, `spearman` (of level and position; 0 where the level
        stands still), `low` and `high` (level at the path's ends, in the system's unit) and
        `change` (log2 of high over low, see `log2_fold`; its sign is the direction).

    Raises:
        CoembedError: the system does not decode features.
        ParameterError: no such modality, or a path that cannot be walked.
    """
    require(model, "denoise", "decode features")
    model.check_decodes(role)
    if steps < 3 or not 0 <= quantiles[0] < quantiles[1] <= 1:
        raise ParameterError(
            f"{steps} steps from quantile {quantiles[0]:g} to {quantiles[1]:g} are no path",
            remedy="Take 3 steps or more between two rising quantiles",
        )
    inputs = model.inputs_of(data, None)
    z = model.latent(inputs)
    if at is None:
        codes = np.unique(inputs.batch)
        base = np.tile(np.median(z, axis=0), (len(codes), 1))
    else:
        codes, base = inputs.batch[at], z[at]
        if not len(base):
            raise ParameterError("no cell to start from", remedy="Name some rows in `at`")
    first, last = np.quantile(z, quantiles, axis=0)
    paths = np.linspace(first, last, steps)
    tables = []
    for dimension, path in enumerate(paths.T):
        points = np.tile(base, (steps, 1)).astype(np.float32)
        points[:, dimension] = np.repeat(path, len(base))
        told = torch.from_numpy(np.tile(codes, steps)).to(model.device)
        each = decoded(model, torch.from_numpy(points).to(model.device), [told], role)
        levels = each.reshape(steps, len(base), -1).mean(axis=1)
        table = pd.DataFrame(
            {
                "dimension": dimension,
                "feature": model.decoded_features[role],
                "spearman": spearman(levels),
                "low": levels[0],
                "high": levels[-1],
                "change": log2_fold(levels[-1], levels[0]),
            }
        )
        tables.append(table.sort_values("change", key=abs, ascending=False, kind="stable"))
    return pd.concat(tables, ignore_index=True)


def spearman(levels: np.ndarray) -> np.ndarray:
    """Return the rank correlation of each column of `levels`, (steps, n_features), with the row.

    A column that stands still, up to rounding, has none: 0.
    """
    ranks = rankdata(levels, axis=0) - (len(levels) + 1) / 2
    place = np.arange(len(levels)) - (len(levels) - 1) / 2
    norm = np.sqrt((ranks**2).sum(axis=0) * (place**2).sum())
    still = np.ptp(levels, axis=0) <= ROUNDING * np.abs(levels).max(axis=0)
    rho: np.ndarray = np.where(still, 0, place @ ranks / np.where(still, 1, norm))
    return rho
