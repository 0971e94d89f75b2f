"""Views: how a modality enters a network.

A pipeline is read like a method section: the steps of each modality in order, then the steps that
join modalities. It is fitted on the training cells alone and applied unchanged to any other cells.

    Pipeline(
        rna=[HighlyVariable(4000), LogNormalise(), Standardise(), PCs(50)],
        atac=[TopPeaks(0.75), TFIDF(), PCs(50)],
        joint=[Concatenate(), JointPCs(10)],
    )
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pandas as pd
from scipy import sparse

from coembed.data.cells import Cells
from coembed.errors import DataError, ModelFileError

Array = np.ndarray
Matrix = sparse.csr_matrix | np.ndarray


@dataclass(frozen=True, eq=False)
class Block:
    """One modality on its way into a network.

    Attributes:
        x: (n_cells, n_features) CSR or dense; rows of cells that were not measured are zero.
        var: the features, in column order.
        totals: (n_cells,) sum of the raw counts over *all* features of the modality.
        present: (n_cells,) bool, whether the modality measured the cell.
    """

    x: Matrix
    var: pd.DataFrame
    totals: Array
    present: Array

    @property
    def measured(self) -> Matrix:
        """The rows of the measured cells: what a step is fitted on."""
        return self.x if self.present.all() else self.x[self.present]


class Step:
    """A transformation of one modality. `learnt` names the arrays that `fit` finds."""

    learnt: ClassVar[tuple[str, ...]] = ()

    def fit(self, block: Block) -> None:
        """Learn from the measured training cells."""

    def apply(self, block: Block) -> Block:
        """Return the transformed modality."""
        raise NotImplementedError


class JointStep:
    """A transformation of all modalities together."""

    learnt: ClassVar[tuple[str, ...]] = ()

    def fit(self, blocks: Mapping[str, Block]) -> None:
        """Learn from the training cells."""

    def apply(self, blocks: Mapping[str, Block]) -> dict[str, Block]:
        """Return the transformed modalities."""
        raise NotImplementedError


# -- choosing features ----------------------------------------------------------------------------


class _Selection(Step):
    learnt = ("columns",)
    columns: Array

    def apply(self, block: Block) -> Block:
        return replace(block, x=block.x[:, self.columns], var=block.var.iloc[self.columns])


class HighlyVariable(_Selection):
    """The `n_top` most variable genes of the training cells; all of them where there are fewer.

    Args:
        n_top: number of genes to keep.
        flavour: 'cell_ranger' on log-normalised counts (the review, study.md section 2) or
            'seurat_v3' on counts (Portal).
    """

    def __init__(self, n_top: int = 4000, flavour: str = "cell_ranger") -> None:
        self.n_top, self.flavour = n_top, flavour

    def fit(self, block: Block) -> None:
        """Rank the genes that the training cells express."""
        x = sparse.csr_matrix(block.measured)
        expressed = np.flatnonzero(np.asarray(x.sum(axis=0)).ravel() > 0)
        if len(expressed) <= self.n_top:
            self.columns = expressed
            return
        import anndata
        import scanpy

        adata = anndata.AnnData(x[:, expressed])
        if self.flavour == "cell_ranger":
            adata.X = _log_normalised(adata.X, block.totals[block.present], 1e4)
        try:
            table = scanpy.pp.highly_variable_genes(
                adata, n_top_genes=self.n_top, flavor=self.flavour, inplace=False
            )
        except (ValueError, ZeroDivisionError) as error:
            raise DataError(
                f"the {self.flavour} ranking of variable genes fails on {x.shape[0]} cells ({error})",
                remedy="Use more cells, or set the number of genes to that of the file",
            ) from error
        self.columns = expressed[np.flatnonzero(table["highly_variable"].to_numpy())]


class TopPeaks(_Selection):
    """Peaks by total count: those in the upper part of the empirical distribution.

    A peak is kept if its ECDF (ties to the upper value) is at least `quantile`, as the review did
    (study.md section 2). That rule thins 116,490 peaks to some 29,000; a set of at most `minimum`
    peaks needs no thinning and is kept whole, and no more is dropped than leaves `minimum`.
    """

    def __init__(self, quantile: float = 0.75, minimum: int = 20_000) -> None:
        self.quantile, self.minimum = quantile, minimum

    def fit(self, block: Block) -> None:
        """Count the peaks over the training cells."""
        totals = np.asarray(block.measured.sum(axis=0)).ravel()
        ordered = np.sort(totals)
        ecdf = np.searchsorted(ordered, totals, side="right") / len(totals)
        enough = 1 - min(self.minimum, len(totals)) / len(totals)
        keep = (ecdf >= min(self.quantile, enough + 1e-12)) & (totals > 0)
        self.columns = np.flatnonzero(keep)


# -- transforming values --------------------------------------------------------------------------


def _log_normalised(x: sparse.csr_matrix, totals: Array, scale: float) -> sparse.csr_matrix:
    factors = np.divide(scale, totals, out=np.zeros(len(totals)), where=totals > 0)
    return sparse.csr_matrix(sparse.diags(factors) @ x, dtype=np.float32).log1p()


class LogNormalise(Step):
    """log(1 + scale x / total), the total taken over all features of the modality."""

    def __init__(self, scale: float = 1e4) -> None:
        self.scale = scale

    def apply(self, block: Block) -> Block:
        """Keep sparsity."""
        return replace(block, x=_log_normalised(block.x, block.totals, self.scale))


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
        """Return dense values; rows of unmeasured cells are zero."""
        x = _dense(block.x)
        centre = np.log1p(x).mean(axis=1, keepdims=True)
        return replace(block, x=np.log1p(x * np.exp(-centre)))


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
        if sparse.issparse(x):
            self.mean = np.asarray(x.mean(axis=0), dtype=np.float64).ravel()
            square = np.asarray(x.multiply(x).mean(axis=0), dtype=np.float64).ravel()
            variance = np.maximum(square - self.mean**2, 0) * n / max(n - 1, 1)
        else:
            self.mean = x.mean(axis=0, dtype=np.float64)
            variance = x.var(axis=0, dtype=np.float64, ddof=min(1, n - 1))
        sd = np.sqrt(variance)
        self.sd = np.where(sd > 1e-8, sd, 1.0)

    def apply(self, block: Block) -> Block:
        """Return dense values; rows of unmeasured cells are zero, the mean."""
        x = (_dense(block.x) - self.mean.astype(np.float32)) / self.sd.astype(np.float32)
        if self.clip is not None:
            np.clip(x, -self.clip if self.two_sided else None, self.clip, out=x)
        x[~block.present] = 0
        return replace(block, x=x)


class StandardiseCells(Step):
    """Each cell's block of values to mean 0 and standard deviation 1."""

    def apply(self, block: Block) -> Block:
        """Return dense values; rows of unmeasured cells are zero."""
        x = _dense(block.x)
        sd = x.std(axis=1, keepdims=True)
        x = (x - x.mean(axis=1, keepdims=True)) / np.where(sd > 1e-8, sd, 1)
        x[~block.present] = 0
        return replace(block, x=x)


