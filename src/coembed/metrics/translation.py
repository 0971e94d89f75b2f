"""How well a predicted modality agrees with the measured one, beside what needs no prediction."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from scipy import sparse

from coembed.errors import DataError, ParameterError, did_you_mean

Kind = Literal["continuous", "binary"]
Matrix = Any
"""A matrix, np.ndarray or sparse.csc_matrix; a vector only where its shape is asked for."""

Contest = dict[str, np.ndarray]
"""Scores by column of the table: 'value', 'baseline', 'null' and, with a depth, 'depth_only'."""

PAIRS = {
    "value": ("truth", "prediction"),
    "baseline": ("truth", "baseline"),
    "null": ("permuted", "prediction"),
    "depth_only": ("truth", "depth"),
}
"""Column of the table -> what it compares. Cells are permuted in the truth: the same pairs as
permuting the prediction, which then is ranked once."""

BLOCK = 2_000_000
"""About how many entries of a matrix are held dense, in double precision, at a time."""

LARGEST = np.float64(1e100)
"""Squares of values below this can be summed. No Python float: it would overflow in float32."""


@dataclass(frozen=True)
class _Row:
    """One row of the table of `score_translation`, which says what the columns are."""

    metric: str
    value: float
    value_defined: float
    baseline: float
    null: float
    depth_only: float
    n_scored: int
    n_undefined: int
    reason: str


def score_translation(
    truth: np.ndarray | sparse.csr_matrix,
    prediction: np.ndarray,
    *,
    kind: Kind,
    baseline: np.ndarray,
    depth: np.ndarray | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Score one predicted modality on held-out cells (translation_metrics.md sections 0-2).

    The values are compared as they are, so truth and prediction must be in one space: for genes
    `log_normalised` of both, for proteins `clr` or `log1p` of both; with kind 'binary' (chromatin)
    a truth above 0 is open, and the prediction is any score that rises with openness.

    Rows for 'continuous': rmse; pearson_overall, one correlation of all entries; pearson and
    spearman `_per_feature` (over cells) and `_per_cell` (over features), means of the single
    correlations; skill = 1 - MSE / MSE of the baseline. A correlation with something constant is
    undefined and counts as 0, as in openproblems; the mean without them, as in Polarbear, is
    `value_defined`.

    Rows for 'binary': auroc_per_feature, auroc_per_cell, mean areas under the ROC curve over those
    with both open and closed entries (the others are undefined and left out, a constant prediction
    scores 0.5); auroc_overall and average_precision_overall (the step-wise sum, not the trapezoid)
    of all entries; normalised_average_precision_overall, (AP - pi) / (1 - pi), pi the open share.

    Args:
        truth: (n, f), dense or sparse, finite.
        prediction: (n, f), finite.
        kind: 'continuous' or 'binary'.
        baseline: (f,) mean of each feature over the training cells, in the space of the truth
            (for 'binary' the share of open cells): a prediction that ignores its input.
        depth: (n,) total counts of each cell in the source modality, for 'binary' alone: a
            prediction that knows nothing else of the cell.
        seed: of the permutation.

    Returns:
        One row per metric: `value`; `value_defined`, without those that are undefined; the same
        score as `value` of the `baseline`, of the prediction with its cells permuted (`null`, one
        permutation) and of the depth (`depth_only`, NaN without one); `n_scored` and `n_undefined`
        features, cells or, overall, entries; `reason`, what is undefined and why. `value` is NaN
        where the truth leaves nothing to score.

    Raises:
        DataError: shapes that do not fit, values that are not finite numbers.
        ParameterError: an unknown kind, or a depth for 'continuous'.
    """
    if kind not in get_args(Kind):
        raise ParameterError(f"no kind '{kind}'", remedy=did_you_mean(kind, get_args(Kind)))
    if kind == "continuous" and depth is not None:
        raise ParameterError("a depth is compared with binary targets only", remedy="Leave it out")
    known = _checked("truth", truth)
    n, f = known.shape
    known = sparse.csc_matrix(known > 0, dtype=np.float32) if kind == "binary" else known
    arrays: dict[str, Matrix] = {
        "truth": known,
        "permuted": known[np.random.default_rng(seed).permutation(n)],
        "prediction": _dense(_checked("prediction", prediction, (n, f))),
        "baseline": _checked("baseline", baseline, (f,))[None],
    }
    if depth is not None:
        arrays["depth"] = _checked("depth", depth, (n,))[:, None]
    rows = _continuous_rows(arrays) if kind == "continuous" else _binary_rows(arrays)
    return pd.DataFrame([asdict(row) for row in rows])


