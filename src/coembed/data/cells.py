"""The checked internal form of a data set: what every higher floor works on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

ROLES = ("rna", "prot", "atac")
"""The parts a modality can play: genes, surface proteins, chromatin peaks."""


@dataclass(frozen=True)
class Keys:
    """Which columns of `obs` say what.

    Attributes:
        batch: the technical batch a model may correct for.
        site: the laboratory, for the site score.
        label: the cell type, for scores only; no model sees it.
        pseudotime: orderings shipped with the data, for the trajectory score.
        ignore_labels: labels that mean "not known", left out of label scores.
    """

    batch: str | None = None
    site: str | None = None
    label: str | None = None
    pseudotime: tuple[str, ...] = ()
    ignore_labels: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Cells:
    """Counts of one or more modalities over one list of cells, paired, unpaired or mosaic.

    Every modality has a row for every cell. A cell that a modality did not measure has an empty
    row there and `present[role]` says so; an empty CSR row costs nothing.

    Attributes:
        counts: role -> CSR (n_cells, n_features), float32, whole non-negative numbers.
        present: role -> (n_cells,) bool, True where the modality measured the cell.
        var: role -> features in column order; `chrom`, `start`, `end`, `strand` where known.
        obs: one row per cell, indexed by unique barcodes.
        keys: which columns of `obs` say what.
        name: a short name for tables and files.
        about: where the data come from; `about["simulated"]` is True for simulated cells.
    """

    counts: Mapping[str, sparse.csr_matrix]
    present: Mapping[str, np.ndarray]
    var: Mapping[str, pd.DataFrame]
    obs: pd.DataFrame
    keys: Keys = Keys()
    name: str = "data"
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return len(self.obs)

    @property
    def roles(self) -> tuple[str, ...]:
        """The modalities there are, in the order of `ROLES`."""
        return tuple(role for role in ROLES if role in self.counts)

    @property
    def paired(self) -> np.ndarray:
        """(n_cells,) bool, True where every modality measured the cell."""
        return np.logical_and.reduce([self.present[role] for role in self.roles])

    @property
    def batch(self) -> np.ndarray:
        """(n_cells,) str, the batch of each cell; one constant where no batch is named."""
        if self.keys.batch is None:
            return np.full(self.n_cells, "all", dtype=object)
        return self.obs[self.keys.batch].astype(str).to_numpy(dtype=object)

    @property
    def site(self) -> np.ndarray | None:
        """(n_cells,) str, the site of each cell, or None where no site is named."""
        if self.keys.site is None:
            return None
        return self.obs[self.keys.site].astype(str).to_numpy(dtype=object)

    @property
    def labels(self) -> np.ndarray | None:
        """(n_cells,) str, with None for a cell without a label or with an ignored one."""
        if self.keys.label is None:
            return None
        column = self.obs[self.keys.label]
        known = column.notna() & ~column.astype(str).isin(self.keys.ignore_labels)
        labels = column.astype(str).to_numpy(dtype=object)
        labels[~known.to_numpy()] = None
        return labels

    @property
    def annotations(self) -> dict[str, Any]:
        """What an embedding is scored against: the keyword arguments of `coembed.metrics.score`."""
        return {
            "labels": self.labels,
            "batch": None if self.keys.batch is None else self.batch,
            "site": self.site,
            "pseudotime": {key: self.obs[key].to_numpy(float) for key in self.keys.pseudotime},
        }

    def take(self, rows: np.ndarray) -> Cells:
        """Return the cells at `rows`, (n,) int or bool, in that order."""
        rows = np.flatnonzero(rows) if np.asarray(rows).dtype == bool else np.asarray(rows)
        return replace(
            self,
            counts={role: matrix[rows] for role, matrix in self.counts.items()},
            present={role: mask[rows] for role, mask in self.present.items()},
            obs=self.obs.iloc[rows],
        )

    def fingerprint(self) -> str:
        """Return a SHA-256 of everything a study's result can depend on."""
        digest = hashlib.sha256()
        for role in self.roles:
            matrix = self.counts[role]
            digest.update(f"{role}{matrix.shape}".encode())
            for part in (matrix.indptr, matrix.indices, matrix.data, self.present[role]):
                digest.update(np.ascontiguousarray(part).data)  # no copy
            digest.update("\0".join(self.var[role].index.astype(str)).encode())
            for place in ("chrom", "start", "end", "strand"):
                if place in self.var[role]:
                    digest.update("\0".join(self.var[role][place].astype(str)).encode())
        digest.update("\0".join(self.obs.index.astype(str)).encode())
        columns = (self.keys.batch, self.keys.site, self.keys.label, *self.keys.pseudotime)
        for column in columns:
            if column is not None:
                values = self.obs[column].astype(str)
                digest.update("\0".join([column, *values]).encode())
        digest.update("\0".join(self.keys.ignore_labels).encode())
        return digest.hexdigest()