class GeneActivity(Step):
    """Counts of the peaks that overlap a gene's body or the `upstream` bases before it.

    Every overlapping gene gets the peak's count (Signac's window on a peak matrix;
    research/gene_activity.md section 5, preset 'signac'). Genes are 1-based and closed, peaks
    0-based and half open.

    Args:
        genes: the gene table with `chrom`, `start`, `end`, `strand`; needed to fit.
        upstream: bases before the transcription start that count as the gene.
    """

    learnt = ("peak", "gene", "n_peaks")
    peak: Array
    gene: Array
    n_peaks: Array

    def __init__(self, genes: pd.DataFrame, upstream: int = 2000) -> None:
        self.genes, self.upstream = genes, upstream

    def fit(self, block: Block) -> None:
        """Join peaks and genes by position."""
        needed = {"chrom", "start", "end"}
        for name, table in (("rna", self.genes), ("atac", block.var)):
            if not needed <= set(table.columns) or not (table["start"] >= 0).any():
                raise DataError(
                    "no feature has a position, so gene activity cannot be computed",
                    where=f"modality '{name}'",
                    remedy="Add var columns chrom, start, end (and strand for genes)",
                )
        genes = self.genes[["chrom", "start", "end"]].copy()
        minus = self.genes.get("strand", pd.Series("+", index=genes.index)).astype(str) == "-"
        genes["first"] = genes["start"] - np.where(minus, 0, self.upstream)
        genes["last"] = genes["end"] + np.where(minus, self.upstream, 0)
        genes["gene"] = np.arange(len(genes))
        genes = genes[genes["start"] >= 0]
        peaks = block.var[["chrom", "start", "end"]].assign(peak=np.arange(len(block.var)))
        peaks = peaks[peaks["start"] >= 0]
        pairs = [
            _overlaps(group, peaks[_chromosome(peaks["chrom"]) == chrom])
            for chrom, group in genes.groupby(_chromosome(genes["chrom"]))
        ]
        self.gene, self.peak = (np.concatenate(part) for part in zip(*pairs, strict=True))
        self.n_peaks = np.array([len(block.var)])
        if not len(self.gene):
            raise DataError(
                "no peak overlaps a gene",
                where="modality 'atac'",
                remedy="Check that genes and peaks use one genome and one way to name chromosomes",
            )

    def apply(self, block: Block) -> Block:
        """Return genes x counts, with totals over all genes."""
        shape = (int(self.n_peaks[0]), len(self.genes))
        ones = np.ones(len(self.peak), dtype=np.float32)
        weights = sparse.csr_matrix((ones, (self.peak, self.gene)), shape=shape)
        x = sparse.csr_matrix(block.x @ weights)
        return replace(block, x=x, var=self.genes, totals=np.asarray(x.sum(axis=1)).ravel())


