"""Which columns of `obs` are the batch, the site, the cell type and the pseudotimes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from coembed.data.cells import Keys
from coembed.errors import DataError, did_you_mean

BATCH = ("batch", "batchid", "sample", "sampleid", "samplename", "library", "libraryid")
SITE = ("site", "siteid")
LABEL = ("celltype", "celltypes", "celllabel", "label", "labels", "annotation")
PSEUDOTIME = re.compile(r"(gex|rna|adt|prot|atac)?pseudotime(order)?(gex|rna|adt|prot|atac)?")
SITE_IN_BATCH = re.compile(r"s(\d+)d\d+")
"""The batch names of the NeurIPS 2021 benchmark: site, then donor (study.md section 1)."""


def letters(name: str) -> str:
    """Return the lower-case letters of `name`: how spellings are compared."""
    return re.sub(r"[^a-z]", "", name.lower())


@dataclass(frozen=True)
class Columns:
    """Columns over one list of cells, some shared, some told by each modality.

    Attributes:
        shared: (n_cells, *) columns that belong to the cells.
        parts: modality name -> its own columns, for the cells it measured.
        where: the data set, for errors.
    """

    shared: pd.DataFrame
    parts: Mapping[str, pd.DataFrame]
    where: str

    def names(self) -> list[str]:
        """Names that can be asked for, the shared ones first."""
        own = [column for part in self.parts.values() for column in part.columns]
        return list(dict.fromkeys([*self.shared.columns, *own]))

    def get(self, name: str, option: str) -> pd.Series:
        """Return column `name`, or `modality:name`, over all cells.

        Raises:
            DataError: if there is none, or two modalities contradict each other.
        """
        if name in self.shared:
            return self.shared[name]
        part, _, own = name.partition(":")
        if part in self.parts and own in self.parts[part]:
            return self.parts[part][own].reindex(self.shared.index)
        tellers = {part: table[name] for part, table in self.parts.items() if name in table}
        if not tellers:
            flag = option.replace("_", "-")
            raise DataError(
                f"there is no column '{name}' in obs ({option}, --{flag})",
                where=self.where,
                remedy=did_you_mean(name, self.names()),
            )
        merged = pd.Series(None, index=self.shared.index, dtype=object)
        for part, column in tellers.items():
            told = column.astype(object).where(column.notna(), None).reindex(merged.index)
            clash = merged.notna() & told.notna() & (merged != told)
            if clash.any():
                raise DataError(
                    f"the modalities disagree on '{name}', first in cell '{clash.idxmax()}'",
                    where=self.where,
                    remedy=f"Say whose to take with {option}='{part}:{name}'",
                )
            merged = merged.where(merged.notna(), told)
        return merged.infer_objects()


def find_keys(
    columns: Columns,
    *,
    batch_key: str | None,
    site_key: str | None,
    label_key: str | None,
    pseudotime_keys: str | Sequence[str] | None,
    ignore_labels: Sequence[str],
) -> tuple[Keys, pd.DataFrame]:
    """Return the keys and the shared columns joined by those in use; see `as_cells`.

    Raises:
        DataError: if a named column does not exist, or one in use lacks values that it needs.
    """
    where = columns.where
    found: dict[str, pd.Series] = {}

    def pick(key: str | None, candidates: tuple[str, ...], option: str) -> str | None:
        if key == "auto":
            spelt = {letters(name): name for name in reversed(columns.names())}
            key = next((spelt[name] for name in candidates if name in spelt), None)
        if key is not None:
            found[key] = columns.get(key, option)
        return key

    def refuse_gaps(key: str, option: str) -> None:
        gaps = found[key].isna()
        if gaps.any():
            raise DataError(
                f"{gaps.sum():,} of {len(gaps):,} cells have no value in '{key}', "
                f"the first '{gaps.idxmax()}'",
                where=where,
                remedy=f"Fill the column, or name another with {option}=",
            )

    batch = pick(batch_key, BATCH, "batch_key")
    if batch is not None:
        refuse_gaps(batch, "batch_key")

    site = pick(site_key, SITE, "site_key")
    if site is not None:
        refuse_gaps(site, "site_key")
    elif site_key == "auto" and batch is not None:
        digits = found[batch].astype(str).str.extract(f"^{SITE_IN_BATCH.pattern}$", expand=False)
        if digits.notna().all():
            site = "site"
            found[site] = digits

    label = pick(label_key, LABEL, "label_key")
    if label is not None and found[label].isna().all():
        if label_key != "auto":
            raise DataError(f"no cell has a value in '{label}' (label_key)", where=where)
        label = None
    if ignore_labels:
        known = set() if label is None else set(found[label].dropna().astype(str))
        for name in ignore_labels:
            if name not in known:
                raise DataError(
                    f"no cell has the label '{name}' (ignore_labels, --ignore-labels)",
                    where=where,
                    remedy=did_you_mean(name, known),
                )

    pseudotime = _pseudotimes(columns, pseudotime_keys, found)
    keys = Keys(batch, site, label, pseudotime, tuple(ignore_labels))
    extra = {name: column for name, column in found.items() if name not in columns.shared}
    return keys, columns.shared.assign(**extra)


def _pseudotimes(
    columns: Columns, wanted: str | Sequence[str] | None, found: dict[str, pd.Series]
) -> tuple[str, ...]:
    """Look up the pseudotime columns into `found`; those of the RNA come first."""
    auto = wanted == "auto"
    if auto:
        names = [name for name in columns.names() if PSEUDOTIME.fullmatch(letters(name))]
        names.sort(key=lambda name: not any(rna in letters(name) for rna in ("gex", "rna")))
    else:
        names = [wanted] if isinstance(wanted, str) else list(wanted or ())
    used = []
    for name in names:
        column = columns.get(name, "pseudotime_keys")
        numeric = pd.api.types.is_numeric_dtype(column) and column.notna().any()
        if not numeric and not auto:
            raise DataError(
                f"column '{name}' holds no numbers (pseudotime_keys)",
                where=columns.where,
                remedy="Name a column with an ordering, or None",
            )
        if numeric:
            found[name] = column
            used.append(name)
    return tuple(used)
