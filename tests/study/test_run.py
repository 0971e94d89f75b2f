from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

import fakes
import psutil
import pytest

from coembed.data.cells import Cells
from coembed.errors import OutputError, StudyError
from coembed.study import Ledger, Progress, run

pytestmark = pytest.mark.usefixtures("fake_models")
MARK = "COEMBED_TEST_MARK"


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> str:
    """Mark the environment, so that every process of the study can be found."""
    value = uuid.uuid4().hex
    monkeypatch.setenv(MARK, value)
    return value


def marked(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            ours = process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE
            if ours and process.environ().get(MARK) == mark:
                found.append(process)
    return found


def assert_nobody_left(mark: str, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while marked(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert marked(mark) == []


def study(cells: Cells, folder: Path, *models: str, workers: int = 2, **options: Any) -> Ledger:
    settings = {"retry_errors": False, "progress": None}
    settings = {name: options.pop(name, value) for name, value in settings.items()}
    plan = fakes.study_plan(cells, models or ("steady",), **options)
    return run(plan, cells, folder, workers=workers, executor="fakes:execute", **settings)


def calls(folder: Path) -> Counter[str]:
    return Counter((folder / "calls.txt").read_text().split())


ONE = {"sizes": (20,), "replicates": 1}


def test_every_task_gets_a_row(cells: Cells, tmp_path: Path, mark: str) -> None:
    ledger = study(cells, tmp_path, "steady", "other")
    rows = ledger.rows()
    assert [row["status"] for row in rows] == ["ok"] * 8
    assert ledger.scores()["value"].notna().sum() == 8 * 3
    for row in rows:
        assert row["total_wall_s"] >= 0.05
        assert row["peak_memory_mb"] > 10
        assert ledger.embedding(row["key"])["train"].shape == (row["task"]["size"], 2)
    assert [path.name for path in (tmp_path / ".work").iterdir()] == ["server.log"]
    assert_nobody_left(mark)


def test_a_finished_study_runs_nothing(cells: Cells, tmp_path: Path) -> None:
    study(cells, tmp_path)
    before = calls(tmp_path)
    steps: list[Progress] = []
    study(cells, tmp_path, progress=steps.append)
    assert calls(tmp_path) == before
    assert set(before.values()) == {1}
    assert [(step.task, step.left, step.total) for step in steps] == [(None, (), 4)]


def test_a_study_is_extended(cells: Cells, tmp_path: Path) -> None:
    study(cells, tmp_path, "steady", **ONE)
    ledger = study(cells, tmp_path, "steady", "other", sizes=(20, 40), replicates=1)
    assert set(calls(tmp_path).values()) == {1}
    assert len(ledger.rows()) == 4
    study(cells, tmp_path, "third", **ONE)
    assert ledger.plan["models"] == ["steady", "other", "third"]
    assert ledger.plan["sizes"] == [20, 40]


def test_progress_tells_every_end(cells: Cells, tmp_path: Path) -> None:
    steps: list[Progress] = []
    study(cells, tmp_path, progress=steps.append)
    assert [len(step.left) for step in steps] == [4, 3, 2, 1, 0]
    assert {step.total for step in steps} == {4}
    assert all(step.row and step.row["status"] == "ok" for step in steps[1:])


def test_an_error_is_a_row_that_says_why(cells: Cells, tmp_path: Path) -> None:
    ledger = study(cells, tmp_path, "failing", "refusing", "steady", **ONE)
    rows = {row["task"]["model"]: row for row in ledger.rows()}
    assert rows["steady"]["status"] == "ok"
    assert rows["failing"]["status"] == "error"
    assert rows["failing"]["message"] == "ValueError: the model is <broken>"
    assert "fakes.py" in rows["failing"]["traceback"]
    assert rows["failing"]["scores"] == []
    assert rows["refusing"]["message"] == (
        "ParameterError: model 'refusing': no such thing. Ask for another"
    )
    study(cells, tmp_path, "failing", **ONE)
    assert calls(tmp_path)[rows["failing"]["key"]] == 1
    study(cells, tmp_path, "failing", retry_errors=True, **ONE)
    assert calls(tmp_path)[rows["failing"]["key"]] == 2


def test_a_divergence_is_kept_and_final(cells: Cells, tmp_path: Path) -> None:
    [row] = study(cells, tmp_path, "diverging", **ONE).rows()
    assert (row["status"], row["message"]) == ("diverged", "the loss is not finite")
    assert len(row["scores"]) == 4
    study(cells, tmp_path, "diverging", **ONE)
    assert calls(tmp_path)[row["key"]] == 1


@pytest.mark.parametrize(
    ("model", "options", "status", "message"),
    [
        ("sleepy", {"timeout": 0.3}, "timeout", "not done after 0.3 s"),
        ("suicidal", {}, "killed", "ended by SIGKILL"),
        ("silent", {}, "killed", "ended with code 3"),
        ("hungry", {}, "out_of_memory", "MemoryError: 400 GiB"),
        ("bloated", {"memory_mb": 350.0}, "out_of_memory", "and 350 are allowed"),
    ],
)
def test_an_end_that_is_not_the_tasks_fault_is_tried_again(
    cells: Cells, tmp_path: Path, mark: str, model: str, options: dict, status: str, message: str
) -> None:
    for times in (1, 2):
        ledger = study(cells, tmp_path, model, "steady", **options, **ONE)
        rows = {row["task"]["model"]: row for row in ledger.rows()}
        assert rows["steady"]["status"] == "ok"
        assert rows[model]["status"] == status
        assert message in rows[model]["message"]
        assert calls(tmp_path)[rows[model]["key"]] == times
        assert calls(tmp_path)[rows["steady"]["key"]] == 1
    if model == "suicidal":
        assert "last words" in rows[model]["traceback"]
    if model == "bloated":
        assert rows[model]["peak_memory_mb"] > 350
    assert_nobody_left(mark)


def test_a_server_that_dies_is_started_again(cells: Cells, tmp_path: Path, mark: str) -> None:
    ledger = study(cells, tmp_path, "orphaning", "steady", workers=1, sizes=(20,), replicates=1)
    rows = {row["task"]["model"]: row for row in ledger.rows()}
    assert rows["orphaning"]["status"] == "killed"
    assert "server died" in rows["orphaning"]["message"]
    assert rows["steady"]["status"] == "ok"
    assert_nobody_left(mark)


def test_a_server_that_keeps_dying_ends_the_study(
    cells: Cells, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(StudyError, match=r"server\.log: the workers' server died 3 times"):
        study(cells, tmp_path)


def test_workers_that_cannot_start_say_why(cells: Cells, tmp_path: Path) -> None:
    plan = fakes.study_plan(cells)
    with pytest.raises(StudyError, match="No module named 'no_such_module'"):
        run(plan, cells, tmp_path, executor="no_such_module:execute")


def test_a_result_that_cannot_be_written_stops_the_study(
    cells: Cells, tmp_path: Path, mark: str
) -> None:
    (tmp_path / "embeddings").write_text("in the way")
    with pytest.raises(OutputError, match="a result cannot be written"):
        study(cells, tmp_path)
    (tmp_path / "embeddings").unlink()
    assert len(study(cells, tmp_path).rows()) == 4
    assert_nobody_left(mark)


def test_without_fork_each_task_has_its_own_interpreter(
    cells: Cells, tmp_path: Path, mark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "fork")
    # subprocess must not notice: it has its own way to start a process.
    ledger = study(cells, tmp_path, "steady", "failing", "suicidal", workers=3, **ONE)
    statuses = {row["task"]["model"]: row["status"] for row in ledger.rows()}
    assert statuses == {"steady": "ok", "failing": "error", "suicidal": "killed"}
    ledger = study(cells, tmp_path, "sleepy", timeout=1.5, **ONE)
    assert {row["status"] for row in ledger.rows()} == {"ok", "error", "killed", "timeout"}
    assert_nobody_left(mark)


def test_ctrl_c_leaves_no_half_row_and_nobody_behind(
    cells: Cells, tmp_path: Path, mark: str
) -> None:
    def interrupt(step: Progress) -> None:
        if step.task is not None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="Run the same command to go on"):
        study(cells, tmp_path, progress=interrupt, replicates=5)
    assert_nobody_left(mark)
    assert 1 <= len(Ledger(tmp_path).rows()) < 10
    assert len(study(cells, tmp_path, replicates=5).rows()) == 10


def start(folder: Path) -> subprocess.Popen[bytes]:
    path = os.pathsep.join([str(Path(fakes.__file__).parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-m", "fakes", str(folder)], env={**os.environ, "PYTHONPATH": path}
    )


def wait_for_rows(folder: Path, n: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while len(list(folder.glob("tasks/[!.]*.json"))) < n:
        assert process.poll() is None, "the study ended before it could be interrupted"
        assert time.monotonic() < deadline
        time.sleep(0.005)


def contents(folder: Path) -> dict[str, tuple[Any, ...]]:
    return {
        row["key"]: (row["status"], row["scores"], row["message"], row["task"])
        for row in Ledger(folder).rows()
    }


def test_kill_9_at_random_moments_loses_nothing(tmp_path: Path, mark: str) -> None:
    assert start(tmp_path / "calm").wait(60) == 0
    calm = contents(tmp_path / "calm")
    assert len(calm) == 30

    folder, moments = tmp_path / "stormy", random.Random(0)
    for _ in range(3):
        done = len(list(folder.glob("tasks/[!.]*.json")))
        process = start(folder)
        wait_for_rows(folder, done + moments.randint(1, 6), process)
        time.sleep(moments.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert_nobody_left(mark)
        partial = contents(folder)
        assert 0 < len(partial) < 30
        assert all(calm[key] == row for key, row in partial.items())
    assert start(folder).wait(60) == 0
    assert contents(folder) == calm
    for key, row in calm.items():
        if row[0] == "ok":
            stormy = (folder / "embeddings" / f"{key}.safetensors").read_bytes()
            assert stormy == (tmp_path / "calm" / "embeddings" / f"{key}.safetensors").read_bytes()


def test_a_second_study_on_the_folder_is_refused(cells: Cells, tmp_path: Path, mark: str) -> None:
    process = start(tmp_path)
    try:
        wait_for_rows(tmp_path, 1, process)
        with pytest.raises(StudyError, match=f"process {process.pid}"):
            study(cells, tmp_path)
    finally:
        process.kill()
        process.wait()
    assert_nobody_left(mark)


def test_sigint_to_the_program_ends_its_workers(tmp_path: Path, mark: str) -> None:
    process = start(tmp_path)
    wait_for_rows(tmp_path, 2, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(10) != 0
    assert_nobody_left(mark)