def _chromosome(names: pd.Series) -> pd.Series:
    return names.astype(str).str.removeprefix("chr")


def _overlaps(genes: pd.DataFrame, peaks: pd.DataFrame) -> tuple[Array, Array]:
    """Return all (gene, peak) pairs of one chromosome that share a base."""
    peaks = peaks.sort_values("start")
    # A closed 1-based gene [first, last] covers the 0-based half-open [first - 1, last).
    stop = np.searchsorted(peaks["start"].to_numpy(), genes["last"].to_numpy(), side="left")
    ends = peaks["end"].to_numpy()
    found_genes, found_peaks = [], []
    for gene, first, upto in zip(genes["gene"], genes["first"], stop, strict=True):
        hits = np.flatnonzero(ends[:upto] > first - 1)
        found_peaks.append(peaks["peak"].to_numpy()[hits])
        found_genes.append(np.full(len(hits), gene))
    empty = np.empty(0, dtype=np.int64)
    return np.concatenate([empty, *found_genes]), np.concatenate([empty, *found_peaks])


class PCs(Step):
    """Centred principal components of one modality, unwhitened; fewer where cells are few."""

    learnt = ("centre", "loadings", "variance")
    centre: Array
    loadings: Array
    variance: Array

    def __init__(self, n: int = 50) -> None:
        self.n = n

    def fit(self, block: Block) -> None:
        """Find the components of the training cells."""
        self.centre, self.loadings, self.variance = _principal_axes(block.measured, self.n)

    def apply(self, block: Block) -> Block:
        """Return dense (n_cells, n) scores; rows of unmeasured cells are zero."""
        scores = _scores(block.x, self.centre, self.loadings)
        scores[~block.present] = 0
        names = pd.DataFrame(index=[f"PC{i + 1}" for i in range(scores.shape[1])])
        return replace(block, x=scores, var=names)


class TruncatedSVD(PCs):
    """Singular vectors without centring, as the 2021 competition's linear entry used them."""

    def fit(self, block: Block) -> None:
        """Find the vectors of the training cells."""
        from sklearn.decomposition import TruncatedSVD as Decomposition

        x = block.measured
        model = Decomposition(min(self.n, min(x.shape) - 1), random_state=0).fit(x)
        self.loadings = model.components_.astype(np.float32)
        self.centre = np.zeros(x.shape[1], dtype=np.float32)
        self.variance = model.explained_variance_.astype(np.float32)


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


def _principal_axes(x: Matrix, n: int) -> tuple[Array, Array, Array]:
    from sklearn.decomposition import PCA

    model = PCA(min(n, min(x.shape) - 1), svd_solver="arpack", random_state=0).fit(x)
    return (
        model.mean_.astype(np.float32),
        model.components_.astype(np.float32),
        model.explained_variance_.astype(np.float32),
    )


def _scores(x: Matrix, centre: Array, loadings: Array) -> Array:
    return np.asarray(x @ loadings.T - centre @ loadings.T, dtype=np.float32)


def _dense(x: Matrix) -> Array:
    return x.toarray() if sparse.issparse(x) else np.array(x, dtype=np.float32)


# -- joining modalities ---------------------------------------------------------------------------


class SharedFeatures(JointStep):
    """The features that all modalities have, by name, in one order.

    Raises:
        DataError: fewer than `minimum` are shared.
    """

    learnt = ("names",)
    names: Array

    def __init__(self, minimum: int = 100) -> None:
        self.minimum = minimum

    def fit(self, blocks: Mapping[str, Block]) -> None:
        """Intersect the names."""
        first, *others = (block.var.index for block in blocks.values())
        shared = [name for name in first if all(name in other for other in others)]
        if len(shared) < self.minimum:
            raise DataError(
                f"only {len(shared)} features are shared by {' and '.join(blocks)}, "
                f"{self.minimum} are needed",
                remedy="Keep more variable genes (--set n_top_genes=...), or use more cells",
            )
        self.names = np.array(shared, dtype=str)

    def apply(self, blocks: Mapping[str, Block]) -> dict[str, Block]:
        """Subset and reorder every modality."""
        return {role: self._subset(block) for role, block in blocks.items()}

    def _subset(self, block: Block) -> Block:
        columns = block.var.index.get_indexer(self.names)
        return replace(block, x=block.x[:, columns], var=block.var.iloc[columns])


