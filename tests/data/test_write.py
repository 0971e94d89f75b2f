"""Writing: a round trip, and files that are whole or not there."""

from __future__ import annotations

import errno
import os

import mudata
import numpy as np
import pytest

from coembed.data.read import as_cells
from coembed.data.simulate import simulate
from coembed.data.write import to_mudata, write_h5mu
from coembed.errors import OutputError

SMALL = {"n_types": 4, "n_batches": 2, "n_sites": 2, "n_genes": 30, "n_proteins": 5, "n_peaks": 20}


@pytest.fixture(scope="module")
def mosaic():
    """Simulated cells, the last ones without protein and the first ones without RNA."""
    cells = simulate("cite", 60, **SMALL)
    order = np.random.default_rng(0).permutation(60)
    cells = cells.take(order)
    for role, hidden in (("prot", slice(45, 60)), ("rna", slice(0, 10))):
        cells.present[role][hidden] = False
        matrix = cells.counts[role].tolil()
        matrix[hidden] = 0
        cells.counts[role] = matrix.tocsr()
    return as_cells(to_mudata(cells), drop_empty=True)


@pytest.mark.parametrize("kind", ["cite", "multiome"])
def test_round_trip(kind, tmp_path):
    cells = simulate(kind, 40, **SMALL)
    again = as_cells(write_h5mu(to_mudata(cells), tmp_path / "cells.h5mu"))
    assert again.fingerprint() == cells.fingerprint()
    assert again.keys == cells.keys
    assert again.about["simulated"] is True
    assert as_cells(to_mudata(cells)).name == cells.name


def test_round_trip_of_a_mosaic(mosaic, tmp_path):
    assert 0 < mosaic.paired.sum() < mosaic.n_cells
    again = as_cells(write_h5mu(to_mudata(mosaic), tmp_path / "cells.h5mu"))
    assert list(again.obs.index) == list(mosaic.obs.index)
    assert again.fingerprint() == mosaic.fingerprint()


def test_counts_are_whole_numbers(mosaic):
    data = to_mudata(mosaic)
    assert data["rna"].X.dtype == np.int32
    assert data["prot"].n_obs == mosaic.present["prot"].sum()


def test_nothing_is_overwritten_unasked(mosaic, tmp_path):
    path = tmp_path / "out.h5mu"
    path.write_text("precious")
    with pytest.raises(OutputError, match=r"out\.h5mu: this exists already.*--overwrite"):
        write_h5mu(to_mudata(mosaic), path)
    assert path.read_text() == "precious"
    write_h5mu(to_mudata(mosaic), path, overwrite=True)
    assert as_cells(path).n_cells == mosaic.n_cells
    assert os.listdir(tmp_path) == ["out.h5mu"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "no space is left"),
        (RuntimeError("file write failed: error message = 'No space left on device'"), "no space"),
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
    ],
)
def test_failed_write_leaves_nothing(mosaic, tmp_path, monkeypatch, error, message):
    def fail(self, path):
        path.write_bytes(b"half of it")
        raise error

    monkeypatch.setattr(mudata.MuData, "write_h5mu", fail)
    path = tmp_path / "out.h5mu"
    path.write_text("the old one")
    with pytest.raises(OutputError, match=message):
        write_h5mu(to_mudata(mosaic), path, overwrite=True)
    assert os.listdir(tmp_path) == ["out.h5mu"]
    assert path.read_text() == "the old one"


def test_interrupted_write_leaves_nothing(mosaic, tmp_path, monkeypatch):
    def interrupt(self, path):
        path.write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(mudata.MuData, "write_h5mu", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_h5mu(to_mudata(mosaic), tmp_path / "out.h5mu")
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="space cannot be reserved here")
def test_full_disk_is_found_before_writing(mosaic, tmp_path, monkeypatch):
    def full(descriptor, start, size):
        assert size > mosaic.counts["rna"].nnz * 8
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(mudata.MuData, "write_h5mu", lambda *_: pytest.fail("it was written to"))
    with pytest.raises(OutputError, match="no space is left"):
        write_h5mu(to_mudata(mosaic), tmp_path / "out.h5mu")
    assert os.listdir(tmp_path) == []


def test_reserved_space_is_enough(mosaic, tmp_path):
    from coembed.data.write import _size

    data = to_mudata(mosaic)
    path = write_h5mu(data, tmp_path / "out.h5mu")
    assert path.stat().st_size <= _size(data)


def test_missing_folder(mosaic, tmp_path):
    with pytest.raises(OutputError, match="nowhere: the folder does not exist"):
        write_h5mu(to_mudata(mosaic), tmp_path / "nowhere" / "out.h5mu")


def test_folder_in_place_of_a_file(mosaic, tmp_path):
    with pytest.raises(OutputError, match="cannot be written"):
        write_h5mu(to_mudata(mosaic), tmp_path, overwrite=True)
    assert os.listdir(tmp_path) == []
