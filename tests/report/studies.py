"""Studies made up for the tests of the report floor: simulated, tiny, every value known."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from coembed.data.cells import Cells, Keys
from coembed.study import Ledger, Plan, Task
from coembed.study.ledger import new_row

METRICS = ("nmi", "trajectory", "asw_site")
"""Few, because drawing them takes the time of the tests."""

VALUES = (0.5, 0.7, 0.6)
"""NMI of replicates 0, 1 and 2 of `pca` at the smallest size on held-out cells; median 0.6."""

Value = Callable[[Task, str, str], float]


def made_up(task: Task, metric: str, part: str) -> float:
    """Return a score: `VALUES`, 0.1 more per size, and by model; every metric alike."""
    shift = {"pca": 0.0, "cobolt": 0.15}.get(task.model, -0.2)
    return VALUES[task.replicate] + shift + 0.1 * (task.size > 20) - 0.05 * (part == "train")


def cells(n: int = 100, *, name: str = "sim-made-up", labels: Sequence[Any] = ("A", "B")) -> Cells:
    random = np.random.default_rng(0)
    obs = pd.DataFrame(
        {
            "batch": [f"s{i % 2}d{i % 4}" for i in range(n)],
            "site": [f"s{i % 2}" for i in range(n)],
            "cell_type": [labels[i % len(labels)] for i in range(n)] if labels else None,
        },
        index=[f"cell{i}" for i in range(n)],
    )
    counts = {
        role: sparse.csr_matrix(random.poisson(1.0, (n, p)).astype(np.float32))
        for role, p in (("rna", 12), ("prot", 5))
    }
    return Cells(
        counts=counts,
        present={role: np.ones(n, dtype=bool) for role in counts},
        var={
            r: pd.DataFrame(index=[f"{r}{i}" for i in range(m.shape[1])]) for r, m in counts.items()
        },
        obs=obs,
        keys=Keys(batch="batch", site="site", label="cell_type" if labels else None),
        name=name,
        about={"simulated": True, "source": "made up for a test", "licence": "none"},
    )


def score_line(task: Task, metric: str, part: str, value: float, **more: Any) -> dict[str, Any]:
    undefined = not np.isfinite(value)
    return {
        "evaluated_on": part, "metric": metric, "value": value,
        "null": np.nan if undefined else 0.1, "null_sd": 0.01, "normalised": value,
        "n_scored": task.size, "n_left_out": 0, "n_labels": 2, "n_batches": 4,
        "undefined": undefined, "reason": "made-up reason" if undefined else "",
    } | more  # fmt: skip


class Study:
    """A ledger being made up."""

    def __init__(self, folder: Path, data: Cells | None = None, **options: Any) -> None:
        self.data = data or cells()
        options = {"models": ("pca", "cobolt"), "sizes": (20, 40), "held_out": 40,
                   "replicates": 3} | options  # fmt: skip
        self.plan = Plan(
            source=self.data.name,
            dataset=self.data.name,
            fingerprint=self.data.fingerprint(),
            **options,
        )
        folder.mkdir(parents=True, exist_ok=True)
        self.ledger = Ledger(folder)
        self.ledger.begin(self.plan, self.data, [])

    def tasks(self) -> list[Task]:
        plan = self.plan
        return [
            Task(
                dataset=plan.dataset, fingerprint=plan.fingerprint, keys={}, model=model,
                preset=preset, params={}, overrides={}, size=size, replicate=replicate, seed=1,
                subsample_seed=2, held_out=plan.held_out, held_out_seed=3,
                n_permutations=20, threads=1, device="cpu",
            )
            for model in plan.models for preset in plan.presets for size in plan.sizes
            for replicate in range(plan.replicates)
        ]  # fmt: skip

    def add(self, task: Task, value: Value = made_up, **content: Any) -> dict[str, Any]:
        """Write the row of a task that ended well, with an embedding, and return it."""
        random = np.random.default_rng(int(hashlib.sha256(task.key.encode()).hexdigest()[:8], 16))
        rows = np.sort(random.choice(self.data.n_cells - 40, task.size, replace=False))
        self.ledger.write_embedding(
            task.key,
            {"train": random.normal(size=(task.size, 3)).astype(np.float32), "train_rows": rows},
        )
        deep = task.model not in ("pca", "svd")
        parts = ("train", "held_out") if task.held_out else ("train",)
        row = new_row(
            task,
            **{
                "status": "ok",
                "scores": [
                    score_line(task, metric, part, value(task, metric, part))
                    for part in parts for metric in METRICS
                ],
                "cpu_s": 0.1 * task.size, "wall_s": 1.0, "peak_memory_mb": 500.0 + task.size,
                "parameters": 1000 * deep, "parameters_trained": 900 * deep,
                "epochs": 10 * deep, "steps": 20, "stopped": "early" if deep else "none",
                "improving": False, "embedding": f"embeddings/{task.key}.safetensors",
            } | content,
        )  # fmt: skip
        self.ledger.write(row)
        return row

    def fail(self, task: Task, status: str, message: str) -> dict[str, Any]:
        row = new_row(task, status, message=message)
        self.ledger.write(row)
        return row

    def fill(self, value: Value = made_up, **content: Any) -> Study:
        for task in self.tasks():
            self.add(task, value, **content)
        return self
