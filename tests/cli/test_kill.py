"""kill -9 of a real study and its tasks, at random moments: nothing lost, nothing done twice."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROWS = 12
COMMAND = (
    *("--models", "pca,svd,cobolt", "--sizes", "60,120", "--replicates", "2"),
    *("--set", "cobolt.max_epochs=120", "--permutations", "2"),
)
TIMES = ("cpu_s", "wall_s", "scoring_s", "total_wall_s", "peak_memory_mb", "start_memory_mb")


def start(data: Path, folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "coembed.cli", "study", str(data), "-o", str(folder), *COMMAND]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def rows(folder: Path) -> dict[str, dict]:
    return {p.stem: json.loads(p.read_text()) for p in (folder / "tasks").glob("*.json")}


def results(folder: Path) -> dict[str, dict]:
    """Return what must be equal: everything but times, memory and whether a task was resumed."""
    return {
        key: {name: value for name, value in row.items() if name not in (*TIMES, "resumed")}
        for key, row in rows(folder).items()
    }


def kill(study: subprocess.Popen[bytes], dice: random.Random) -> str:
    """Kill the study or one of its tasks; return which."""
    workers = psutil.Process(study.pid).children(recursive=True)
    tasks = [w for w in workers if w.ppid() != study.pid]
    if tasks and dice.random() < 0.5:
        dice.choice(tasks).send_signal(signal.SIGKILL)
        study.wait(timeout=300)
        return "task"
    study.kill()
    study.wait()
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive, "orphans"
    return "study"


@pytest.mark.slow
def test_five_kills_leave_the_ledger_of_an_undisturbed_run(cite_file: Path, tmp_path: Path) -> None:
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    assert start(cite_file, calm).wait(timeout=300) == 0
    assert len(rows(calm)) == ROWS
    dice, hit = random.Random(1), []
    for _ in range(5):
        study = start(cite_file, killed)
        before = {key: row["status"] for key, row in rows(killed).items()} if hit else {}
        # Wait for work to begin, then a moment more: kills at the start would test only the start.
        deadline = time.monotonic() + 120
        while len(psutil.Process(study.pid).children(recursive=True)) < 3:
            if study.poll() is not None or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        time.sleep(dice.uniform(0, 2))
        if study.poll() is None:
            hit.append(kill(study, dice))
        done = {key for key, status in before.items() if status == "ok"}
        assert done <= {key for key, row in rows(killed).items() if row["status"] == "ok"}
    assert len(hit) >= 2
    finished = {p: p.stat().st_mtime_ns for p in (killed / "tasks").glob("*.json")
                if json.loads(p.read_text())["status"] == "ok"}  # fmt: skip
    study = start(cite_file, killed)
    assert study.wait(timeout=300) == 0, study.stderr.read().decode()
    assert {p: p.stat().st_mtime_ns for p in finished} == finished
    assert results(killed) == results(calm)
