"""Data sets by name: two built-in simulated pilots, and the real files of a folder."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from coembed.data.cells import Cells
from coembed.data.read import as_cells, role_of
from coembed.data.simulate import simulate
from coembed.errors import DataError, did_you_mean

FOLDER_VARIABLE = "COEMBED_DATA"
CHECKOUT_DATA = Path(__file__).resolve().parents[4] / "shared" / "data"

PILOT: dict[str, Any] = {
    **{"n_cells": 1000, "n_types": 10, "n_batches": 4, "n_sites": 2, "n_genes": 600, "seed": 3},
    **{"site_effect": 0.2, "batch_effect": 0.15},
}
"""What the simulated pilots share. They are shallow, so that more cells are of use."""

SIMULATED: dict[str, Callable[[], Cells]] = {
    "sim-cite": lambda: simulate("cite", n_proteins=20, depth=0.2, **PILOT),
    "sim-multiome": lambda: simulate("multiome", n_peaks=1500, depth=0.25, **PILOT),
}
IGNORE_LABELS = {"pbmc10k_cite": "unknown", "snare_adbrain_*": "Mis"}
"""Labels of real pilots that mean "not known" (their README)."""


@dataclass(frozen=True)
class Pilot:
    """A data set that can be asked for by name.

    Attributes:
        name: what to ask for.
        kind: "cite" (RNA and proteins), "multiome" (RNA and peaks), or the modalities' names.
        n_cells: number of cells; None where the file cannot be read.
        source: where the cells come from.
        simulated: True for simulated cells.
        path: the file of a real data set.
    """

    name: str
    kind: str
    n_cells: int | None
    source: str
    simulated: bool
    path: Path | None = None


def pilots() -> list[Pilot]:
    """Return the pilots there are: the simulated ones, then those of the data folder.

    The folder is `COEMBED_DATA`, or `../shared/data` beside a checkout of the repository.

    Raises:
        DataError: if `COEMBED_DATA` names no folder.
    """
    built_in = [
        Pilot(name, name.removeprefix("sim-"), 1000, "simulated by coembed", simulated=True)
        for name in SIMULATED
    ]
    return built_in + [_described(path) for path in _files().values()]


def load_pilot(name: str, **options: Any) -> Cells:
    """Return the pilot `name`; `options` are those of `as_cells`.

    Raises:
        DataError: if there is no such pilot, or its file cannot be used.
    """
    if name in SIMULATED:
        return as_cells(SIMULATED[name](), **options)
    files = _files()
    if name not in files:
        folder = os.environ.get(FOLDER_VARIABLE)
        hint = f"{FOLDER_VARIABLE} is {folder}" if folder else f"{FOLDER_VARIABLE} is not set"
        raise DataError(
            f"'{name}' is neither a file nor a pilot",
            remedy=f"{did_you_mean(name, [*SIMULATED, *files])}. Real pilots are the .h5mu files "
            f"of the folder that {FOLDER_VARIABLE} names ({hint})",
        )
    cells = as_cells(files[name], **options)
    if options.get("ignore_labels") or cells.labels is None:
        return cells
    known = set(cells.labels)
    ignored = tuple(
        label
        for pattern, label in IGNORE_LABELS.items()
        if fnmatch.fnmatch(name, pattern) and label in known
    )
    return replace(cells, keys=replace(cells.keys, ignore_labels=ignored))


def resolve(data: Any, **options: Any) -> Cells:
    """Return the cells of a pilot's name, a path, or an object that `as_cells` takes.

    A pilot's name wins over a file of the same name; write `./name` for the file.

    Raises:
        DataError: if there is no such pilot or file, or it cannot be used.
    """
    if not isinstance(data, str):
        return as_cells(data, **options)
    is_path = Path(data).suffix in (".h5mu", ".h5ad", ".h5") or os.sep in data
    if not is_path and data not in SIMULATED and data not in _files():
        is_path = Path(data).exists()
    return as_cells(data, **options) if is_path else load_pilot(data, **options)


def _files() -> dict[str, Path]:
    """Return name -> file of the real pilots."""
    named = os.environ.get(FOLDER_VARIABLE)
    folder = Path(named) if named else CHECKOUT_DATA
    if named and not folder.is_dir():
        raise DataError(
            f"{FOLDER_VARIABLE} names no folder", where=named, remedy="Correct it or unset it"
        )
    return {path.stem: path for path in sorted(folder.glob("*.h5mu"))}


def _described(path: Path) -> Pilot:
    """Look into a file for what a list of pilots says."""
    import h5py

    try:
        with h5py.File(path, "r") as file:
            roles = [role for role in map(role_of, file["mod"]) if role]
            kind = {"prot": "cite", "atac": "multiome"}.get("+".join(sorted(set(roles) - {"rna"})))
            obs = file["obs"]
            n_cells = len(obs[obs.attrs["_index"]])
            source = file.get("uns/accession")
            text = source.asstr()[()] if source is not None else path.name
            simulated = bool(file["uns/simulated"][()]) if "uns/simulated" in file else False
    except (OSError, KeyError, ValueError, TypeError):
        return Pilot(path.stem, "unreadable", None, str(path), simulated=False, path=path)
    return Pilot(path.stem, kind or "+".join(sorted(roles)), n_cells, text, simulated, path)
