"""Reading: what becomes of good data, and the error for each kind of bad data."""

from __future__ import annotations

import warnings

import anndata
import h5py
import mudata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from coembed.data.cells import Cells, Keys
from coembed.data.read import as_cells, role_of
from coembed.errors import CoembedError, DataError, ParameterError

BARCODES = [f"c{i}" for i in range(6)]


def table(cells=BARCODES, features=4, prefix="g", seed=0, dtype=np.int32, **var):
    """AnnData of small counts, none of them zero."""
    names = [f"{prefix}{i}" for i in range(features)] if isinstance(features, int) else features
    counts = np.random.default_rng(seed).integers(1, 9, (len(cells), len(names)))
    return anndata.AnnData(
        sparse.csr_matrix(counts.astype(dtype)),
        obs=pd.DataFrame(index=list(cells)),
        var=pd.DataFrame(var, index=names),
    )


def join(obs=None, **parts):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = mudata.MuData(parts)
        if obs is not None:
            data.obs = pd.DataFrame(obs, index=data.obs_names)
    return data


def pair(obs=None, **changed):
    return join(obs, **{"rna": table(), "prot": table(prefix="p", seed=1), **changed})


def set_value(data, role, row, column, value):
    matrix = data[role].X.astype(float).tolil()
    matrix[row, column] = value
    data[role].X = matrix.tocsr()
    return data


def refused(data, *fragments, kind=DataError, **options):
    """Assert that reading fails with a message that holds all fragments; return it."""
    with pytest.raises(kind) as caught:
        as_cells(data, **options)
    for fragment in fragments:
        assert fragment in str(caught.value)
    return str(caught.value)


# Good data ---------------------------------------------------------------------------------------


def test_paired_mudata_keeps_counts_and_order():
    data = pair()
    cells = as_cells(data)
    assert cells.roles == ("rna", "prot")
    assert cells.paired.all()
    assert list(cells.obs.index) == BARCODES
    np.testing.assert_array_equal(cells.counts["rna"].toarray(), data["rna"].X.toarray())
    assert cells.counts["rna"].dtype == np.float32
    assert cells.keys == Keys()
    assert cells.name == "data"


def test_input_is_not_changed():
    data = pair()
    data["rna"].X = data["rna"].X.astype(np.float64)
    before = data["rna"].X.copy()
    cells = as_cells(data)
    cells.counts["rna"].data[:] = 0
    assert (before != data["rna"].X).nnz == 0


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("rna", "rna"),
        ("GEX", "rna"),
        ("Gene Expression", "rna"),
        ("scRNA-seq", "rna"),
        ("ADT", "prot"),
        ("Antibody Capture", "prot"),
        ("CITE", "prot"),
        ("Protein", "prot"),
        ("Peaks", "atac"),
        ("ATAC-seq", "atac"),
        ("chromatin_accessibility", "atac"),
        ("Multiplexing Capture", None),
    ],
)
def test_roles_by_name(name, role):
    assert role_of(name) == role


def test_own_modality_names():
    data = join(mine=table(), yours=table(prefix="p"), rna=table(prefix="x"))
    cells = as_cells(data, modalities={"rna": "mine", "prot": "yours"})
    assert list(cells.var["rna"].index) == ["g0", "g1", "g2", "g3"]
    refused(data, "'mien'", "'mine'", modalities={"rna": "mien", "prot": "yours"})
    refused(data, "no role 'gex'", modalities={"gex": "mine"}, kind=ParameterError)
    refused(data, "two modalities are needed", "yours", "--modality")


def test_two_modalities_for_one_role():
    refused(join(rna=table(), gex=table(prefix="x"), adt=table(prefix="p")), "rna, gex", "Name")


