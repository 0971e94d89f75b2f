"""Simulated cells with known truth, at any size (study.md section 9)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import pandas as pd
from scipy import sparse

from coembed.data.cells import Cells, Keys
from coembed.errors import ParameterError, did_you_mean

KINDS = {"cite": ("rna", "prot"), "multiome": ("rna", "atac")}
N_LATENT = 10
N_PATH = 5
"""Number of types on the path that has a pseudotime."""
CHUNK = 2_000_000
"""Largest number of entries, cells times features, that are dense at any time."""

Draw = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(n, N_LATENT) latent positions and (n,) batch numbers -> (n, n_features) counts."""


def simulate(
    kind: Literal["cite", "multiome"] = "cite",
    n_cells: int = 1000,
    *,
    n_types: int = 22,
    n_batches: int = 12,
    n_sites: int = 4,
    n_genes: int = 2000,
    n_proteins: int = 134,
    n_peaks: int = 8000,
    separation: float = 2.0,
    site_effect: float = 0.4,
    batch_effect: float = 0.2,
    depth: float = 1.0,
    seed: int = 0,
    name: str | None = None,
) -> Cells:
    """Return simulated paired cells; the same arguments give the same cells.

    - Type: proportions from a Dirichlet(0.8). Batch: uniform; batches are nested in sites and
      named as in the NeurIPS 2021 benchmark (s1d2: site 1, donor 2).
    - Latent position z, (n_cells, 10): the centre of the type plus unit Gaussian noise. Five types
      (half of them where there are fewer than ten) lie on one line; their cells fill the line from
      type to type and have a pseudotime in [0, 1].
    - Gene: log mean = base + loading . z + site + batch; negative binomial counts, with a
      log-normal library size. Each protein and each peak is linked to a gene.
    - Protein: negative binomial background; the foreground is added in the cells that are "on".
    - Peak: Poisson fragments; it lies at its gene, the gene's first peak at the promoter.

    The truth is in `obs`: `cell_type`, `batch`, `site`, `pseudotime_order_GEX` and the latent
    position, `latent_0` to `latent_9`. A cell or a feature that got no count is given a single one
    at a random place, so that none is empty at any size. In memory at once: the sparse result and
    `CHUNK` dense entries.

    Args:
        kind: "cite" (RNA and proteins) or "multiome" (RNA and peaks).
        n_cells: number of cells.
        n_types: number of cell types.
        n_batches: number of batches, at least `n_sites`.
        n_sites: number of sites.
        n_genes: number of genes.
        n_proteins: number of proteins (cite).
        n_peaks: number of peaks (multiome).
        separation: standard deviation of the type centres along each latent axis; the cells of a
            type have 1.
        site_effect: standard deviation of a site's log-fold changes.
        batch_effect: standard deviation of a batch's log-fold changes within its site.
        depth: factor on all library sizes.
        seed: of everything.
        name: by default `sim-<kind>`; a name always gets the prefix "sim-".

    Raises:
        ParameterError: at an unknown kind or a number out of range.
    """
    asked = {key: value for key, value in locals().items() if key != "name"}  # for `about`
    if kind not in KINDS:
        raise ParameterError(f"no kind of simulation '{kind}'", remedy=did_you_mean(kind, KINDS))
    for parameter in ("n_cells", "n_types", "n_sites", "n_genes", "n_proteins", "n_peaks"):
        if asked[parameter] < 1:
            raise ParameterError(f"{parameter} is {asked[parameter]}, it must be at least 1")
    for parameter in ("separation", "site_effect", "batch_effect", "depth"):
        if not 0 <= asked[parameter] < np.inf:
            raise ParameterError(f"{parameter} is {asked[parameter]}, it must be 0 or more")
    if n_batches < n_sites:
        raise ParameterError(
            f"{n_batches} batches cannot be nested in {n_sites} sites",
            remedy="Ask for at least as many batches as sites",
        )

    rng, rng_rna, rng_second = map(np.random.default_rng, np.random.SeedSequence(seed).spawn(3))
    site_of = np.arange(n_batches) * n_sites // n_batches
    z, obs = _cells(rng, n_cells, n_types, separation)
    batch = rng.integers(n_batches, size=n_cells)
    donor_of = np.arange(n_batches) - np.searchsorted(site_of, site_of)
    names = np.array([f"s{s + 1}d{d + 1}" for s, d in zip(site_of, donor_of, strict=True)])
    obs = obs.assign(batch=names[batch], site=[f"site{s + 1}" for s in site_of[batch]])
    obs = obs.join(pd.DataFrame(z, obs.index, [f"latent_{i}" for i in range(N_LATENT)]))

    def shifts(rng: np.random.Generator, n_features: int) -> np.ndarray:
        """(n_batches, n_features) log-fold changes: of the site, and of the batch within it."""
        of_site = rng.normal(0, site_effect, (n_sites, n_features))
        return of_site[site_of] + rng.normal(0, batch_effect, (n_batches, n_features))

    genes = _genes(n_genes, n_peaks)
    loading = rng_rna.normal(0, 0.12, (N_LATENT, n_genes))
    draw_rna = _rna(rng_rna, loading, shifts(rng_rna, n_genes), depth)
    if kind == "cite":
        var = pd.DataFrame(index=[f"protein{i + 1}" for i in range(n_proteins)])
        draw = _proteins(rng_second, loading, shifts(rng_second, n_proteins), depth)
    else:
        var = _peaks(genes, n_peaks)
        draw = _accessibility(rng_second, loading, shifts(rng_second, n_peaks), depth)
    second, unused = KINDS[kind][1], "n_peaks" if kind == "cite" else "n_proteins"
    name = name or kind
    return Cells(
        counts={
            "rna": _drawn(draw_rna, rng_rna, z, batch, n_genes),
            second: _drawn(draw, rng_second, z, batch, len(var)),
        },
        present={role: np.ones(n_cells, dtype=bool) for role in KINDS[kind]},
        var={"rna": genes, second: var},
        obs=obs,
        keys=Keys("batch", "site", "cell_type", ("pseudotime_order_GEX",)),
        name=name if name.startswith("sim-") else f"sim-{name}",
        about={
            "simulated": True,
            "source": "simulated by coembed.data.simulate",
            "note": ", ".join(f"{key}={value}" for key, value in asked.items() if key != unused),
        },
    )