def log_normalised(
    x: np.ndarray | sparse.csr_matrix, totals: np.ndarray | None = None, scale: float = 1e4
) -> np.ndarray | sparse.csr_matrix:
    """Return log(1 + scale x / total): counts, shares or expected levels of genes in one space.

    Args:
        x: (n, f) at least 0, dense or sparse; so is the result (CSR), float64.
        totals: (n,); None is the sum over the f features. Without it the measured counts of a
            cell and a decoded profile in any unit are brought to the same scale.
        scale: the total that all cells are given; a cell whose total is 0 stays 0.

    Raises:
        DataError: a value is negative or not finite, totals of another length.
    """
    counts = _checked_counts(x)
    sums = np.asarray(counts.sum(axis=1)).ravel() if totals is None else totals
    sums = _checked("totals", sums, counts.shape[:1])
    factors = np.divide(scale, sums, out=np.zeros(len(sums)), where=sums > 0)
    if isinstance(counts, sparse.csc_matrix):
        return sparse.csr_matrix(sparse.diags(factors) @ counts).log1p()
    return np.log1p(factors[:, None] * counts)


def clr(x: np.ndarray | sparse.csr_matrix) -> np.ndarray:
    """Return log(1 + x / exp(mean over features of log(1 + x))), the CLR of Seurat and muon.

    It is not free of the scale: a decoded profile must be in counts, as the measured one is.

    Args:
        x: (n, f) counts of proteins, dense or sparse; the result is dense, float64.

    Raises:
        DataError: a value is negative or not finite.
    """
    counts = _dense(_checked_counts(x))
    return np.log1p(counts * np.exp(-np.log1p(counts).mean(axis=1, keepdims=True)))


def correlation_matrix_distance(truth: np.ndarray, prediction: np.ndarray) -> float:
    """Return 1 - tr(R S) / (|R| |S|), R and S the correlations between features over cells.

    0 where both have the same structure, 1 where none is shared (CMD, translation_metrics.md
    section 1). Pass transposed matrices for the correlations between cells. A constant feature
    has correlation 0 with all others and itself; NaN if all are constant.

    Args:
        truth: (n, f), dense or sparse, finite.
        prediction: (n, f), finite.

    Raises:
        DataError: shapes that differ, values that are not finite numbers.
    """
    known = _checked("truth", truth)
    scaled = []
    for x in (known, _checked("prediction", prediction, known.shape)):
        centred = _centred(_dense(x).astype(np.float64))
        norm = np.sqrt((centred**2).sum(axis=0))
        scaled.append(np.divide(centred, norm, out=np.zeros_like(centred), where=norm > 0))
    a, b = scaled
    # tr(A'A B'B) = |A B'|^2, the smaller of the two matrices of products: (n, n) or (f, f).
    wide = a.shape[1] > a.shape[0]
    shared = ((a @ b.T) ** 2).sum() if wide else ((a.T @ a) * (b.T @ b)).sum()
    norms = [np.linalg.norm(x @ x.T if wide else x.T @ x) for x in scaled]
    with np.errstate(invalid="ignore"):
        return float(1 - shared / np.float64(norms[0] * norms[1]))


def _continuous_rows(arrays: dict[str, Matrix]) -> list[_Row]:
    """The rows of 'continuous'."""
    n, f = arrays["truth"].shape
    mse, pearson = _overall_agreement(arrays)
    varies = np.array([_varies(arrays["truth"])])
    rows = [
        _row("rmse", {name: np.sqrt(error) for name, error in mse.items()}, each=n * f),
        _correlation_row("pearson_overall", pearson, varies, "entries", each=n * f),
    ]
    for unit, sides in (("feature", arrays), ("cell", _transposed(arrays))):
        correlations, varies = _correlations(sides)
        rows += [
            _correlation_row(f"{method}_per_{unit}", contest, varies, f"{unit}s")
            for method, contest in correlations.items()
        ]
    least = mse["baseline"]
    skill = {
        name: 1 - np.divide(error, least, out=np.full(1, np.nan), where=least > 0)
        for name, error in mse.items()
    }
    reason = "" if least > 0 else "the baseline has no error"
    return [*rows, _row("skill", skill, each=n * f, reason=reason)]


def _binary_rows(arrays: dict[str, Matrix]) -> list[_Row]:
    """The rows of 'binary'."""
    n, f = arrays["truth"].shape
    rows = []
    for unit, sides in (("feature", arrays), ("cell", _transposed(arrays))):
        contest = _aurocs(sides)
        left_out = np.isnan(contest["value"]).sum()
        reason = f"{left_out} {unit}s are open throughout or closed throughout and are left out"
        rows.append(_row(f"auroc_per_{unit}", contest, reason=reason if left_out else ""))
    share = arrays["truth"].nnz / (n * f)
    auroc, precision = _overall_areas(arrays)
    normalised = {
        name: (area - share) / (1 - share) if share < 1 else np.full(1, np.nan)
        for name, area in precision.items()
    }
    reason = {0.0: "no entry is open", 1.0: "every entry is open"}.get(share, "")
    overall = {
        "auroc_overall": auroc,
        "average_precision_overall": precision,
        "normalised_average_precision_overall": normalised,
    }
    return rows + [_row(name, one, each=n * f, reason=reason) for name, one in overall.items()]


