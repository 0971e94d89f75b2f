"""Cells and executors for the tests of the study floor: simulated, tiny, deterministic.

As a program it runs one study: `python -m fakes FOLDER`.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

import coembed.study.plan
from coembed.data.cells import Cells, Keys
from coembed.errors import ParameterError
from coembed.study import Plan, Task, run
from coembed.study.task import Source

METRICS = ("nmi", "asw_batch")


def small_cells(n: int = 120, *, seed: int = 0, name: str = "sim-small") -> Cells:
    """Return simulated cells: three batches of unlike sizes in two sites, two types."""
    random = np.random.default_rng(seed)
    counts = {
        role: sparse.csr_matrix(random.poisson(1.0, (n, p)).astype(np.float32))
        for role, p in (("rna", 12), ("prot", 5))
    }
    batch = np.array(["s1d1", "s1d2", "s2d1"])[
        np.searchsorted([n // 2, n // 2 + n // 3], range(n), side="right")
    ]
    obs = pd.DataFrame(
        {
            "batch": batch,
            "site": [name[:2] for name in batch],
            "cell_type": random.choice(["A", "B"], n),
        },
        index=[f"cell{i}" for i in range(n)],
    )
    obs.loc["cell3", "cell_type"] = None
    return Cells(
        counts=counts,
        present={role: np.ones(n, dtype=bool) for role in counts},
        var={
            r: pd.DataFrame(index=[f"{r}{i}" for i in range(m.shape[1])]) for r, m in counts.items()
        },
        obs=obs,
        keys=Keys(batch="batch", site="site", label="cell_type"),
        name=name,
        about={"simulated": True, "source": "tests"},
    )


def resolve_params(
    model: str, cells: Cells, preset: str, params: Mapping[str, Any]
) -> dict[str, Any]:
    """Stand in for the models' own: a model has `rate`, and a batch size that grows with n."""
    for name in params:
        if name != "rate":
            raise ParameterError(f"no hyper-parameter '{name}'", where=f"model '{model}'")
    return {"rate": 0.1, "batch_size": cells.n_cells // 10, "preset": preset} | dict(params)


def execute(task: Task, source: Source) -> dict[str, Any]:
    """Behave as the model's name says, and note the call in `calls.txt`."""
    with open(Path(source.folder) / "calls.txt", "a") as calls:
        calls.write(f"{task.key}\n")
    if task.model == "failing":
        raise ValueError("the model is <broken>")
    if task.model == "refusing":
        raise ParameterError("no such thing", where="model 'refusing'", remedy="Ask for another")
    if task.model == "hungry":
        raise MemoryError("400 GiB")
    if task.model == "bloated":
        ballast = np.ones(50_000_000)
        time.sleep(60 + 0 * ballast[0])
    if task.model == "sleepy":
        time.sleep(60)
    if task.model == "suicidal":
        print("last words", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    if task.model == "silent":
        os._exit(3)
    if task.model == "orphaning":
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)
    time.sleep(0.05)
    random = np.random.default_rng([task.seed, task.subsample_seed])
    latent = random.normal(size=(task.size, 2)).astype(np.float32)
    name = source.ledger.write_embedding(
        task.key, {"train": latent, "train_rows": np.arange(task.size)}
    )
    return {
        "status": "diverged" if task.model == "diverging" else "ok",
        "message": "the loss is not finite" if task.model == "diverging" else "",
        "scores": [
            {
                "evaluated_on": part,
                "metric": metric,
                "value": float("nan")
                if metric == "asw_batch" and part == "train"
                else float(random.random()),
                "null": 0.1,
                "null_sd": 0.01,
                "normalised": 0.5,
                "n_scored": task.size,
                "n_left_out": 0,
                "n_labels": 2,
                "n_batches": 3,
                "undefined": False,
                "reason": "",
            }
            for part in ("train", "held_out")
            for metric in METRICS
        ],
        "history": {"loss": [1.0, float("nan")]},
        "embedding": name,
    }


def study_plan(cells: Cells, models: tuple[str, ...] = ("steady",), **options: Any) -> Plan:
    """Return a plan of a few tasks; the fakes never read the source."""
    return Plan.make(cells, "fake", models, **({"sizes": (20, 40), "replicates": 2} | options))


if __name__ == "__main__":
    coembed.study.plan.resolve_params = resolve_params
    data = small_cells()
    plan = study_plan(data, ("steady", "other", "failing"), replicates=5)
    run(plan, data, sys.argv[1], workers=2, executor="fakes:execute")
