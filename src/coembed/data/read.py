"""MuData, AnnData and 10x files in, checked `Cells` out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from coembed.data.cells import ROLES, Cells, Keys
from coembed.data.checks import (
    checked_counts,
    checked_names,
    empty_cells,
    empty_features,
    refuse_empty,
)
from coembed.data.files import ABOUT, Part, Source, intervals, read_source
from coembed.data.keys import Columns, find_keys, letters
from coembed.errors import DataError, ParameterError, did_you_mean

SPELLINGS = {
    "rna": {"rna", "mrna", "scrna", "snrna", "gex", "gene", "genes", "geneexpression"},
    "prot": {
        "prot",
        "protein",
        "proteins",
        "adt",
        "antibodycapture",
        "antibody",
        "cite",
        "citeseq",
    },
    "atac": {"atac", "scatac", "snatac", "peak", "peaks", "chromatin", "chromatinaccessibility"},
}
"""Role -> names of modalities and feature types, letters only (also with 'seq' at the end)."""

WANTED = "coembed embeds two or more of: RNA, surface proteins (prot), chromatin peaks (atac)"


def as_cells(
    data: Any,
    *,
    batch_key: str | None = "auto",
    site_key: str | None = "auto",
    label_key: str | None = "auto",
    pseudotime_keys: str | Sequence[str] | None = "auto",
    ignore_labels: Sequence[str] = (),
    layer: str | None = None,
    modalities: Mapping[str, str] | None = None,
    drop_empty: bool = False,
    unpaired: bool = False,
    query: bool = False,
    name: str | None = None,
) -> Cells:
    """Return `data` as checked `Cells`; nothing wrong in them is repaired silently.

    Args:
        data: a MuData or AnnData object; the path of an .h5mu, .h5ad or 10x .h5 file; or `Cells`,
            which come back with the keys that are named here ("auto" keeps theirs).
            The columns of an AnnData or a 10x file are split by `var["feature_types"]`.
        batch_key: column of `obs` with the batch: a name, None, or "auto" (batch, sample, ...).
            Columns are sought in the shared `obs` first, then in the modalities';
            `modality:column` names one of those.
        site_key: the same for the site; "auto" also reads it from batch names like s1d2.
        label_key: the same for the cell type. Cells may lack a label, not a batch or a site.
        pseudotime_keys: one name or several, None, or "auto" (`pseudotime_order_GEX`,
            `GEX_pseudotime_order`, ...; those of the RNA first).
        ignore_labels: labels that mean "not known".
        layer: where the raw counts are, "X" for X itself; by default `layers["counts"]` in each
            modality that has it, else X.
        modalities: role ("rna", "prot", "atac") -> its name in the data, where the name is not
            a usual one. If given, only these are read.
        drop_empty: leave out cells that have no counts in a modality that measured them, and then
            features without counts; `about["dropped"]` says how many. Otherwise they are errors.
        unpaired: allow data in which no cell was measured by two modalities.
        query: the cells are for a trained model, for which one modality is enough.
        name: a short name; by default the file's.

    Returns:
        Every cell that one of the modalities measured, in the order of the data.

    Raises:
        DataError: if the file or the data in it cannot be used.
        ParameterError: if an argument does not fit this kind of data.
    """
    asked: dict[str, Any] = {
        "batch_key": batch_key,
        "site_key": site_key,
        "label_key": label_key,
        "pseudotime_keys": pseudotime_keys,
        "ignore_labels": (ignore_labels,) if isinstance(ignore_labels, str) else ignore_labels,
    }
    if isinstance(data, Cells):
        if layer is not None or modalities is not None:
            raise ParameterError("layer and modalities say how to read a file, not Cells")
        return _rekeyed(data, asked, name)

    of_path = isinstance(data, str | Path)
    where = str(data) if of_path else type(data).__name__
    source = read_source(data, layer)
    parts = _by_role(source, modalities, where, least=1 if query else 2)
    places = {role: f"{where}, modality '{part.name}'" for role, part in parts.items()}
    counts, var, cells = {}, {}, {}
    for role, part in parts.items():
        place = places[role]
        if part.matrix is None:
            raise DataError(
                f"there is no layer '{layer}'" if layer else "there are no counts in X",
                where=place,
                remedy=did_you_mean(layer, [*part.layers, "X"]) if layer else "Fill X or a layer",
            )
        cells[role] = checked_names(part.obs.index, "cell", place)
        var[role] = _features(part.var, role, place)
        counts[role] = checked_counts(part.matrix, cells[role], var[role].index, place, part.layers)

    shared, present = _union(source, parts, cells, where)
    if not (unpaired or query) and not (np.sum(list(present.values()), axis=0) >= 2).any():
        examples = " and ".join(f"'{names[0]}' ({role})" for role, names in cells.items())
        raise DataError(
            "no cell was measured by two modalities",
            where=where,
            remedy=f"Check that barcodes are spelt alike: {examples}. "
            "If the cells were measured apart, say so with unpaired=True (--unpaired)",
        )
    own = {part.name: part.obs.set_axis(cells[role]) for role, part in parts.items()}
    columns = Columns(shared, {} if source.split else own, where)
    keys, obs = find_keys(columns, **asked)
    title = Path(data).stem if of_path else str(source.uns.get("dataset", "data"))
    found = Cells(
        counts={
            role: _spread(matrix, obs.index.get_indexer(cells[role]), len(obs))
            for role, matrix in counts.items()
        },
        present=present,
        var=var,
        obs=obs,
        keys=keys,
        name=name or title,
        about=_about(source.uns),
    )
    return _without_empty(found, places, drop=drop_empty)


def _rekeyed(cells: Cells, asked: dict[str, Any], name: str | None) -> Cells:
    """Return `cells` with the keys that were asked for by name; the others stay, unchecked."""
    old = cells.keys
    label = old.label if asked["label_key"] == "auto" else asked["label_key"]
    if asked["ignore_labels"]:
        asked = {**asked, "label_key": label}
    stay = {option for option, value in asked.items() if value == "auto"}
    named: dict[str, Any] = {
        option: None if option in stay else value for option, value in asked.items()
    }
    keys, obs = find_keys(Columns(cells.obs, {}, cells.name), **named)
    keys = Keys(
        batch=old.batch if "batch_key" in stay else keys.batch,
        site=old.site if "site_key" in stay else keys.site,
        label=label,
        pseudotime=old.pseudotime if "pseudotime_keys" in stay else keys.pseudotime,
        ignore_labels=old.ignore_labels if "label_key" in stay else keys.ignore_labels,
    )
    return replace(cells, keys=keys, obs=obs, name=name or cells.name)


def role_of(name: str) -> str | None:
    """Return the role that a modality or a feature type of this name plays, if it is known."""
    plain = letters(name)
    spellings = {plain, plain.removesuffix("seq")}
    return next((role for role in ROLES if spellings & SPELLINGS[role]), None)


def _by_role(
    source: Source, modalities: Mapping[str, str] | None, where: str, *, least: int
) -> dict[str, Part]:
    """Return role -> part, in the order of `ROLES`; an AnnData's columns are split first."""
    parts = _split(source.parts[0], where) if source.split else source.parts
    stored = {part.name: part for part in parts}
    name_them = "Name them with modalities={'rna': '...', ...} (--modality rna=...)"
    if modalities is None:
        named = [(role_of(name), name) for name in stored]
        for role in ROLES:
            same = [name for other, name in named if other == role]
            if len(same) > 1:
                raise DataError(
                    f"several modalities could be '{role}': {', '.join(same)}",
                    where=where,
                    remedy=name_them,
                )
        chosen = {role: name for role, name in named if role is not None}
    else:
        chosen = dict(modalities)
        for role, name in chosen.items():
            if role not in ROLES:
                raise ParameterError(f"no role '{role}'", remedy=did_you_mean(role, ROLES))
            if name not in stored:
                raise DataError(
                    f"there is no modality '{name}'",
                    where=where,
                    remedy=did_you_mean(name, stored),
                )
    if len(chosen) < least:
        known = f"only {', '.join(chosen.values())}" if chosen else "none"
        raise DataError(
            f"two modalities are needed, of {', '.join(stored) or 'nothing'} {known} is known",
            where=where,
            remedy=f"{WANTED}. {name_them}",
        )
    return {role: stored[chosen[role]] for role in ROLES if role in chosen}


