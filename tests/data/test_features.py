"""Choosing features: rankings against scanpy, peaks by rank, gene activity by hand."""

from __future__ import annotations

from dataclasses import replace

import anndata
import numpy as np
import pandas as pd
import pytest
import scanpy
from blocks import block, fitted, values

from coembed.data.cells import Cells
from coembed.data.features import GeneActivity, HighlyVariable, SharedFeatures, TopPeaks
from coembed.data.pipeline import Block, block_of
from coembed.errors import DataError

# -- choosing features ----------------------------------------------------------------------------


def test_top_peaks_keep_the_upper_part_with_ties_to_the_upper_value() -> None:
    # Totals 1 1 2 2 3 4 4 5: ECDF 0.25 0.25 0.5 0.5 0.625 0.875 0.875 1.
    x = [[1, 1, 2, 2, 3, 4, 4, 5]]
    kept = lambda quantile: fitted(TopPeaks(quantile, minimum=0), block(x)).columns.tolist()  # noqa: E731
    assert kept(0.75) == [5, 6, 7]
    assert kept(0.875) == [5, 6, 7]
    assert kept(0.88) == [7]
    assert kept(0.5) == [2, 3, 4, 5, 6, 7]  # both peaks of the tie at 2


def test_top_peaks_leave_a_minimum() -> None:
    x = [[1, 2, 3, 4, 5, 6, 7, 8, 0]]
    kept = lambda minimum: fitted(TopPeaks(0.9, minimum), block(x)).columns.tolist()  # noqa: E731
    assert kept(0) == [7]
    assert kept(4) == [4, 5, 6, 7]
    assert kept(9) == list(range(8)), "a peak without a count is never kept"
    assert kept(100) == list(range(8))


@pytest.mark.parametrize("n_top", [1, 7, 40])
def test_highly_variable_equals_scanpy_on_the_same_cells(cite: Cells, n_top: int) -> None:
    step = fitted(HighlyVariable(n_top), block_of(cite, "rna"))
    adata = anndata.AnnData(cite.counts["rna"].copy(), var=cite.var["rna"][[]])
    scanpy.pp.filter_genes(adata, min_cells=1)
    scanpy.pp.normalize_total(adata, target_sum=1e4)
    scanpy.pp.log1p(adata)
    scanpy.pp.highly_variable_genes(adata, n_top_genes=n_top, flavor="cell_ranger")
    expected = adata.var_names[adata.var["highly_variable"]]
    assert list(cite.var["rna"].index[step.columns]) == list(expected)


def test_highly_variable_by_seurat_v3_equals_scanpy_on_the_counts(cite: Cells) -> None:
    pytest.importorskip("skmisc", reason="scanpy's seurat_v3 needs scikit-misc")
    step = fitted(HighlyVariable(20, flavour="seurat_v3"), block_of(cite, "rna"))
    adata = anndata.AnnData(cite.counts["rna"].copy())
    table = scanpy.pp.highly_variable_genes(
        adata, n_top_genes=20, flavor="seurat_v3", inplace=False
    )
    assert step.columns.tolist() == np.flatnonzero(table["highly_variable"]).tolist()
    assert len(step.columns) == 20


def test_highly_variable_keeps_every_expressed_gene_where_there_are_fewer() -> None:
    step = fitted(HighlyVariable(10), block([[1, 0, 2], [3, 0, 0]]))
    assert step.columns.tolist() == [0, 2]


def test_a_selection_keeps_totals_and_names() -> None:
    raw = block([[1, 0, 2], [3, 0, 0]], names=["a", "b", "c"])
    out = fitted(HighlyVariable(10), raw).apply(raw)
    assert list(out.var.index) == ["a", "c"]
    np.testing.assert_array_equal(out.totals, [3, 3])


# -- gene activity: research/gene_activity.md section 6, preset signac ---------------------------

GENES = pd.DataFrame(
    {"chrom": "chr1", "start": [10_000, 30_000], "end": [20_000, 40_000], "strand": ["+", "-"]},
    index=["G1", "G2"],
)
PEAKS = pd.DataFrame(
    {
        "chrom": "chr1",
        "start": [7_900, 7_000, 15_000, 41_500, 25_000],
        "end": [8_100, 7_500, 15_500, 42_100, 25_500],
    },
    index=["p1", "p2", "p3", "p4", "p5"],
)
COUNTS = np.array([[1, 2, 4, 8, 16], [3, 0, 5, 0, 7]], dtype=np.float32)


def activity(
    x: np.ndarray = COUNTS, genes: pd.DataFrame = GENES, peaks: pd.DataFrame = PEAKS
) -> Block:
    raw = replace(block(x), var=peaks)
    return fitted(GeneActivity(genes), raw).apply(raw)


def test_gene_activity_window() -> None:
    out = activity()
    np.testing.assert_array_equal(values(out.x), [[1 + 4, 8], [3 + 5, 0]])
    np.testing.assert_array_equal(out.totals, [13, 8])
    assert list(out.var.index) == ["G1", "G2"]


