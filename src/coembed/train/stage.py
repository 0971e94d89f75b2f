"""A training plan as data: stages of players.

A plain VAE is one stage with one player; an adversarial system has a player per side; a system
that pretrains has several stages. No system needs a loop of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from coembed.data.minibatches import Batch, Draw, Sampler


@dataclass(frozen=True)
class Clock:
    """Where the training stands.

    Attributes:
        step: optimiser steps done in this stage.
        planned: steps the stage will take if nothing stops it.
    """

    step: int
    planned: int

    @property
    def fraction(self) -> float:
        """Share of the planned steps that is done, in [0, 1]."""
        return min(1.0, self.step / max(1, self.planned))

    @classmethod
    def end(cls) -> Clock:
        """Return the clock at the end of a plan: every schedule at its final value."""
        return cls(step=2**31, planned=1)


@dataclass(frozen=True)
class WarmUp:
    """A weight that rises linearly from 0 to 1 over the first `fraction` of the planned steps."""

    fraction: float

    def __call__(self, clock: Clock) -> float:
        """Return the weight at this moment."""
        return min(1.0, clock.fraction / self.fraction) if self.fraction > 0 else 1.0


@dataclass(frozen=True)
class CoolDown(WarmUp):
    """A weight that falls linearly from 1 to 0 over the first `fraction` of the planned steps."""

    def __call__(self, clock: Clock) -> float:
        """Return the weight at this moment."""
        return 1 - super().__call__(clock)


@dataclass(frozen=True)
class Anneal(WarmUp):
    """A factor that falls linearly from 1 to 0 over the last `fraction` of the planned steps."""

    def __call__(self, clock: Clock) -> float:
        """Return the factor at this moment."""
        return min(1.0, (1 - clock.fraction) / self.fraction) if self.fraction > 0 else 1.0


@dataclass(frozen=True)
class Plateau:
    """Learning rates are multiplied by `factor` after `patience` rounds without improvement."""

    factor: float
    patience: int


Weight = float | WarmUp
Loss = Callable[[Batch, Clock], Mapping[str, Tensor]]
"""A minibatch to named terms, each a scalar averaged over cells."""


@dataclass(frozen=True)
class Player:
    """One optimiser (Adam or AdamW), the parameters it owns and the loss it minimises.

    Attributes:
        name: for the history.
        modules: what it owns.
        loss: named terms, each a scalar.
        weights: term -> constant or schedule; 1 where a term is not named.
        lr: learning rate.
        anneal: share of the plan, at its end, over which the learning rate falls to 0.
        eps: added to the root of the second moment.
        weight_decay: L2 penalty's gradient factor; with `decoupled`, AdamW's shrinkage.
        decoupled: AdamW in place of Adam.
        amsgrad: Adam's variant that keeps the largest second moment.
    """

    name: str
    modules: Sequence[nn.Module]
    loss: Loss
    weights: Mapping[str, Weight] = field(default_factory=dict)
    lr: float = 1e-3
    anneal: float = 0.0
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = False
    amsgrad: bool = False

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters it trains."""
        return [p for module in self.modules for p in module.parameters() if p.requires_grad]

    def weight(self, term: str, clock: Clock) -> float:
        """Return the weight of a term at this moment."""
        weight = self.weights.get(term, 1.0)
        return weight(clock) if isinstance(weight, WarmUp) else weight

    def rate(self, clock: Clock) -> float:
        """Return the learning rate at this moment."""
        return self.lr * Anneal(self.anneal)(clock)

    def total(self, terms: Mapping[str, Tensor], clock: Clock) -> Tensor:
        """Return the weighted sum of the terms: what is minimised at this moment."""
        weighted = [self.weight(name, clock) * value for name, value in terms.items()]
        return torch.stack(weighted).sum()


@dataclass(frozen=True)
class Stage:
    """Players that take turns on every minibatch, until the plan ends or nothing improves.

    Attributes:
        name: for the history.
        players: in the order of their turns.
        sampler: where minibatches come from.
        epochs: the planned number of passes; an upper bound where `validation` is given.
        validation: draws of held-back cells, on which the first player's loss (final weights) is
            measured; the best weights are kept. Without them the last weights are.
        patience: rounds without improvement before the stage ends; a round is one epoch, or
            a hundredth of the plan where that is longer.
        begin: called when the stage starts, before its first step: initial values from the data.
        plateau: how learning rates fall when the validation loss stands still.
    """

    name: str
    players: Sequence[Player]
    sampler: Sampler
    epochs: int
    validation: Sequence[Draw] = ()
    patience: int = 20
    begin: Callable[[], None] | None = None
    plateau: Plateau | None = None

    @property
    def planned_steps(self) -> int:
        """Optimiser steps of each player, if nothing stops the stage."""
        return self.epochs * self.sampler.steps_per_epoch

    @property
    def epochs_per_round(self) -> int:
        """Epochs between two looks at the validation loss."""
        return max(1, self.epochs // 100)

    @property
    def warm_up(self) -> float:
        """The fraction of the plan after which every weight is final."""
        weights = [w for player in self.players for w in player.weights.values()]
        return max((w.fraction for w in weights if isinstance(w, WarmUp)), default=0.0)
