"""Counts as they must be, or an error that names the modality, the cell and the feature."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from coembed.errors import DataError

LARGEST = 2**24
"""From here on float32 cannot tell a whole number from the next."""


def checked_names(names: pd.Index, kind: str, where: str) -> pd.Index:
    """Return `names` as text; raise `DataError` where there are none or one comes twice."""
    names = pd.Index(names.astype(str), name=None)
    if not len(names):
        raise DataError(f"there are no {kind}s", where=where, remedy="Check how it was filtered")
    twice = names.duplicated()
    if twice.any():
        axis = {"cell": "obs_names_make_unique", "feature": "var_names_make_unique"}[kind]
        raise DataError(
            f"{kind} names repeat ({twice.sum()} times, the first '{names[twice][0]}')",
            where=where,
            remedy=f"Give each {kind} its own name, for example with AnnData's {axis}()",
        )
    return names


def checked_counts(
    matrix: Any, cells: pd.Index, features: pd.Index, where: str, layers: tuple[str, ...]
) -> sparse.csr_matrix:
    """Return `matrix`, (n_cells, n_features), as canonical float32 CSR of whole numbers >= 0.

    Raises:
        DataError: at NaN, infinite, negative, fractional or too large values, naming the first.
    """
    counts = sparse.csr_matrix(matrix, copy=True)
    try:
        counts.check_format(full_check=True)
    except ValueError as error:
        raise DataError(f"the sparse matrix is damaged ({error})", where=where) from error
    if counts.shape != (len(cells), len(features)):
        raise DataError(
            f"the counts are {counts.shape}, the names {(len(cells), len(features))}", where=where
        )
    counts.sum_duplicates()
    values = counts.data
    if values.dtype.kind not in "biuf":
        raise DataError(f"the counts are of type {values.dtype}, not numbers", where=where)
    there = f"Layers there: {', '.join(layers)}" if layers else "There are no layers"
    raw = f"Raw counts are wanted: name their layer with layer= (--layer). {there}"

    def refuse(bad: np.ndarray, kind: str, remedy: str) -> None:
        if not bad.any():
            return
        at = int(np.argmax(bad))
        row = int(np.searchsorted(counts.indptr, at, side="right")) - 1
        many = "1 value is" if bad.sum() == 1 else f"{bad.sum():,} values are"
        raise DataError(
            f"{many} {kind}, the first {values[at]:g} in cell '{cells[row]}', "
            f"feature '{features[counts.indices[at]]}'",
            where=where,
            remedy=remedy,
        )

    if values.dtype.kind == "f":
        refuse(~np.isfinite(values), "NaN or infinite", "Repair or remove these cells or features")
    refuse(values < 0, "negative", raw)
    if values.dtype.kind == "f":
        refuse(values != np.floor(values), "fractional", raw)
    rounded = "Check that these are counts: float32 would round them"
    refuse(values >= LARGEST, "too large (2^24 or more)", rounded)
    counts.data = values.astype(np.float32)
    counts.eliminate_zeros()
    return counts


def empty_cells(counts: sparse.csr_matrix) -> np.ndarray:
    """(n_cells,) bool, True where a cell has no count (explicit zeros must be gone)."""
    return np.diff(counts.indptr) == 0


def empty_features(counts: sparse.csr_matrix) -> np.ndarray:
    """(n_features,) bool, True where a feature has no count (explicit zeros must be gone)."""
    return np.bincount(counts.indices, minlength=counts.shape[1]) == 0


def refuse_empty(empty: np.ndarray, names: pd.Index, kind: str, where: str) -> None:
    """Raise `DataError` with the first of `names` where `empty` is True."""
    if empty.any():
        many = f"1 {kind} has" if empty.sum() == 1 else f"{empty.sum():,} {kind}s have"
        raise DataError(
            f"{many} no counts, the first '{names[empty][0]}'",
            where=where,
            remedy="Filter the data, or leave them out with drop_empty=True (--drop-empty)",
        )
