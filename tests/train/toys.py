"""Small trainings for the tests of the loop: a line to fit, two players, and a killed program.

As a program it trains until a given step and kills itself: `python toys.py CHECKPOINT STEP`.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from coembed.data.minibatches import Batch, Inputs, Shuffled
from coembed.data.pipeline import Block
from coembed.train.loop import Loop, Outcome, seeded
from coembed.train.stage import Clock, Player, Stage, Weight

CPU = torch.device("cpu")
Hook = Callable[[int], float]
"""The number of the call, from 0, to a factor on the loss; it may raise."""


def inputs(n: int = 60, noise: float = 0.1) -> Inputs:
    """Points x with a target y = x w, in one block of three columns: two of x, one of y."""
    random = np.random.default_rng(0)
    x = random.normal(size=(n, 2))
    y = x @ [1.0, -2.0] + noise * random.normal(size=n)
    values = np.column_stack([x, y]).astype(np.float32)
    var = pd.DataFrame(index=["x1", "x2", "y"])
    block = Block(values, var, np.ones(n), np.ones(n, bool))
    return Inputs({"xy": block}, np.zeros(n, dtype=np.int64), CPU)


class Line(nn.Module):
    """Two layers with dropout, for torch's random numbers, and batch norm, for buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2))
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def line_loss(net: nn.Module, hook: Hook | None = None) -> Callable[..., Mapping[str, Tensor]]:
    """Squared error with a penalty; `hook` sees every call in training mode."""
    calls = 0

    def loss(batch: Batch, clock: Clock) -> dict[str, Tensor]:
        nonlocal calls
        factor = 1.0
        if hook is not None and net.training:
            factor = hook(calls)
            calls += 1
        xy = batch.x["xy"]
        error = (net(xy[:, :2]).squeeze(-1) - xy[:, 2]).square().mean()
        size = sum(p.square().sum() for p in net.parameters())
        return {"error": factor * error, "size": 1e-3 * size}

    return loss


def line_stage(
    net: nn.Module,
    *,
    hook: Hook | None = None,
    epochs: int = 12,
    held_back: bool = True,
    patience: int = 20,
    weights: Mapping[str, Weight] | None = None,
    lr: float = 1e-2,
    anneal: float = 0.0,
    name: str = "fit",
    loss: Any = None,
) -> Stage:
    rows, validation = np.arange(50), np.arange(50, 60)
    return Stage(
        name=name,
        players=[Player("line", [net], loss or line_loss(net, hook), weights or {}, lr, anneal)],
        sampler=Shuffled([(("xy",), rows)], 10),
        epochs=epochs,
        validation=Shuffled([(("xy",), validation)], 4).sweep() if held_back else (),
        patience=patience,
    )


def train(
    make: Callable[[nn.Module], Sequence[Stage]], *, seed: int = 0, **options: Any
) -> tuple[nn.Module, Outcome, list[dict[str, Any]]]:
    """Build a line and train it by the stages that `make` gives."""
    with seeded(seed, CPU):
        net = Line()
        outcome, history = Loop(net, make(net), inputs(), seed=seed, **options).run()
    return net, outcome, history


def two_stages(hook: Hook | None = None) -> Callable[[nn.Module], Sequence[Stage]]:
    """A plan that uses all a checkpoint must hold: stages, validation, warm-up, both optimisers."""
    from coembed.train.stage import WarmUp

    def make(net: nn.Module) -> Sequence[Stage]:
        shared = line_loss(net, hook)
        return [
            line_stage(net, loss=shared, epochs=4, held_back=False, name="first"),
            line_stage(net, loss=shared, epochs=8, weights={"size": WarmUp(0.5)}, name="second"),
        ]

    return make


def main(checkpoint: str, step: str) -> None:
    """Train with a checkpoint after every round, and die at a step without a chance to clean up."""

    def kill(call: int) -> float:
        if call == int(step):
            os.kill(os.getpid(), signal.SIGKILL)
        return 1.0

    torch.set_num_threads(1)
    train(two_stages(kill), checkpoint=Path(checkpoint), identity="toy", interval=0.0)


if __name__ == "__main__":
    main(*sys.argv[1:])
