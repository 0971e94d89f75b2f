"""When a training has diverged, and what to do about it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Guard:
    """Stops a run whose loss is not finite or explodes, and lets it go on more slowly.

    The run goes back to the last good state with a learning rate `slowdown` times as high, at most
    `restarts` times; each is an event in the outcome. After that the outcome is 'diverged'.

    Attributes:
        explosion: a loss this many times its minimum so far has exploded (study.md section 7).
        slowdown: factor on the learning rate at each restart.
        restarts: how many times.
    """

    explosion: float = 10.0
    slowdown: float = 0.1
    restarts: int = 3

    def complaint(self, means: Mapping[str, float], minima: Mapping[str, float]) -> str | None:
        """Return what is wrong with a round's mean terms and losses, or None.

        Args:
            means: name -> mean over the round, of every term and loss.
            minima: name of a loss -> its smallest mean in earlier rounds.
        """
        for name, value in means.items():
            if not math.isfinite(value):
                return f"{name} is {value}"
        for name, least in minima.items():
            # A loss near or below 0 has no meaningful ratio: its scale is at least 1.
            if means[name] - least > (self.explosion - 1) * max(abs(least), 1.0):
                return f"{name} rose from {least:.4g} to {means[name]:.4g}"
        return None
