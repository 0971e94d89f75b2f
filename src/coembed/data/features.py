"""Which features a network sees: variable genes, top peaks, gene activity, shared names."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pandas as pd
from scipy import sparse

from coembed.data.pipeline import Array, Block, JointStep, Step
from coembed.errors import DataError, warn

SPANS = (0.3, 0.6, 1.0)
"""Share of the genes that seurat_v3's regression sees at a time; the first is its default."""


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
            'seurat_v3' on counts (Portal). Its local regression is singular where few cells give
            few distinct means; it is then tried over a wider span (`SPANS`).
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
        x = x[:, expressed]
        if self.flavour == "cell_ranger":
            x = log_normalised(x, block.totals[block.present], 1e4)
        self.columns = expressed[np.flatnonzero(self._chosen(x))]

    def _chosen(self, x: sparse.csr_matrix) -> Array:
        from threadpoolctl import threadpool_limits

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # louvain, which scanpy imports, on pkg_resources
            import anndata
            import scanpy

        problem = None
        for span in SPANS if self.flavour == "seurat_v3" else SPANS[:1]:
            # numba raises torch's number of threads; the context puts it back
            with threadpool_limits(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # counts that are none: Portal's double_lognorm
                try:
                    table = scanpy.pp.highly_variable_genes(
                        anndata.AnnData(x),
                        n_top_genes=self.n_top,
                        flavor=self.flavour,
                        span=span,
                        inplace=False,
                    )
                except (ValueError, ZeroDivisionError) as error:
                    problem = error
                else:
                    return table["highly_variable"].to_numpy()
        raise DataError(
            f"the {self.flavour} ranking of genes fails on {x.shape[0]} cells ({problem})",
            remedy="Use more cells, or set the number of genes to that of the file",
        )


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


class OpenIn(_Selection):
    """Peaks open in a share of the training cells from `low` to `high`; all if there are none."""

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high

    def fit(self, block: Block) -> None:
        """Count in how many training cells each peak is open."""
        x = sparse.csr_matrix(block.measured)
        share = x.getnnz(axis=0) / x.shape[0]
        self.columns = np.flatnonzero((share >= self.low) & (share <= self.high))
        if not len(self.columns):
            warn(
                f"no peak is open in {self.low:g} to {self.high:g} of the cells",
                instead="all peaks are kept",
            )
            self.columns = np.arange(x.shape[1])


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
        columns = block.var.index.get_indexer(pd.Index(self.names))
        return replace(block, x=block.x[:, columns], var=block.var.iloc[columns])


def log_normalised(x: sparse.csr_matrix, totals: Array, scale: float) -> sparse.csr_matrix:
    """Return log(1 + scale x / total), sparse."""
    factors = np.divide(scale, totals, out=np.zeros(len(totals)), where=totals > 0)
    return sparse.csr_matrix(sparse.diags(factors) @ x, dtype=np.float32).log1p()