class JointPCs(JointStep):
    """Principal components of the modalities stacked cell over cell: one space for all."""

    learnt = ("centre", "loadings", "variance")

    def __init__(self, n: int = 30) -> None:
        self.step = PCs(n)

    def __getattr__(self, name: str) -> Array:
        if name in JointPCs.learnt:
            return getattr(self.step, name)
        raise AttributeError(name)

    def fit(self, blocks: Mapping[str, Block]) -> None:
        """Find the components of the stacked training cells."""
        self.step.fit(_stacked(blocks))

    def apply(self, blocks: Mapping[str, Block]) -> dict[str, Block]:
        """Project every modality."""
        return {role: self.step.apply(block) for role, block in blocks.items()}


def _stacked(blocks: Mapping[str, Block]) -> Block:
    parts = list(blocks.values())
    stack = sparse.vstack if sparse.issparse(parts[0].x) else np.vstack
    return Block(
        x=stack([part.x for part in parts]),
        var=parts[0].var,
        totals=np.concatenate([part.totals for part in parts]),
        present=np.concatenate([part.present for part in parts]),
    )


class Concatenate(JointStep):
    """All features of a cell side by side, as one block named 'joint'."""

    def apply(self, blocks: Mapping[str, Block]) -> dict[str, Block]:
        """Return one dense block."""
        parts = list(blocks.values())
        return {
            "joint": Block(
                x=np.hstack([_dense(part.x) for part in parts]),
                var=pd.concat([part.var[[]] for part in parts]),
                totals=np.sum([part.totals for part in parts], axis=0),
                present=np.logical_or.reduce([part.present for part in parts]),
            )
        }


# -- the pipeline ---------------------------------------------------------------------------------


class Pipeline:
    """The steps of each modality in order, then the joint steps.

    Args:
        joint: steps that see all modalities.
        **steps: role -> steps of that modality. An empty list passes raw counts.
    """

    def __init__(self, joint: Sequence[JointStep] = (), **steps: Sequence[Step]) -> None:
        self.steps, self.joint = steps, joint

    def fit(self, cells: Cells) -> dict[str, Block]:
        """Fit every step on `cells` and return the views of these cells."""
        return self._run(cells, fit=True)

    def apply(self, cells: Cells) -> dict[str, Block]:
        """Return the views of `cells` under the fitted steps."""
        return self._run(cells, fit=False)

    def _run(self, cells: Cells, *, fit: bool) -> dict[str, Block]:
        blocks = {}
        for role, steps in self.steps.items():
            blocks[role] = block_of(cells, role)
            for step in steps:
                if fit:
                    step.fit(blocks[role])
                blocks[role] = step.apply(blocks[role])
        for joint in self.joint:
            if fit:
                joint.fit(blocks)
            blocks = joint.apply(blocks)
        return blocks

    def _named(self) -> Iterator[tuple[str, Step | JointStep]]:
        for role, steps in self.steps.items():
            for i, step in enumerate(steps):
                yield f"{role}.{i}", step
        for i, joint in enumerate(self.joint):
            yield f"joint.{i}", joint

    def state(self) -> dict[str, Array]:
        """Return what was learnt, as arrays by name."""
        return {
            f"{name}.{part}": np.asarray(getattr(step, part))
            for name, step in self._named()
            for part in step.learnt
        }

    def load_state(self, state: Mapping[str, Array]) -> None:
        """Put back what `state` returned.

        Raises:
            ModelFileError: an array is missing.
        """
        for name, step in self._named():
            for part in step.learnt:
                if f"{name}.{part}" not in state:
                    raise ModelFileError(
                        f"the array '{name}.{part}' of the views is missing",
                        remedy="The file is damaged or of another version; save the model again",
                    )
                owner = step.step if isinstance(step, JointPCs) else step
                setattr(owner, part, state[f"{name}.{part}"])


def counts(
    roles: Iterable[str], *, n_top_genes: int, all_peaks: bool = False
) -> dict[str, list[Step]]:
    """Return the steps by which most systems see raw counts: variable genes, top peaks, proteins."""
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


def block_of(cells: Cells, role: str) -> Block:
    """Return one modality of `cells` as raw counts."""
    counts = cells.counts[role]
    return Block(
        counts, cells.var[role], np.asarray(counts.sum(axis=1)).ravel(), cells.present[role]
    )
