"""Mapping new cells into a trained model: new batches get parts of their own, all else stands."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from coembed.errors import DataError
from coembed.train.loop import Loop, seeded
from coembed.train.stage import Player, Stage

if TYPE_CHECKING:
    from coembed.models.base import Model

    M = TypeVar("M", bound=Model)


def map_query(model: M, data: Any, *, steps: int, seed: int, progress: bool) -> M:
    """Return a model that knows the batches of `data` too; see `Model.map_query`."""
    cells = model.cells_of(data)
    new = sorted(set(cells.batch) - set(model.batches))
    mapped = copy.copy(model)  # what was learnt of the features is common to both
    mapped.batches, mapped.cells = [*model.batches, *new], cells
    with seeded(seed, mapped.device):
        mapped._build()
        free = _grow(mapped.net, model.net.state_dict(), len(model.batches), len(new))
        mapped.net.eval()
        mapped.net.frozen = True
        inputs = mapped.inputs_of(cells, None)
        stages = _stages(mapped, inputs, steps) if free else []
        loop = Loop(mapped.net, stages, inputs, seed=seed, progress=progress)
        mapped.outcome, history = loop.run()
    mapped.history = pd.DataFrame(history)
    mapped.net.eval()
    return mapped


def _grow(net: torch.nn.Module, old: dict[str, Tensor], n_old: int, n_new: int) -> bool:
    """Copy the trained weights into a net for more batches; only the new parts stay trainable.

    A weight that depends on the batch has the batches last along one axis: rows of a table, or
    columns of a layer that sees their one-hot (which one batch alone does not have). Its new part
    starts at the mean of the old ones.

    Returns:
        Whether anything is left to train.
    """
    parameters, free = dict(net.named_parameters()), False
    for name, target in net.state_dict(keep_vars=True).items():
        if name not in old:  # a part that only several batches have, as a classifier of them
            target.requires_grad_(False)
            continue
        source, is_new = old[name], torch.zeros_like(target, dtype=torch.bool)
        if source.shape != target.shape:
            axis = next(i for i, n in enumerate(source.shape) if n != target.shape[i])
            n_shared = source.shape[axis]
            appended = target.shape[axis] - n_shared
            source = torch.cat([source, _start(source, axis, appended, n_old, n_new)], axis)
            is_new.narrow(axis, target.shape[axis] - n_new, n_new).fill_(True)
        with torch.no_grad():
            target.copy_(source)
        if name in parameters:
            target.requires_grad_(bool(is_new.any()))
            if is_new.any():
                target.register_hook(lambda gradient, mask=is_new: gradient * mask)
                free = True
    return free


def _start(source: Tensor, axis: int, appended: int, n_old: int, n_new: int) -> Tensor:
    shape = list(source.shape)
    shape[axis] = appended
    if appended != n_new:  # one batch had no one-hot: its column and the new ones start at zero
        return source.new_zeros(shape)
    known = source.narrow(axis, source.shape[axis] - n_old, n_old)
    return known.mean(axis, keepdim=True).expand(shape)


def _stages(model: Model, inputs: Any, steps: int) -> list[Stage]:
    """Return the last stage of the plan, `steps` long, with the players that own new parts."""
    rows = np.arange(inputs.n_cells)
    last = model.stages(inputs, rows, rows[:0])[-1]
    players = [_quiet(player) for player in last.players if player.parameters]
    if not players:
        raise DataError(f"{model.card.title} has no part for new batches")
    epochs = max(1, round(steps / last.sampler.steps_per_epoch))
    return [replace(last, players=players, epochs=epochs, validation=(), begin=None, plateau=None)]


def _quiet(player: Player) -> Player:
    """Return the player without what would move or judge the parts that stand."""
    return replace(player, weight_decay=0.0, weights={**player.weights, "adversarial": 0.0})
