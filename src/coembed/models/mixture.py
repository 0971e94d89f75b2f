"""Systems whose prior is a mixture of Gaussians, fitted part of the way (VaDE's plan)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from coembed.data.cells import Cells
from coembed.data.minibatches import Inputs
from coembed.errors import warn
from coembed.models.base import Model
from coembed.train.stage import Stage

CELLS_PER_COMPONENT = 3
FIT_AT = 0.3
"""Share of the plan after which the mixture is fitted."""


class MixturePrior(Model):
    """A system with a `GaussianMixture` of `n_components`, `net.mixture`, as its prior."""

    @classmethod
    def resolve_params(
        cls, data: Cells, preset: str = "default", **overrides: Any
    ) -> dict[str, Any]:
        """Return the hyper-parameters, with no more components than the cells can tell apart."""
        params = super().resolve_params(data, preset, **overrides)
        asked, most = params["n_components"], max(1, data.n_cells // CELLS_PER_COMPONENT)
        if asked > most:
            what = f"{asked} components are too many for {data.n_cells} cells"
            warn(what, where=cls.card.title, instead=f"{most} are used")
        return {**params, "n_components": min(asked, most)}

    def sample_prior(self, n: int) -> Tensor:
        """Return n draws from the mixture."""
        return self.net.mixture.sample(n)

    def fitted_midway(self, plan: Stage, inputs: Inputs, rows: np.ndarray) -> Sequence[Stage]:
        """Return the plan in two stages; before the second the mixture is fitted to the means.

        They are the posterior means of `rows` after `FIT_AT` of the plan; one too short to be
        parted is returned as it is.
        """
        first = replace(plan, name="vae", epochs=int(FIT_AT * plan.epochs))
        if not first.epochs:
            return [plan]

        def fit() -> None:
            self.net.eval()
            self.net.mixture.fit(Model.latent(self, inputs.take(self.roles, rows)))

        rest = plan.epochs - first.epochs
        return [first, replace(plan, name="mixture", epochs=rest, begin=fit)]
