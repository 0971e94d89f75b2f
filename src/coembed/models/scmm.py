"""scMM: a mixture of experts in which every expert decodes every modality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import softmax

from coembed.data.minibatches import Batch, Inputs
from coembed.data.pipeline import Pipeline
from coembed.data.views import counts
from coembed.models.base import Card, Model, Networks
from coembed.models.params import MIN_STEPS, VALIDATION, WARM_UP, TrainingParams, param
from coembed.nn.counts import NegativeBinomialCounts, depth_of
from coembed.nn.fusion import mean_of_experts
from coembed.nn.layers import mlp
from coembed.nn.posteriors import Laplace
from coembed.nn.sparse import Linear, scale_rows
from coembed.train.stage import Clock, Player, Stage, WarmUp

BOUND = 12.0
"""Clamp of scale and log r heads (original code)."""
P_BOUND = 18.42
"""|logit| of the original's clamp of p to [1e-8, 1 - 1e-8]."""
DEPTH = 1e4
"""Encoders see counts per this many."""
WITH_PEAKS = {"hidden_rna": 500, "hidden_other": 100, "learning_rate": 5e-4, "batch_size": 64,
              "max_epochs": 100}  # fmt: skip
"""What the paper sets otherwise for genes and peaks than for genes and proteins."""


