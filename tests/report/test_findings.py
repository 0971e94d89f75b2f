from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import studies

from coembed.errors import StudyError
from coembed.report.findings import headline, rank_correlations
from coembed.report.results import load
from coembed.study import Task


def test_medians_are_those_of_the_replicates(tmp_path: Path) -> None:
    studies.Study(tmp_path).fill()
    results = load(tmp_path)
    score = results.score("held_out", "nmi", "pca", 20)
    assert score is not None
    assert score.value == 0.6
    assert sorted(score.values) == [0.5, 0.6, 0.7]
    assert score.sd == pytest.approx(0.1)
    assert score.null == 0.1
    assert score.missing == score.undefined == 0
    assert results.score("train", "nmi", "cobolt", 40).value == pytest.approx(0.6 + 0.15 + 0.05)
    assert results.score("train", "nmi", "cobolt", 41) is None


def test_medians_agree_with_the_ledger(tmp_path: Path) -> None:
    study = studies.Study(tmp_path).fill()
    results = load(tmp_path)
    table = study.ledger.medians()
    assert len(table) == 2 * 2 * 2 * len(studies.METRICS)
    for line in table.itertuples():
        score = results.score(line.evaluated_on, line.metric, line.model, line.size)
        assert (score.value, len(score.values)) == (line.value, line.replicates)
        assert score.sd == pytest.approx(line.sd)


def test_only_tasks_that_ended_well_count(tmp_path: Path) -> None:
    study = studies.Study(tmp_path)
    for task in study.tasks():
        study.add(task, status="diverged" if task.replicate == 1 else "ok")
    score = load(tmp_path).score("held_out", "nmi", "pca", 20)
    assert score.values == (0.5, 0.6)
    assert score.value == 0.55


def test_an_undefined_score_counts_with_its_value_and_is_counted(tmp_path: Path) -> None:
    study = studies.Study(tmp_path)
    for task in study.tasks():
        row = study.add(task)
        if task.replicate == 0:
            for line in row["scores"]:
                if line["metric"] == "trajectory":
                    line.update(value=0.0, undefined=True, reason="the root is elsewhere")
                if line["metric"] == "asw_site":
                    line.update(value=None, undefined=True, reason="one site only")
            study.ledger.write(row)
    results = load(tmp_path)
    trajectory = results.score("held_out", "trajectory", "pca", 20)
    assert (trajectory.value, trajectory.undefined, trajectory.missing) == (0.6, 1, 0)
    site = results.score("held_out", "asw_site", "pca", 20)
    assert (site.undefined, site.missing) == (0, 1)
    assert site.value == pytest.approx(0.65)


def test_noise_at_a_size_that_takes_all_cells_is_that_of_the_size_below(tmp_path: Path) -> None:
    def value(task: Task, metric: str, part: str) -> float:
        return 0.5 + (0.1 * task.replicate if task.size == 20 else 0.0)

    studies.Study(tmp_path, sizes=(20, 60)).fill(value)  # 40 of 100 are held out
    results = load(tmp_path)
    assert results.score("held_out", "nmi", "pca", 60).sd == 0
    assert results.score("held_out", "nmi", "pca", 60).noise == pytest.approx(0.1)
    assert results.score("held_out", "nmi", "pca", 20).noise == pytest.approx(0.1)


def test_the_headline_names_the_best_and_the_gain(tmp_path: Path) -> None:
    studies.Study(tmp_path).fill()
    found = headline(load(tmp_path))
    text = " ".join(found.sentences)
    assert "2 models trained on 20 to 40 simulated cells of sim-made-up" in text
    assert (
        "At 40 cells, cobolt has the best NMI on held-out cells: 0.850 (median of 3 replicates)"
        in text
    )
    assert "0.150 above the best linear baseline, pca (0.700), which is beyond noise" in text
    assert "would score 0.100: cobolt is 0.750 above chance" in text
    assert "From 20 to 40 cells, cobolt gained 0.100 in NMI" in text
    assert [standing.variant for standing in found.standings] == ["cobolt", "pca"]
    assert found.standings[1].linear
    assert found.standings[0].lead == "+0.150 (beyond noise)"
    assert found.standings[1].lead == "–"


