"""Cobolt: a product of experts over modalities with a topic-model decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import softmax

from coembed.data.minibatches import Batch, Inputs, Shuffled, slices
from coembed.data.pipeline import Pipeline
from coembed.data.views import counts, normalised
from coembed.models.base import Card, Model, Networks
from coembed.models.bridge import bridge, subsets
from coembed.models.params import MIN_STEPS, VALIDATION, WARM_UP, TrainingParams, param
from coembed.nn.fusion import product_of_experts
from coembed.nn.layers import mlp, rows_of_batches
from coembed.nn.likelihoods import draw_multinomial, multinomial
from coembed.nn.posteriors import Gaussian
from coembed.nn.sparse import Linear
from coembed.train.stage import Clock, Player, Stage, WarmUp

HIDDEN = (128, 64)


class Cobolt(Model):
    r"""Cobolt (Gong, Zhou & Purdom 2021), a multimodal neural topic model.

    A cell's topics are :math:`\theta = \mathrm{softmax}(z)` with the Laplace approximation of a
    symmetric Dirichlet(50/K) as prior, :math:`z \sim N(0, v I)`, :math:`v = (1 - 1/K) K / 50`.
    Each modality m has an encoder :math:`q_m(z | x_m)` on log(1 + x); a set of modalities has the
    product of its experts and the prior, counted once. Counts are multinomial with

    .. math:: \pi_m = \mathrm{softmax}((\theta B_m)(1 + s_{m,d}) + b_{m,d}),

    d being the cell's batch. Every epoch visits each combination of modalities in turn, with all
    cells that have it. The embedding is the mean of the joint posterior, centred over the topics
    (softmax does not see a shift); a cell without all modalities is moved to the joint space by
    boosted trees trained on the paired cells. Source: specs/cobolt.md.
    """

    card = Card.read("cobolt")
    takes_sparse = True

    class Params(TrainingParams):
        """Hyper-parameters of Cobolt."""

        n_latent: int = param(10, "number of topics K", "tutorial and review", ge=2)
        learning_rate: float = param(0.005, "Adam's learning rate", "original code", gt=0)
        min_steps: int = param(1500, MIN_STEPS, "ours: BMMC pilots of 120-480 cells", ge=0)
        validation_fraction: float = param(0.0, VALIDATION, "original code", ge=0, lt=1)
        warm_up: float = param(0.3, WARM_UP, "original: 30 of 100 epochs", ge=0, le=1)
        n_top_genes: int = param(4000, "most variable genes kept", "review", ge=2)
        lognorm_input: bool = param(False, "normalised values for counts", "fault of study.md 3")
        slice_normalisation: bool = param(False, "batch statistics of 128 cells", "fault, 9.1")

    presets: ClassVar = {
        "review": lambda _: {"min_steps": 0, "lognorm_input": True, "slice_normalisation": True}
    }

    def pipeline(self, var: Mapping[str, pd.DataFrame]) -> Pipeline:
        """Counts of variable genes, top peaks and all proteins."""
        view = normalised if self.params.lognorm_input else counts
        return Pipeline(view(var, n_top_genes=self.params.n_top_genes))

    def build(self, net: Networks) -> None:
        """Encoder trunk and heads; loadings B; intercept b and slope s of every batch."""
        k, n_batches, widths = self.params.n_latent, len(self.batches), self.n_features.items()
        xavier = nn.init.xavier_uniform_
        style: Any = {"norm": nn.BatchNorm1d, "activation": nn.LeakyReLU}
        net.trunk = nn.ModuleDict({m: mlp((p, *HIDDEN), first=Linear, **style) for m, p in widths})
        net.mean = nn.ModuleDict({m: nn.Linear(HIDDEN[-1], k) for m, _ in widths})
        net.log_var = nn.ModuleDict({m: nn.Linear(HIDDEN[-1], k) for m, _ in widths})
        net.loadings = nn.ParameterDict({m: xavier(torch.empty(k, p)) for m, p in widths})
        net.intercept = nn.ParameterDict({m: xavier(torch.empty(n_batches, p)) for m, p in widths})
        net.slope = nn.ParameterDict({m: torch.rand(n_batches, p) for m, p in widths})

    @property
    def prior(self) -> Gaussian:
        """N(0, v) with v = (1/alpha)(1 - 1/K) and alpha = 50/K."""
        k = self.params.n_latent
        variance = torch.tensor(k / 50 * (1 - 1 / k), device=self.device)
        return Gaussian(torch.zeros_like(variance), variance.log())

    def posterior(self, batch: Batch) -> Gaussian:
        """Product of the prior and the experts of the modalities that are there."""
        trunks = {m: self.net.trunk[m](torch.log1p(x)) for m, x in batch.x.items()}
        experts = [Gaussian(self.net.mean[m](h), self.net.log_var[m](h)) for m, h in trunks.items()]
        return product_of_experts(experts, prior=self.prior, present=list(batch.present.values()))

    def logits(self, z: Tensor, codes: Tensor, m: str) -> Tensor:
        """Return the logits of pi_m, (b, P_m); a batch never seen gets the mean terms."""
        terms = self.net.slope[m], self.net.intercept[m]
        slope, intercept = (rows_of_batches(term, codes) for term in terms)
        return softmax(z, -1) @ self.net.loadings[m] * (1 + slope) + intercept

    def decode(self, z: Tensor, codes: Tensor, role: str) -> Tensor:
        """Return pi of `role`: the share of every feature in the cell's counts."""
        return softmax(self.logits(z, codes, role), -1)

    def draw(self, z: Tensor, codes: Tensor, role: str, depth: Tensor) -> Tensor:
        """Return multinomial counts."""
        return draw_multinomial(self.decode(z, codes, role), depth)

    def loss(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """Negative log-likelihood of every modality in the draw, and the KL to the prior."""
        posterior = self.posterior(batch)
        z = posterior.sample()
        terms = {
            f"reconstruction_{m}": -multinomial(x, self.logits(z, batch.batch[m], m)).mean()
            for m, x in batch.x.items()
        }
        return {**terms, "kl": posterior.kl(self.prior).mean()}

    def stages(self, inputs: Inputs, rows: np.ndarray, validation: np.ndarray) -> Sequence[Stage]:
        """One player; every subset of modalities in turn, each with all cells that have it."""
        player = Player(
            "elbo", [self.net], self.loss,
            weights={"kl": WarmUp(self.params.warm_up)}, lr=self.params.learning_rate,
        )  # fmt: skip
        sampler, held_back = (
            Shuffled(
                [(s, inputs.having(s, r)) for s in subsets(self.roles)], self.params.batch_size
            )
            for r in (rows, validation)
        )
        return [self.one_stage(sampler, held_back, player)]

    def latent(self, inputs: Inputs, chunk: int = 1024) -> np.ndarray:
        """Joint means, incomplete cells moved to the joint space, centred over the topics."""
        z = bridge(self._means(inputs, chunk), inputs, self.learnt)
        return z - z.mean(axis=1, keepdims=True)

    def _means(self, inputs: Inputs, chunk: int = 1024) -> np.ndarray:
        if self.params.slice_normalisation:
            return self.latent_in_training_mode(inputs, slices(np.arange(inputs.n_cells), 128))
        return super().latent(inputs, chunk)

    def finish(self, inputs: Inputs) -> None:
        """Keep the means of the paired training cells under every subset of modalities."""
        paired = inputs.having(self.roles, np.arange(inputs.n_cells))
        self.learnt = {
            "+".join(s): self._means(inputs.take(s, paired)) for s in subsets(self.roles)
        }
