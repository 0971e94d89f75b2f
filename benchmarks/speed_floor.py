"""What the matrix products of a step would take by themselves, and where its time goes.

The products of a step are counted over one epoch, every player's forward and backward included:
2 m k n for dense ones, 2 nnz n where a factor is sparse. The floor is that number over the rate at
which this machine multiplies float32 matrices of the very shapes of the dense ones.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from speed_parts import Part, Settings, pin
from speed_sides import Epochs, described, simulated, train_ours
from speed_step import EIGHT
from torch import Tensor
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.flop_counter import FlopCounterMode

from coembed.data.cells import Cells
from coembed.data.minibatches import Inputs
from coembed.nn import kernels
from coembed.train.stage import Player

EPOCHS = 8
"""Of one training; scMVP's has two stages, of which the first takes a third."""

Shape = tuple[int, int, int, int, bool, bool]
"""Batch, m, k, n of a product, and whether its factors are transposed views."""

ATEN = torch.ops.aten
BOTH = [("cobolt", "cite"), ("scmm", "cite"), *EIGHT.items()]


def floor(settings: Settings) -> dict[str, Part]:
    """All eight systems; those that take both kinds of cells on both."""
    return {f"{name} {kind}": partial(share, name, kind, settings) for name, kind in BOTH}


def cells_of(kind: str, settings: Settings) -> Cells:
    """Return 2,000 simulated cells of 2,000 genes and 134 proteins or 10,000 peaks."""
    if settings.quick:
        return simulated(kind, 300, n_genes=100, n_proteins=10, n_peaks=300)
    return simulated(kind, 2000, n_genes=2000, n_proteins=134, n_peaks=10_000)


def share(name: str, kind: str, settings: Settings) -> dict[str, Any]:
    """Return seconds and products of a step, the floor under them, and the step's parts."""
    cells = cells_of(kind, settings)
    train_ours(name, cells, Epochs(), epochs=1)  # warms up
    seconds = []
    for _ in range(settings.repeats):
        pin(settings.threads)
        epochs = Epochs()
        model = train_ours(name, cells, epochs, epochs=EPOCHS)
        assert model.outcome is not None
        steps = model.outcome.steps / model.outcome.epochs
        seconds.append(median(epochs.seconds) / steps)
    products = counted(name, cells)
    dense = {shape: n / products.steps for shape, n in products.shapes.items()}
    alone = sum(n * seconds_of(shape, settings.repeats) for shape, n in dense.items())
    dense_flops = sum(n * flops(shape) for shape, n in dense.items())
    sparse_flops = products.sparse / products.steps
    rate = dense_flops / alone if alone else 0.0
    cube = (1, 1024, 1024, 1024, False, False)
    return {
        "cells": described(cells),
        "batch_size": model.params.batch_size,
        "seconds_per_step": seconds,
        "flops": {"dense": dense_flops, "sparse": sparse_flops, "other": products.other},
        "rate": rate,
        "rate_1024": flops(cube) / seconds_of(cube, settings.repeats),
        "floor_seconds": (dense_flops + sparse_flops + products.other) / rate,
        "parts": breakdown(name, cells),
    }


# -- products -------------------------------------------------------------------------------------


