"""What a person sees while a study runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from coembed.study.plan import Task
from coembed.study.run import Progress


@contextlib.contextmanager
def console_progress() -> Iterator[Callable[[Progress], None]]:
    """Give the `progress` of `run`: a bar with the time left, or plain lines without a terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda step: console.print(
            f"[{_count(step)}] {_last(step)}", markup=False, highlight=False, soft_wrap=True
        )
        return
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        BarColumn(),
        TextColumn("{task.fields[count]}"),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
    )
    # Tasks take minutes: the speed is that of all of them, not of the last half minute.
    with Bar(*columns, console=console, speed_estimate_period=1e9) as bar:
        shown = bar.add_task("starting", total=None, count="")

        def show(step: Progress) -> None:
            left = sum(map(_work, step.left))
            if step.task is None:
                bar.update(shown, total=left)
            total = bar.tasks[0].total or left
            bar.update(
                shown,
                completed=total - left,
                count=_count(step),
                description=_last(step),
            )

        yield show


def _work(task: Task) -> float:
    """Return the cost of a task up to a factor: a fixed part, and one that grows with cells."""
    return 500 + task.size


def _count(step: Progress) -> str:
    return f"{step.total - len(step.left)}/{step.total}"


def _last(step: Progress) -> str:
    if step.task is None or step.row is None:
        return f"{len(step.left)} tasks to run"
    task, row = step.task, step.row
    name = task.model if task.preset == "default" else f"{task.model} ({task.preset})"
    text = f"{name}, {task.size:,} cells, replicate {task.replicate}: {row['status']}"
    nmi = _score(row["scores"], "nmi")
    if nmi is not None:
        text += f", NMI {nmi:.3f}"
    if row["total_wall_s"] is not None:
        text += f", {row['total_wall_s']:.0f} s"
    first = row["message"].splitlines()[0] if row["message"] else ""
    return f"{text}: {first}" if row["status"] != "ok" and first else text


def _score(scores: list[Mapping[str, Any]], metric: str) -> float | None:
    """Return the held-out value of a metric, or else that of the training cells."""
    values = {line["evaluated_on"]: line["value"] for line in scores if line["metric"] == metric}
    value = values.get("held_out", values.get("train"))
    return None if value is None else float(value)
