"""Differential features between two groups: what the model says, and what the counts say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch

from coembed.data.pipeline import block_of
from coembed.data.views import LogNormalise
from coembed.errors import CoembedError, ParameterError, did_you_mean, warn
from coembed.explain.levels import PSEUDOCOUNT, log2_fold
from coembed.models.generate import CHUNK, decoded, require
from coembed.models.system import System
from coembed.train.loop import seeded

if TYPE_CHECKING:
    from scipy import sparse

    from coembed.data.cells import Cells
    from coembed.data.minibatches import Inputs
    from coembed.models.base import Model

DELTAS = {"fold": 0.5, "difference": 0.05}
"""Effect -> the smallest that matters by default. PeakVI's 0.05; for folds twice totalVI's, whose
0.25 finds differences that are there by chance where cells are few (see the caveats below)."""


def differential_features(
    model: Model,
    role: str,
    group_a: np.ndarray,
    group_b: np.ndarray | None = None,
    data: Any = None,
    *,
    effect: Literal["fold", "difference"] = "fold",
    delta: float | None = None,
    pseudocount: float = PSEUDOCOUNT,
    batches: Literal["shared", "own"] = "shared",
    n_samples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    r"""Return how every feature differs between two groups, by the model and by the counts.

    The model's part is the "change" mode of scVI and totalVI (Boyeau et al., bioRxiv 794289, 2019).
    Cells are drawn at random from both groups, each with one draw of its posterior, and decoded;
    the effect is that of a cell of `a` against one of `b`. The probability is the larger of
    :math:`P(\mathrm{effect} > \delta)` and :math:`P(\mathrm{effect} < -\delta)`, not
    :math:`P(|\mathrm{effect}| > \delta)`: two cells of one type differ as well, one way or the
    other. Between random halves of a type of BMMC cells the latter reaches 0.89, the former 0.57,
    and it cannot pass 1/2 by more than chance. So a discovery is a feature of which nearly every
    cell of one group has more than nearly every cell of the other.

    Caveats. The FDR is the model's own belief, and takes the decoder's weights as known: what
    differs by chance between the groups is learnt and believed. With 80 simulated cells a group
    and a delta of 0.25, 6 of 46 discoveries of Cobolt and scMM were false; none with a delta of
    0.5, nor of those with a Wilcoxon q below 0.05 as well. Wilcoxon in turn takes cells for
    replicates, so its q is far too small where the groups are of different donors or samples
    (Squair et al., Nature Communications 12:5692, 2021). Neither counts for groups that are
    clusters of this very embedding: they were made to differ.

    Args:
        model: a trained model that decodes features and has a posterior.
        role: the modality to compare.
        group_a: (n_cells,) bool, or rows of cells.
        group_b: the same; None for all other cells.
        data: cells with the features of the training data; None for the training cells.
        effect: 'fold' (log2 of the levels' ratio) or 'difference' (of the levels; for a system that
            decodes chromatin into probabilities of being open).
        delta: the smallest effect that matters; by default 0.5 for a fold, 0.05 for a difference.
        pseudocount: of a fold, see `log2_fold`.
        batches: 'shared' decodes every draw in each batch that both groups have and takes the
            mean, so that batches do not count; 'own' decodes it in the cell's batch.
        n_samples: pairs of cells.
        seed: of the draws.

    Returns:
        One row per feature, the most probable first: `feature`; of the model `effect` (median of
        the pairs), `probability`, `fdr` (expected share of false ones among this row and those
        above it) and the mean levels `level_a`, `level_b` (the system's unit); of the measured
        cells' counts `mean_a`, `mean_b` (of log(1 + counts per 10,000)), `detected_a`, `detected_b`
        (share of cells with a count), `wilcoxon_p`, and `wilcoxon_q` after Benjamini and Hochberg.
        The latter are NaN for decoded features that were not counted, such as gene activities.

    Raises:
        CoembedError: the system does not decode features, or has no posterior to draw from.
        ParameterError: no such modality; groups that overlap or have fewer than two cells; a value
            that is not allowed.
    """
    _require_posterior(model)
    model.check_decodes(role)
    for what, asked, known in (
        ("effect", effect, list(DELTAS)),
        ("choice of batches", batches, ["shared", "own"]),
    ):
        if asked not in known:
            raise ParameterError(f"no {what} '{asked}'", remedy=did_you_mean(asked, known))
    delta = DELTAS[effect] if delta is None else delta
    if n_samples < 1 or delta < 0 or pseudocount <= 0:
        raise ParameterError(
            f"{n_samples} samples, a delta of {delta:g} and a pseudocount of {pseudocount:g} "
            "are not allowed together",
            remedy="Take one sample or more, a delta of 0 or more and a pseudocount above 0",
        )
    cells = model.cells_of(data)
    a = _rows(group_a, cells.n_cells, "a")
    others = np.setdiff1d(np.arange(cells.n_cells), a)
    b = _rows(others if group_b is None else group_b, cells.n_cells, "b")
    if len(np.intersect1d(a, b)):
        raise ParameterError(
            f"{len(np.intersect1d(a, b))} cells are in both groups",
            remedy="Choose groups without common cells",
        )
    inputs = model.inputs_of(cells, None)
    shared = _shared(inputs, a, b) if batches == "shared" else []
    random = np.random.default_rng(seed)
    with seeded(seed, model.device):
        of_a, of_b = (
            _drawn(model, inputs, random.choice(rows, n_samples), shared, role) for rows in (a, b)
        )
    if effect == "difference" and (top := max(of_a.max(), of_b.max())) <= delta:
        raise ParameterError(
            f"no level of '{role}' is above {top:.2g}, so that no difference can pass {delta:g}",
            where=model.card.title,
            remedy="Compare by 'fold', or with a smaller delta",
        )
    change = of_a - of_b if effect == "difference" else log2_fold(of_a, of_b, pseudocount)
    probability = np.maximum((change > delta).mean(axis=0), (change < -delta).mean(axis=0))
    names = model.decoded_features[role]
    table = pd.DataFrame(
        {
            "feature": names,
            "effect": np.median(change, axis=0),
            "probability": probability,
            "fdr": expected_fdr(probability),
            "level_a": of_a.mean(axis=0),
            "level_b": of_b.mean(axis=0),
        }
    )
    table = table.join(counted(cells, role, a, b).reindex(names), on="feature")
    order = np.lexsort((-table["effect"].abs(), -table["probability"]))
    return table.iloc[order].reset_index(drop=True)


def _require_posterior(model: Model) -> None:
    require(model, "denoise", "decode features")
    if type(model).posterior is System.posterior:
        from coembed.models import get_model, model_names

        systems = {name: get_model(name) for name in model_names()}
        able = [
            name
            for name, system in systems.items()
            if "denoise" in system.card.abilities and system.posterior is not System.posterior
        ]
        raise CoembedError(
            f"{model.card.title} has no posterior to draw from",
            remedy=f"These have: {', '.join(able)}",
        )


def _rows(group: np.ndarray, n_cells: int, name: str) -> np.ndarray:
    """Return the different rows of a group, given as such or as a mask."""
    group = np.asarray(group)
    if group.dtype == bool and group.shape != (n_cells,):
        raise ParameterError(
            f"the mask of group {name} has shape {group.shape}, the data have {n_cells} cells",
            remedy="Give a value for every cell",
        )
    rows = np.flatnonzero(group) if group.dtype == bool else np.unique(group)
    if len(rows) < 2 or rows.min() < 0 or rows.max() >= n_cells:
        raise ParameterError(
            f"group {name} does not name two or more of the {n_cells} cells",
            remedy="Give a mask or rows from 0",
        )
    return rows


def _shared(inputs: Inputs, a: np.ndarray, b: np.ndarray) -> list[int]:
    """Return the codes of the batches that both groups have."""
    shared = np.intersect1d(inputs.batch[a], inputs.batch[b]).tolist()
    if not shared:
        warn(
            "the groups have no batch in common, so that effects of the batch cannot be told apart",
            instead="every cell is decoded in its own batch",
        )
    return list(shared)


@torch.no_grad()
def _drawn(
    model: Model, inputs: Inputs, rows: np.ndarray, codes: list[int], role: str
) -> np.ndarray:
    """Return the levels of a posterior draw of each row, mean over `codes`, (n, n_features)."""
    parts = []
    for batch in inputs.chunks(rows, CHUNK):
        z = model.posterior(batch).sample()
        told = [torch.full_like(batch.codes, code) for code in codes] or [batch.codes]
        parts.append(decoded(model, z, told, role))
    return np.concatenate(parts)


def expected_fdr(probability: np.ndarray) -> np.ndarray:
    """Return, for each feature, the mean of 1 - p over it and all that are more probable.

    Features of the same probability stand or fall together.
    """
    order = np.argsort(-probability, kind="stable")
    falling = probability[order]
    fdr = np.cumsum(1 - falling) / np.arange(1, len(order) + 1)
    last = np.searchsorted(-falling, -probability, side="right") - 1
    result: np.ndarray = fdr[last]
    return result


def counted(cells: Cells, role: str, a: np.ndarray, b: np.ndarray) -> pd.DataFrame:
    """Return what the counts of the measured cells say of groups a and b, by feature of `role`."""
    from scipy.stats import false_discovery_control, mannwhitneyu

    block = block_of(cells, role)
    x = LogNormalise().apply(block).x.astype(np.float64)
    of_a, of_b = (x[rows[block.present[rows]]].tocsc() for rows in (a, b))
    p = np.full(x.shape[1], np.nan)
    if of_a.shape[0] and of_b.shape[0]:
        for columns in np.array_split(np.arange(x.shape[1]), -(-x.shape[1] // CHUNK)):
            dense_a, dense_b = (part[:, columns].toarray() for part in (of_a, of_b))
            p[columns] = mannwhitneyu(dense_a, dense_b, axis=0, method="asymptotic").pvalue
        p = np.nan_to_num(p, nan=1.0)  # one value in all cells: no difference
    q = false_discovery_control(p) if np.isfinite(p).all() else p
    table = {
        f"{what}_{group}": _mean(values)
        for what, change in (("mean", lambda m: m), ("detected", lambda m: m.sign()))
        for group, values in (("a", change(of_a)), ("b", change(of_b)))
    }
    return pd.DataFrame({**table, "wilcoxon_p": p, "wilcoxon_q": q}, index=cells.var[role].index)


def _mean(x: sparse.csc_matrix) -> np.ndarray:
    """Return the mean of every column, NaN where there is no row."""
    n = x.shape[0]
    return np.asarray(x.sum(axis=0)).ravel() / n if n else np.full(x.shape[1], np.nan)