def _split(table: Part, where: str) -> tuple[Part, ...]:
    """Split the columns of an AnnData by their feature types."""
    column = next((c for c in ("feature_types", "feature_type") if c in table.var), None)
    if column is None:
        raise DataError(
            "an AnnData without var['feature_types'] holds one modality, two are needed",
            where=where,
            remedy=f"{WANTED}. Set var['feature_types'] to 'GEX', 'ADT' or 'ATAC' for each "
            "feature, or put the modalities into a MuData",
        )
    types = table.var[column].astype(str)
    matrix = None if table.matrix is None else sparse.csc_matrix(table.matrix)
    return tuple(
        replace(
            table,
            name=kind,
            matrix=None if matrix is None else matrix[:, (types == kind).to_numpy()],
            var=table.var[types == kind],
        )
        for kind in types.unique()
    )


def _union(
    source: Source, parts: Mapping[str, Part], cells: Mapping[str, pd.Index], where: str
) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """Return the shared columns over all cells that were measured, and who measured which."""
    if source.obs is None:
        shared = next(iter(parts.values())).obs.set_axis(next(iter(cells.values())))
    else:
        prefixes = tuple(f"{part.name}:" for part in source.parts)
        plain = [column for column in source.obs if not str(column).startswith(prefixes)]
        shared = source.obs[plain].set_axis(checked_names(source.obs.index, "cell", where))
        everyone = shared.index
        for names in cells.values():
            everyone = everyone.union(names, sort=False)
        shared = shared.reindex(everyone)
    present = {role: shared.index.isin(names) for role, names in cells.items()}
    measured = np.logical_or.reduce(list(present.values()))
    return shared[measured], {role: mask[measured] for role, mask in present.items()}


