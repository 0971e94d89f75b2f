from __future__ import annotations

import fakes
import pytest

from coembed.data.cells import Cells
from coembed.study import Progress, Task
from coembed.study.ledger import new_row
from coembed.study.progress import console_progress

pytestmark = pytest.mark.usefixtures("fake_models")


def show_all(tasks: list[Task]) -> None:
    score = {"evaluated_on": "held_out", "metric": "nmi", "value": 0.512}
    first = new_row(tasks[0], "ok", scores=[score], total_wall_s=75.2)
    second = new_row(tasks[1], "error", message="ValueError: no [bold]such[/x] thing\nmore")
    with console_progress() as show:
        show(Progress(None, None, tuple(tasks), 4))
        show(Progress(tasks[0], first, tuple(tasks[1:]), 4))
        show(Progress(tasks[1], second, tuple(tasks[2:]), 4))


def test_plain_lines_without_a_terminal(cells: Cells, capsys: pytest.CaptureFixture[str]) -> None:
    show_all(fakes.study_plan(cells).tasks(cells))
    assert capsys.readouterr().err.splitlines() == [
        "[0/4] 4 tasks to run",
        "[1/4] steady, 20 cells, replicate 0: ok, NMI 0.512, 75 s",
        "[2/4] steady, 40 cells, replicate 0: error: ValueError: no [bold]such[/x] thing",
    ]


def test_a_bar_in_a_terminal(
    cells: Cells, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    show_all(fakes.study_plan(cells).tasks(cells))
    text = capsys.readouterr().err
    assert "2/4" in text
    assert "no [bold]such[/x] thing" in text
