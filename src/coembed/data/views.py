"""Views: in what form a modality's features enter a network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
import pandas as pd
from scipy import sparse

from coembed.data.features import HighlyVariable, TopPeaks, log_normalised
from coembed.data.pipeline import Array, Block, JointStep, Matrix, Step
from coembed.errors import warn


class LogNormalise(Step):
    """log(1 + scale x / total), the total taken over all features of the modality."""

    def __init__(self, scale: float = 1e4) -> None:
        self.scale = scale

    def apply(self, block: Block) -> Block:
        """Keep sparsity. The new totals are those of the new values."""
        x = log_normalised(block.x, block.totals, self.scale)
        return replace(block, x=x, totals=np.asarray(x.sum(axis=1)).ravel())


class Binarise(Step):
    """1 where there is a count."""

    def apply(self, block: Block) -> Block:
        """Keep sparsity."""
        return replace(block, x=block.x.sign())


class CLR(Step):
    """Centred log-ratio within a cell: log(1 + x / exp(mean over features of log(1 + x))).

    The variant of Seurat and muon, which keeps zeros at zero and so never is negative.
    """

    def apply(self, block: Block) -> Block:
        """Return dense values; rows of unmeasured cells are zero. Totals are of the new values."""
        x = dense(block.x)
        centre = np.log1p(x).mean(axis=1, keepdims=True)
        x = np.log1p(x * np.exp(-centre))
        return replace(block, x=x, totals=x.sum(axis=1))


class TFIDF(Step):
    """log(1 + 1e4 tf idf): tf = x / total, idf = n / (number of cells with the peak) (Signac)."""

    learnt = ("idf",)
    idf: Array

    def fit(self, block: Block) -> None:
        """Count in how many training cells each peak is open."""
        x = sparse.csr_matrix(block.measured)
        self.idf = (x.shape[0] / np.maximum(x.getnnz(axis=0), 1)).astype(np.float32)

    def apply(self, block: Block) -> Block:
        """Keep sparsity."""
        totals = block.totals
        factors = np.divide(1e4, totals, out=np.zeros(len(totals)), where=totals > 0)
        x = sparse.diags(factors) @ block.x @ sparse.diags(self.idf)
        return replace(block, x=sparse.csr_matrix(x, dtype=np.float32).log1p())


class MaxAbs(Step):
    """Each feature divided by its largest absolute value in the training cells.

    Levels that are not negative then lie in [0, 1]; those of other cells are cut off at 1.
    """

    learnt = ("scale",)
    scale: Array

    def fit(self, block: Block) -> None:
        """Find the largest value of every feature; a feature of zeros keeps its scale."""
        largest = abs(block.measured).max(axis=0)
        if not isinstance(largest, np.ndarray):
            largest = largest.toarray().ravel()
        self.scale = np.where(largest > 0, largest, 1).astype(np.float32)

    def apply(self, block: Block) -> Block:
        """Keep sparsity."""
        if isinstance(block.x, np.ndarray):
            return replace(block, x=np.clip(block.x / self.scale, -1, 1))
        x = sparse.csr_matrix(block.x @ sparse.diags(1 / self.scale), dtype=np.float32)
        x.data.clip(-1, 1, out=x.data)
        return replace(block, x=x)


class Standardise(Step):
    """Each feature to mean 0 and standard deviation 1 (ddof 1; a constant one to 0), clipped.

    Args:
        clip: upper (and, with `two_sided`, lower) bound in standard deviations; None for none.
        two_sided: clip below too.
    """

    learnt = ("mean", "sd")
    mean: Array
    sd: Array

    def __init__(self, clip: float | None = 10.0, two_sided: bool = True) -> None:
        self.clip, self.two_sided = clip, two_sided

    def fit(self, block: Block) -> None:
        """Learn mean and standard deviation of the training cells."""
        x = block.measured
        n = x.shape[0]
        if isinstance(x, sparse.csr_matrix):
            x = x.astype(np.float64)  # in float32 the difference below loses a constant's digits
            self.mean = np.asarray(x.mean(axis=0)).ravel()
            square = np.asarray(x.multiply(x).mean(axis=0)).ravel()
            variance = np.maximum(square - self.mean**2, 0) * n / max(n - 1, 1)
        else:
            self.mean = x.mean(axis=0, dtype=np.float64)
            variance = x.var(axis=0, dtype=np.float64, ddof=min(1, n - 1))
        sd = np.sqrt(variance)
        self.sd = np.where(sd > 1e-8 + 1e-6 * np.abs(self.mean), sd, 1.0)

    def apply(self, block: Block) -> Block:
        """Return dense values; rows of unmeasured cells are zero, the mean."""
        x = (dense(block.x) - self.mean.astype(np.float32)) / self.sd.astype(np.float32)
        if self.clip is not None:
            np.clip(x, -self.clip if self.two_sided else None, self.clip, out=x)
        x[~block.present] = 0
        return replace(block, x=x)


class StandardiseCells(Step):
    """Each cell's block of values to mean 0 and standard deviation 1."""

    def apply(self, block: Block) -> Block:
        """Return dense values; rows of unmeasured cells are zero."""
        x = dense(block.x)
        sd = x.std(axis=1, keepdims=True)
        x = (x - x.mean(axis=1, keepdims=True)) / np.where(sd > 1e-8, sd, 1)
        x[~block.present] = 0
        return replace(block, x=x)


