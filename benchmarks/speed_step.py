"""Seconds per optimiser step and peak memory, ours beside scvi-tools', on the same cells.

A section is a function of the settings that returns its parts. Sides take turns: A B A B ...
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

from speed_parts import Part, Settings, peer_is_here, pin
from speed_sides import (
    Epochs,
    bare,
    counts_for_scvi,
    described,
    peak_while,
    scvi_sizes,
    simulated,
    train_ours,
    train_scvi,
)

from coembed.data.cells import Cells
from coembed.models import get_model

EPOCHS = 7
"""Of one training; five of them are timed."""

BATCH_SIZES = {"totalvi": 256, "multivi": 128}
SHAPES: dict[str, dict[str, Any]] = {
    "totalvi": {"kind": "cite", "n_cells": 2000, "n_genes": 2000, "n_proteins": 134},
    "multivi": {"kind": "multiome", "n_cells": 2000, "n_genes": 2000, "n_peaks": 29_800},
}
QUICK = {"n_cells": 300, "n_genes": 100, "n_proteins": 10, "n_peaks": 300}

EIGHT = {
    "cobolt": "multiome", "scmm": "multiome", "totalvi": "cite", "multivi": "multiome",
    "scalex": "cite", "scmvp": "multiome", "davae": "multiome", "portal": "multiome",
}  # fmt: skip
"""The systems, each with a kind of cells that it takes."""

Side = Callable[[Epochs, int], int]
"""Trains so many epochs; returns the number of steps of one."""


def cells_of(name: str, settings: Settings) -> Cells:
    """Return the simulated cells of the comparison."""
    shape = SHAPES[name]
    return simulated(**(shape | {k: v for k, v in QUICK.items() if k in shape and settings.quick}))


def step(settings: Settings) -> dict[str, Part]:
    """Both comparisons on the processor, and the memory of each side in a process of its own."""
    parts: dict[str, Part] = {n: partial(compare, n, settings) for n in SHAPES}
    for name in SHAPES:
        for side in ("ours", *(["scvi"] if peer_is_here() else [])):
            parts[f"{name} memory {side}"] = partial(memory, name, side, settings)
    return parts


def gpu(settings: Settings) -> dict[str, Part]:
    """The comparisons on CUDA, and a default training of every system; nothing without CUDA."""
    import torch

    if not torch.cuda.is_available():
        return {}
    parts: dict[str, Part] = {
        f"step {n}": partial(compare, n, settings, device="cuda") for n in SHAPES
    }
    return parts | {f"fit {n}": partial(fit, n, settings, device="cuda") for n in EIGHT}


def compare(name: str, settings: Settings, *, device: str = "cpu") -> dict[str, Any]:
    """Return seconds per epoch of every side, one number for each repeat."""
    cells, batch_size = cells_of(name, settings), BATCH_SIZES[name]
    default = get_model(name).resolve_params(cells)
    sides: dict[str, Side] = {"ours": _ours(name, cells, device, batch_size=batch_size)}
    sizes: dict[str, int] = {}
    if peer_is_here():
        data = counts_for_scvi(cells)
        sizes = scvi_sizes(name, data)
        if not sizes.items() <= default.items():
            same = {"batch_size": batch_size, **sizes}
            sides["ours_at_their_sizes"] = _ours(name, cells, device, **same)
        sides["scvi"] = _scvi(name, data, device, batch_size)
    steps = {side: train(Epochs(), 2) for side, train in sides.items()}  # warms up
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(settings.repeats):
        for side, train in sides.items():
            pin(settings.threads)
            epochs = Epochs()
            train(epochs, EPOCHS)
            seconds[side].append(median(epochs.seconds))
    return {
        "cells": described(cells),
        "device": device,
        "batch_size": batch_size,
        "their_sizes": sizes,
        "default_sizes": {size: default[size] for size in sizes},
        "steps_per_epoch": steps,
        "epochs_timed": EPOCHS - 2,
        "seconds_per_epoch": seconds,
    }


def _ours(name: str, cells: Cells, device: str, **params: Any) -> Side:
    def train(tick: Epochs, epochs: int) -> int:
        model = train_ours(
            name, cells, tick, epochs=epochs, device=device, all_features=True, **params
        )
        assert model.outcome is not None
        return model.outcome.steps // model.outcome.epochs

    return train


def _scvi(name: str, data: Any, device: str, batch_size: int) -> Side:
    def train(tick: Epochs, epochs: int) -> int:
        options = bare(name) | {"max_epochs": epochs, "batch_size": batch_size}
        model = train_scvi(name, data, tick, device=device, **options)
        return int(model.trainer.num_training_batches)

    return train


def memory(name: str, side: str, settings: Settings) -> dict[str, Any]:
    """Return the resident memory of one side's training of two epochs; see `peak_while`."""

    def train(cells: Cells) -> None:
        batch_size = BATCH_SIZES[name]
        if side == "ours":
            _ours(name, cells, "cpu", batch_size=batch_size)(Epochs(), 2)
        else:
            _scvi(name, counts_for_scvi(cells), "cpu", batch_size)(Epochs(), 2)

    train(cells_of(name, replace(settings, quick=True)))  # imports what it needs
    found, _ = peak_while(partial(cells_of, name, settings), train)
    return found


def fit(name: str, settings: Settings, *, device: str) -> dict[str, Any]:
    """Return the seconds of a default training on 10,000 simulated cells, all epochs."""
    quick = settings.quick
    cells = simulated(
        EIGHT[name], 300 if quick else 10_000, n_genes=100 if quick else 2000,
        n_peaks=300 if quick else 10_000,
    )  # fmt: skip
    import time

    train_ours(name, cells, Epochs(), epochs=1, device=device)  # warms up
    started = time.perf_counter()
    model = train_ours(name, cells, Epochs(), device=device)
    seconds = time.perf_counter() - started
    assert model.outcome is not None
    return {
        "cells": described(cells), "device": device, "seconds": seconds,
        "epochs": model.outcome.epochs, "steps": model.outcome.steps,
    }  # fmt: skip
