"""`coembed explain` on files: tables written whole, and what is wrong said plainly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from coembed.data.read import as_cells
from coembed.data.write import write_h5mu
from coembed.explain import archetypes, differential_features, traversal
from coembed.models import get_model
from coembed.models.saving import load_model


@pytest.fixture(scope="module")
def folder(cite_file, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Cobolt model of the simulated cells, trained briefly."""
    folder = tmp_path_factory.mktemp("explained") / "model"
    model = get_model("cobolt")(as_cells(cite_file), max_epochs=30, n_latent=4)
    model.train(progress=False).save(folder)
    return folder


@pytest.fixture
def biggest(mdata) -> str:
    return str(mdata.obs["cell_type"].value_counts().index[0])


def test_traversal_is_the_librarys(coembed, cite_file, folder, tmp_path) -> None:
    out = tmp_path / "table.csv"
    result = coembed("explain", "traversal", folder, cite_file, "--role", "prot", "-o", out)
    assert result.code == 0, result.err
    expected = traversal(load_model(folder), "prot", as_cells(cite_file))
    pd.testing.assert_frame_equal(pd.read_csv(out), expected, check_dtype=False, rtol=1e-5)
    assert len(expected) == 4 * 12
    shown = [line for line in result.out.splitlines() if "protein" in line]
    assert len(shown) == 4 * 3


def test_differential_is_the_librarys(coembed, cite_file, folder, tmp_path, biggest) -> None:
    out = tmp_path / "table.csv"
    result = coembed(
        *("explain", "differential", folder, cite_file, "--group-a", f"cell_type={biggest}"),
        *("--samples", 50, "--seed", 3, "-o", out),
    )
    assert result.code == 0, result.err
    cells = as_cells(cite_file)
    a = (cells.obs["cell_type"].astype(str) == biggest).to_numpy()
    expected = differential_features(load_model(folder), "rna", a, data=cells, n_samples=50, seed=3)
    pd.testing.assert_frame_equal(pd.read_csv(out), expected, check_dtype=False, rtol=1e-5)
    assert f"{a.sum()} cells against {200 - a.sum()}" in result.out
    assert str(expected["feature"][0]) in result.out


def test_groups_of_several_values_and_the_rest_without_a_value(
    coembed, mdata, folder, tmp_path
) -> None:
    """The rest leaves out cells of which the column knows nothing."""
    copy = mdata.copy()
    types = copy.obs["cell_type"].astype(object).to_numpy()
    types[:30] = None
    types[30:40] = "unknown"
    copy.obs["cell_type"] = types
    path = write_h5mu(copy, tmp_path / "gaps.h5mu")
    two, other = sorted(set(types[40:]))[:2], sorted(set(types[40:]))[2]
    n_two, n_other = (int(np.isin(types, names).sum()) for names in (two, [other]))
    common = ("explain", "differential", folder, path, "--samples", 20, "-o", tmp_path / "t.csv")
    groups = [option for kind in two for option in ("--group-a", f"cell_type={kind}")]
    result = coembed(*common, *groups, "--ignore-labels", "unknown")
    assert f"{n_two} cells against {160 - n_two}" in result.out, result.err
    result = coembed(*common, *groups, "--group-b", f"cell_type={other}")
    assert f"{n_two} cells against {n_other}" in result.out, result.err


def test_archetypes_are_the_librarys(coembed, cite_file, folder, tmp_path) -> None:
    out = tmp_path / "weights.csv"
    result = coembed("explain", "archetypes", folder, cite_file, "-n", 4, "-o", out)
    assert result.code == 0, result.err
    weights = pd.read_csv(out, index_col="cell")
    cells = as_cells(cite_file)
    found = archetypes(load_model(folder).get_latent_representation(cells), 4)
    np.testing.assert_allclose(weights.to_numpy(), found.weights, atol=1e-6)
    assert list(weights.index) == list(cells.obs.index)
    assert f"{found.explained_variance:.3f} of the embedding's variance" in result.out
    for near in found.nearest[:, 0]:
        assert cells.obs.index[near] in result.out


def test_a_model_that_only_embeds_has_archetypes(coembed, cite_file, tmp_path) -> None:
    folder, out = tmp_path / "pca", tmp_path / "table.csv"
    get_model("pca")(as_cells(cite_file)).train(progress=False).save(folder)
    assert coembed("explain", "archetypes", folder, cite_file, "-n", 3, "-o", out).code == 0
    out.unlink()
    result = coembed("explain", "traversal", folder, cite_file, "-o", out)
    assert (result.code, "cannot decode features" in result.err) == (2, True)
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--group-a", "cell_typ=x"), "no column 'cell_typ' in obs. Did you mean 'cell_type'?"),
        (
            ("--group-a", "cell_type=typ1"),
            "no cell has 'typ1' in 'cell_type'. Did you mean 'type1'",
        ),
        (("--group-a", "cell_type"), "'cell_type' is not column=value"),
        (("--group-a", "cell_type=type1", "--group-b", "cell_type=type1"), "are in both groups"),
        (("--group-a", "cell_type=type1", "--role", "pro"), "Did you mean 'prot'"),
        (("--group-a", "cell_type=type1", "--effect", "ratio"), "no effect 'ratio'"),
        (("--group-a", "cell_type=type1", "--effect", "difference", "--delta", 2), "by 'fold'"),
    ],
)
def test_what_is_wrong_is_said(coembed, cite_file, folder, tmp_path, options, says) -> None:
    out = tmp_path / "t.csv"
    result = coembed("explain", "differential", folder, cite_file, *options, "-o", out)
    assert result.code == 2
    assert says in " ".join(result.err.split())
    assert not out.exists()


def test_the_table_is_a_csv_and_the_model_a_model(coembed, cite_file, folder, tmp_path) -> None:
    before = cite_file.read_bytes()
    result = coembed("explain", "archetypes", folder, cite_file, "-o", cite_file)
    assert (result.code, "does not end in .csv" in result.err) == (2, True)
    assert cite_file.read_bytes() == before
    result = coembed("explain", "archetypes", tmp_path, cite_file, "-o", tmp_path / "t.csv")
    assert (result.code, "not a saved coembed model" in result.err) == (2, True)


def test_names_are_not_read_as_markup(coembed, mdata, folder, tmp_path) -> None:
    copy = mdata.copy()
    copy.obs["cell_type"] = ["[bold]B[/red]" if i % 2 else "[red]" for i in range(200)]
    path, out = write_h5mu(copy, tmp_path / "odd.h5mu"), tmp_path / "t.csv"
    result = coembed("explain", "archetypes", folder, path, "-n", 3, "-o", out)
    assert result.code == 0, result.err
    assert "[bold]B[/red]" in result.out
    result = coembed(
        "explain", "differential", folder, path, "--group-a", "cell_type=[red", "-o", out
    )
    assert "Did you mean '[red]'" in result.err


def test_help_has_examples(coembed) -> None:
    for verb in ("traversal", "differential", "archetypes"):
        result = coembed("explain", verb, "--help")
        assert f"coembed explain {verb} model/" in " ".join(result.out.split())