def test_mosaic_keeps_the_union():
    data = join(
        {"batch": list("aaaabb")},
        rna=table(BARCODES[:4]),
        adt=table(BARCODES[2:][::-1], prefix="p"),
    )
    cells = as_cells(data)
    assert cells.n_cells == 6
    position = {barcode: i for i, barcode in enumerate(cells.obs.index)}
    for role, part in (("rna", "rna"), ("prot", "adt")):
        dense = cells.counts[role].toarray()
        for barcode, row in zip(data[part].obs_names, data[part].X.toarray(), strict=True):
            np.testing.assert_array_equal(dense[position[barcode]], row)
        assert (dense.sum(axis=1) > 0).tolist() == cells.present[role].tolist()
    assert cells.paired.sum() == 2
    assert cells.batch[position["c5"]] == data.obs.loc["c5", "batch"]


def test_unpaired_only_on_request():
    data = join(rna=table(), atac=table([f"other{i}" for i in range(5)], prefix="p"))
    refused(data, "no cell was measured by two", "'c0'", "'other0'", "--unpaired")
    cells = as_cells(data, unpaired=True)
    assert cells.n_cells == 11
    assert not cells.paired.any()


def test_cells_of_an_unused_modality_are_not_kept():
    data = pair(hashtag=table([*BARCODES, "stray"], prefix="h"))
    assert as_cells(data).n_cells == 6


def test_counts_layer_comes_before_x():
    data = pair()
    data["rna"].layers["counts"] = data["rna"].X.copy()
    data["rna"].X = data["rna"].X.astype(float) * 0.5
    np.testing.assert_array_equal(
        as_cells(data).counts["rna"].toarray(), data["rna"].layers["counts"].toarray()
    )
    refused(data, "fractional", "modality 'rna'", "Layers there: counts", layer="X")
    refused(data, "no layer 'raw'", "modality 'rna'", "counts", layer="raw")
    refused(data, "no layer 'counts'", "modality 'prot'", layer="counts")


def test_dense_and_csc_counts():
    data = pair()
    expected = data["rna"].X.toarray()
    data["rna"].X = expected
    data["prot"].X = sparse.csc_matrix(data["prot"].X)
    np.testing.assert_array_equal(as_cells(data).counts["rna"].toarray(), expected)


def test_peak_names_are_parsed():
    names = ["chr1:100-200", "chr2-5-10", "GL000194.1:7-9", "nonsense"]
    var = as_cells(pair(atac=table(features=names))).var["atac"]
    assert var["chrom"].tolist() == ["chr1", "chr2", "GL000194.1", ""]
    assert var["start"].tolist() == [100, 5, 7, -1]
    assert var["end"].tolist() == [200, 10, 9, -1]


def test_coordinates_have_one_form():
    rna = table(chrom=["chr1", None, "chr2", "chrX"], start=[1, 2, np.nan, 4], end=[5, 6, 7, 8])
    rna.var["strand"] = np.array([1, -1, 0, 1], dtype=np.int8)
    rna.var["gene_ids"] = list("abcd")
    var = as_cells(pair(rna=rna)).var["rna"]
    assert var["chrom"].tolist() == ["chr1", "", "chr2", "chrX"]
    assert var["start"].tolist() == [1, 2, -1, 4]
    assert var["strand"].tolist() == ["+", "-", "", "+"]
    assert var["gene_ids"].tolist() == list("abcd")


def test_provenance_is_kept():
    data = pair()
    data.uns.update(source="a lab", licence="CC BY 4.0", dataset="ours", junk="x", simulated=True)
    cells = as_cells(data)
    assert cells.about == {"source": "a lab", "license": "CC BY 4.0", "simulated": True}
    assert cells.name == "ours"
    assert as_cells(data, name="mine").name == "mine"


# Keys --------------------------------------------------------------------------------------------