def test_gene_activity_of_mirrored_strands_is_the_same() -> None:
    length = 100_000

    def mirrored(table: pd.DataFrame, one_based: bool) -> pd.DataFrame:
        """Closed 1-based [s, e] becomes [L+1-e, L+1-s]; half-open 0-based [s, e) [L-e, L-s)."""
        last = length + one_based
        return table.assign(start=last - table["end"], end=last - table["start"])

    flip = GENES["strand"].map({"+": "-", "-": "+"})
    out = activity(genes=mirrored(GENES, True).assign(strand=flip), peaks=mirrored(PEAKS, False))
    np.testing.assert_array_equal(values(out.x), values(activity().x))
    # The strand matters: flipped without the mirror, the upstream peaks fall out.
    flipped = activity(genes=GENES.assign(strand=flip))
    np.testing.assert_array_equal(values(flipped.x), [[4, 0], [5, 0]])


def test_gene_activity_doubles_with_the_counts() -> None:
    np.testing.assert_array_equal(values(activity(2 * COUNTS).x), 2 * values(activity().x))


def test_gene_activity_does_not_depend_on_row_order() -> None:
    peaks, genes = np.array([3, 0, 4, 2, 1]), [1, 0]
    out = activity(COUNTS[:, peaks], GENES.iloc[genes], PEAKS.iloc[peaks])
    np.testing.assert_array_equal(values(out.x)[:, genes], values(activity().x))


def test_a_peak_counts_for_every_gene_it_overlaps() -> None:
    genes = pd.concat([GENES, GENES.iloc[[0]].rename(index={"G1": "G3"})])
    np.testing.assert_array_equal(values(activity(genes=genes).x), [[5, 8, 5], [8, 0, 8]])


@pytest.mark.parametrize(
    ("start", "end", "hit"),
    [
        # The window of G1 is the closed 1-based [8000, 20000], the half-open [7999, 20000).
        (7_000, 7_999, 0), (7_000, 8_000, 1), (19_999, 20_500, 1), (20_000, 20_500, 0),
        (1_000, 90_000, 1),
    ],
)  # fmt: skip
def test_gene_activity_at_the_last_base(start: int, end: int, hit: int) -> None:
    peaks = PEAKS.iloc[:2].assign(start=[start, 15_000], end=[end, 15_001])
    out = activity(np.array([[7, 1]]), GENES.iloc[[0]], peaks)
    np.testing.assert_array_equal(values(out.x), [[7 * hit + 1]])


def test_gene_activity_keeps_chromosomes_apart_and_ignores_the_prefix() -> None:
    other = PEAKS.assign(chrom=["chr2", "1", "1", "1", "1"])
    np.testing.assert_array_equal(values(activity(peaks=other).x), [[4, 8], [5, 0]])


def test_gene_activity_needs_positions_and_an_overlap() -> None:
    with pytest.raises(DataError, match=r"modality 'atac'.*no feature has a position.*chrom"):
        activity(peaks=PEAKS[[]])
    with pytest.raises(DataError, match=r"modality 'rna'.*no feature has a position"):
        activity(genes=GENES.assign(start=-1))
    with pytest.raises(DataError, match=r"no peak overlaps a gene.*genome"):
        activity(peaks=PEAKS.assign(chrom="chr9"))
    with pytest.raises(DataError, match="no peak overlaps a gene"):
        activity(peaks=PEAKS.iloc[[1, 4]], x=COUNTS[:, [1, 4]])


def test_simulated_peaks_lie_at_their_genes(multiome: Cells) -> None:
    out = activity_of(multiome)
    # Peak j belongs to gene j modulo the genes; the first three turns lie in its window.
    own = np.zeros((multiome.counts["atac"].shape[1], 80), dtype=np.float32)
    for j in range(160):  # turn 0 at the promoter, turn 1 5,000 bases into the gene
        own[j, j % 80] = 1
    np.testing.assert_array_equal(values(out.x), values(multiome.counts["atac"]) @ own)


def activity_of(cells: Cells) -> Block:
    raw = block_of(cells, "atac")
    return fitted(GeneActivity(cells.var["rna"]), raw).apply(raw)


# -- shared features ----------------------------------------------------------------------------


def test_shared_features_are_in_one_order() -> None:
    blocks = {"a": block([[1, 2, 3]], names=["x", "y", "z"]),
              "b": block([[4, 5, 6]], names=["z", "w", "x"])}  # fmt: skip
    step = SharedFeatures(minimum=2)
    step.fit(blocks)
    out = step.apply(blocks)
    assert {name: list(b.var.index) for name, b in out.items()} == {
        "a": ["x", "z"],
        "b": ["x", "z"],
    }
    np.testing.assert_array_equal(values(out["a"].x), [[1, 3]])
    np.testing.assert_array_equal(values(out["b"].x), [[6, 4]])
    with pytest.raises(DataError, match=r"only 2 features are shared by a and b, 3 are needed"):
        SharedFeatures(minimum=3).fit(blocks)
