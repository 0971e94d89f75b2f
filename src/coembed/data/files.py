"""What is stored in MuData, AnnData and 10x files or objects, as it is, unchecked."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from scipy import sparse

from coembed.errors import DataError

ABOUT = (
    *("source", "license", "licence", "publication", "accession", "genome", "organism"),
    *("tissue", "technology", "note", "dataset", "simulated"),
)
"""The entries of `uns` that tell where the data come from; `uns` can hold gigabytes besides."""
INTERVAL = r"^(.+)[:_-](\d+)[-_](\d+)$"
"""Peak names: chr1:100-200, chr1-100-200 or chr1_100_200."""


@dataclass(frozen=True)
class Part:
    """A modality as stored: `matrix` is None where the layer asked for is missing."""

    name: str
    matrix: Any
    obs: pd.DataFrame
    var: pd.DataFrame
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """A data set as stored; `parts` is one table of all features where it is an AnnData."""

    parts: tuple[Part, ...]
    obs: pd.DataFrame | None
    uns: Mapping[str, Any]
    split: bool


def read_source(data: Any, layer: str | None) -> Source:
    """Return what is stored in a file or an object, unchecked."""
    if isinstance(data, str | Path):
        return _read_file(Path(data), layer)
    if hasattr(data, "mod"):
        parts = tuple(_part_of(name, table, layer) for name, table in data.mod.items())
        return Source(parts, data.obs, data.uns, split=False)
    if hasattr(data, "var") and hasattr(data, "layers"):
        return Source((_part_of("X", data, layer),), None, data.uns, split=True)
    raise DataError(
        f"a {type(data).__name__} is neither a path nor a MuData, an AnnData or Cells",
        remedy="Give one of these",
    )


def _part_of(name: str, table: Any, layer: str | None) -> Part:
    """Return an AnnData object's counts and tables."""
    table = table.to_memory() if table.isbacked else table
    layers = tuple(table.layers)
    chosen = _chosen(layer, layers)
    matrix = table.X if chosen == "X" else table.layers.get(chosen)
    return Part(name, matrix, table.obs, table.var, layers)


def _chosen(layer: str | None, layers: tuple[str, ...]) -> str:
    return layer or ("counts" if "counts" in layers else "X")


def _read_file(path: Path, layer: str | None) -> Source:
    """Read only what is needed: one matrix and two tables of each modality."""
    where = str(path)
    readers = {".h5mu": _read_h5mu, ".h5ad": _read_h5ad, ".h5": _read_10x}
    kinds = "coembed reads .h5mu (MuData), .h5ad (AnnData) and 10x .h5 files"
    if not path.exists():
        raise DataError("there is no such file", where=where, remedy="Check the path")
    if path.is_dir():
        raise DataError("this is a folder, not a file", where=where, remedy=kinds)
    if path.suffix.lower() not in readers:
        raise DataError("not a known kind of file", where=where, remedy=kinds)

    import h5py

    try:
        with warnings.catch_warnings(), h5py.File(path, "r") as file:
            warnings.simplefilter("ignore")  # of anndata, about its own formats
            return readers[path.suffix.lower()](file, layer, where)
    except DataError:
        raise
    except MemoryError as error:
        raise DataError(
            "there is not enough memory to read it",
            where=where,
            remedy="Use a machine with more, or a smaller file",
        ) from error
    except PermissionError as error:
        raise DataError("may not be read", where=where, remedy="Check its permissions") from error
    except Exception as error:  # h5py and anndata raise many kinds at damaged files
        first_line = (str(error).splitlines() or [""])[0]
        raise DataError(
            f"cannot be read; damaged, cut short, or not what its name says "
            f"({type(error).__name__}: {first_line[:160]})",
            where=where,
            remedy="Copy or download the file again and compare its size or checksum",
        ) from error


def _lacks(structure: str, what: str, where: str) -> DataError:
    return DataError(
        f"not {what}: it has no {structure}",
        where=where,
        remedy="Check how the file was written and that its extension fits",
    )


def _read_h5mu(file: Any, layer: str | None, where: str) -> Source:
    from anndata.io import read_elem

    if "mod" not in file or "obs" not in file:
        raise _lacks("groups 'mod' and 'obs'", "a MuData file", where)
    parts = tuple(_stored_part(name, group, layer, where) for name, group in file["mod"].items())
    return Source(parts, read_elem(file["obs"]), _stored_uns(file), split=False)


def _read_h5ad(file: Any, layer: str | None, where: str) -> Source:
    if "obs" not in file or "var" not in file:
        raise _lacks("groups 'obs' and 'var'", "an AnnData file", where)
    return Source((_stored_part("X", file, layer, where),), None, _stored_uns(file), split=True)


def _stored_uns(file: Any) -> dict[str, Any]:
    from anndata.io import read_elem

    stored = file.get("uns", {})
    return {key: read_elem(stored[key]) for key in ABOUT if key in stored}


def _stored_part(name: str, group: Any, layer: str | None, where: str) -> Part:
    """Return the counts and tables of an AnnData on disk."""
    import h5py
    from anndata.io import read_elem

    if isinstance(group["obs"], h5py.Dataset):
        raise DataError(
            "written by an anndata older than 0.7",
            where=where,
            remedy="Read it with anndata.read_h5ad and write it again",
        )
    layers = tuple(group.get("layers", ()))
    chosen = _chosen(layer, layers)
    node = group.get("X") if chosen == "X" else group.get(f"layers/{chosen}")
    matrix = None if node is None else read_elem(node)
    return Part(name, matrix, read_elem(group["obs"]), read_elem(group["var"]), layers)


def _read_10x(file: Any, layer: str | None, where: str) -> Source:
    """Read a Cell Ranger (ARC) matrix; a feature is called by its id where its name repeats."""
    features = file.get("matrix/features")
    if features is None or "feature_type" not in features:
        raise _lacks("'matrix/features/feature_type'", "a 10x file with feature types", where)
    text = {
        key: node.asstr()[:]
        for key, node in features.items()
        if key != "_all_tag_keys" and node.dtype.kind in "SO"
    }
    names = pd.Series(text["name"])
    repeats = pd.DataFrame({"name": names, "type": text["feature_type"]}).duplicated(keep=False)
    var = pd.DataFrame(
        {"gene_ids": text["id"], "feature_types": text["feature_type"]},
        index=pd.Index(names.where(~repeats, text["id"])),
    )
    if "interval" in text:
        var[["chrom", "start", "end"]] = intervals(pd.Series(text["interval"], index=var.index))
    matrix = file["matrix"]
    n_features, n_cells = (int(size) for size in matrix["shape"][:])
    by_cell = (matrix["data"][:], matrix["indices"][:], matrix["indptr"][:])
    obs = pd.DataFrame(index=pd.Index(matrix["barcodes"].asstr()[:]))
    counts = (
        None
        if layer not in (None, "X")
        else sparse.csr_matrix(by_cell, shape=(n_cells, n_features))
    )
    return Source((Part("X", counts, obs, var, ()),), None, {}, split=True)


def intervals(names: pd.Series) -> pd.DataFrame:
    """Return chrom, start and end from names like chr1:100-200."""
    found = names.astype(str).str.extract(INTERVAL)
    return pd.DataFrame(
        {
            "chrom": found[0].fillna(""),
            "start": found[1].fillna(-1).astype("int64"),
            "end": found[2].fillna(-1).astype("int64"),
        }
    )
