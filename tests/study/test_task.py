from __future__ import annotations

import importlib
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import fakes
import numpy as np
import pandas as pd
import pytest

import coembed.study.task
from coembed.data.cells import Cells
from coembed.errors import DataError, OutputError
from coembed.study import Ledger, Plan, Task, run
from coembed.study.ledger import new_row
from coembed.study.task import Source, execute, perform

pytestmark = pytest.mark.usefixtures("fake_models")
TINY = {"sizes": (40,), "replicates": 1}


def burn(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


class FakeModel:
    """Embeds a cell by its first two genes; what it shall do is in its parameters."""

    made: ClassVar[list[FakeModel]] = []

    def __init__(self, cells: Cells, *, preset: str, **params: Any) -> None:
        burn(0.2)
        self.cells, self.preset, self.params = cells, preset, params
        self.n_parameters = (10, 7)
        self.history = pd.DataFrame({"loss": [2.0, np.nan]})
        FakeModel.made.append(self)

    def train(self, *, seed: int, device: str, progress: bool, checkpoint: Path) -> None:
        burn(0.05)
        self.seed, self.checkpoint = seed, checkpoint
        self.outcome = SimpleNamespace(
            warnings=[],
            status=self.params.get("status", "ok"),
            message=self.params.get("message", ""),
            epochs=2, steps=4, stopped="cap", improving=True, events=[{"event": "restart"}],
        )  # fmt: skip

    def get_latent_representation(self, cells: Cells | None = None) -> np.ndarray:
        if cells is not None and self.params.get("closed"):
            raise DataError("cannot embed new cells")
        latent = (cells or self.cells).counts["rna"][:, :2].toarray()
        return latent * self.params.get("factor", 1.0)


def fake_score(embedding: np.ndarray, **given: Any) -> pd.DataFrame:
    assert np.isfinite(embedding).all()
    assert len(embedding) == len(given["labels"]) == len(given["batch"]) == len(given["site"])
    first = {"metric": "nmi", "value": float(embedding.sum()), "null": given["seed"]}
    return pd.DataFrame([first, {"metric": "ari", "value": np.nan, "null": np.nan}])


@pytest.fixture(autouse=True)
def _fake_floors(monkeypatch: pytest.MonkeyPatch, cells: Cells) -> None:
    monkeypatch.setattr("coembed.models.get_model", lambda name: FakeModel)
    # By its module: the package has a function of the same name.
    monkeypatch.setattr(importlib.import_module("coembed.metrics.score"), "score", fake_score)
    monkeypatch.setattr("coembed.data.pilots.resolve", lambda source, **read: cells)
    monkeypatch.setattr("coembed.study.task._loaded", {})
    monkeypatch.setattr(FakeModel, "made", [])


@pytest.fixture
def source(cells: Cells, tmp_path: Path) -> Source:
    return Source("fake", {}, cells.fingerprint(), ("a",), str(tmp_path))


def one_task(cells: Cells, **overrides: Any) -> Task:
    return replace(fakes.study_plan(cells, **TINY).tasks(cells)[0], overrides=overrides)


def test_a_row_has_both_scores_and_all_costs(cells: Cells, source: Source) -> None:
    task = one_task(cells)
    row = new_row(task, **execute(task, source))
    rows = source.ledger.embedding(task.key)
    assert len(rows["train_rows"]) == 40
    assert len(rows["held_out_rows"]) == 24
    assert not set(rows["train_rows"]) & set(rows["held_out_rows"])
    genes = cells.counts["rna"][:, :2].toarray()
    for part in ("train", "held_out"):
        np.testing.assert_array_equal(rows[part], genes[rows[f"{part}_rows"]])
    values = {(s["evaluated_on"], s["metric"]): s["value"] for s in row["scores"]}
    assert values["train", "nmi"] == rows["train"].sum()
    assert values["held_out", "nmi"] == rows["held_out"].sum()
    assert {s["null"] for s in row["scores"] if s["metric"] == "nmi"} == {task.subsample_seed}
    [model] = FakeModel.made
    assert model.seed == task.seed
    assert list(model.cells.obs.index) == list(cells.obs.index[rows["train_rows"]])
    assert (row["status"], row["parameters"], row["parameters_trained"]) == ("ok", 10, 7)
    assert (row["epochs"], row["steps"], row["stopped"], row["improving"]) == (2, 4, "cap", True)
    assert row["events"] == [{"event": "restart"}]
    assert row["embedding"] == f"embeddings/{task.key}.safetensors"
    # Training alone: the fake burns 0.05 s there, and 0.2 s when it is made.
    assert 0.05 <= row["cpu_s"] < 0.15
    assert row["wall_s"] >= 0.05
    assert row["start_memory_mb"] > 10


def test_every_model_gets_the_same_cells(cells: Cells, source: Source) -> None:
    for task in fakes.study_plan(cells, ("a", "b"), **TINY).tasks(cells):
        execute(replace(task, overrides={}), source)
    first, second = (model.cells.obs.index for model in FakeModel.made)
    assert list(first) == list(second)


def test_a_divergence_is_scored_where_its_weights_are_finite(cells: Cells, source: Source) -> None:
    task = one_task(cells, status="diverged", message="the loss is not finite")
    row = perform(task, source, execute)
    assert (row["status"], row["message"]) == ("diverged", "the loss is not finite")
    assert len(row["scores"]) == 4
    task = one_task(cells, status="diverged", factor=np.nan)
    row = perform(task, source, execute)
    assert (row["status"], row["scores"]) == ("diverged", [])


def test_a_model_without_a_way_for_new_cells_keeps_its_training_scores(
    cells: Cells, source: Source
) -> None:
    row = perform(one_task(cells, closed=True), source, execute)
    assert row["status"] == "ok"
    assert {score["evaluated_on"] for score in row["scores"]} == {"train"}
    assert row["events"][-1] == {
        "event": "no held-out embedding",
        "message": "cannot embed new cells.",
    }


def test_nothing_held_out(cells: Cells, source: Source) -> None:
    task = fakes.study_plan(cells, held_out=0, **TINY).tasks(cells)[0]
    row = perform(replace(task, overrides={}), source, execute)
    assert {score["evaluated_on"] for score in row["scores"]} == {"train"}


def test_data_that_changed_are_an_error(cells: Cells, source: Source) -> None:
    row = perform(one_task(cells), replace(source, fingerprint="0" * 64), execute)
    assert row["status"] == "error"
    assert "the data changed" in row["message"]


def test_a_checkpoint_that_was_there_is_told(cells: Cells, source: Source) -> None:
    task = one_task(cells)
    assert execute(task, source)["resumed"] is False
    checkpoint = source.ledger.checkpoint(task.key)
    checkpoint.parent.mkdir()
    checkpoint.write_text("x")
    content = execute(task, source)
    assert content["resumed"] is True
    # Only a part of the training was seen, so its time is not known.
    assert content["cpu_s"] is None
    assert content["wall_s"] is None
    assert FakeModel.made[-1].checkpoint == checkpoint


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (MemoryError("no"), "out_of_memory"),
        (np._core._exceptions._ArrayMemoryError((9,), np.dtype(float)), "out_of_memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory"), "out_of_memory"),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA"), "out_of_memory"),
        (RuntimeError("shapes do not match"), "error"),
        (ValueError("out of memory lane"), "error"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else value,
)
def test_what_ran_out_of_memory(
    cells: Cells, source: Source, error: Exception, status: str
) -> None:
    def fail(task: Task, source: Source) -> dict[str, Any]:
        raise error

    row = perform(one_task(cells), source, fail)
    assert row["status"] == status
    assert str(error) in row["message"]
    assert row["total_wall_s"] >= 0


def test_output_errors_are_not_rows(cells: Cells, source: Source) -> None:
    def fail(task: Task, source: Source) -> dict[str, Any]:
        raise OutputError("the disk is full")

    with pytest.raises(OutputError):
        perform(one_task(cells), source, fail)


@pytest.mark.slow
def test_a_real_study_of_a_simulated_pilot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    from coembed.data.pilots import resolve

    cells = resolve("sim-cite")
    plan = Plan.make(cells, "sim-cite", ["pca"], sizes=[100], replicates=2, n_permutations=2)
    first = run(plan, cells, tmp_path / "first", workers=2)
    again = run(plan, cells, tmp_path / "again", workers=1)
    assert [row["status"] for row in first.rows()] == ["ok", "ok"]
    assert [row["scores"] for row in first.rows()] == [row["scores"] for row in again.rows()]
    medians = first.medians().set_index(["evaluated_on", "metric"])["value"]
    assert medians["train", "nmi"] > 0.5
    assert medians["held_out", "nmi"] > 0.5
    # The server has imported and compiled everything: the linear baseline takes no second.
    assert max(row["cpu_s"] for row in first.rows()) < 0.5
    assert isinstance(first, Ledger)
    assert coembed.study.task._loaded == {}