def test_auto_keys():
    obs = {
        "Site": list("xxxyyy"),
        "Batch": list("aabbcc"),
        "CellType": ["B", "B", "T", "T", None, "T"],
        "ADT_pseudotime_order": [0.1] * 6,
        "GEX_pseudotime_order": [np.nan, 0.5, 1, 1, 1, 1],
        "pseudotime_order_ATAC": [np.nan] * 6,
    }
    cells = as_cells(pair(obs))
    assert cells.keys == Keys(
        "Batch", "Site", "CellType", ("GEX_pseudotime_order", "ADT_pseudotime_order"), ()
    )
    assert cells.labels.tolist() == ["B", "B", "T", "T", None, "T"]
    assert as_cells(pair(obs), batch_key=None, site_key=None, pseudotime_keys=None).keys == Keys(
        None, None, "CellType", (), ()
    )


def test_batch_comes_before_sample():
    assert as_cells(pair({"sample": list("aabbcc"), "batch": list("aabbcc")})).keys.batch == "batch"


def test_site_from_benchmark_batch_names():
    cells = as_cells(pair({"batch": ["s1d1", "s1d2", "s2d1", "s2d1", "s10d3", "s1d1"]}))
    assert cells.site.tolist() == ["1", "1", "2", "2", "10", "1"]
    assert as_cells(pair({"batch": ["s1d1"] * 5 + ["other"]})).site is None
    assert as_cells(pair({"batch": ["s1d1"] * 6}), site_key=None).site is None


def test_columns_of_modalities():
    data = pair(rna=table(BARCODES[:5]), prot=table(BARCODES[1:], prefix="p"))
    for role in ("rna", "prot"):
        data[role].obs["sample"] = [f"s{b}" for b in data[role].obs_names]
        data[role].obs["n_counts"] = np.asarray(data[role].X.sum(axis=1)).ravel()
    cells = as_cells(data)
    assert cells.keys.batch == "sample"
    assert cells.batch.tolist() == [f"s{b}" for b in cells.obs.index]
    assert list(cells.obs.columns) == ["sample"]
    data["prot"].obs["sample"] = "elsewhere"
    refused(data, "disagree on 'sample'", "'c1'", "batch_key='prot:sample'")
    assert as_cells(data, label_key="rna:n_counts", batch_key=None).keys.label == "rna:n_counts"
    refused(data, "1 of 6 cells have no value in 'rna:sample'", "'c5'", batch_key="rna:sample")


def test_plain_columns_are_kept_without_prefixed_ones():
    data = pair({"batch": list("aabbcc"), "donor": list("xxyyzz"), "rna:batch": list("aabbcc")})
    assert list(as_cells(data).obs.columns) == ["batch", "donor"]


def test_unknown_key():
    data = pair({"batch": list("aabbcc")})
    refused(data, "no column 'btch'", "--batch-key", "Did you mean 'batch'?", batch_key="btch")
    for option in ("site_key", "label_key", "pseudotime_keys"):
        refused(data, "no column 'nope'", option, **{option: "nope"})


def test_gaps():
    data = pair({"batch": ["a", "a", None, None, "b", "b"], "cell_type": [None] * 6})
    refused(data, "2 of 6 cells have no value in 'batch'", "'c2'")
    assert as_cells(data, batch_key=None).labels is None
    refused(data, "no cell has a value in 'cell_type'", batch_key=None, label_key="cell_type")


def test_pseudotime_must_be_numbers():
    data = pair({"order": list("abcdef")})
    refused(data, "column 'order' holds no numbers", pseudotime_keys=["order"])


def test_ignored_labels():
    data = pair({"cell_type": ["B", "B", "unknown", "T", "T", "T"]})
    cells = as_cells(data, ignore_labels=["unknown"])
    assert cells.labels.tolist() == ["B", "B", None, "T", "T", "T"]
    assert as_cells(data, ignore_labels="unknown").keys == cells.keys
    refused(data, "no cell has the label 'unknwn'", "'unknown'", ignore_labels=["unknwn"])
    refused(pair(), "no cell has the label 'x'", ignore_labels=["x"])