class PCs(Step):
    """Centred principal components of one modality, unwhitened; fewer where cells are few."""

    learnt = ("centre", "loadings")
    centre: Array
    loadings: Array

    def __init__(self, n: int = 50) -> None:
        self.n = n

    def fit(self, block: Block) -> None:
        """Find the components of the training cells."""
        self.centre, self.loadings = _principal_axes(block.measured, self.n)

    def apply(self, block: Block) -> Block:
        """Return dense (n_cells, n) scores; rows of unmeasured cells are zero."""
        return _projected(block, self.centre, self.loadings)


class TruncatedSVD(PCs):
    """Singular vectors without centring, as the 2021 competition's linear entry used them."""

    def fit(self, block: Block) -> None:
        """Find the vectors of the training cells."""
        from sklearn.decomposition import TruncatedSVD as Decomposition

        x = block.measured
        model = Decomposition(_possible(self.n, x), random_state=0).fit(x)
        self.loadings = model.components_.astype(np.float32)
        self.centre = np.zeros(x.shape[1], dtype=np.float32)


class UnitVariance(Step):
    """The whole block scaled so that its training cells have total variance 1."""

    learnt = ("scale",)
    scale: Array

    def fit(self, block: Block) -> None:
        """Measure the total variance of the training cells."""
        self.scale = np.array([1 / np.sqrt(max(block.measured.var(axis=0).sum(), 1e-12))])

    def apply(self, block: Block) -> Block:
        """Scale."""
        return replace(block, x=(block.x * self.scale[0]).astype(np.float32))


def _principal_axes(x: Matrix, n: int) -> tuple[Array, Array]:
    from sklearn.decomposition import PCA

    model = PCA(_possible(n, x), svd_solver="arpack", random_state=0).fit(x)
    return (
        model.mean_.astype(np.float32),
        model.components_.astype(np.float32),
    )


def _possible(n: int, x: Matrix) -> int:
    """Return the number of components there can be; fewer cells than components are announced."""
    n_cells, n_features = x.shape
    if n >= n_cells:
        most = min(n_cells, n_features) - 1
        warn(f"{n} components need more than {n_cells} cells", instead=f"{most} are used")
    return int(min(n, n_cells - 1, n_features - 1))


def _projected(block: Block, centre: Array, loadings: Array) -> Block:
    scores = np.asarray(block.x @ loadings.T - centre @ loadings.T, dtype=np.float32)
    scores[~block.present] = 0
    names = pd.DataFrame(index=[f"PC{i + 1}" for i in range(scores.shape[1])])
    return replace(block, x=scores, var=names)


class JointPCs(JointStep):
    """Principal components of the modalities stacked cell over cell: one space for all."""

    learnt = ("centre", "loadings")
    centre: Array
    loadings: Array

    def __init__(self, n: int = 30) -> None:
        self.n = n

    def fit(self, blocks: Mapping[str, Block]) -> None:
        """Find the components of the stacked training cells."""
        measured = [block.measured for block in blocks.values()]
        stack = sparse.vstack if sparse.issparse(measured[0]) else np.vstack
        self.centre, self.loadings = _principal_axes(stack(measured), self.n)

    def apply(self, blocks: Mapping[str, Block]) -> dict[str, Block]:
        """Project every modality."""
        return {
            role: _projected(block, self.centre, self.loadings) for role, block in blocks.items()
        }


class Concatenate(JointStep):
    """All features of a cell side by side, as one block named 'joint'."""

    def apply(self, blocks: Mapping[str, Block]) -> dict[str, Block]:
        """Return one dense block."""
        parts = list(blocks.values())
        return {
            "joint": Block(
                x=np.hstack([dense(part.x) for part in parts]),
                var=pd.concat([block.var[[]].assign(_role=role) for role, block in blocks.items()]),
                totals=np.sum([part.totals for part in parts], axis=0),
                present=np.logical_or.reduce([part.present for part in parts]),
            )
        }


class MisreadColumns(JointStep):
    """The review's columns: peaks, then genes, of which as many as there are genes are 'rna'."""

    def apply(self, blocks: Mapping[str, Block]) -> dict[str, Block]:
        """Cut [peaks, genes] where [genes, peaks] should be cut."""
        rna, atac = blocks["rna"], blocks["atac"]
        x = sparse.csr_matrix(sparse.hstack([atac.x, rna.x]), dtype=np.float32)
        var, n = pd.concat([atac.var, rna.var]), len(rna.var)
        present = rna.present | atac.present
        parts = {"rna": slice(n), "atac": slice(n, None)}
        return {
            role: replace(blocks[role], x=x[:, part], var=var.iloc[part], present=present)
            for role, part in parts.items()
        }


def counts(
    roles: Iterable[str], *, n_top_genes: int, all_peaks: bool = False
) -> dict[str, list[Step]]:
    """Return the steps to raw counts that most systems want: variable genes, top peaks."""
    steps: dict[str, list[Step]] = {
        "rna": [HighlyVariable(n_top_genes)],
        "prot": [],
        "atac": [] if all_peaks else [TopPeaks()],
    }
    return {role: steps[role] for role in roles}


def normalised(
    roles: Iterable[str], *, n_top_genes: int, all_peaks: bool = False
) -> dict[str, list[Step]]:
    """Return `counts` brought to one scale: log-normalised genes, CLR proteins, open peaks."""
    values: dict[str, Step] = {"rna": LogNormalise(), "prot": CLR(), "atac": Binarise()}
    steps = counts(roles, n_top_genes=n_top_genes, all_peaks=all_peaks)
    return {role: [*steps[role], values[role]] for role in steps}


def dense(x: Matrix) -> Array:
    """Return a new dense float32 array."""
    return x.toarray() if isinstance(x, sparse.csr_matrix) else np.array(x, dtype=np.float32)