def _cells(
    rng: np.random.Generator, n_cells: int, n_types: int, separation: float
) -> tuple[np.ndarray, pd.DataFrame]:
    """Return latent positions and a table of barcode, type and pseudotime."""
    share = rng.dirichlet(np.full(n_types, 0.8))
    centre = rng.normal(0, separation, (n_types, N_LATENT))
    path = np.argsort(-share)[1::2][:N_PATH]  # every other type by size: common and rare ones
    # Neighbours on the line are two thirds as far apart as two types are on average.
    step = rng.normal(size=N_LATENT)
    step *= 2 / 3 * separation * np.sqrt(2 * N_LATENT) / np.linalg.norm(step)
    place = np.arange(len(path)) - (len(path) - 1) / 2
    centre[path] = rng.normal(0, separation / 2, N_LATENT) + place[:, None] * step

    kind = rng.choice(n_types, size=n_cells, p=share)
    order = np.full(n_types, -1)
    order[path] = np.arange(len(path))
    on_path = order[kind] >= 0
    along = order[kind] + rng.uniform(size=n_cells)  # from 0 to the number of types
    z = centre[kind] + rng.normal(size=(n_cells, N_LATENT))
    z[on_path] += (along - order[kind] - 0.5)[on_path, None] * step
    digits = len(str(n_types))
    obs = pd.DataFrame(
        {
            "cell_type": [f"type{k + 1:0{digits}}" for k in kind],
            "pseudotime_order_GEX": np.where(on_path, along / max(1, len(path)), np.nan),
        },
        index=[f"cell{i + 1}" for i in range(n_cells)],
    )
    return z, obs


def _rna(rng: np.random.Generator, loading: np.ndarray, shift: np.ndarray, depth: float) -> Draw:
    """Negative binomial genes; each cell's library is shared out by a softmax."""
    n_genes = loading.shape[1]
    base = rng.normal(0, 1.3, n_genes)
    theta = rng.lognormal(np.log(2), 0.5, n_genes)

    def draw(z: np.ndarray, batch: np.ndarray) -> np.ndarray:
        mean = np.exp(base + z @ loading + shift[batch])
        library = depth * 0.32 * n_genes * rng.lognormal(0, 0.4, len(z))
        mean *= (library / mean.sum(axis=1))[:, None]
        return rng.poisson(rng.gamma(theta, mean / theta))

    return draw