def test_cells_are_rekeyed():
    obs = {"batch": list("aabbcc"), "cell_type": list("xxyyzz"), "fine": list("uvwxyz")}
    cells = as_cells(pair(obs), ignore_labels=["x"])
    assert as_cells(cells).keys == cells.keys
    again = as_cells(cells, label_key="fine", ignore_labels=["u"], batch_key=None, name="new")
    assert again.keys == Keys(None, None, "fine", (), ("u",))
    assert again.name == "new"
    refused(cells, "no column 'nope'", label_key="nope")
    refused(cells, "no cell has the label 'q'", ignore_labels=["q"])
    assert as_cells(cells, label_key="fine").keys.ignore_labels == ()
    without = cells.take(np.array([4, 5]))  # no cell has the ignored label x any more
    assert as_cells(without).keys == cells.keys
    refused(cells, "not Cells", layer="counts", kind=ParameterError)


# Bad counts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (np.nan, "NaN or infinite"),
        (np.inf, "NaN or infinite"),
        (-1, "negative"),
        (0.5, "fractional"),
        (2**24, "too large"),
    ],
)
def test_bad_value_is_named_with_its_place(value, word):
    data = set_value(pair(), "prot", 3, 2, value)
    refused(data, "1 value is " + word, "modality 'prot'", "cell 'c3', feature 'p2'")


def test_first_of_several_bad_values():
    data = set_value(set_value(pair(), "rna", 4, 0, -2), "rna", 1, 3, -7)
    refused(data, "2 values are negative, the first -7 in cell 'c1', feature 'g3'", "--layer")


def test_largest_count_that_fits():
    cells = as_cells(set_value(pair(), "rna", 0, 0, 2**24 - 1))
    assert cells.counts["rna"][0, 0] == 2**24 - 1


def test_text_is_not_counts():
    data = pair()
    data["rna"].X = data["rna"].X.toarray().astype(complex)
    refused(data, "complex128, not numbers")


def test_missing_x():
    data = pair(rna=anndata.AnnData(obs=pd.DataFrame(index=BARCODES)))
    refused(data, "no counts in X")


def test_damaged_sparse_matrix():
    data = pair()
    data["rna"].X.indices[0] = 99
    refused(data, "modality 'rna'", "damaged")


def test_empty_cells_and_features():
    data = pair()
    counts = data["rna"].X.toarray()
    counts[2] = 0
    data["rna"].X = sparse.csr_matrix(counts)
    refused(data, "1 cell has no counts, the first 'c2'", "modality 'rna'", "--drop-empty")
    cells = as_cells(data, drop_empty=True)
    assert list(cells.obs.index) == ["c0", "c1", "c3", "c4", "c5"]
    assert cells.about["dropped"] == {"cells": 1, "rna features": 0, "prot features": 0}

    counts = data["prot"].X.toarray()
    counts[:, 1] = 0
    counts[[0, 1, 3, 4, 5], 3] = 0  # p3 is seen only in the empty cell c2
    data["prot"].X = counts
    cells = as_cells(data, drop_empty=True)
    assert list(cells.var["prot"].index) == ["p0", "p2"]
    assert cells.counts["prot"].shape == (5, 2)
    data["rna"].X = table().X
    refused(data, "1 feature has no counts, the first 'p1'", "modality 'prot'")


def test_nothing_is_dropped_from_full_data():
    data = pair()
    assert as_cells(data, drop_empty=True).fingerprint() == as_cells(data).fingerprint()
    assert "dropped" not in as_cells(data, drop_empty=True).about


def test_nothing_is_left():
    data = pair()
    data["rna"].X = data["rna"].X * 0
    refused(data, "6 cells have no counts")
    refused(data, "no cell has counts", drop_empty=True)


def test_explicit_zeros_do_not_count():
    data = pair()
    data["rna"].X.data[data["rna"].X.indices == 2] = 0
    refused(data, "1 feature has no counts, the first 'g2'")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_repeated_names():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twice = table(
            ["a", "b", "a"], features=["g", "h", "g"], feature_types=["GEX", "ADT", "GEX"]
        )
    refused(twice, "cell names repeat (1 times, the first 'a')", "obs_names_make_unique")
    twice.obs_names = ["a", "b", "c"]
    refused(twice, "feature names repeat (1 times, the first 'g')", "var_names_make_unique")