def _correlation_row(
    metric: str, contest: Contest, truth_varies: np.ndarray, units: str, each: int = 1
) -> _Row:
    """The row of (m,) correlations: undefined ones are 0, unless the truth varies nowhere."""
    of_truth = np.count_nonzero(~truth_varies)
    of_prediction = np.count_nonzero(np.isnan(contest["value"])) - of_truth
    causes = [("truth", of_truth), ("prediction", of_prediction)]
    reasons = [f"the {what} is constant in {each * k} {units}" for what, k in causes if k]
    if not truth_varies.any():
        return _row(metric, contest, each, reason=reasons[0])
    reasons += ["these count as 0"] if reasons else []
    return _row(metric, contest, each, undefined_as=0.0, reason="; ".join(reasons))


def _row(
    metric: str, contest: Contest, each: int = 1, undefined_as: float = np.nan, reason: str = ""
) -> _Row:
    """The row of the means of (m,) scores, NaN where undefined; each counts for `each` units."""
    means = {
        name: _mean(np.where(np.isnan(scores), undefined_as, scores))
        for name, scores in contest.items()
    }
    undefined = np.isnan(contest["value"])
    return _Row(
        metric,
        **{"depth_only": np.nan, **means},
        value_defined=_mean(contest["value"]),
        n_scored=each * int((~undefined).sum()),
        n_undefined=each * int(undefined.sum()),
        reason=reason,
    )


def _mean(scores: np.ndarray) -> float:
    """The mean of those that are defined; NaN if none is."""
    defined = scores[~np.isnan(scores)]
    return float(defined.mean()) if defined.size else np.nan


def _correlations(arrays: dict[str, Matrix]) -> tuple[dict[str, Contest], np.ndarray]:
    """Pearson and Spearman of each column, NaN where undefined, and whether its truth varies."""
    methods: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "pearson": _centred,
        "spearman": _centred_ranks,
    }
    found: dict[str, list[Contest]] = {method: [] for method in methods}
    varies = []
    for block in _blocks(arrays):
        for method, prepare in methods.items():
            centred = {name: prepare(x) for name, x in block.items()}
            norms = {name: np.sqrt((x**2).sum(axis=0)) for name, x in centred.items()}
            with np.errstate(invalid="ignore"):
                found[method].append(
                    {
                        name: (centred[a] * centred[b]).sum(axis=0) / (norms[a] * norms[b])
                        for name, (a, b) in _pairs(arrays)
                    }
                )
        varies.append(norms["truth"] > 0)
    return {method: _joined(parts) for method, parts in found.items()}, np.concatenate(varies)


def _aurocs(arrays: dict[str, Matrix]) -> Contest:
    """Area under the ROC curve of each column, NaN unless the truth has both 0 and 1."""
    found = []
    for block in _blocks(arrays):
        ranks = {b: _centred_ranks(block[b]) for b in block if b not in ("truth", "permuted")}
        areas = {}
        for name, (a, b) in _pairs(arrays):
            n_open = block[a].sum(axis=0)
            # The Mann-Whitney statistic in ranks less their mean: ties are halves, a constant 1/2.
            with np.errstate(invalid="ignore"):
                excess = (block[a] * ranks[b]).sum(axis=0) / (n_open * (len(block[a]) - n_open))
            areas[name] = 0.5 + excess
        found.append(areas)
    return _joined(found)


def _overall_agreement(arrays: dict[str, Matrix]) -> tuple[Contest, Contest]:
    """Mean squared error and Pearson of all entries, (1,) each, Pearson NaN where undefined."""
    n, f = arrays["truth"].shape
    means = {name: float(x.mean(dtype=np.float64)) for name, x in arrays.items()}
    varies = {name: _varies(x) for name, x in arrays.items()}
    sums = {name: np.zeros(4) for name, _ in _pairs(arrays)}
    for block in _blocks(arrays):
        for name, (a, b) in _pairs(arrays):
            x, y = np.broadcast_arrays(block[a], block[b])
            error, x, y = x - y, x - means[a], y - means[b]
            sums[name] += [(p * q).sum() for p, q in ((error, error), (x, y), (x, x), (y, y))]
    mse = {name: total[:1] / (n * f) for name, total in sums.items()}
    pearson = {
        name: sums[name][1:2] / np.sqrt(sums[name][2]) / np.sqrt(sums[name][3])
        if varies[a] and varies[b]
        else np.full(1, np.nan)
        for name, (a, b) in _pairs(arrays)
    }
    return mse, pearson


