"""Pilots by name: the simulated ones, and the real ones where the folder is there."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from coembed.data import pilots
from coembed.data.read import as_cells
from coembed.data.simulate import simulate
from coembed.data.write import to_mudata, write_h5mu
from coembed.errors import DataError

try:
    REAL = {pilot.name for pilot in pilots.pilots() if not pilot.simulated}
except DataError:
    REAL = set()


def real(*values):
    mark = pytest.mark.skipif(
        values[0] not in REAL, reason=f"{values[0]}.h5mu is not in COEMBED_DATA"
    )
    return pytest.param(*values, marks=mark)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A data folder with one small file, called mine."""
    monkeypatch.setenv("COEMBED_DATA", str(tmp_path))
    cells = simulate("multiome", 30, n_types=3, n_genes=20, n_peaks=20)
    data = to_mudata(cells)
    data.uns["accession"] = "X1"
    write_h5mu(data, tmp_path / "mine.h5mu")
    return tmp_path


@pytest.mark.parametrize("name", ["sim-cite", "sim-multiome"])
def test_simulated_pilots(name):
    cells = pilots.load_pilot(name)
    assert cells.name == name
    assert cells.about["simulated"] is True
    assert cells.n_cells == 1000
    assert len(np.unique(cells.labels)) == 10
    assert np.unique(cells.batch).tolist() == ["s1d1", "s1d2", "s2d1", "s2d2"]
    assert np.unique(cells.site).size == 2
    shapes = {role: cells.counts[role].shape[1] for role in cells.roles}
    assert shapes == (
        {"rna": 600, "prot": 20} if name == "sim-cite" else {"rna": 600, "atac": 1500}
    )
    assert pilots.load_pilot(name).fingerprint() == cells.fingerprint()


@pytest.mark.parametrize("name", ["sim-cite", "sim-multiome"])
def test_more_cells_of_a_simulated_pilot_are_of_use(name):
    """What a demonstration of sample size needs: PCA learns, gains with cells, leaves room."""
    from coembed.metrics import score
    from coembed.models import get_model

    cells = pilots.load_pilot(name)
    held_out = cells.take(np.arange(800, 1000))

    def nmi(rows: np.ndarray) -> float:
        model = get_model("pca")(cells.take(rows)).train(device="cpu", progress=False)
        z = model.get_latent_representation(held_out)
        table = score(z, labels=held_out.labels, n_permutations=0).set_index("metric")
        return float(table["value"]["nmi"])

    few = [nmi(np.random.default_rng(seed).permutation(800)[:100]) for seed in range(3)]
    many = nmi(np.arange(800))
    assert np.mean(few) > 0.4
    assert np.mean(few) + 0.03 < many < 0.85


def test_keys_of_a_simulated_pilot():
    cells = pilots.resolve("sim-cite", batch_key="site", ignore_labels=["type01"])
    assert cells.keys.batch == "site"
    assert (cells.labels == None).sum() > 0  # noqa: E711


def test_list(folder):
    listed = {pilot.name: pilot for pilot in pilots.pilots()}
    assert list(listed) == ["sim-cite", "sim-multiome", "mine"]
    mine = listed["mine"]
    assert (mine.kind, mine.n_cells, mine.source) == ("multiome", 30, "X1")
    assert mine.simulated  # the file says so
    assert listed["sim-cite"].kind == "cite"


def test_list_with_an_unreadable_file(folder):
    (folder / "broken.h5mu").write_text("no HDF5")
    broken = pilots.pilots()[2]
    assert (broken.name, broken.kind, broken.n_cells) == ("broken", "unreadable", None)


def test_names_and_paths(folder, monkeypatch):
    by_name = pilots.resolve("mine")
    assert pilots.resolve(str(folder / "mine.h5mu")).fingerprint() == by_name.fingerprint()
    assert pilots.resolve(folder / "mine.h5mu").fingerprint() == by_name.fingerprint()
    assert pilots.resolve(by_name).fingerprint() == by_name.fingerprint()
    monkeypatch.chdir(folder)
    assert pilots.resolve("mine.h5mu").n_cells == 30
    (folder / "sim-cite").mkdir()
    assert pilots.resolve("sim-cite").about["simulated"]
    (folder / "results").mkdir()
    with pytest.raises(DataError, match="results: this is a folder"):
        pilots.resolve("results")