def _spread(matrix: sparse.csr_matrix, position: np.ndarray, n_cells: int) -> sparse.csr_matrix:
    """Move row i to row `position[i]` of a matrix of `n_cells` rows; the others are empty."""
    rows = matrix[np.argsort(position)]
    lengths = np.zeros(n_cells, dtype=np.int64)
    lengths[np.sort(position)] = np.diff(rows.indptr)
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    index = np.int32 if rows.nnz < 2**31 else np.int64  # one type, so one fingerprint
    stored: Any = (rows.data, rows.indices.astype(index), indptr.astype(index))
    return sparse.csr_matrix(stored, shape=(n_cells, matrix.shape[1]))


def _without_empty(cells: Cells, places: Mapping[str, str], *, drop: bool) -> Cells:
    """Refuse cells and features without counts, or leave them out and say so in `about`."""
    empty = {role: empty_cells(cells.counts[role]) & cells.present[role] for role in cells.roles}
    if not drop:
        for role, mask in empty.items():
            refuse_empty(mask, cells.obs.index, "cell", places[role])
            nothing = empty_features(cells.counts[role])
            refuse_empty(nothing, cells.var[role].index, "feature", places[role])
        return cells
    kept = ~np.logical_or.reduce(list(empty.values()))
    if not kept.any():
        raise DataError("no cell has counts in each of its modalities", where=cells.name)
    dropped = {"cells": int((~kept).sum())}
    cells = cells if kept.all() else cells.take(kept)
    counts, var = dict(cells.counts), dict(cells.var)
    for role in cells.roles:
        some = ~empty_features(counts[role])
        dropped[f"{role} features"] = int((~some).sum())
        if not some.any():
            raise DataError("no feature has counts", where=places[role])
        if not some.all():
            counts[role], var[role] = counts[role][:, some], var[role][some]
    about = {**cells.about, "dropped": dropped} if any(dropped.values()) else cells.about
    return replace(cells, counts=counts, var=var, about=about)


def _features(var: pd.DataFrame, role: str, where: str) -> pd.DataFrame:
    """Return the features with coordinates: '' and -1 where not known; strand '+' or '-'."""
    var = var.set_axis(checked_names(var.index, "feature", where))
    if {"chrom", "start", "end"} <= set(var.columns):
        places = pd.DataFrame(
            {
                "chrom": var["chrom"].astype(object).where(var["chrom"].notna(), "").astype(str),
                "start": pd.to_numeric(var["start"], errors="coerce").fillna(-1).astype("int64"),
                "end": pd.to_numeric(var["end"], errors="coerce").fillna(-1).astype("int64"),
            }
        )
    elif role == "atac":
        places = intervals(var.index.to_series())
    else:
        return var
    if "strand" in var:
        signs = {"1": "+", "+": "+", "-1": "-", "-": "-"}
        places["strand"] = var["strand"].astype(str).map(signs).fillna("")
    return var.assign(**{str(column): places[column] for column in places})


def _about(uns: Mapping[str, Any]) -> dict[str, Any]:
    """Return the strings of `uns` that tell where the data come from."""
    told: dict[str, Any] = {key: uns[key] for key in ABOUT if isinstance(uns.get(key), str)}
    told.pop("dataset", None)
    if "licence" in told:
        told.setdefault("license", told.pop("licence"))
    if bool(uns.get("simulated", False)):
        told["simulated"] = True
    return told
