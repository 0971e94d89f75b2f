"""What a user does, verb by verb, on small simulated cells."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import mudata
import numpy as np
import pandas as pd
import pytest

QUICK = ("--set", "max_epochs=3")


def test_fit_writes_a_new_file_with_embedding_history_and_parameters(coembed, cite_file, tmp_path):
    before = cite_file.read_bytes()
    out = tmp_path / "out.h5mu"
    result = coembed("fit", cite_file, "-m", "cobolt", *QUICK, "--set", "n_latent=4", "-o", out)
    assert result.code == 0, result.err
    assert cite_file.read_bytes() == before
    mdata = mudata.read_h5mu(out)
    assert mdata.obsm["X_cobolt"].shape == (200, 4)
    assert np.isfinite(mdata.obsm["X_cobolt"]).all()
    assert dict(mdata.obs["X_cobolt_split"].value_counts()) == {"train": 180, "held out": 20}
    about = mdata.uns["coembed"]["X_cobolt"]
    assert json.loads(about["params"])["n_latent"] == 4
    assert len(about["history"]["epoch"]) == 3
    assert {path.name for path in tmp_path.iterdir()} == {"out.h5mu"}


def test_a_second_fit_adds_to_the_first_and_score_tells_train_from_held_out(
    coembed, cite_file, tmp_path
):
    first, second, table = (tmp_path / name for name in ("1.h5mu", "2.h5mu", "scores.csv"))
    assert coembed("fit", cite_file, "-m", "pca", "-o", first).code == 0
    assert coembed("fit", first, "-m", "svd", "-o", second).code == 0
    result = coembed("score", second, "-o", table)
    assert result.code == 0, result.err
    assert "X_pca" in result.out
    assert "X_svd" in result.out
    scores = pd.read_csv(table)
    assert set(scores["evaluated_on"]) == {"train", "held out"}
    assert set(scores["embedding"]) == {"X_pca", "X_svd"}
    pca = scores[(scores["embedding"] == "X_pca") & (scores["metric"] == "nmi")]
    pca = pca[pca["evaluated_on"] == "train"]  # the 20 held-out cells have a null of 0.4
    assert (pca["value"] > pca["null"] + 0.2).all()


def test_fit_saves_a_model_that_loads(coembed, cite_file, tmp_path):
    from coembed import load_model
    from coembed.data.read import as_cells

    out, folder = tmp_path / "out.h5mu", tmp_path / "model"
    assert coembed("fit", cite_file, "-m", "cobolt", *QUICK, "-o", out, "--save", folder).code == 0
    z = load_model(folder).get_latent_representation(as_cells(cite_file))
    np.testing.assert_array_equal(z, mudata.read_h5mu(out).obsm["X_cobolt"])


def test_fit_stopped_by_ctrl_c_goes_on_to_the_same_result(
    coembed, cite_file, tmp_path, monkeypatch
):
    from coembed.models.cobolt import Cobolt

    calm, stopped = tmp_path / "calm.h5mu", tmp_path / "stopped.h5mu"
    command = ("fit", cite_file, "-m", "cobolt", "--set", "max_epochs=4", "-o")
    assert coembed(*command, calm).code == 0
    loss, calls = Cobolt.loss, []

    def interrupted(self, batch, clock):
        calls.append(clock.step)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return loss(self, batch, clock)

    monkeypatch.setattr(Cobolt, "loss", interrupted)
    result = coembed(*command, stopped)
    assert result.code == 130
    assert "same command" in result.err
    assert not stopped.exists()
    monkeypatch.setattr(Cobolt, "loss", loss)
    assert coembed(*command, stopped).code == 0
    a, b = mudata.read_h5mu(calm), mudata.read_h5mu(stopped)
    np.testing.assert_array_equal(a.obsm["X_cobolt"], b.obsm["X_cobolt"])
    assert {p.name for p in tmp_path.iterdir()} == {"calm.h5mu", "stopped.h5mu"}


def test_models_lists_cards_and_sources(coembed):
    listed = coembed("models")
    assert listed.code == 0
    for name in ("pca", "svd", "cobolt", "scmm", "portal"):
        assert name in listed.out
    one = coembed("models", "cobolt")
    assert "n_latent" in one.out
    assert "0.005" in one.out
    as_json = json.loads(coembed("models", "scmm", "--json").out)
    assert all(param["source"] for param in as_json["params"])
    assert {card["name"] for card in json.loads(coembed("models", "--json").out)} >= {"pca", "scmm"}


def test_data_lists_pilots_checks_files_and_writes_a_pilot(coembed, cite_file, tmp_path):
    assert "sim-multiome" in coembed("data").out
    seen = coembed("data", cite_file)
    assert "200 cells" in seen.out
    assert "cobolt" in seen.out
    out = tmp_path / "pilot.h5mu"
    assert coembed("data", "sim-cite", "-o", out).code == 0
    assert mudata.read_h5mu(out).n_obs == 1000
    assert coembed("data", "sim-cite", "-o", out).code == 2


def test_every_verb_has_examples_in_its_help(coembed):
    for verb in ("fit", "score", "study", "report", "models", "data"):
        result = coembed(verb, "--help")
        assert result.code == 0
        assert "Examples" in result.out
        assert f"coembed {verb}" in result.out


@pytest.mark.slow
def test_study_ends_in_a_report_and_resumes_without_doing_anything_twice(
    coembed, cite_file, tmp_path
):
    folder = tmp_path / "study"
    command = ("study", cite_file, "--models", "pca,svd", "--sizes", "60,120", "--replicates", 2)
    result = coembed(*command, "-o", folder, "--permutations", 2)
    assert result.code == 0, result.err
    page = folder / "report.html"
    assert page.exists()
    assert "<html" in page.read_text()[:500]
    rows = {p: p.stat().st_mtime_ns for p in (folder / "tasks").glob("*.json")}
    assert len(rows) == 8
    assert coembed(*command, "-o", folder, "--permutations", 2).code == 0
    assert {p: p.stat().st_mtime_ns for p in (folder / "tasks").glob("*.json")} == rows
    page.unlink()
    assert coembed("report", folder).code == 0
    assert page.exists()


@pytest.mark.parametrize("code", ["import coembed", "import coembed.cli"])
def test_import_is_quick(code):
    """Issue 2: under a second; the best of three, so that a busy machine does not decide."""
    times = []
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        times.append(time.perf_counter() - started)
    assert min(times) < 1.0
