"""The two sides of a comparison: coembed's training and scvi-tools', on the same cells."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import scvi_weights
import torch
from scvi_tools import as_mudata, registered

from coembed.data.cells import Cells
from coembed.data.pipeline import Pipeline
from coembed.data.simulate import simulate
from coembed.models import get_model
from coembed.models.base import Model
from coembed.study.task import memory_mb, peak_memory_mb

Tick = Callable[[str, Any], None]
"""Called with the stage's name and the model when an epoch starts, before its first minibatch."""

DEPTHS = {0.02: 0.4, 0.04: 0.86}
"""Density of peaks -> `depth` of the simulator that gives about that."""

BARE: dict[str, Any] = {
    "train_size": 1.0, "early_stopping": False, "check_val_every_n_epoch": None,
    "logger": False,
}  # fmt: skip
"""scvi-tools' training without all that is not a step."""


def simulated(kind: str, n_cells: int, *, density: float = 0.04, **sizes: int) -> Cells:
    """Return simulated cells of 2 batches; `density` is that of the peaks."""
    depth = DEPTHS[density] if kind == "multiome" else 1.0
    return simulate(kind, n_cells, n_batches=2, n_sites=2, depth=depth, **sizes)


def described(cells: Cells) -> dict[str, Any]:
    """Return what a table says about cells."""
    sizes = {m: x.shape[1] for m, x in cells.counts.items()}
    return {
        "name": cells.name,
        "simulated": bool(cells.about.get("simulated")),
        "cells": cells.n_cells,
        "features": sizes,
        "density": {m: cells.counts[m].nnz / cells.n_cells / n for m, n in sizes.items()},
    }


class Epochs:
    """Notes when epochs start; from one start to the next is an epoch with its bookkeeping."""

    def __init__(self) -> None:
        self.starts: list[tuple[str, float]] = []

    def __call__(self, stage: str, model: Any) -> None:
        """Note the start of an epoch of `stage`."""
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self.starts.append((stage, time.perf_counter()))

    @property
    def seconds(self) -> list[float]:
        """Of every epoch but a stage's first, a warm-up, and its last, whose end is not seen."""
        triples = zip(self.starts, self.starts[1:], self.starts[2:], strict=False)
        return [end - start for (a, _), (b, start), (c, end) in triples if a == b == c]


def train_ours(
    name: str,
    cells: Cells,
    tick: Tick,
    *,
    epochs: int | None = None,
    device: str = "cpu",
    seed: int = 0,
    all_features: bool = False,
    **params: Any,
) -> Model:
    """Return a trained system of coembed.

    Args:
        name: of the system.
        cells: to train on.
        tick: called at the start of every epoch.
        epochs: in place of the default plan.
        device: 'cpu' or 'cuda'.
        seed: of the training.
        all_features: counts of all features, in place of the system's selection of them.
        **params: hyper-parameters that differ from the default's.
    """
    model = get_model(name)(cells, **params)
    if all_features:
        model.pipeline = lambda var: Pipeline({role: [] for role in var})
    at_every_epoch(model, tick)
    return model.train(epochs, device=device, seed=seed, progress=False)


def at_every_epoch(model: Model, tick: Tick) -> None:
    """Let a training of `model` call `tick`; its plan is else as the system declares it."""
    stages = model.stages

    def ticking(*args: Any) -> list[Any]:
        return [
            replace(s, sampler=_Ticking(s.sampler, partial(tick, s.name, model)))
            for s in stages(*args)
        ]

    model.stages = ticking


class _Ticking:
    """A stage's sampler that says when an epoch starts."""

    def __init__(self, sampler: Any, tick: Callable[[], None]) -> None:
        self.sampler, self.tick = sampler, tick

    def epoch(self, rng: np.random.Generator) -> Iterator[Any]:
        self.tick()
        yield from self.sampler.epoch(rng)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sampler, name)


def counts_for_scvi(cells: Cells) -> Any:
    """Return all features of `cells` as scvi-tools wants them."""
    return as_mudata(Pipeline({role: [] for role in cells.roles}).fit(cells), cells)


def train_scvi(
    name: str, data: Any, tick: Tick, *, device: str = "cpu", seed: int = 0, **options: Any
) -> Any:
    """Return a trained model of scvi-tools with its default sizes; `options` are those of `train`.

    Args:
        name: 'totalvi' or 'multivi'.
        data: the MuData to train on.
        tick: called at the start of every epoch.
        device: 'cpu' or 'cuda'.
        seed: of initial values and minibatches.
        **options: of its `train`.
    """
    import scvi
    from lightning.pytorch.callbacks import Callback

    class Starts(Callback):
        def on_train_epoch_start(self, trainer: Any, plan: Any) -> None:
            tick("train", model)

    warnings.simplefilter("ignore")  # lightning, on loaders without workers and its own future
    scvi.settings.seed = seed
    scvi.settings.verbosity = 40
    model = registered(name, data)
    accelerator = {"cpu": "cpu", "cuda": "gpu"}[device]
    model.train(
        accelerator=accelerator,
        devices=1,
        callbacks=[Starts()],
        enable_progress_bar=False,
        **options,
    )
    return model


def bare(name: str) -> dict[str, Any]:
    """Return the options of scvi-tools' `train` under which it takes steps and nothing else."""
    return BARE | ({"reduce_lr_on_plateau": False} if name == "totalvi" else {})


def scvi_sizes(name: str, data: Any) -> dict[str, int]:
    """Return the hyper-parameters by which our networks get the widths of scvi-tools' defaults."""
    return scvi_weights.sizes(name, registered(name, data).module)


# -- memory ---------------------------------------------------------------------------------------


def peak_while(
    load: Callable[[], Any], train: Callable[[Any], Any]
) -> tuple[dict[str, float], Any]:
    """Return resident memory in MB: after the imports, with the data, at the peak of `train`.

    The imports have to be done before. The peak of `load`, which simulates, does not count.

    Returns:
        The three numbers and what `train` returned.
    """
    _settle()
    imports = memory_mb()
    data = load()
    _settle()
    before = memory_mb()
    trained = train(data)
    return {"imports_mb": imports, "data_mb": before, "peak_mb": _peak_mb()}, trained


def _settle() -> None:
    """Give freed memory back and let the kernel forget the peak so far, where it can (Linux)."""
    import ctypes
    import gc

    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # the peak then includes that of the simulation: more than there is, never less


def _peak_mb() -> float:
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 / 1e6 if found else float(peak_memory_mb() or "nan")