def _proteins(
    rng: np.random.Generator, loading: np.ndarray, shift: np.ndarray, depth: float
) -> Draw:
    """Background in every cell, foreground where the gene of the protein is up."""
    n_proteins = shift.shape[1]
    gene = rng.choice(loading.shape[1], n_proteins, replace=n_proteins > loading.shape[1])
    threshold = rng.normal(0.3, 0.5, n_proteins)
    background = rng.lognormal(np.log(4), 0.7, n_proteins)
    foreground = rng.lognormal(np.log(40), 0.8, n_proteins)
    theta = rng.lognormal(np.log(4), 0.4, n_proteins)

    def draw(z: np.ndarray, batch: np.ndarray) -> np.ndarray:
        up = z @ loading[:, gene]
        on = rng.uniform(size=up.shape) < 1 / (1 + np.exp(-8 * (up - threshold)))
        size = depth * rng.lognormal(0, 0.35, (len(z), 1))
        mean = size * np.exp(shift[batch]) * (background + on * foreground)
        return rng.poisson(rng.gamma(theta, mean / theta))

    return draw


def _accessibility(
    rng: np.random.Generator, loading: np.ndarray, shift: np.ndarray, depth: float
) -> Draw:
    """Poisson fragments; peaks follow their gene more or less closely, and z by themselves."""
    n_peaks = shift.shape[1]
    gene = np.arange(n_peaks) % loading.shape[1]
    of_peak = loading[:, gene] * rng.uniform(0.5, 1.2, n_peaks)
    of_peak += rng.normal(0, 0.05, of_peak.shape)
    base = rng.normal(np.log(0.021), 0.7, n_peaks)

    def draw(z: np.ndarray, batch: np.ndarray) -> np.ndarray:
        size = depth * rng.lognormal(0, 0.5, (len(z), 1))
        return rng.poisson(size * np.exp(base + z @ of_peak + shift[batch]))

    return draw


def _drawn(
    draw: Draw, rng: np.random.Generator, z: np.ndarray, batch: np.ndarray, n_features: int
) -> sparse.csr_matrix:
    """Return counts, (n_cells, n_features), drawn in chunks of cells; none is empty."""
    step = max(1, CHUNK // n_features)
    chunks = [
        sparse.csr_matrix(draw(z[i : i + step], batch[i : i + step]).astype(np.float32))
        for i in range(0, len(z), step)
    ]
    counts = sparse.vstack(chunks, format="csr")
    rows = np.flatnonzero(np.diff(counts.indptr) == 0)
    columns = np.flatnonzero(np.bincount(counts.indices, minlength=n_features) == 0)
    if not len(rows) and not len(columns):
        return counts
    at = (
        np.concatenate([rows, rng.integers(len(z), size=len(columns))]),
        np.concatenate([rng.integers(n_features, size=len(rows)), columns]),
    )
    single = (np.ones(len(at[0]), dtype=np.float32), at)
    return (counts + sparse.csr_matrix(single, shape=counts.shape)).tocsr()


def _distance(n_genes: int, n_peaks: int) -> int:
    """Bases from a gene to the next: room for its peaks, 5,000 bases each."""
    return 10_000 * (n_peaks // n_genes + 2)


def _genes(n_genes: int, n_peaks: int) -> pd.DataFrame:
    """Return genes of 8,000 bases on 22 chromosomes, 1-based, on both strands by turns."""
    i = np.arange(n_genes)
    start = 1 + (i // 22 + 1) * _distance(n_genes, n_peaks)
    return pd.DataFrame(
        {
            "chrom": [f"chr{k % 22 + 1}" for k in i],
            "start": start,
            "end": start + 7_999,
            "strand": np.where(i // 22 % 2, "-", "+"),
        },
        index=[f"gene{k + 1}" for k in i],
    )


def _peaks(genes: pd.DataFrame, n_peaks: int) -> pd.DataFrame:
    """Return peaks of 500 bases: peak j is of gene j modulo the genes, first at its promoter."""
    gene = genes.iloc[np.arange(n_peaks) % len(genes)]
    turn = np.arange(n_peaks) // len(genes)
    forward = np.where(gene["strand"] == "+", 1, -1)
    origin = np.where(forward == 1, gene["start"], gene["end"])
    # Offsets 0, +5000 (in the gene), -5000, +10000, ... seen along the gene's strand.
    middle = origin + forward * (5_000 * ((turn + 1) // 2) * np.where(turn % 2, 1, -1) - 250)
    table = pd.DataFrame(
        {"chrom": gene["chrom"].to_numpy(), "start": middle - 250, "end": middle + 250}
    )
    return table.set_index(
        table["chrom"] + ":" + table["start"].astype(str) + "-" + table["end"].astype(str)
    )
