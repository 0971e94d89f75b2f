from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import fakes
import numpy as np
import pandas as pd
import pytest

from coembed.data.cells import Cells
from coembed.errors import OutputError, StudyError
from coembed.study import Ledger, Task
from coembed.study.jsonable import plain
from coembed.study.ledger import new_row

pytestmark = pytest.mark.usefixtures("fake_models")


@pytest.fixture
def tasks(cells: Cells) -> list[Task]:
    return fakes.study_plan(cells).tasks(cells)


@pytest.fixture
def ledger(tmp_path: Path, cells: Cells, tasks: list[Task]) -> Ledger:
    ledger = Ledger(tmp_path / "study")
    with ledger.locked():
        ledger.begin(fakes.study_plan(cells), cells, tasks)
    return ledger


def score(metric: str, value: float, part: str = "train") -> dict:
    return {"evaluated_on": part, "metric": metric, "value": value, "null": 0.0,
            "null_sd": 0.0, "normalised": value, "undefined": False, "reason": ""}  # fmt: skip


def test_study_json_says_what_was_studied(ledger: Ledger, cells: Cells) -> None:
    card = ledger.card
    assert card["name"] == "sim-small"
    assert card["simulated"] is True
    assert card["n_cells"] == 120
    assert card["batches"] == {"s1d1": 60, "s1d2": 40, "s2d1": 20}
    assert card["sites"] == {"s1": 100, "s2": 20}
    assert sum(card["labels"].values()) == 119
    assert card["unlabelled"] == 1
    rna = cells.counts["rna"]
    assert card["modalities"]["rna"] == {
        "features": 12,
        "cells": 120,
        "median_counts": float(np.median(rna.toarray().sum(axis=1))),
        "density": np.count_nonzero(rna.toarray()) / rna.toarray().size,
    }
    assert ledger.plan["sizes"] == [20, 40]
    assert "torch" in ledger.study["versions"]
    table = pd.read_csv(ledger.folder / "cells.csv", keep_default_na=False)
    assert list(table.columns) == ["barcode", "label", "batch", "site"]
    assert list(table["barcode"]) == list(cells.obs.index)
    assert table["label"][3] == ""


def test_a_row_comes_back_as_it_went_in(ledger: Ledger, tasks: list[Task]) -> None:
    row = new_row(tasks[0], "ok", scores=[score("nmi", 0.5)], cpu_s=np.float64(1.5),
                  history={"loss": [np.float32(1), math.nan, math.inf]})  # fmt: skip
    ledger.write(row)
    back = ledger.row(tasks[0].key)
    assert back is not None
    assert back["history"]["loss"] == [1.0, None, None]
    assert back == plain(row)
    assert Task.from_dict(back["task"]) == tasks[0]
    text = (ledger.folder / "tasks" / f"{tasks[0].key}.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not strict JSON"))


def test_a_row_has_known_fields_only(tasks: list[Task]) -> None:
    with pytest.raises(TypeError, match="cpu"):
        new_row(tasks[0], "ok", cpu=1)


def test_embeddings_come_back(ledger: Ledger) -> None:
    arrays = {"train": np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32).T,
              "train_rows": np.arange(2)}  # fmt: skip
    assert ledger.write_embedding("k", arrays) == "embeddings/k.safetensors"
    back = ledger.embedding("k")
    assert back.keys() == arrays.keys()
    for name in arrays:
        np.testing.assert_array_equal(back[name], arrays[name])


def test_a_missing_or_damaged_embedding_is_reported(ledger: Ledger) -> None:
    with pytest.raises(StudyError, match=r"gone\.safetensors"):
        ledger.embedding("gone")
    ledger.write_embedding("k", {"train": np.zeros((2, 2))})
    path = ledger.folder / "embeddings" / "k.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(StudyError, match=r"k\.safetensors"):
        ledger.embedding("k")


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda text: text[: len(text) // 2], id="cut"),
        pytest.param(lambda text: "", id="empty"),
        pytest.param(lambda text: "7", id="no-object"),
        pytest.param(lambda text: '{"schema": 1}', id="fields"),
        pytest.param(lambda text: text.replace('"schema": 1', '"schema": 99'), id="schema"),
    ],
)
def test_a_damaged_row_is_reported_by_name(ledger: Ledger, tasks: list[Task], damage) -> None:
    ledger.write(new_row(tasks[0], "ok"))
    path = ledger.folder / "tasks" / f"{tasks[0].key}.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(StudyError, match=path.name):
        ledger.rows()
    with pytest.raises(StudyError, match=path.name):
        ledger.pending(tasks)


def test_what_a_killed_writer_left_is_ignored_and_swept(
    ledger: Ledger, cells: Cells, tasks: list[Task]
) -> None:
    ledger.write(new_row(tasks[0], "ok"))
    leftover = ledger.folder / "tasks" / f".{tasks[1].key}.json.x7.tmp"
    leftover.write_text('{"sche')
    assert [row["key"] for row in ledger.rows()] == [tasks[0].key]
    with ledger.locked():
        ledger.begin(fakes.study_plan(cells), cells, tasks)
    assert not leftover.exists()