def test_no_features_and_no_cells():
    refused(pair(rna=table(features=[])), "there are no features", "modality 'rna'")
    refused(join(rna=table([]), prot=table([], prefix="p")), "there are no cells")


# AnnData and files -------------------------------------------------------------------------------


def typed(types=("GEX", "ADT", "GEX", "ADT", "HTO")):
    data = table(features=5, feature_types=list(types))
    data.obs["batch"] = list("aabbcc")
    return data


def test_anndata_is_split_by_feature_types():
    data = typed()
    cells = as_cells(data)
    assert {role: list(cells.var[role].index) for role in cells.roles} == {
        "rna": ["g0", "g2"],
        "prot": ["g1", "g3"],
    }
    np.testing.assert_array_equal(cells.counts["prot"].toarray(), data.X[:, [1, 3]].toarray())
    assert cells.keys.batch == "batch"


def test_anndata_without_two_modalities():
    data = typed()
    refused(data[:, [0, 2]].copy(), "two modalities are needed", "only GEX is known")
    del data.var["feature_types"]
    refused(data, "one modality, two are needed", "feature_types", "MuData")


def test_other_objects():
    refused({"rna": 1}, "a dict is neither")


def test_geo_spelling(tmp_path):
    """The names of GSE194122: typed features, counts layer, modality before the word."""
    data = typed(("GEX", "GEX", "ATAC", "ATAC", "ATAC"))
    data.var_names = ["A", "B", "chr1-10-20", "chr1-30-40", "chr2-5-9"]
    data.layers["counts"] = data.X.copy()
    data.X = data.X.astype(np.float32) / 3
    data.obs["batch"] = ["s1d1", "s1d1", "s2d1", "s2d4", "s3d3", "s3d3"]
    data.obs["ATAC_pseudotime_order"] = np.linspace(0, 1, 6)
    data.obs["GEX_pseudotime_order"] = np.linspace(0, 1, 6)
    data.obs["Site"] = [f"site{b[1]}" for b in data.obs["batch"]]
    data.write_h5ad(tmp_path / "geo.h5ad")
    cells = as_cells(tmp_path / "geo.h5ad")
    assert cells.name == "geo"
    assert cells.keys == Keys(
        "batch", "Site", None, ("GEX_pseudotime_order", "ATAC_pseudotime_order"), ()
    )
    assert cells.var["atac"]["start"].tolist() == [10, 30, 5]
    np.testing.assert_array_equal(
        cells.counts["rna"].toarray(), data.layers["counts"][:, :2].toarray()
    )
    backed = anndata.read_h5ad(tmp_path / "geo.h5ad", backed="r")
    assert as_cells(backed).fingerprint() == cells.fingerprint()


def write_10x(path, names=("A", "B", "B", "B"), types=None, **more):
    types = types or ["Gene Expression"] * 3 + ["Antibody Capture"]
    counts = np.arange(1, 4 * len(names) + 1).reshape(4, len(names))
    matrix = sparse.csr_matrix(counts)
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        group["barcodes"] = np.array([f"b{i}" for i in range(4)], dtype="S")
        group["data"], group["indices"] = matrix.data, matrix.indices
        group["indptr"], group["shape"] = matrix.indptr, np.array(counts.shape[::-1])
        features = group.create_group("features")
        features["id"] = np.array([f"id{i}" for i in range(len(names))], dtype="S")
        features["name"] = np.array(names, dtype="S")
        features["feature_type"] = np.array(types, dtype="S")
        features["_all_tag_keys"] = np.array(["genome"], dtype="S")
        for key, value in more.items():
            features[key] = np.array(value, dtype="S")
    return counts


def test_10x_file(tmp_path):
    counts = write_10x(tmp_path / "filtered.h5")
    cells = as_cells(str(tmp_path / "filtered.h5"))
    assert list(cells.var["rna"].index) == ["A", "id1", "id2"]  # ids where a name repeats
    assert list(cells.var["prot"].index) == ["B"]
    assert list(cells.obs.index) == ["b0", "b1", "b2", "b3"]
    np.testing.assert_array_equal(cells.counts["rna"].toarray(), counts[:, :3])