def test_unknown_name(folder):
    with pytest.raises(DataError) as caught:
        pilots.resolve("min")
    assert "neither a file nor a pilot" in str(caught.value)
    assert "Did you mean 'mine'?" in str(caught.value)
    assert f"COEMBED_DATA is {folder}" in str(caught.value)
    with pytest.raises(DataError, match="there is no such file"):
        pilots.resolve("other/place.h5mu")


def test_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("COEMBED_DATA", raising=False)
    monkeypatch.setattr(pilots, "CHECKOUT_DATA", tmp_path / "none")
    assert [pilot.name for pilot in pilots.pilots()] == ["sim-cite", "sim-multiome"]
    with pytest.raises(DataError, match="COEMBED_DATA is not set"):
        pilots.resolve("bmmc")


def test_folder_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("COEMBED_DATA", str(tmp_path / "gone"))
    with pytest.raises(DataError, match="COEMBED_DATA names no folder"):
        pilots.resolve("bmmc")
    assert pilots.resolve("sim-cite").n_cells == 1000


@pytest.mark.parametrize(
    ("name", "n_cells", "features", "n_batches", "n_labels"),
    [
        real("bmmc_cite_600", 600, {"rna": 1000, "prot": 134}, 2, 41),
        real("bmmc_multiome_500", 500, {"rna": 1133, "atac": 595}, 2, 21),
        real("pbmc10k_cite", 6855, {"rna": 4000, "prot": 14}, 1, 7),
        real("snare_adbrain_2500", 2511, {"rna": 1589, "atac": 12052}, 6, 14),
        real("snare_adbrain_AF", 5232, {"rna": 1675, "atac": 23538}, 6, 14),
        real("pbmc_wnn_mosaic_1600", 1600, {"rna": 500, "prot": 224}, None, 8),
        real("pbmc_multiome_100", 100, {"rna": 4286, "atac": 7829}, 1, 19),
    ],
)
def test_real_pilots(name, n_cells, features, n_batches, n_labels):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cells = pilots.load_pilot(name)
    assert cells.n_cells == n_cells
    assert {role: cells.counts[role].shape[1] for role in cells.roles} == features
    if n_batches is not None:
        assert np.unique(cells.batch).size == n_batches
    assert len({label for label in cells.labels if label is not None}) == n_labels
    assert "simulated" not in cells.about
    assert cells.about["license"]
    mosaic = name == "pbmc_wnn_mosaic_1600"
    assert cells.paired.sum() == (800 if mosaic else n_cells)
    if mosaic:
        assert {role: mask.sum() for role, mask in cells.present.items()} == {
            "rna": 1200,
            "prot": 1200,
        }


@pytest.mark.parametrize("name", [real("bmmc_cite_600")])
def test_pseudotimes_of_the_benchmark(name):
    cells = pilots.load_pilot(name)
    assert cells.keys.pseudotime == ("pseudotime_order_GEX", "pseudotime_order_ADT")
    assert cells.obs["pseudotime_order_GEX"].notna().sum() == 99
    assert np.unique(cells.site).tolist() == ["site1"]


@pytest.mark.parametrize(
    ("name", "ignored"),
    [
        real("pbmc10k_cite", ("unknown",)),
        real("snare_adbrain_AF", ("Mis",)),
        real("snare_adbrain_2500", ()),
    ],
)
def test_labels_that_mean_not_known(name, ignored):
    assert pilots.load_pilot(name).keys.ignore_labels == ignored
    path = next(pilot.path for pilot in pilots.pilots() if pilot.name == name)
    assert as_cells(path).keys.ignore_labels == ()