def test_a_difference_below_the_spread_is_within_noise(tmp_path: Path) -> None:
    def value(task: Task, metric: str, part: str) -> float:
        shift = 0.03 * (task.model == "cobolt") + 0.02 * (task.size > 20)
        return studies.VALUES[task.replicate] + shift

    studies.Study(tmp_path).fill(value)
    found = headline(load(tmp_path))
    text = " ".join(found.sentences)
    assert "0.030 above the best linear baseline, pca (0.620), which is within noise" in text
    assert "cobolt gained 0.020 in NMI (0.630 to 0.650), which is within noise" in text
    assert found.standings[0].lead == "+0.030 (within noise)"


def test_a_linear_baseline_that_wins_is_said_to_win(tmp_path: Path) -> None:
    studies.Study(tmp_path, models=("pca", "scmm")).fill()
    text = " ".join(headline(load(tmp_path)).sentences)
    assert "At 40 cells, pca has the best NMI" in text
    assert "It is a linear baseline: the best deep model, scmm (0.500), is 0.200 below it" in text


def test_one_replicate_says_nothing_of_noise(tmp_path: Path) -> None:
    studies.Study(tmp_path, replicates=1).fill()
    found = headline(load(tmp_path))
    assert "with one replicate the noise is unknown" in " ".join(found.sentences)
    assert found.standings[0].gain == "+0.100 (one replicate: noise unknown)"


def test_one_size_says_nothing_of_more_cells(tmp_path: Path) -> None:
    studies.Study(tmp_path, sizes=(20,)).fill()
    found = headline(load(tmp_path))
    assert "at one size only" in found.sentences[-1]
    assert {standing.gain for standing in found.standings} == {"–"}


def test_without_held_out_cells_the_training_cells_decide(tmp_path: Path) -> None:
    studies.Study(tmp_path, held_out=0).fill()
    found = headline(load(tmp_path))
    assert found.part == "training cells"
    assert "(none were held out)" in found.sentences[0]


def test_without_labels_the_reason_is_given(tmp_path: Path) -> None:
    studies.Study(tmp_path, studies.cells(labels=())).fill(lambda *_: np.nan)
    results = load(tmp_path)
    assert results.metrics == {}
    assert headline(results).sentences[1] == "No score could be computed: made-up reason."


def test_variants_are_model_and_preset_where_there_are_several(tmp_path: Path) -> None:
    studies.Study(tmp_path, presets=("default", "review")).fill()
    names = ["pca (default)", "pca (review)", "cobolt (default)", "cobolt (review)"]
    results = load(tmp_path)
    assert list(results.variants) == names
    assert {s.variant for s in headline(results).standings} == set(names)


def test_rank_correlation_by_hand(tmp_path: Path) -> None:
    models = ("pca", "a", "b", "c", "d")
    # Ranks by score 2, 1, 3, 4; by parameters 1, 2, 3, 4: squared differences 2 in all.
    # rho = 1 - 6 * 2 / (4 * 15) = 0.8
    value = {"a": 0.7, "b": 0.8, "c": 0.6, "d": 0.5, "pca": 0.9}
    size = {"pca": 0, "a": 10, "b": 20, "c": 30, "d": 40}
    study = studies.Study(tmp_path, models=models)
    for task in study.tasks():
        study.add(
            task, lambda t, *_: value[t.model], parameters=50, parameters_trained=size[task.model]
        )
    table = rank_correlations(load(tmp_path), "held_out")
    assert len(table) == 2 * len(studies.METRICS)
    assert set(table["n"]) == {4}
    np.testing.assert_allclose(table["rho"], 0.8)


def test_rank_correlation_needs_four_trained_models(tmp_path: Path) -> None:
    studies.Study(tmp_path, models=("pca", "svd", "a", "b", "c")).fill()
    assert rank_correlations(load(tmp_path), "held_out").empty


def test_a_folder_that_is_no_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"study\.json"):
        load(tmp_path)


@pytest.mark.parametrize("content", [None, "", "barcode,label\nx,y\n"])
def test_a_damaged_cell_table_is_named(tmp_path: Path, content: str | None) -> None:
    studies.Study(tmp_path).fill()
    path = tmp_path / "cells.csv"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(StudyError, match=r"cells\.csv"):
        load(tmp_path)