def test_10x_multiome_intervals(tmp_path):
    write_10x(
        tmp_path / "arc.h5",
        names=["A", "B", "chr1:5-9"],
        types=["Gene Expression", "Gene Expression", "Peaks"],
        interval=["chr1:10-20", "NA", "chr1:5-9"],
    )
    cells = as_cells(tmp_path / "arc.h5")
    assert cells.var["rna"]["chrom"].tolist() == ["chr1", ""]
    assert cells.var["rna"]["end"].tolist() == [20, -1]
    assert cells.var["atac"]["start"].tolist() == [5]


def stored(tmp_path):
    path = tmp_path / "data.h5mu"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pair({"batch": list("aabbcc")}).write_h5mu(path)
    return path


def test_h5mu_file_is_read_without_warnings(tmp_path):
    path = stored(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cells = as_cells(path)
    expected = as_cells(pair({"batch": list("aabbcc")}))
    assert cells.fingerprint() == expected.fingerprint()
    assert cells.name == "data"


def test_repeated_barcodes_in_a_file(tmp_path):
    path = stored(tmp_path)
    with h5py.File(path, "r+") as file:
        file["mod/prot/obs/_index"][1] = "c0"
    refused(path, "cell names repeat", "'c0'", "modality 'prot'", str(path))


def test_no_usable_file(tmp_path):
    refused(tmp_path / "none.h5mu", "there is no such file", "none.h5mu")
    refused(tmp_path, "this is a folder")
    (tmp_path / "data.csv").write_text("a,b\n")
    refused(tmp_path / "data.csv", "not a known kind of file", ".h5mu")
    (tmp_path / "text.h5mu").write_text("not HDF5")
    refused(tmp_path / "text.h5mu", "cannot be read", "text.h5mu")
    (tmp_path / "empty.h5ad").write_bytes(b"")
    refused(tmp_path / "empty.h5ad", "cannot be read", "empty.h5ad")


@pytest.mark.parametrize(
    ("suffix", "lacks"), [(".h5mu", "'mod'"), (".h5ad", "'var'"), (".h5", "feature_type")]
)
def test_hdf5_without_the_structure(tmp_path, suffix, lacks):
    path = tmp_path / f"other{suffix}"
    with h5py.File(path, "w") as file:
        file["table"] = np.zeros(3)
    refused(path, "it has no", lacks, str(path))


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9, 0.999])
def test_truncated_file(tmp_path, share):
    path = stored(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    refused(path, "cannot be read", "Copy or download")


def test_corrupt_files_never_give_a_traceback(tmp_path):
    """Random bytes flipped anywhere: either the same cells, other cells, or our own error."""
    path = stored(tmp_path)
    content = np.frombuffer(path.read_bytes(), dtype=np.uint8)
    rng = np.random.default_rng(0)
    failed = 0
    for _ in range(60):
        broken = content.copy()
        at = rng.integers(len(content), size=40)
        broken[at] = rng.integers(256, size=40)
        path.write_bytes(broken.tobytes())
        try:
            assert isinstance(as_cells(path), Cells)
        except CoembedError:
            failed += 1
    assert failed > 0


def test_missing_inner_group(tmp_path):
    path = stored(tmp_path)
    with h5py.File(path, "r+") as file:
        del file["mod/rna/X/indices"]
    refused(path, "cannot be read", "damaged")


def test_file_that_may_not_be_read(tmp_path, monkeypatch):
    path = stored(tmp_path)

    def deny(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(h5py, "File", deny)
    refused(path, "may not be read", "permissions")


def test_too_little_memory(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(h5py, "File", fail)
    (tmp_path / "big.h5mu").write_bytes(b"x")
    refused(tmp_path / "big.h5mu", "not enough memory")
