"""Easy simulated cells: three types, each with its own block of features up in every modality."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from scipy import sparse

from coembed.data.cells import Cells, Keys
from coembed.data.minibatches import Batch

KINDS = {"cite": ("rna", "prot"), "multiome": ("rna", "atac"), "all": ("rna", "prot", "atac")}
N_GENES = 60
WIDTHS = {"rna": N_GENES, "prot": 12, "atac": 90}
TYPES = ("A", "B", "C")


def features(role: str) -> pd.DataFrame:
    """Genes of 1,000 bases every 10,000; peaks at the genes in turn; proteins without a place."""
    i = np.arange(WIDTHS[role])
    index = pd.Index([f"{role}{k}" for k in i])
    if role == "prot":
        return pd.DataFrame(index=index)
    gene, turn = i % N_GENES, i // N_GENES
    start = 10_000 * (gene + 1) + 300 * turn
    end = start + (999 if role == "rna" else 200)
    return pd.DataFrame({"chrom": "chr1", "start": start, "end": end, "strand": "+"}, index=index)


def easy_cells(
    kind: str = "cite", n: int = 150, *, seed: int = 0, n_batches: int = 2, depth: float = 1.0
) -> Cells:
    """Return paired cells. Feature j belongs to type (gene of j) % 3, and is ten times up there."""
    random = np.random.default_rng(seed)
    kinds = np.arange(n) % 3
    batch = random.integers(n_batches, size=n)
    counts = {}
    for role in KINDS[kind]:
        owner = np.arange(WIDTHS[role]) % N_GENES % 3
        size = depth * random.lognormal(0, 0.3, (n, 1))
        mean = size * np.where(owner == kinds[:, None], 5.0, 0.5) * (1 + 0.1 * batch[:, None])
        counts[role] = sparse.csr_matrix(random.poisson(mean).astype(np.float32))
    obs = pd.DataFrame(
        {"type": np.array(TYPES)[kinds], "batch": [f"b{b}" for b in batch]},
        index=[f"cell{i}" for i in range(n)],
    )
    return Cells(
        counts=counts,
        present={role: np.ones(n, bool) for role in counts},
        var={role: features(role) for role in counts},
        obs=obs,
        keys=Keys(batch="batch", label="type"),
        name=f"sim-easy-{kind}",
        about={"simulated": True},
    )


def mosaic(cells: Cells, *, seed: int = 0) -> Cells:
    """Return the cells, of which a sixth lack each modality; every cell keeps one."""
    random = np.random.default_rng(seed)
    lacks = random.integers(6, size=cells.n_cells)
    counts, present = {}, {}
    for i, role in enumerate(cells.roles):
        has = lacks != i
        counts[role] = sparse.csr_matrix(cells.counts[role].multiply(has[:, None]), dtype="f4")
        present[role] = has
    return replace(cells, counts=counts, present=present)


def neighbour_accuracy(z: np.ndarray, labels: np.ndarray) -> float:
    """Share of cells whose five nearest other cells are mostly of their type."""
    from sklearn.neighbors import NearestNeighbors

    near = NearestNeighbors(n_neighbors=5).fit(z).kneighbors(return_distance=False)
    return float(((labels[near] == labels[:, None]).sum(axis=1) >= 3).mean())


def batch_of(widths: dict[str, int], codes: list[int]) -> Batch:
    """A minibatch of Poisson counts in which every cell has every modality."""
    random = np.random.default_rng(1)
    x = {
        m: torch.from_numpy(random.poisson(2, (len(codes), p)).astype("f4"))
        for m, p in widths.items()
    }
    return Batch(
        x=x,
        present={m: torch.ones(len(codes), dtype=torch.bool) for m in x},
        batch=dict.fromkeys(x, torch.tensor(codes)),
    )
