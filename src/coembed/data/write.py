"""Cells out again, as MuData and as a file that is whole or not there."""

from __future__ import annotations

import errno
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from coembed.data.cells import Cells
from coembed.errors import OutputError
from coembed.files import write_atomically

if TYPE_CHECKING:
    from mudata import MuData


def to_mudata(cells: Cells) -> MuData:
    """Return a MuData with a modality for each role, each with the cells that it measured.

    Counts are int32 in X, the columns of `cells.obs` are shared ones, `cells.about` goes to `uns`.
    `as_cells` of the result gives the same cells again, where "auto" finds the same keys.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of mudata, about its own future defaults
        from anndata import AnnData
        from mudata import MuData

        parts = {}
        for role in cells.roles:
            here = cells.present[role]
            obs = cells.obs.loc[here, []]
            counts = cells.counts[role][here].astype(np.int32)
            parts[role] = AnnData(X=counts, obs=obs, var=cells.var[role].copy())
        mdata = MuData(parts)
        mdata = mdata[cells.obs.index].copy()  # MuData orders the union of cells by itself
        mdata.obs = cells.obs.copy()
        mdata.uns.update({"dataset": cells.name, **cells.about})
    return mdata


def write_h5mu(mdata: MuData, path: str | Path, *, overwrite: bool = False) -> Path:
    """Write `mdata` to `path` in one move: another reader sees the whole file or none.

    Raises:
        OutputError: if the file exists and `overwrite` is False, or it cannot be written.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise OutputError(
            "this exists already",
            where=str(path),
            remedy="Choose another name, or allow it with overwrite=True (--overwrite)",
        )
    if not path.parent.is_dir():
        raise OutputError(
            "the folder does not exist", where=str(path.parent), remedy="Make it first"
        )

    def write(unfinished: Path) -> None:
        _reserve(unfinished, _size(mdata))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mdata.write_h5mu(unfinished)

    write_atomically(path, write)
    return path


def _size(mdata: MuData) -> int:
    """Return about the bytes that the file will need, rather too many than too few."""
    parts = [*mdata.mod.values(), mdata.obs, mdata.var, *mdata.obsm.values()]
    return sum(part.__sizeof__() for part in parts) * 11 // 10 + 2**20


def _reserve(path: Path, size: int) -> None:
    """Make sure of the space first: HDF5 crashes the process when the disk fills up under it."""
    with open(path, "wb") as file:
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # it cannot be reserved
                    raise
