"""Time to the held-out objective that scvi-tools' default training ends at, on real cells.

The objective is the negative evidence lower bound per cell, reconstruction of every modality plus
KL terms at weight 1, of cells that neither side trains on, each encoded from its own counts. After
how many epochs each side is where is one measurement; how long an epoch takes, by turns on a quiet
machine, is another. The objective is evaluated by one function for both sides, our loss:
scvi-tools' weights are copied into our networks, whose likelihoods have the same constants (the
parity tests). In evaluation mode, with the same noise every time. The batches' classifier, the
experts' distance (MultiVI) and the priors of efficiency and background (totalVI) are terms of the
training, not of it.
"""

from __future__ import annotations

from functools import partial
from statistics import median
from typing import Any

import numpy as np
import pandas as pd
import scvi_weights
import torch
from scvi_tools import as_mudata
from speed_parts import Part, Settings, peer_is_here, pin
from speed_sides import Epochs, described, train_ours, train_scvi

from coembed.data.cells import Cells
from coembed.data.minibatches import Inputs
from coembed.data.pilots import load_pilot
from coembed.errors import DataError
from coembed.models import get_model
from coembed.models.base import Model
from coembed.train.loop import seeded
from coembed.train.stage import Clock

PILOTS = {"totalvi": "pbmc10k_cite", "multivi": "snare_adbrain_AF"}
SIMULATED = {"totalvi": "sim-cite", "multivi": "sim-multiome"}
"""In place of the real ones in a smoke run."""

HELD_OUT = 0.1
NOISES = 3
"""Draws of the latent variables over which an evaluation is averaged."""

EPOCHS = 6
"""Of one training that measures the pace; four of them are timed."""

EVERY = {"ours": 2, "scvi": 5}
"""Epochs from one evaluation to the next."""


def quality(settings: Settings) -> dict[str, Part]:
    """A training of scvi-tools by default and some of ours, where the pilots and it are there."""
    parts: dict[str, Part] = {}
    for name, pilot in (SIMULATED if settings.quick else PILOTS).items():
        try:
            load_pilot(pilot)
        except DataError:
            continue
        if peer_is_here():
            for seed in range(settings.peer_repeats):
                parts[f"{name} scvi {seed}"] = partial(peer, name, pilot, seed, settings)
            parts[f"{name} pace"] = partial(pace, name, pilot, settings)
        for seed in range(settings.repeats):
            parts[f"{name} ours {seed}"] = partial(ours, name, pilot, seed, settings)
    return parts


def split(cells: Cells) -> tuple[Cells, Cells]:
    """Return the cells to train on and those held out; the same for every training."""
    order = np.random.default_rng(0).permutation(cells.n_cells)
    held = round(HELD_OUT * cells.n_cells)
    return cells.take(np.sort(order[held:])), cells.take(np.sort(order[:held]))


class Watch:
    """The curve of a training: its objective on held-out cells over its epochs.

    Args:
        held_out: the cells.
        every: epochs from one evaluation to the next.
    """

    def __init__(self, held_out: Cells, every: int) -> None:
        self.held_out, self.every, self.epoch = held_out, every, -1
        self.points: list[dict[str, Any]] = []
        self.inputs: Inputs | None = None

    def due(self) -> bool:
        """Count an epoch that starts; say whether to evaluate the weights it starts from."""
        self.epoch += 1
        return self.epoch > 0 and self.epoch % self.every == 0

    def note(self, model: Model) -> None:
        """Evaluate `model` as it is."""
        terms = self.objective(model)
        elbo = sum(v for k, v in terms.items() if k.startswith(("reconstruction", "kl")))
        self.points.append({"epoch": self.epoch, "objective": elbo, "terms": terms})

    @torch.no_grad()
    def objective(self, model: Model) -> dict[str, float]:
        """Return the mean of every term of the loss over the held-out cells."""
        if self.inputs is None:
            cells = self.held_out
            codes = pd.Categorical(cells.batch, categories=model.batches).codes.astype(np.int64)
            self.inputs = Inputs(
                model.views.apply(cells), codes, model.device, sparse=model.takes_sparse
            )
        sums: dict[str, float] = {}
        training = model.net.training
        model.net.eval()
        with seeded(0, model.device):
            for _ in range(NOISES):
                for batch in self.inputs.chunks(np.arange(self.inputs.n_cells), 256):
                    share = len(batch) / self.inputs.n_cells / NOISES
                    for term, value in model.loss(batch, Clock.end()).items():
                        sums[term] = sums.get(term, 0.0) + share * float(value)
        model.net.train(training)
        return sums


def ours(name: str, pilot: str, seed: int, settings: Settings) -> dict[str, Any]:
    """Return the curve of our default training, from the cells to the last weights."""
    cells = load_pilot(pilot)
    train, held_out = split(cells)
    train_ours(name, train, idle, epochs=1)  # warms up

    def tick(_: str, model: Model) -> None:
        if watch.due():
            watch.note(model)

    watch = Watch(held_out, EVERY["ours"])
    model = train_ours(name, train, tick, seed=seed, epochs=6 if settings.quick else None)
    watch.epoch += 1
    watch.note(model)
    return _record(cells, watch)


def peer(name: str, pilot: str, seed: int, settings: Settings) -> dict[str, Any]:
    """Return the curve of scvi-tools' default training, on the features that our system selects."""
    cells = load_pilot(pilot)
    train, held_out = split(cells)
    data = as_mudata(get_model(name)(train).pipeline(train.var).fit(train), train)
    short = {"max_epochs": 6} if settings.quick else {}
    first = train_scvi(name, data, idle, max_epochs=1)  # warms up
    # Ours at its sizes, with what a training finds in the data: its weights are copied into it.
    twin = train_ours(name, train, idle, epochs=1, **scvi_weights.sizes(name, first.module))

    def note(model: Any) -> None:
        scvi_weights.load(name, twin, model.module)
        watch.note(twin)

    def tick(_: str, model: Any) -> None:
        if watch.due():
            note(model)

    watch = Watch(held_out, EVERY["scvi"])
    model = train_scvi(name, data, tick, seed=seed, **short)
    watch.epoch += 1
    note(model)
    return _record(cells, watch)


def pace(name: str, pilot: str, settings: Settings) -> dict[str, Any]:
    """Return seconds per epoch of both sides' default trainings, by turns, on the same cells."""
    train, _ = split(load_pilot(pilot))
    data = as_mudata(get_model(name)(train).pipeline(train.var).fit(train), train)
    seconds: dict[str, list[float]] = {"ours": [], "scvi": []}
    for repeat in range(settings.repeats + 1):  # the first warms up
        for side, run in (
            ("ours", partial(train_ours, name, train, epochs=EPOCHS)),
            ("scvi", partial(train_scvi, name, data, max_epochs=EPOCHS)),
        ):
            pin(settings.threads)
            epochs = Epochs()
            run(tick=epochs)
            if repeat:
                seconds[side].append(median(epochs.seconds))
    return {"cells": described(train), "seconds_per_epoch": seconds}


def idle(stage: str, model: Any) -> None:
    """Do nothing when an epoch starts."""


def _record(cells: Cells, watch: Watch) -> dict[str, Any]:
    end = watch.points[-1]
    return {
        "cells": described(cells),
        "held_out": watch.held_out.n_cells,
        "epochs": end["epoch"],
        "final": end["objective"],
        "curve": watch.points,
    }


def reached(curve: list[dict[str, Any]], target: float) -> int | None:
    """Return the epoch after which a training was first at `target` or below; None if never."""
    return next((p["epoch"] for p in curve if p["objective"] <= target), None)
