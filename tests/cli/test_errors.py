"""Every kind of bad input: a message that names thing, place and remedy; exit code 2; no file."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from coembed.data.write import write_h5mu


@pytest.fixture
def refused(coembed, tmp_path):
    """Run a command that must fail, and check what every failure has in common."""

    def run(*args: object, says: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        result = coembed(*args)
        assert result.code == 2, result.out + result.err
        assert says in " ".join(result.err.split())
        assert sorted(tmp_path.rglob("*")) == before
        return result.err

    return run


@pytest.fixture
def spoilt(mdata, tmp_path):
    """Write a copy of the simulated data after a change to it."""

    def make(change):
        copy = mdata.copy()
        copy = change(copy) or copy
        copy.update()
        return write_h5mu(copy, tmp_path / "spoilt.h5mu")

    return make


def set_count(value):
    def change(mdata):
        x = mdata["rna"].X.astype(np.float32).tolil()
        x[3, 5] = value
        mdata["rna"].X = sparse.csr_matrix(x)

    return change


def fit(path, folder):
    return ("fit", path, "-m", "pca", "-o", folder / "out.h5mu")


def test_missing_file(refused, tmp_path):
    refused(*fit(tmp_path / "no.h5mu", tmp_path), says="no such file")


def test_neither_file_nor_pilot(refused, tmp_path):
    refused(*fit("sim-cit", tmp_path), says="Did you mean 'sim-cite'")


def test_not_a_mudata(refused, tmp_path):
    path = tmp_path / "text.h5mu"
    path.write_text("not HDF5")
    refused(*fit(path, tmp_path), says="cannot be read")


def test_truncated_file(refused, cite_file, tmp_path):
    path = tmp_path / "short.h5mu"
    path.write_bytes(cite_file.read_bytes()[: cite_file.stat().st_size // 2])
    refused(*fit(path, tmp_path), says="cut short")


@pytest.mark.parametrize(
    ("value", "says"), [(-1, "negative"), (0.5, "fraction"), (np.nan, "NaN"), (np.inf, "inf")]
)
def test_counts_that_are_none(refused, spoilt, tmp_path, value, says):
    text = refused(*fit(spoilt(set_count(value)), tmp_path), says="rna")
    assert says.lower() in text.lower()


def test_empty_cell(refused, spoilt, tmp_path):
    def change(mdata):
        x = mdata["rna"].X.tolil()
        x[7] = 0
        mdata["rna"].X = sparse.csr_matrix(x)

    refused(*fit(spoilt(change), tmp_path), says="--drop-empty")


def test_empty_feature(refused, spoilt, tmp_path):
    def change(mdata):
        x = mdata["prot"].X.tolil()
        x[:, 2] = 0
        mdata["prot"].X = sparse.csr_matrix(x)

    refused(*fit(spoilt(change), tmp_path), says="--drop-empty")


def test_drop_empty_leaves_the_cell_out(coembed, spoilt, tmp_path):
    def change(mdata):
        x = mdata["rna"].X.tolil()
        x[7] = 0
        mdata["rna"].X = sparse.csr_matrix(x)

    assert coembed(*fit(spoilt(change), tmp_path), "--drop-empty").code == 0


def test_no_common_cells(refused, mdata, tmp_path):
    from mudata import MuData

    rna, prot = mdata["rna"].copy(), mdata["prot"].copy()
    prot.obs_names = [f"other{i}" for i in range(prot.n_obs)]
    path = write_h5mu(MuData({"rna": rna, "prot": prot}), tmp_path / "apart.h5mu")
    refused(*fit(path, tmp_path), says="no cell was measured by two modalities")


def test_duplicate_barcodes(refused, mdata, tmp_path):
    from anndata import concat

    both = concat([mdata["rna"], mdata["prot"]], axis=1)
    both.var["feature_types"] = ["GEX"] * mdata["rna"].n_vars + ["ADT"] * mdata["prot"].n_vars
    both.obs_names = [*both.obs_names[:-1], both.obs_names[0]]
    path = tmp_path / "twice.h5ad"
    both.write_h5ad(path)
    refused(*fit(path, tmp_path), says=str(both.obs_names[0]))


def test_unknown_names(refused, cite_file, tmp_path):
    out = tmp_path / "out.h5mu"
    base = ("fit", cite_file, "-o", out)
    refused(*base, "-m", "cobold", says="Did you mean 'cobolt'")
    refused(*base, "-m", "cobolt", "--set", "n_laten=3", says="Did you mean 'n_latent'")
    refused(*base, "-m", "cobolt", "--set", "n_latent=abc", says="n_latent")
    refused(*base, "-m", "cobolt", "--set", "n_latent", says="name=value")
    refused(*base, "-m", "cobolt", "--preset", "reviev", says="Did you mean 'review'")
    refused(*base, "-m", "cobolt", "--batch-key", "bacth", says="Did you mean 'batch'")
    refused(*base, "-m", "cobolt", "--modality", "rna=gex", says="gex")
    refused(*base, "-m", "cobolt", "--layer", "raw", says="raw")
    refused(*base, "-m", "portal", says="Portal takes rna + atac")
    refused(*base, "-m", "cobolt", "--device", "tpu9", says="tpu9")
    refused("score", cite_file, says="holds no embedding")


def test_outputs_that_cannot_be_written(refused, cite_file, tmp_path):
    refused("fit", cite_file, "-m", "pca", "-o", cite_file, "--overwrite", says="never overwritten")
    refused("fit", cite_file, "-m", "pca", "-o", tmp_path / "no" / "x.h5mu", says="no such folder")
    refused("fit", cite_file, "-m", "pca", "-o", tmp_path / "x.csv", says=".h5mu")
    existing = tmp_path / "there.h5mu"
    existing.write_bytes(b"mine")
    refused("fit", cite_file, "-m", "pca", "-o", existing, says="--overwrite")
    assert existing.read_bytes() == b"mine"


def test_full_disk(refused, cite_file, tmp_path, monkeypatch):
    import errno
    import os

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    refused(*fit(cite_file, tmp_path), says="no space is left")


def test_study_that_cannot_be(refused, cite_file, tmp_path):
    base = ("study", cite_file, "-o", tmp_path / "study", "--models", "pca")
    refused(*base, "--sizes", "500", says="size 500 is more than the 160 cells")
    refused(*base, "--sizes", "many", says="whole numbers")
    refused(*base, "--set", "n_laten=3", says="n_laten")
    refused(*base, "--set", "pca.n_laten=3", says="Did you mean 'n_latent'")
    refused("report", tmp_path, says=str(tmp_path))


def test_one_label_or_one_batch_only(refused, spoilt, tmp_path):
    def one_label(mdata):
        mdata.obs["cell_type"] = "T"

    path = spoilt(one_label)
    refused("study", path, "-o", tmp_path / "s", says="fewer than two labels")
    refused("score", path, says="--label-key")
    path.unlink()

    def one_batch(mdata):
        mdata.obs["batch"] = "b"

    refused("score", spoilt(one_batch), "--batch-key", "batch", says="one batch only")


def test_missing_labels_are_left_out_and_counted(coembed, spoilt, tmp_path):
    def change(mdata):
        mdata.obs["cell_type"] = (
            mdata.obs["cell_type"].astype(object).where(np.arange(mdata.n_obs) >= 30, None)
        )

    out = tmp_path / "out.h5mu"
    path = spoilt(change)
    assert coembed("fit", path, "-m", "pca", "--held-out", 0, "-o", out).code == 0
    result = coembed("score", out, "-o", tmp_path / "scores.csv")
    assert result.code == 0, result.err
    import pandas as pd

    nmi = pd.read_csv(tmp_path / "scores.csv").query("metric == 'nmi'").iloc[0]
    assert (nmi["n_scored"], nmi["n_left_out"]) == (170, 30)
