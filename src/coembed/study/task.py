"""One task: take the cells, train, embed, score. Whatever happens becomes a row."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from coembed.data.cells import Cells
from coembed.errors import CoembedError, OutputError, StudyError
from coembed.study.ledger import Ledger, new_row
from coembed.study.plan import Task, held_out_rows, training_rows

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Source:
    """Where a task finds its data and leaves its results; none of it changes a result.

    Attributes:
        source: file or pilot's name.
        read: options it is read with.
        fingerprint: SHA-256 of the data.
        models: the models of the study.
        folder: the ledger.
    """

    source: str
    read: Mapping[str, Any]
    fingerprint: str
    models: Sequence[str]
    folder: str

    @property
    def ledger(self) -> Ledger:
        """The ledger that takes the row."""
        return Ledger(Path(self.folder))


Executor = Callable[[Task, Source], dict[str, Any]]
"""Runs a task and returns the content of its row, with `status` "ok" or "diverged"."""

EXIT_OUTPUT = 74
"""Exit code of a task's process where its row cannot be written (EX_IOERR of sysexits.h)."""

_loaded: dict[str, Cells] = {}


def preload(source: Source) -> None:
    """Do once, before any task, what would else be counted as its time: imports, compilation.

    Nothing here may start a thread that a fork would lose, so no model is trained by gradients.
    """
    from coembed.data.simulate import simulate
    from coembed.metrics.score import score
    from coembed.models import get_model

    for name in source.models:
        get_model(name)
    cells = simulate("cite", n_cells=200, seed=0)
    model = get_model("pca")(cells)
    model.train(device="cpu", progress=False)
    # The first score compiles umap's functions, for about ten seconds.
    score(
        model.get_latent_representation(),
        **cells.annotations,
        n_permutations=2,
    )
    load(source)


def load(source: Source) -> Cells:
    """Return the data, kept for the process's next task. Raises StudyError if they changed."""
    from coembed.data.pilots import resolve

    if source.fingerprint not in _loaded:
        cells = resolve(source.source, **source.read)
        if cells.fingerprint() != source.fingerprint:
            raise StudyError(
                "the data changed since the study was planned",
                where=source.source,
                remedy="Bring the old file back, or plan a new study in a new folder; options that "
                "the data were read with belong in the plan's `read`",
            )
        _loaded[source.fingerprint] = cells
    return _loaded[source.fingerprint]


def execute(task: Task, source: Source) -> dict[str, Any]:
    """Train one model on one sub-sample; score the embedding of these and of the held-out cells.

    Returns:
        The content of a ledger row (`coembed.study.ledger.new_row`), `status` included.
    """
    import torch
    from threadpoolctl import threadpool_limits

    from coembed.models import get_model

    torch.set_num_threads(task.threads)
    threadpool_limits(task.threads)
    cells = load(source)
    held_out = held_out_rows(cells.batch, task.held_out, task.held_out_seed)
    train = training_rows(cells.n_cells, held_out, task.size, task.subsample_seed)
    checkpoint = source.ledger.checkpoint(task.key)
    resumed = checkpoint.exists()
    model = get_model(task.model)(cells.take(train), preset=task.preset, **task.overrides)

    before = memory_mb()
    wall, cpu = time.perf_counter(), time.process_time()
    model.train(seed=task.seed, device=task.device, progress=False, checkpoint=checkpoint)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall

    outcome = model.outcome
    assert outcome is not None  # the model is trained
    events = [*outcome.events, *({"event": "warning", "message": w} for w in outcome.warnings)]
    embedding = {"train": np.asarray(model.get_latent_representation(), dtype=np.float32)}
    embedding["train_rows"] = train.astype(np.int64)
    if len(held_out):
        try:
            latent = model.get_latent_representation(cells.take(held_out))
        except CoembedError as error:
            # A model may be unable to embed cells it has not seen; its own cells still count.
            events.append({"event": "no held-out embedding", "message": str(error)})
        else:
            embedding["held_out"] = np.asarray(latent, dtype=np.float32)
            embedding["held_out_rows"] = held_out.astype(np.int64)

    started = time.perf_counter()
    scores = []
    for part in ("train", "held_out"):
        # A model that diverged is scored at its last good weights, if it has any.
        lost = outcome.status == "diverged" and not np.isfinite(embedding.get(part, 0)).all()
        if part not in embedding or lost:
            continue
        table = _score(embedding[part], cells.take(embedding[f"{part}_rows"]), task)
        scores += [{"evaluated_on": part, **line} for line in table.to_dict("records")]
    total, trained = model.n_parameters
    return {
        "status": outcome.status,
        "scores": scores,
        # A resumed training took longer than the part of it that was seen here.
        "cpu_s": None if resumed else cpu,
        "wall_s": None if resumed else wall,
        "scoring_s": time.perf_counter() - started,
        "start_memory_mb": before,
        "parameters": total,
        "parameters_trained": trained,
        "epochs": outcome.epochs,
        "steps": outcome.steps,
        "stopped": outcome.stopped,
        "improving": outcome.improving,
        "resumed": resumed,
        "events": events,
        "history": model.history.reset_index(drop=True).to_dict("list"),
        "message": outcome.message or "",
        "embedding": source.ledger.write_embedding(task.key, embedding),
    }


def _score(embedding: np.ndarray, cells: Cells, task: Task) -> pd.DataFrame:
    from coembed.metrics.score import score

    table: pd.DataFrame = score(
        embedding,
        **cells.annotations,
        n_permutations=task.n_permutations,
        # The same permutations for every model, so that their nulls can be compared.
        seed=task.subsample_seed,
    )
    return table


def perform(task: Task, source: Source, executor: Executor) -> dict[str, Any]:
    """Return the row of a task, whatever becomes of it.

    Raises:
        OutputError: results cannot be written; the study must stop rather than lose hours.
    """
    started = time.perf_counter()
    try:
        content = executor(task, source)
    except OutputError:
        raise
    except Exception as error:
        content = {
            "status": "out_of_memory" if _is_memory(error) else "error",
            "message": f"{type(error).__name__}: {error}",
            "traceback": traceback.format_exc(),
        }
    content["total_wall_s"] = time.perf_counter() - started
    content["peak_memory_mb"] = peak_memory_mb()
    return new_row(task, **content)


def _is_memory(error: Exception) -> bool:
    """Say whether numpy, torch on the CPU or torch on a GPU ran out of memory."""
    texts = ("not enough memory", "out of memory", "can't allocate memory")
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and any(text in str(error).lower() for text in texts))
    )


def memory_mb() -> float:
    """Return the resident memory of this process, in MB."""
    import psutil

    return float(psutil.Process().memory_info().rss / 1e6)


def peak_memory_mb() -> float | None:
    """Return the largest resident memory this process has had, in MB; None where unknown."""
    try:
        import resource
    except ImportError:
        return None
    return maxrss_mb(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def maxrss_mb(maxrss: int) -> float:
    """Return `ru_maxrss` in MB: the kernel counts in kB, macOS in bytes."""
    return maxrss / 1e6 if sys.platform == "darwin" else maxrss * 1024 / 1e6