class Products:
    """The products of an epoch.

    Attributes:
        shapes: of the dense ones, each with its number.
        sparse: floating-point operations of those with a sparse factor.
        own: operations of those, of both kinds, in our own kernels, which PyTorch does not see.
        other: operations a step does otherwise, as PyTorch counts them (attention).
        steps: in how many steps.
    """

    def __init__(self) -> None:
        self.shapes: Counter[Shape] = Counter()
        self.sparse, self.own, self.other, self.steps = 0, 0, 0.0, 0

    def product(self, a: Tensor, b: Tensor) -> int:
        """Note the product of two matrices, or of two stacks of them."""
        if a.layout == b.layout == torch.strided:
            stack = a.shape[0] if a.dim() == 3 else 1
            m, k = a.shape[-2:]
            shape = (stack, m, k, b.shape[-1], _transposed(a), _transposed(b))
            self.shapes[shape] += 1
            return flops(shape)
        thin, width = (a, b.shape[-1]) if a.layout != torch.strided else (b, a.shape[-2])
        return self.entries(thin._nnz(), width)

    def entries(self, n: int, width: int) -> int:
        """Note a product of n entries with a row of so many numbers each."""
        self.sparse += 2 * n * width
        return 2 * n * width

    def formulas(self) -> dict[Any, Callable[..., int]]:
        """Return how to count the operators that multiply matrices, for `FlopCounterMode`."""

        def first_two(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
            return self.product(a, b)

        def last_two(_: Tensor, a: Tensor, b: Tensor, *__: Any, **___: Any) -> int:
            return self.product(a, b)

        def bag(weight: Tensor, indices: Tensor, *_: Any, **__: Any) -> int:
            return self.entries(indices.numel(), weight.shape[1])

        formulas: dict[Any, Callable[..., int]] = {
            **dict.fromkeys((ATEN.mm, ATEN.bmm), first_two),
            **dict.fromkeys((ATEN.addmm, ATEN.addmm_, ATEN.baddbmm), last_two),
            ATEN._embedding_bag_forward_only: bag,  # the gradient of a weight of CSR rows
        }
        for formula in formulas.values():
            formula._get_raw = True  # type: ignore[attr-defined]
        return formulas

    @contextmanager
    def kernels(self) -> Iterator[None]:
        """Note the products of our own kernels too."""
        run = kernels.run

        def counting(kernel: Callable[..., None], *arguments: Any) -> None:
            if kernel is kernels.product:
                _, _, values, right, _ = arguments
                self.own += self.entries(len(values), right.shape[1])
            if kernel is kernels.scaled_bernoulli:
                _, _, h, _, weights, _, weight, *_ = arguments
                h = h[weights != 0]  # without those that only fill it up
                logit = torch.empty(len(weight), len(h))
                for a, b in ((weight, h.T), (logit.T, weight), (logit, h)):
                    self.own += self.product(a, b)
            run(kernel, *arguments)

        with patch.object(kernels, "run", counting):
            yield


def counted(name: str, cells: Cells) -> Products:
    """Return the products of the second of three epochs."""
    products = Products()
    seen: list[tuple[Counter[Shape], int, int, int]] = []
    counter = FlopCounterMode(display=False, custom_mapping=products.formulas())

    def tick(stage: str, model: Any) -> None:
        counts = products.sparse, products.own, counter.get_total_flops()
        seen.append((products.shapes.copy(), *counts))

    with counter, products.kernels():
        model = train_ours(name, cells, tick, epochs=3)
    (shapes, *before), (shapes_after, *after) = seen[1:3]
    products.sparse, own, seen_by_pytorch = (b - a for a, b in zip(before, after, strict=True))
    assert model.outcome is not None
    products.steps = model.outcome.steps // model.outcome.epochs
    products.shapes = shapes_after - shapes
    dense = sum(n * flops(shape) for shape, n in products.shapes.items())
    products.other = (seen_by_pytorch + own - dense - products.sparse) / products.steps
    return products


def flops(shape: Shape) -> int:
    """Return the floating-point operations of a dense product."""
    stack, m, k, n, *_ = shape
    return 2 * stack * m * k * n


def seconds_of(shape: Shape, repeats: int) -> float:
    """Return the seconds of a float32 product of this shape by itself, the median of some."""
    stack, m, k, n, *transposed = shape
    a, b = (
        torch.randn(stack, *reversed(size)).mT if flag else torch.randn(stack, *size)
        for size, flag in zip(((m, k), (k, n)), transposed, strict=True)
    )
    if stack == 1:
        a, b = a[0], b[0]
    inner = max(1, round(2e9 / flops(shape) / 20))  # some milliseconds at 20 to 100 GFLOP/s
    times = []
    for _ in range(repeats + 1):  # the first warms up
        started = time.perf_counter()
        for _ in range(inner):
            torch.matmul(a, b)
        times.append((time.perf_counter() - started) / inner)
    return median(times[1:])


def _transposed(x: Tensor) -> bool:
    return x.stride(-1) != 1 and x.stride(-2) == 1


# -- where the time goes --------------------------------------------------------------------------


def breakdown(name: str, cells: Cells) -> dict[str, float]:
    """Return the seconds per step of its parts; `rest` is what they leave of it."""
    spent: Counter[str] = Counter()
    marks: list[tuple[str, float, Counter[str]]] = []

    def tick(stage: str, model: Any) -> None:
        marks.append((stage, time.perf_counter(), spent.copy()))

    with timed_parts(spent):
        model = train_ours(name, cells, tick, epochs=EPOCHS)
    assert model.outcome is not None
    last = [mark for mark in marks if mark[0] == marks[-1][0]][1:]  # its first epoch warms up
    steps = (len(last) - 1) * model.outcome.steps / model.outcome.epochs
    (_, start, before), (_, end, after) = last[0], last[-1]
    parts = {part: (after[part] - before[part]) / steps for part in after}
    whole = (end - start) / steps
    return {**parts, "rest": whole - sum(parts.values()), "step": whole}


@contextmanager
def timed_parts(spent: Counter[str]) -> Iterator[None]:
    """Add to `spent` the seconds inside the parts of a step, by name."""

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[part] += time.perf_counter() - started

        return call

    made = Player.__init__

    def make(player: Player, *args: Any, **kwargs: Any) -> None:
        made(player, *args, **kwargs)
        object.__setattr__(player, "loss", timed("forward and loss", player.loss))

    def began(*_: Any) -> None:
        spent["optimiser"] -= time.perf_counter()

    def ended(*_: Any) -> None:
        spent["optimiser"] += time.perf_counter()

    hooks = [register_optimizer_step_pre_hook(began), register_optimizer_step_post_hook(ended)]
    with ExitStack() as stack:
        for hook in hooks:
            stack.callback(hook.remove)
        stack.enter_context(patch.object(Player, "__init__", make))
        for owner, method, part in (
            (Inputs, "gather", "gather"),
            (torch.autograd, "backward", "backward"),
            (torch.autograd, "grad", "backward"),
        ):
            replacement = timed(part, getattr(owner, method))
            stack.enter_context(patch.object(owner, method, replacement))
        yield