def test_a_write_that_fails_leaves_the_old_row(
    ledger: Ledger, tasks: list[Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger.write(new_row(tasks[0], "killed"))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OutputError, match="No space left"):
        ledger.write(new_row(tasks[0], "ok"))
    row = ledger.row(tasks[0].key)
    assert row is not None
    assert row["status"] == "killed"
    assert [path.name for path in (ledger.folder / "tasks").iterdir()] == [f"{tasks[0].key}.json"]


def test_scores_and_medians(ledger: Ledger, cells: Cells) -> None:
    tasks = fakes.study_plan(cells, sizes=(20,), replicates=5).tasks(cells)
    values = [0.1, 0.5, 0.3, math.nan]
    for task, value in zip(tasks, values, strict=False):
        ledger.write(new_row(task, "ok", scores=[score("nmi", value), score("ari", 1.0)]))
    ledger.write(new_row(tasks[4], "diverged", scores=[score("nmi", 0.9)], cpu_s=2.0))
    table = ledger.scores()
    assert len(table) == 9
    assert set(table["replicate"]) == {0, 1, 2, 3, 4}
    assert table[table["status"] == "diverged"]["cpu_s"].tolist() == [2.0]
    medians = ledger.medians().set_index("metric")
    assert medians.loc["nmi", "value"] == 0.3
    assert medians.loc["nmi", "replicates"] == 3
    assert medians.loc["nmi", "sd"] == pytest.approx(0.2)
    assert medians.loc["ari", "replicates"] == 4


def test_a_study_without_scores_has_an_empty_table(ledger: Ledger, tasks: list[Task]) -> None:
    ledger.write(new_row(tasks[0], "error", message="it broke"))
    assert len(ledger.rows()) == 1
    assert ledger.scores().empty
    assert ledger.medians().empty
    assert {"value", "size", "cpu_s"} <= set(ledger.scores().columns)


def test_pending(ledger: Ledger, cells: Cells) -> None:
    tasks = fakes.study_plan(cells, replicates=4).tasks(cells)
    statuses = ["ok", "diverged", "error", "killed", "timeout", "out_of_memory"]
    for task, status in zip(tasks, statuses, strict=False):
        ledger.write(new_row(task, status))
    assert ledger.pending(tasks) == tasks[3:]
    assert ledger.pending(tasks, retry_errors=True) == tasks[2:]


def test_a_final_row_ends_the_checkpoint(ledger: Ledger, tasks: list[Task]) -> None:
    checkpoint, log = ledger.checkpoint(tasks[0].key), ledger.log(tasks[0].key)
    for path in (checkpoint, log):
        path.write_text("x")
    ledger.write(new_row(tasks[0], "killed"))
    assert checkpoint.exists()
    ledger.write(new_row(tasks[0], "ok"))
    assert not checkpoint.exists()
    assert not log.exists()


def test_a_folder_that_is_no_study(tmp_path: Path) -> None:
    for read in (Ledger.rows, Ledger.scores, lambda ledger: ledger.plan):
        with pytest.raises(StudyError, match=r"no study\.json"):
            read(Ledger(tmp_path))


def test_a_second_study_is_told_who_runs(ledger: Ledger) -> None:
    import os

    with (
        ledger.locked(),
        pytest.raises(StudyError, match=f"process {os.getpid()}"),
        Ledger(ledger.folder).locked(),
    ):
        pytest.fail("the lock was given twice")
    with ledger.locked():
        pass


def test_other_data_are_refused(ledger: Ledger) -> None:
    other = fakes.small_cells(seed=1)
    plan = fakes.study_plan(other)
    with pytest.raises(StudyError, match="other data"):
        ledger.begin(plan, other, plan.tasks(other))


def test_results_of_another_version_are_refused(
    ledger: Ledger, cells: Cells, tasks: list[Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger.write(new_row(tasks[0], "ok"))
    monkeypatch.setattr("coembed.study.plan.__version__", "99")
    with pytest.raises(StudyError, match="another version"):
        ledger.begin(fakes.study_plan(cells), cells, tasks)


def test_changed_defaults_are_refused_by_name(
    ledger: Ledger, cells: Cells, tasks: list[Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger.write(new_row(tasks[0], "ok"))
    monkeypatch.setattr("coembed.study.plan.resolve_params", lambda *_: {"rate": 0.7})
    plan = fakes.study_plan(cells)
    with pytest.raises(StudyError, match=r"\(params\)"):
        ledger.begin(plan, cells, plan.tasks(cells))


def test_too_little_space_is_found_at_the_start(
    ledger: Ledger, cells: Cells, tasks: list[Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 1000))
    with pytest.raises(OutputError, match="free space"):
        ledger.begin(fakes.study_plan(cells), cells, tasks)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with (
        pytest.raises(OutputError, match="cannot be written"),
        Ledger(tmp_path / "file" / "study").locked(),
    ):
        pytest.fail("no such folder can be made")
