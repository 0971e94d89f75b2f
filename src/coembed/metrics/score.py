"""The table of scores of one embedding: every metric with its null, its counts and its reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from scipy import sparse

from coembed.errors import DataError, ParameterError
from coembed.metrics.biology import ami, ari, best_partition, label_asw
from coembed.metrics.graph import louvain_partitions, neighbours
from coembed.metrics.silhouette import codes_of
from coembed.metrics.technical import batch_asw, graph_connectivity, scorable_types
from coembed.metrics.trajectory import diffusion_map, trajectory_conservation

MIN_CELLS = 3
"""The least number of labelled cells of which a neighbour graph is made."""


@dataclass(frozen=True)
class Row:
    """One row of the table of `score`, which says what the columns are."""

    metric: str
    value: float = np.nan
    null: float = np.nan
    null_sd: float = np.nan
    normalised: float = np.nan
    n_scored: int = 0
    n_left_out: int = 0
    n_labels: int = 0
    n_batches: int = 0
    undefined: bool = False
    reason: str = ""


def score(
    embedding: np.ndarray,
    *,
    labels: np.ndarray | None,
    batch: np.ndarray | None = None,
    site: np.ndarray | None = None,
    pseudotime: Mapping[str, np.ndarray] | None = None,
    n_permutations: int = 20,
    seed: int = 0,
    min_cells_per_batch: int = 2,
) -> pd.DataFrame:
    """Score an embedding by the review's metrics, with ARI and AMI (metrics.md sections 0-6).

    Cells without a label are left out before anything is computed: every metric needs the label,
    and the neighbour graph is that of the labelled cells. The trajectory then takes the part of
    this graph that has a pseudotime.

    A null permutes the labels (nmi, ari, ami, asw_label, graph_connectivity), the batches or sites
    within each type (asw_batch, asw_site), or the known order within each batch (trajectory). nmi
    chooses its clustering anew for each permutation; ari and ami are taken at that clustering.

    Args:
        embedding: (n, d), finite.
        labels: (n,) cell types, None or NaN for a cell without one; or None.
        batch: (n,) batches, or None.
        site: (n,) laboratories, or None.
        pseudotime: name -> (n,) known order, NaN for a cell outside it. The first is the row
            `trajectory`, another one the row `trajectory_<name>`.
        n_permutations: for each null; 0 for no null, else at least 2.
        seed: of the permutations. The graph and its clusters have the review's fixed seed 0.
        min_cells_per_batch: of the trajectory; 2 as in scib.

    Returns:
        One row per metric: `value`; `null` and `null_sd`, mean and standard deviation over the
        permutations; `normalised`, (value - null) / (1 - null), but value / null for asw_batch and
        asw_site, whose null is the best to be had (section 4); `n_scored` and `n_left_out` cells,
        n together; `n_labels` and `n_batches` among the scored cells (asw_site counts sites);
        `undefined`, the value is no measurement; `reason`, why it is not, why another column is
        NaN, or what makes the value doubtful.

    Raises:
        DataError: a value that is not finite, a wrong shape, a cell without batch or site.
        ParameterError: `n_permutations` is 1 or negative.
    """
    if n_permutations < 0 or n_permutations == 1:
        raise ParameterError(
            f"n_permutations is {n_permutations}", remedy="Use 0 for no null, or at least 2"
        )
    embedding = _checked_embedding(embedding)
    n = len(embedding)
    kinds = np.full(n, None) if labels is None else _checked_column("labels", labels, n)
    batch = None if batch is None else _complete("batch", batch, n)
    site = None if site is None else _complete("site", site, n)
    orders = {name: _checked_order(name, time, n) for name, time in (pseudotime or {}).items()}
    orders = orders or {"": np.full(n, np.nan)}
    trajectories = ["trajectory", *(f"trajectory_{name}" for name in list(orders)[1:])]

    known = ~pd.isna(kinds)
    if known.sum() < MIN_CELLS:
        reason = (
            f"fewer than {MIN_CELLS} cells have a label" if known.any() else "no cell has a label"
        )
        names = ["nmi", "ari", "ami", "asw_label", *trajectories]
        names += ["asw_batch", "asw_site", "graph_connectivity"]
        rows = [Row(name, n_left_out=n, undefined=True, reason=reason) for name in names]
        return pd.DataFrame([asdict(row) for row in rows])

    cells = _Cells(
        n_all=n,
        embedding=embedding[known],
        labels=kinds[known].astype(str),
        batch=None if batch is None else batch[known],
        graph=neighbours(embedding[known]),
        n_permutations=n_permutations,
        seed=seed,
    )
    rows = [
        *_label_rows(cells),
        *(
            _trajectory_row(cells, name, time[known], min_cells_per_batch, stream)
            for stream, (name, time) in enumerate(
                zip(trajectories, orders.values(), strict=True), 3
            )
        ),
        _width_row(cells, "asw_batch", "batch", cells.batch, stream=1),
        _width_row(cells, "asw_site", "site", None if site is None else site[known], stream=2),
        _connectivity_row(cells),
    ]
    return pd.DataFrame([asdict(row) for row in rows])


@dataclass(frozen=True, eq=False)
class _Cells:
    """The labelled cells, and how to permute them.

    `labels` (n,) str; `batch` (n,) str or None; `graph` (n, n); `n_all` counts the others too.
    """

    n_all: int
    embedding: np.ndarray
    labels: np.ndarray
    batch: np.ndarray | None
    graph: sparse.csr_matrix
    n_permutations: int
    seed: int

    @cached_property
    def labelings(self) -> np.ndarray:
        """(1 + n_permutations, n) int, the labels, then their permutations."""
        return self.with_null(codes_of(self.labels), np.zeros(len(self.labels)), stream=0)

    def with_null(self, values: np.ndarray, within: np.ndarray, stream: int) -> np.ndarray:
        """(1 + n_permutations, n): the values, then the values permuted within groups.

        Each stream has its own random numbers: the permutations of one metric do not depend on
        which others there are.
        """
        rng = np.random.default_rng([self.seed, stream])
        places = np.argsort(within, kind="stable")
        result = np.tile(values, (1 + self.n_permutations, 1))
        for permuted in result[1:]:
            permuted[places] = values[np.lexsort((rng.random(len(values)), within))]
        return result

    def row(
        self,
        metric: str,
        values: np.ndarray,
        *,
        scored: np.ndarray | None = None,
        groups: np.ndarray | None = None,
        undefined: bool = False,
        reason: str = "",
        null_is_best: bool = False,
    ) -> Row:
        """Make a row of a value and its null.

        Args:
            metric: its name.
            values: the value, then its values under permutation (NaN: not defined).
            scored: (n,) bool, the cells that counted; None is all.
            groups: (n,) what to count as batches; None is the batches.
            undefined: the value is no measurement.
            reason: why, or a caution.
            null_is_best: the scale runs from 0 to the null, not from the null to 1.
        """
        scored = np.ones(len(self.labels), dtype=bool) if scored is None else scored
        groups = self.batch if groups is None else groups
        value, null, null_sd, normalised = float(values[0]), np.nan, np.nan, np.nan
        nulls = values[1:][np.isfinite(values[1:])]
        remarks = [reason] if reason else []
        if not undefined and len(nulls) < 2:
            remarks.append("no null: fewer than two permutations can be scored")
        elif not undefined:
            null, null_sd = float(nulls.mean()), float(nulls.std(ddof=1))
            zero, one = (0.0, null) if null_is_best else (null, 1.0)
            if one > zero:
                normalised = (value - zero) / (one - zero)
            else:
                remarks.append(f"not normalised: the null is {null:g}")
        return Row(
            metric,
            value,
            null,
            null_sd,
            normalised,
            n_scored=int(scored.sum()),
            n_left_out=self.n_all - int(scored.sum()),
            n_labels=len(np.unique(self.labels[scored])),
            n_batches=0 if groups is None else len(np.unique(groups[scored])),
            undefined=undefined,
            reason="; ".join(remarks),
        )

    def no_row(self, metric: str, reason: str) -> Row:
        """Make the row of a metric that cannot be computed."""
        nothing = np.zeros(len(self.labels), dtype=bool)
        return self.row(metric, np.array([np.nan]), scored=nothing, undefined=True, reason=reason)


def _label_rows(cells: _Cells) -> list[Row]:
    """The rows nmi, ari, ami, asw_label."""
    labelings, n_labels = cells.labelings, len(np.unique(cells.labels))
    if n_labels < 2:
        metrics = ("nmi", "ari", "ami", "asw_label")
        return [cells.no_row(metric, "fewer than two labels") for metric in metrics]
    partitions = louvain_partitions(cells.graph)
    best, chosen = best_partition(labelings, partitions)
    rows = [cells.row("nmi", best)]
    for metric, agreement in (("ari", ari), ("ami", ami)):
        # No clustering above NMI 0 means nothing was found: 0, as for nmi.
        values = [
            agreement(labeling, partitions[index]) if index >= 0 else 0.0
            for labeling, index in zip(labelings, chosen, strict=True)
        ]
        rows.append(cells.row(metric, np.array(values)))
    if n_labels == len(cells.labels):
        return [*rows, cells.no_row("asw_label", "every cell has a label of its own")]
    return [*rows, cells.row("asw_label", label_asw(cells.embedding, labelings))]


def _trajectory_row(
    cells: _Cells, metric: str, time: np.ndarray, min_cells_per_batch: int, stream: int
) -> Row:
    """The row of one known order, (n,) with NaN outside it."""
    from scipy.sparse.linalg import ArpackError

    ordered = np.isfinite(time)
    if not ordered.any():
        return cells.no_row(metric, "no labelled cell has a pseudotime")
    labels = cells.labels[ordered]
    batch = np.full(len(labels), "") if cells.batch is None else cells.batch[ordered]
    try:
        diffusion = diffusion_map(cells.graph[ordered][:, ordered])
    except ArpackError as error:
        return cells.no_row(metric, f"the diffusion map cannot be computed ({error})")
    value, *null = (
        trajectory_conservation(diffusion, labels, reference, batch, min_cells_per_batch)
        for reference in cells.with_null(time[ordered], batch, stream)
    )
    scored = np.zeros(len(time), dtype=bool)
    scored[ordered] = value.counted
    return cells.row(
        metric,
        np.array([value.value, *(one.value if one.undefined is None else np.nan for one in null)]),
        scored=scored,
        undefined=value.undefined is not None,
        reason=value.undefined or value.caution or "",
    )


def _width_row(
    cells: _Cells, metric: str, what: str, groups: np.ndarray | None, stream: int
) -> Row:
    """The row asw_batch or asw_site; `groups`, (n,), are the batches or the sites."""
    if groups is None:
        return cells.no_row(metric, f"no {what} is named")
    if len(np.unique(groups)) < 2:
        return cells.no_row(metric, f"one {what} only")
    scorable = scorable_types(cells.labels, groups)
    if not scorable.any():
        return cells.no_row(metric, f"no cell type has two {what} groups and more cells than these")
    return cells.row(
        metric,
        batch_asw(cells.embedding, cells.labels, cells.with_null(groups, cells.labels, stream)),
        scored=scorable[codes_of(cells.labels)],
        groups=groups,
        null_is_best=True,
    )


def _connectivity_row(cells: _Cells) -> Row:
    """The row graph_connectivity."""
    return cells.row("graph_connectivity", graph_connectivity(cells.graph, cells.labelings))


def _checked_embedding(embedding: np.ndarray) -> np.ndarray:
    """The embedding as (n, d) floats, its precision kept."""
    embedding = np.asarray(embedding)
    if embedding.ndim != 2 or 0 in embedding.shape:
        raise DataError(
            f"the embedding has shape {embedding.shape}",
            remedy="Pass one row per cell and at least one column",
        )
    if embedding.dtype not in (np.float32, np.float64):
        embedding = embedding.astype(np.float64)
    # No squared distance exceeds 4 max |x|^2; UMAP and scikit-learn hold it in single precision.
    with np.errstate(over="ignore", invalid="ignore"):
        reach = 4 * np.square(embedding, dtype=np.float64).sum(axis=1)
    usable = reach < np.finfo(np.float32).max
    if not usable.all():
        raise DataError(
            f"{(~usable).sum()} of {len(usable)} cells have values that are not finite or too "
            f"large for a distance, the first is cell {usable.argmin()} (counted from 0)",
            where="embedding",
            remedy="The model has probably diverged; score an embedding of its last good state",
        )
    return embedding


def _checked_column(name: str, values: np.ndarray, n: int) -> np.ndarray:
    """One value per cell, (n,) object."""
    column = np.asarray(values, dtype=object)
    if column.shape != (n,):
        raise DataError(
            f"has shape {column.shape}, the embedding has {n} cells",
            where=name,
            remedy="Pass one value per cell",
        )
    return column


def _complete(name: str, values: np.ndarray, n: int) -> np.ndarray:
    """One value for every cell, (n,) str."""
    column = _checked_column(name, values, n)
    missing = pd.isna(column)
    if missing.any():
        raise DataError(
            f"missing for {missing.sum()} cells, the first is cell {missing.argmax()}",
            where=name,
            remedy="Name the group of every cell, or leave these cells out",
        )
    return column.astype(str)


def _checked_order(name: str, values: np.ndarray, n: int) -> np.ndarray:
    """One time per cell, (n,) float, NaN outside the order."""
    column = _checked_column(name, values, n)
    try:
        time = column.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(str(error), where=name, remedy="Pass numbers, NaN outside it") from error
    if np.isinf(time).any():
        raise DataError(
            f"infinite for cell {np.isinf(time).argmax()}",
            where=name,
            remedy="Use NaN for a cell outside the order",
        )
    return time