class ScMM(Model):
    r"""scMM (Minoura et al. 2021), a mixture-of-experts VAE with Laplace prior and posterior.

    Prior :math:`p(z) = \prod_l \mathrm{Laplace}(0, b_l)`; expert m is
    :math:`q_m(z | x_m) = \prod_l \mathrm{Laplace}(\mu_{ml}, s_{ml})` with
    :math:`s_m = L\,\mathrm{softmax}(a_m)`, so that a cell's scales sum to L. One z is drawn from
    each expert and decodes *every* modality; with M modalities the objective per cell is

    .. math:: \frac1M \sum_e \Big[ \sum_d \log p(x_d | z_e) - \beta\, KL(q_e \,\|\, p) \Big].

    Counts are negative binomial with total count :math:`r = e^{\cdot}\, n_d / 10^4` (n_d the
    cell's depth) and success probability p, both decoded; chromatin has an extra-zero gate.
    The embedding is the mean of the experts' locations. Source: specs/scmm.md.
    """

    card = Card.read("scmm")
    takes_sparse = True

    class Params(TrainingParams):
        """Hyper-parameters of scMM."""

        n_latent: int = param(10, "latent dimensions L", "original code and review", ge=2)
        n_layers: int = param(3, "hidden layers of encoders and decoders", "paper", ge=1)
        hidden_rna: int = param(200, "width of the RNA layers (with peaks: 500)", "paper", ge=1)
        hidden_other: int = param(200, "width of the other layers (peaks: 100)", "paper", ge=1)
        learning_rate: float = param(1e-3, "of Adam (AMSGrad)", "ours (with peaks: 5e-4)", gt=0)
        max_epochs: int = param(50, "passes over the cells (with peaks: 100)", "paper", ge=1)
        min_steps: int = param(800, MIN_STEPS, "ours: BMMC pilots of 100-480 cells", ge=0)
        validation_fraction: float = param(0.0, VALIDATION, "original: last weights", ge=0, lt=1)
        warm_up: float = param(0.5, WARM_UP, "paper: half of its epochs", ge=0, le=1)
        n_top_genes: int = param(4000, "most variable genes kept", "review", ge=2)
        all_peaks: bool = param(False, "every peak, not the top ones", "fault of study.md 3")
        sticky_lr: bool = param(False, "2e-4 at every size", "fault of study.md 3")

    presets: ClassVar = {
        "default": lambda facts: {**WITH_PEAKS} if "atac" in facts.roles else {},
        "review": lambda facts: (
            {**WITH_PEAKS, "min_steps": 0, "learning_rate": 1e-4, "all_peaks": True}
            if "atac" in facts.roles
            else {"min_steps": 0, "learning_rate": 2e-3, "batch_size": 200, "sticky_lr": True}
        ),
    }

    def pipeline(self, var: Mapping[str, pd.DataFrame]) -> Pipeline:
        """Counts of variable genes, top peaks and all proteins."""
        p = self.params
        return Pipeline(counts(var, n_top_genes=p.n_top_genes, all_peaks=p.all_peaks))

    def build(self, net: Networks) -> None:
        """Per modality: encoder with location and scale heads; decoder with r, p (and gate)."""
        p, latent = self.params, self.params.n_latent
        for part in ("encoder", "location", "scale", "decoder", "log_r", "logit_p", "gate"):
            setattr(net, part, nn.ModuleDict())
        for m, width in self.n_features.items():
            h = p.hidden_rna if m == "rna" else p.hidden_other
            hidden = (h,) * p.n_layers
            net.encoder[m] = mlp((width, *hidden), first=Linear, norm=nn.BatchNorm1d)
            net.location[m], net.scale[m] = nn.Linear(h, latent), nn.Linear(h, latent)
            net.decoder[m] = mlp((latent, *hidden), norm=nn.BatchNorm1d)
            net.log_r[m], net.logit_p[m] = nn.Linear(h, width), nn.Linear(h, width)
            if m == "atac":
                net.gate[m] = nn.Linear(h, width)

    @property
    def prior(self) -> Laplace:
        """Laplace(0, 1)."""
        one = torch.ones((), device=self.device)
        return Laplace(torch.zeros_like(one), one)

    def experts(self, batch: Batch) -> dict[str, Laplace]:
        """Return the posterior of every modality in the minibatch on its own."""
        experts = {}
        for m, x in batch.x.items():
            h = self.net.encoder[m](scale_rows(x, DEPTH / depth_of(x)))
            weights = softmax(self.net.scale[m](h).clamp(-BOUND, BOUND), -1)
            experts[m] = Laplace(self.net.location[m](h), self.params.n_latent * weights + 1e-6)
        return experts

    def posterior(self, batch: Batch) -> Laplace:
        """Return the mean location of the experts, with their mean scale."""
        experts = list(self.experts(batch).values())
        return Laplace(*(mean_of_experts(part) for part in zip(*experts, strict=True)))

    def counts_of(self, z: Tensor, depth: Tensor, m: str) -> NegativeBinomialCounts:
        """Return what modality m is drawn from in cells of a depth (b,)."""
        h = self.net.decoder[m](z)
        r = self.net.log_r[m](h).clamp(-BOUND, BOUND).exp() * (depth / DEPTH).unsqueeze(-1)
        logit = self.net.logit_p[m](h).clamp(-P_BOUND, P_BOUND)
        gate = self.net.gate[m](h) if m in self.net.gate else None
        return NegativeBinomialCounts(r, logit, gate)

    def decode(self, z: Tensor, codes: Tensor, role: str) -> Tensor:
        """Return the mean count of every feature of `role` per 10,000 counts."""
        return self.counts_of(z, torch.full_like(z[:, 0], DEPTH), role).mean()

    def draw(self, z: Tensor, codes: Tensor, role: str, depth: Tensor) -> Tensor:
        """Return negative binomial counts at a depth, chromatin with its extra zeros."""
        return self.counts_of(z, depth, role).draw()

    def log_likelihood(self, z: Tensor, batch: Batch, m: str) -> Tensor:
        """Return log p(x_m | z), (b,)."""
        x = batch.x[m]
        return self.counts_of(z, depth_of(x), m).log_likelihood(x)

    def loss(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """Every expert decodes every modality; terms are averaged over experts."""
        experts = self.experts(batch)
        terms = {"kl": torch.stack([q.kl(self.prior).mean() for q in experts.values()]).mean()}
        draws = {e: q.sample() for e, q in experts.items()}
        for m in experts:
            nll = [-self.log_likelihood(z, batch, m).mean() for z in draws.values()]
            terms[f"reconstruction_{m}"] = torch.stack(nll).mean()
        return terms

    def stages(self, inputs: Inputs, rows: np.ndarray, validation: np.ndarray) -> Sequence[Stage]:
        """One player on paired minibatches."""
        p = self.params
        rate = min(2e-4, p.learning_rate) if p.sticky_lr else p.learning_rate
        weights = {"kl": WarmUp(p.warm_up)}
        player = Player("elbo", [self.net], self.loss, weights, lr=rate, amsgrad=True)
        return [self.paired_stage(rows, validation, player)]