def _overall_areas(arrays: dict[str, Matrix]) -> tuple[Contest, Contest]:
    """AUROC and average precision of all entries, (1,) each and NaN where undefined."""
    shape = arrays["truth"].shape
    n_all, n_open = shape[0] * shape[1], arrays["truth"].nnz
    ordered = {b: np.sort(arrays[b], axis=None) for b in {b for _, (_, b) in _pairs(arrays)}}
    auroc, precision = {}, {}
    for name, (a, b) in _pairs(arrays):
        scores = np.sort(np.broadcast_to(arrays[b], shape)[arrays[a].nonzero()])
        repeats = n_all // ordered[b].size
        # How many entries, and open ones, are below and up to the score of each open entry.
        below, upto = (repeats * np.searchsorted(ordered[b], scores, s) for s in ("left", "right"))
        open_below, open_upto = (np.searchsorted(scores, scores, s) for s in ("left", "right"))
        closed_below = (below - open_below + upto - open_upto) / 2
        at_threshold = (n_open - open_below) / (n_all - below)
        auroc[name] = np.full(1, _mean(closed_below) / (n_all - n_open or np.nan))
        precision[name] = np.full(1, _mean(at_threshold))
    return auroc, precision


def _pairs(arrays: dict[str, Matrix]) -> list[tuple[str, tuple[str, str]]]:
    """The pairs of which both are there."""
    return [(name, pair) for name, pair in PAIRS.items() if set(pair) <= set(arrays)]


def _joined(parts: list[Contest]) -> Contest:
    """The scores of all columns from those of blocks of columns."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _blocks(arrays: dict[str, Matrix]) -> Iterator[dict[str, np.ndarray]]:
    """Dense float64 blocks of columns; what is one column for all, or one row for all, stays so."""
    n, f = arrays["truth"].shape
    width = max(1, BLOCK // n)
    for start in range(0, f, width):
        columns = slice(start, start + width)
        yield {
            name: _dense(x if x.shape[1] < f else x[:, columns]).astype(np.float64)
            for name, x in arrays.items()
        }


def _transposed(arrays: dict[str, Matrix]) -> dict[str, Matrix]:
    """The arrays with cells as columns."""
    return {
        name: x.T.tocsc() if isinstance(x, sparse.csc_matrix) else x.T for name, x in arrays.items()
    }


def _centred(x: np.ndarray) -> np.ndarray:
    """The columns less their means, exactly 0 where constant."""
    return np.where(np.ptp(x, axis=0) > 0, x - x.mean(axis=0), 0.0)


def _centred_ranks(x: np.ndarray) -> np.ndarray:
    """The ranks in each column, mean ranks of ties, less their mean."""
    from scipy.stats import rankdata

    return rankdata(x, axis=0) - (len(x) + 1) / 2


def _varies(x: Matrix) -> bool:
    """Whether two entries differ."""
    return bool(x.min() < x.max())


def _dense(x: Matrix) -> np.ndarray:
    """The matrix as an array; one that is dense is not copied."""
    return x.toarray() if isinstance(x, sparse.csc_matrix) else x


def _checked_counts(x: Matrix) -> Matrix:
    """Counts or levels as finite, non-negative float64."""
    counts = _checked("counts", x).astype(np.float64)
    if counts.min() < 0:
        raise DataError("a value is negative", where="counts", remedy="Pass values before any log")
    return counts


def _checked(name: str, x: Any, shape: tuple[int, ...] | None = None) -> Matrix:
    """Finite numbers of the shape, or a matrix with rows and columns; sparse as CSC."""
    is_sparse = isinstance(x, sparse.spmatrix | sparse.sparray)
    array: Matrix = sparse.csc_matrix(x) if is_sparse else np.asarray(x)
    fits = array.shape == shape if shape else array.ndim == 2 and 0 not in array.shape
    if not fits:
        raise DataError(
            f"has shape {array.shape}, not {shape or '(cells, features)'}",
            where=name,
            remedy="Pass one value per cell and feature, the same cells and features in all",
        )
    if array.dtype.kind not in "fiub":
        raise DataError(f"has type {array.dtype}", where=name, remedy="Pass numbers")
    usable = np.abs(array.data if is_sparse else array) < LARGEST
    if not usable.all():
        raise DataError(
            f"{np.count_nonzero(~usable)} values are not finite, or too large to be squared",
            where=name,
            remedy="Leave out cells that were not measured; a prediction like this has diverged",
        )
    return array
