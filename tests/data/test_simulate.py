"""Simulated cells have the structure that they are said to have."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from coembed.data.read import as_cells
from coembed.data.simulate import simulate
from coembed.data.write import to_mudata
from coembed.errors import ParameterError

SMALL = {"n_genes": 300, "n_proteins": 25, "n_peaks": 900}


@pytest.fixture(scope="module", params=["cite", "multiome"])
def cells(request):
    return simulate(request.param, 800, **SMALL, seed=7)


def density(cells, role):
    return cells.counts[role].nnz / np.prod(cells.counts[role].shape)


def test_same_seed_same_cells(cells):
    kind = cells.name.removeprefix("sim-")
    again = simulate(kind, 800, **SMALL, seed=7)
    assert again.fingerprint() == cells.fingerprint()
    pd.testing.assert_frame_equal(again.obs, cells.obs)
    assert simulate(kind, 800, **SMALL, seed=8).fingerprint() != cells.fingerprint()


def test_always_called_simulated(cells):
    assert cells.about["simulated"] is True
    assert "seed=7" in cells.about["note"]
    assert cells.name in ("sim-cite", "sim-multiome")
    assert simulate("cite", 5, name="mine", **SMALL).name == "sim-mine"


def test_batches_are_nested_in_sites(cells):
    obs = cells.obs
    assert obs["batch"].nunique() == 12
    assert obs["site"].nunique() == 4
    assert obs.groupby("batch")["site"].nunique().eq(1).all()
    assert all(re.fullmatch(r"s\dd\d", name) for name in obs["batch"])
    assert (obs["site"].str[-1] == obs["batch"].str[1]).all()


def test_pseudotime_is_of_one_path_of_five_types(cells):
    order = cells.obs["pseudotime_order_GEX"]
    types = cells.obs["cell_type"]
    on_path = order.notna()
    assert types[on_path].nunique() == 5
    assert not set(types[on_path]) & set(types[~on_path])
    assert order[on_path].between(0, 1).all()
    step = np.floor(order[on_path] * 5)
    assert step.groupby(types[on_path]).nunique().eq(1).all()
    latent = cells.obs.filter(like="latent_")[on_path]
    line = np.linalg.svd(latent - latent.mean(), full_matrices=False)[2][0]
    assert abs(np.corrcoef(latent @ line, order[on_path])[0, 1]) > 0.9


def test_types_are_apart_in_the_latent_space(cells):
    latent = cells.obs.filter(like="latent_").to_numpy()
    assert latent.shape == (800, 10)
    spread = cells.obs.filter(like="latent_").groupby(cells.obs["cell_type"]).transform("mean")
    assert np.var(latent) > 2 * np.var(latent - spread.to_numpy())


def test_sparsity_and_library_sizes(cells):
    assert 0.1 < density(cells, "rna") < 0.3
    if "atac" in cells.roles:
        assert 0.03 < density(cells, "atac") < 0.1
    else:
        assert 0.7 < density(cells, "prot") < 0.99
    library = np.asarray(cells.counts["rna"].sum(axis=1)).ravel()
    assert 0.3 < np.log(library).std() < 0.6


def test_counts_vary_more_than_poisson_ones():
    counts = simulate("cite", 2000, **SMALL, n_types=1, depth=5).counts["rna"].toarray()
    share = counts / counts.sum(axis=1, keepdims=True) * counts.sum(axis=1).mean()
    mean, variance = share.mean(axis=0), share.var(axis=0)
    assert np.median((variance / mean)[mean > 1]) > 1.5


def test_proteins_have_background_and_foreground():
    counts = simulate("cite", 2000, **SMALL).counts["prot"].toarray()
    high = np.percentile(counts, 95, axis=0) / np.maximum(1, np.percentile(counts, 20, axis=0))
    assert np.median(high) > 5


@pytest.mark.parametrize("n_cells", [1, 20, 200])
@pytest.mark.parametrize("kind", ["cite", "multiome"])
def test_no_cell_and_no_feature_is_empty(kind, n_cells):
    cells = simulate(kind, n_cells, **SMALL, depth=0.05)
    for role in cells.roles:
        assert (cells.counts[role].sum(axis=1) > 0).all()
        assert (cells.counts[role].sum(axis=0) > 0).all()
    assert as_cells(to_mudata(cells)).n_cells == n_cells


def mean_shift(cells, names):
    """Mean squared difference of log mean expression between groups of cells."""
    counts = cells.counts["rna"].toarray()
    means = [np.log(counts[names == name].mean(axis=0) + 0.01) for name in np.unique(names)]
    return np.var(means, axis=0).mean()


def test_site_effect_is_larger_than_batch_effect():
    options = {**SMALL, "n_types": 1, "n_sites": 4, "depth": 20}
    both = simulate("cite", 2000, **options)
    first = both.take(both.site == "site1")
    assert mean_shift(both, both.site) > 1.5 * mean_shift(first, first.batch)
    none = simulate("cite", 2000, **options, site_effect=0, batch_effect=0)
    assert mean_shift(both, both.site) > 10 * mean_shift(none, none.site)


def test_peaks_lie_at_their_genes():
    cells = simulate("multiome", 50, **SMALL)
    genes, peaks = cells.var["rna"], cells.var["atac"]
    assert peaks.index.is_unique
    assert (peaks["end"] - peaks["start"] == 500).all()
    assert (peaks["start"] > 0).all()
    for chrom in genes["chrom"].unique():
        here = genes[genes["chrom"] == chrom].sort_values("start")
        assert (here["start"].to_numpy()[1:] > here["end"].to_numpy()[:-1]).all()
    for gene, peak in zip(genes.itertuples(), peaks.itertuples(), strict=False):
        assert gene.chrom == peak.chrom  # the gene's first peak, within 2,000 bases upstream
        if gene.strand == "+":
            assert gene.start - 2000 <= peak.start < gene.start
        else:
            assert gene.end < peak.end <= gene.end + 2000


def test_promoter_follows_gene_expression():
    cells = simulate("multiome", 3000, **SMALL, depth=10, site_effect=0, batch_effect=0)
    rna = np.log1p(cells.counts["rna"].toarray())
    atac = np.log1p(cells.counts["atac"][:, :300].toarray())
    matched = [np.corrcoef(rna[:, g], atac[:, g])[0, 1] for g in range(300)]
    other = [np.corrcoef(rna[:, g], atac[:, (g + 7) % 300])[0, 1] for g in range(300)]
    assert np.mean(matched) > 0.15
    assert abs(np.mean(other)) < 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "cit"}, "Did you mean 'cite'"),
        ({"n_cells": 0}, "n_cells is 0"),
        ({"n_genes": -1}, "n_genes is -1"),
        ({"batch_effect": -0.1}, "batch_effect is -0.1"),
        ({"depth": np.nan}, "depth is nan"),
        ({"n_batches": 3, "n_sites": 4}, "3 batches cannot be nested in 4 sites"),
    ],
)
def test_impossible_requests(options, message):
    with pytest.raises(ParameterError, match=message):
        simulate(**options)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_memory_is_bounded():
    """20,000 cells x 8,000 peaks are 1.3 GB dense in float64; the sparse result is 65 MB."""
    # Not getrusage's maximum: after fork and exec that still is the test process's own.
    code = (
        "from coembed.data.simulate import simulate; simulate('multiome', 20_000);"
        "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )
    peak = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(peak.stdout) * 1024 < 700e6
