"""The ledger: a folder of results that survives anything.

```
study.json                     plan, data card, versions, the command
cells.csv                      barcode, label, batch, site of every cell
tasks/<key>.json               one row per task, whole or absent
embeddings/<key>.safetensors   train, train_rows, held_out, held_out_rows
.work/                         checkpoints and logs of unfinished tasks
.lock                          held by the study that runs
```
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from coembed import __version__
from coembed.data.cells import Cells
from coembed.errors import OutputError, StudyError
from coembed.files import cannot_write, write_bytes, write_json
from coembed.study.jsonable import plain
from coembed.study.plan import SCHEMA, Plan, Task

FINAL = ("ok", "diverged", "error")
"""Statuses that the same task would reach again."""

RETRIED = ("killed", "timeout", "out_of_memory")
"""Statuses that say more about the machine than about the task; the next run tries again."""

_PACKAGES = (
    *("anndata", "igraph", "louvain", "mudata", "numpy", "pandas"),
    *("scanpy", "scikit-learn", "scipy", "torch", "umap-learn"),
)
_OF_TASK = ("dataset", "model", "preset", "size", "replicate", "seed", "subsample_seed")
_OF_SCORE = ("evaluated_on", "metric", "value", "null", "null_sd", "normalised")
_OF_RUN = (
    *("cpu_s", "wall_s", "scoring_s", "total_wall_s", "peak_memory_mb", "start_memory_mb"),
    *("parameters", "parameters_trained", "epochs", "steps", "stopped", "improving"),
)


class Ledger:
    """The results of a study in `folder`. Reading needs no lock; `begin` and `write` do."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.work = self.folder / ".work"

    # ---------------------------------------------------------------- what was studied

    @property
    def study(self) -> dict[str, Any]:
        """`study.json`. Raises StudyError for a folder that is not a study."""
        path = self.folder / "study.json"
        if not path.is_file():
            raise StudyError(
                "is not a study: it has no study.json",
                where=str(self.folder),
                remedy="Name a folder that `coembed study` has written",
            )
        return _read(path, ("plan", "card", "versions"), "Move the folder away and run it again")

    @property
    def plan(self) -> dict[str, Any]:
        """The plan, as `Plan.to_dict` describes it."""
        return dict(self.study["plan"])

    @property
    def card(self) -> dict[str, Any]:
        """The data card: name, simulated or not, cells, modalities, batches, sites, labels."""
        return dict(self.study["card"])

    # ---------------------------------------------------------------- results

    def row(self, key: str) -> dict[str, Any] | None:
        """Return a task's row, or None where there is none. Raises StudyError if damaged."""
        path = self._row_path(key)
        if not path.is_file():
            return None
        return _read(
            path,
            ("key", "status", "task", "scores"),
            "Delete the file and run the study again: only this task is repeated",
        )

    def rows(self) -> list[dict[str, Any]]:
        """Return all rows, ordered by model, preset, size and replicate.

        Raises:
            StudyError: the folder is not a study, or a file is damaged.
        """
        _ = self.study
        keys = [path.stem for path in (self.folder / "tasks").glob("[!.]*.json")]
        rows = [row for key in keys if (row := self.row(key)) is not None]
        return sorted(rows, key=_identity)

    def scores(self) -> pd.DataFrame:
        """Return a tidy table: one line per task, evaluated cells and metric.

        Tasks without scores (errors, timeouts, ...) have no line here; `rows` has them.
        """
        lines = [
            {"key": row["key"], "status": row["status"]}
            | {name: row["task"][name] for name in _OF_TASK}
            | score
            | {name: row[name] for name in _OF_RUN}
            for row in self.rows()
            for score in row["scores"]
        ]
        columns = None if lines else ["key", "status", *_OF_TASK, *_OF_SCORE, *_OF_RUN]
        table = pd.DataFrame(lines, columns=columns)
        return table.astype(dict.fromkeys(("value", "null", "null_sd", "normalised"), float))

    def medians(self) -> pd.DataFrame:
        """Return the median over replicates of each score, as the review's heat maps show.

        Only tasks with status "ok" count; `replicates` says how many had a defined value, and
        `sd` is their standard deviation (NaN for one).
        """
        table = self.scores()
        table = table[table["status"] == "ok"]
        by = ["dataset", "model", "preset", "size", "evaluated_on", "metric"]
        groups = table.groupby(by, sort=True)
        medians = groups[["value", "null", "normalised"]].median()
        medians["sd"] = groups["value"].std()
        medians["replicates"] = groups["value"].count()
        return medians.reset_index()

    def embedding(self, key: str) -> dict[str, np.ndarray]:
        """Return `train` (n, d), `train_rows` (n,), and `held_out`, `held_out_rows` if there.

        Rows index `cells.csv`. Raises StudyError where the file is missing or damaged.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load

        path = self.folder / "embeddings" / f"{key}.safetensors"
        try:
            return dict(load(path.read_bytes()))
        except (OSError, SafetensorError) as error:
            raise StudyError(
                f"is not a readable embedding ({error})",
                where=str(path),
                remedy=f"Delete {self._row_path(key)} and run the study again",
            ) from error

    # ---------------------------------------------------------------- writing

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder, so that no second study runs on it.

        Raises:
            StudyError: another process holds it; the message names it.
            OutputError: the folder cannot be made or written.
        """
        try:
            import fcntl
        except ImportError:  # Windows has no such lock
            yield
            return
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            file = open(self.folder / ".lock", "a+")  # noqa: SIM115 - closed below
        except OSError as error:
            raise cannot_write(self.folder, error) from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                raise StudyError(
                    f"another study runs in this folder (process {file.read().strip()})",
                    where=str(self.folder),
                    remedy="Wait for it, stop it, or choose another folder",
                ) from error
            except OSError as error:
                raise cannot_write(self.folder, error) from error
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield

    def begin(self, plan: Plan, cells: Cells, tasks: list[Task]) -> None:
        """Write `study.json` and `cells.csv`, or extend what an earlier run left.

        Raises:
            StudyError: the folder holds results that these would not be comparable with.
            OutputError: the folder cannot be written, or has too little space.
        """
        if (self.folder / "study.json").exists():
            plan = plan.extend(Plan.from_dict(self.plan))
            self._refuse_other_settings(tasks)
        for pattern in (".*.tmp", "*/.*.tmp"):  # what a killed writer left behind
            for leftover in self.folder.glob(pattern):
                leftover.unlink(missing_ok=True)
        self._check_space(self.pending(tasks))
        write_bytes(self.folder / "cells.csv", _cell_table(cells))
        study = {
            "schema": SCHEMA,
            "plan": plan.to_dict(),
            "card": data_card(cells),
            "versions": versions(),
            "command": " ".join(sys.argv),
            "written": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        write_json(self.folder / "study.json", plain(study))

    def _refuse_other_settings(self, tasks: list[Task]) -> None:
        """Refuse a task that is in the ledger with other parameters or versions."""
        planned = {task.identity: task for task in tasks}
        for row in self.rows():
            task = planned.get(_identity(row))
            if task is None or task.key == row["key"]:
                continue
            now = task.to_dict()
            changed = [name for name in now if now[name] != row["task"].get(name)]
            raise StudyError(
                f"the folder holds {task.model} at {task.size} cells with other settings "
                f"({', '.join(changed) or 'another version of coembed'})",
                where=str(self.folder),
                remedy="Choose a new folder",
            )

    def _check_space(self, tasks: list[Task]) -> None:
        # At most 64 dimensions of four bytes per embedded cell, and half a megabyte of history.
        need = sum(256 * (task.size + task.held_out) + 500_000 for task in tasks)
        free = shutil.disk_usage(self.folder).free
        if free < need:
            raise OutputError(
                f"has {free / 1e6:,.0f} MB of free space, and the study may need {need / 1e6:,.0f}",
                where=str(self.folder),
                remedy="Free some space, or choose a folder on another disk",
            )

    def pending(self, tasks: list[Task], *, retry_errors: bool = False) -> list[Task]:
        """Return the tasks that have no final row, in their order."""
        final = {"ok", "diverged"} if retry_errors else set(FINAL)
        rows = {task.key: self.row(task.key) for task in tasks}
        return [t for t in tasks if (row := rows[t.key]) is None or row["status"] not in final]

    def write(self, row: Mapping[str, Any]) -> None:
        """Write a row made by `new_row`; a final one ends the task's checkpoints and logs."""
        write_json(self._row_path(row["key"]), plain(row))
        if row["status"] in FINAL:
            for path in self.work.glob(f"{row['key']}*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def discard(self, key: str) -> None:
        """Remove a task's row, before the task is tried again."""
        self._row_path(key).unlink(missing_ok=True)

    def write_embedding(self, key: str, arrays: Mapping[str, np.ndarray]) -> str:
        """Write an embedding and return its path inside the folder."""
        from safetensors.numpy import save

        name = f"embeddings/{key}.safetensors"
        content = {part: np.ascontiguousarray(array) for part, array in arrays.items()}
        write_bytes(self.folder / name, save(content))
        return name

    def checkpoint(self, key: str) -> Path:
        """Return where a task keeps its checkpoint while it is unfinished."""
        return self.work / f"{key}.checkpoint"

    def log(self, name: str) -> Path:
        """Return the log of a task (by key) or of the server."""
        return self.work / f"{name}.log"

    def _row_path(self, key: str) -> Path:
        return self.folder / "tasks" / f"{key}.json"


def new_row(task: Task, status: str, **content: Any) -> dict[str, Any]:
    """Return a row: the same fields for every status, None or empty where nothing is known.

    Times are seconds: `cpu_s` and `wall_s` of training alone (None where it was `resumed` from a
    checkpoint), `scoring_s` of both scorings, `total_wall_s` of the whole task. Memory is resident
    memory in MB, of the process with its libraries and data; `start_memory_mb` is what it held
    before training.
    """
    row: dict[str, Any] = {
        "schema": SCHEMA,
        "key": task.key,
        "status": status,
        "task": task.to_dict(),
        "scores": [],
        **dict.fromkeys(_OF_RUN),
        "resumed": False,
        "events": [],
        "history": {},
        "message": "",
        "traceback": "",
        "versions": versions(),
        "embedding": None,
    }
    unknown = content.keys() - row.keys()
    if unknown:
        raise TypeError(f"a row has no {sorted(unknown)}")
    return row | content


def versions() -> dict[str, str]:
    """Return the versions of everything a result depends on."""
    found = {"coembed": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found | {"platform": platform.platform()}


def data_card(cells: Cells) -> dict[str, Any]:
    """Return what a reader must know of the data: counts, batches, labels, where from."""
    modalities = {}
    for role in cells.roles:
        measured = cells.counts[role][cells.present[role]]
        totals = np.asarray(measured.sum(axis=1)).ravel()
        modalities[role] = {
            "features": measured.shape[1],
            "cells": measured.shape[0],
            "median_counts": float(np.median(totals)) if len(totals) else None,
            "density": measured.nnz / max(1, measured.shape[0] * measured.shape[1]),
        }
    simple = (str, int, float, bool, type(None))
    return {
        "name": cells.name,
        "simulated": bool(cells.about.get("simulated", False)),
        "n_cells": cells.n_cells,
        "modalities": modalities,
        "batches": _count(cells.batch),
        "sites": _count(cells.site),
        "labels": _count(cells.labels),
        "unlabelled": int(pd.isna(cells.labels).sum()) if cells.labels is not None else None,
        "about": {k: v if isinstance(v, simple) else str(v) for k, v in cells.about.items()},
    }


def _count(values: np.ndarray | None) -> dict[str, int]:
    if values is None:
        return {}
    return {str(name): int(n) for name, n in pd.Series(values).dropna().value_counts().items()}


def _cell_table(cells: Cells) -> bytes:
    """Return `cells.csv`; a cell without a label, or data without one, has an empty field."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["barcode", "label", "batch", "site"])
    empty = [None] * cells.n_cells
    labels = empty if cells.labels is None else cells.labels
    sites = empty if cells.site is None else cells.site
    writer.writerows(zip(cells.obs.index, labels, cells.batch, sites, strict=True))
    return text.getvalue().encode()


def _identity(row: Mapping[str, Any]) -> tuple[str, str, int, int]:
    return Task.from_dict(row["task"]).identity


def _read(path: Path, names: tuple[str, ...], remedy: str) -> dict[str, Any]:
    """Return a JSON object that has `names` and our schema, or raise StudyError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        missing = [name for name in ("schema", *names) if name not in content]
    except (OSError, ValueError, TypeError) as error:
        raise StudyError(f"is damaged ({error})", where=str(path), remedy=remedy) from error
    if missing:
        raise StudyError(
            f"is damaged: it has no {', '.join(missing)}", where=str(path), remedy=remedy
        )
    if content["schema"] != SCHEMA:
        raise StudyError(
            f"has schema {content['schema']}; this version of coembed reads {SCHEMA}",
            where=str(path),
            remedy="Use the version of coembed that wrote it",
        )
    return dict(content)
