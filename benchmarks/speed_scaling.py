"""How time and memory grow with cells and with peaks, and what a study spends beside its fits."""

from __future__ import annotations

import shutil
import time
from functools import partial
from statistics import median
from typing import Any

from speed_parts import Part, Settings
from speed_sides import Epochs, described, peak_while, simulated, train_ours

from coembed.data.cells import Cells
from coembed.data.pilots import load_pilot
from coembed.models.base import Model

CELLS = (1000, 3000, 10_000, 30_000, 100_000)
PEAKS = (10_000, 30_000, 100_000, 200_000)
N_GENES, N_PROTEINS, N_PEAKS, N_CELLS = 2000, 134, 30_000, 2000
KINDS = {"multivi": "multiome", "totalvi": "cite"}

STUDY: dict[str, Any] = {
    "models": ("totalvi", "scmm", "cobolt"),
    "size": 500,
    "held_out": 200,
    "replicates": 3,
}
STUDY_DATA = "sim-cite"


def cells(settings: Settings) -> dict[str, Part]:
    """Trainings on 1,000 to 100,000 cells: MultiVI with 30,000 peaks at 2 % density, totalVI."""
    numbers = (200, 400) if settings.quick else CELLS
    n_genes, n_peaks = (100, 300) if settings.quick else (N_GENES, N_PEAKS)
    sizes = {
        "totalvi": {"n_genes": n_genes, "n_proteins": N_PROTEINS},
        "multivi": {"n_genes": n_genes, "n_peaks": n_peaks},
    }
    return {
        f"{name} {n}": partial(point, name, n_cells=n, **sizes[name])
        for name in sizes
        for n in numbers
    }


def peaks(settings: Settings) -> dict[str, Part]:
    """MultiVI on 2,000 cells with 10,000 to 200,000 peaks at 2 % density."""
    numbers = (300, 600) if settings.quick else PEAKS
    n_cells, n_genes = (200, 100) if settings.quick else (N_CELLS, N_GENES)
    return {
        f"multivi {n}": partial(point, "multivi", n_cells=n_cells, n_genes=n_genes, n_peaks=n)
        for n in numbers
    }


def point(name: str, **sizes: int) -> dict[str, Any]:
    """Return seconds per epoch and memory of a short training on all features of simulated cells.

    Args:
        name: of the system.
        **sizes: of `speed_sides.simulated`.
    """
    epochs = Epochs()
    # Five epochs are timed; of a training of minutes per epoch, two.
    number = 7 if sizes["n_cells"] < 30_000 else 4

    def load() -> Cells:
        return simulated(KINDS[name], density=0.02, **sizes)

    def train(data: Cells) -> tuple[Cells, Model]:
        return data, train_ours(name, data, epochs, epochs=number, all_features=True)

    warm = simulated(KINDS[name], 200, n_genes=50, n_proteins=5, n_peaks=50)
    train_ours(name, warm, Epochs(), epochs=1, all_features=True)  # imports, thread pools
    memory, (data, model) = peak_while(load, train)
    parameters, trained = model.n_parameters
    return {
        "cells": described(data),
        "seconds_per_epoch": epochs.seconds,
        "memory": {
            **memory,
            "csr_mb": sum(map(_csr_bytes, data.counts.values())) / 1e6,
            # Adam keeps two numbers for each that it trains; all of float32.
            "parameters_and_optimiser_mb": (parameters + 2 * trained) * 4 / 1e6,
        },
    }


def _csr_bytes(x: Any) -> int:
    return int(x.data.nbytes + x.indices.nbytes + x.indptr.nbytes)


# -- a study --------------------------------------------------------------------------------------


def study(settings: Settings) -> dict[str, Part]:
    """A whole study of fits of 500 cells, from a ledger that does not exist yet."""
    return {f"run {i}": partial(whole_study, settings) for i in range(settings.repeats)}


def whole_study(settings: Settings) -> dict[str, Any]:
    """Return the wall time of a study, and what of it its rows spent in training and scoring."""
    from coembed.study import Plan, run

    data, folder = load_pilot(STUDY_DATA), settings.folder / "study"
    shutil.rmtree(folder, ignore_errors=True)
    quick = settings.quick
    plan = Plan.make(
        data,
        STUDY_DATA,
        STUDY["models"][2:] if quick else STUDY["models"],
        sizes=(60 if quick else STUDY["size"],),
        held_out=STUDY["held_out"],
        replicates=1 if quick else STUDY["replicates"],
    )
    started = time.perf_counter()
    ledger = run(plan, data, folder, workers=settings.threads)
    wall = time.perf_counter() - started
    rows = [row for row in ledger.rows() if row["status"] == "ok"]
    return {
        "cells": described(data),
        "tasks": len(rows),
        "not_ok": len(ledger.rows()) - len(rows),
        "workers": settings.threads,
        "wall_s": wall,
        "training_s": sum(row["wall_s"] for row in rows),
        "scoring_s": sum(row["scoring_s"] for row in rows),
        "in_tasks_s": sum(row["total_wall_s"] for row in rows),
        "median_task_s": median(row["total_wall_s"] for row in rows),
    }
