"""The verbs of a trained model on files: translate, map."""

from __future__ import annotations

from pathlib import Path

import mudata
import numpy as np
import pytest

from coembed.data.write import write_h5mu
from coembed.models.saving import load_model


@pytest.fixture(scope="module")
def folder(cite_file, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Cobolt model of the simulated cells, trained briefly."""
    from coembed.data.read import as_cells
    from coembed.models import get_model

    folder = tmp_path_factory.mktemp("trained") / "model"
    model = get_model("cobolt")(as_cells(cite_file), max_epochs=30)
    model.train(progress=False).save(folder)
    return folder


def test_translate_writes_a_modality_and_scores_it(coembed, cite_file, folder, tmp_path) -> None:
    out = tmp_path / "out.h5mu"
    result = coembed("translate", folder, cite_file, "--from", "rna", "--to", "prot", "-o", out)
    assert result.code == 0, result.err
    mdata = mudata.read_h5mu(out)
    levels = mdata["prot_from_rna"]
    assert levels.shape == (200, 12)
    np.testing.assert_allclose(
        levels.X, load_model(folder, cite_file).translate("prot", source="rna"), rtol=1e-5
    )
    assert {"rna", "prot", "prot_from_rna"} == set(mdata.mod)
    for metric in ("rmse", "pearson_per_feature", "foscttm"):
        assert metric in result.out
    again = coembed("translate", folder, cite_file, "--from", "rna", "--to", "prot", "-o", out)
    assert (again.code, "exists already" in again.err) == (2, True)


def test_translate_from_a_file_with_one_modality(
    coembed, cite_file, folder, tmp_path, mdata
) -> None:
    alone, out = tmp_path / "rna.h5mu", tmp_path / "out.h5mu"
    write_h5mu(mudata.MuData({"rna": mdata["rna"].copy()}), alone)
    result = coembed(
        *("translate", folder, alone, "--from", "rna", "--to", "prot", "-o", out),
        *("--batch-key", "none"),
    )
    assert result.code == 0, result.err
    assert "nothing to score" in result.out
    assert mudata.read_h5mu(out)["prot_from_rna"].shape == (200, 12)
    wrong = coembed("translate", folder, alone, "--from", "rna", "--to", "atac",
                    "--batch-key", "none", "-o", tmp_path / "no.h5mu")  # fmt: skip
    assert wrong.code == 2
    assert "no modality 'atac'" in wrong.err


def test_map_embeds_a_new_batch_and_saves_the_mapped_model(
    coembed, folder, tmp_path, mdata
) -> None:
    query = mdata.copy()
    query.obs["batch"] = "new donor"
    file, out, saved = tmp_path / "query.h5mu", tmp_path / "out.h5mu", tmp_path / "mapped"
    write_h5mu(query, file)
    result = coembed("map", folder, file, "-o", out, "--steps", 10, "--save", saved)
    assert result.code == 0, result.err
    assert "new batches: new donor" in result.out
    z = mudata.read_h5mu(out).obsm["X_cobolt"]
    assert np.isfinite(z).all()
    mapped = load_model(saved)
    assert "new donor" in mapped.batches
    np.testing.assert_allclose(mapped.get_latent_representation(file), z, rtol=1e-5)
    assert coembed("score", out).code == 0


def test_a_folder_without_a_model_is_named(coembed, cite_file, tmp_path) -> None:
    result = coembed("map", tmp_path, cite_file, "-o", tmp_path / "out.h5mu")
    assert result.code == 2
    assert "not a saved coembed model" in result.err


def test_unworkable_settings_are_announced_in_a_line(coembed, cite_file, tmp_path) -> None:
    result = coembed("fit", cite_file, "-m", "scmm", "--set", "batch_size=5000",
                     "--set", "max_epochs=1", "-o", tmp_path / "out.h5mu")  # fmt: skip
    assert result.code == 0, result.err
    lines = [line for line in result.err.splitlines() if line.startswith("Warning: ")]
    assert lines == [
        "Warning: scMM: minibatches of 5000 cells are more than the 180 training cells; every "
        "step uses all of them."
    ]
