"""MultiVI: one Gaussian per modality, averaged, with a penalty on their distance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import combinations
from math import isqrt
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, softmax

from coembed.data.minibatches import Batch, Inputs, Shuffled
from coembed.data.pipeline import Pipeline
from coembed.data.views import MisreadColumns, counts, normalised
from coembed.models.base import Card, Facts, Model, Networks
from coembed.models.confusion import batch_classifier, classifier_player
from coembed.models.params import ANNEAL, MIN_STEPS, VALIDATION, WARM_UP, TrainingParams, param
from coembed.nn.adversary import confusion_loss
from coembed.nn.fusion import average_of_experts
from coembed.nn.layers import ConditionalMLP, batch_one_hot, mlp
from coembed.nn.likelihoods import (
    draw_negative_binomial_mean,
    negative_binomial_mean,
    scaled_bernoulli,
)
from coembed.nn.posteriors import Gaussian
from coembed.nn.protein import ProteinDecoder, ProteinMixture
from coembed.nn.sparse import Linear, dense
from coembed.train.stage import Clock, Player, Stage, WarmUp

DROPOUT = 0.1
MANY = 3000
MANY_CELLS = {"learning_rate": 3e-4, "anneal": 0.5, "weight_decay": 2.0, "max_epochs": 100}
"""What is set otherwise from so many cells on: held-out cells are then as likely as after the
original's 350 epochs (benchmarks/NOTES.md). With fewer it costs label separation."""


class MultiVI(Model):
    r"""MultiVI (Ashuach et al. 2023), a VAE whose modalities have posteriors of their own.

    Each modality m has an encoder :math:`q_m = N(\mu_m, v_m)` on its counts. A cell measured in M
    modalities has the joint posterior

    .. math:: q = N\Big(\tfrac1M \sum_m \mu_m,\; \tfrac1{\sqrt M} \sum_m v_m\Big),

    one Gaussian, not a mixture; the root in the variance is the original code's. The loss per cell
    is :math:`-\sum_m \log p(x_m | z, d) + w\,KL(q \| N(0, I)) + \sum_{m<n} [KL(q_m \| q_n) +
    KL(q_n \| q_m)]` over the measured modalities, d being the batch. Likelihoods:

    - genes: zero-inflated NB with mean :math:`\ell(x)\,\rho_g(z, d)`, shares :math:`\rho`;
    - peaks: open with probability :math:`p_r(z, d)\,\delta(x)\,\sigma(f_r)`, the depth factor
      :math:`\delta` and the region factor :math:`\sigma(f)` in (0, 1);
    - proteins: a mixture of NB background and foreground, without a prior on the background.

    With more than one batch a classifier guesses the batch from z, and the VAE confuses it.
    Source: specs/multivi.md.
    """

    card = Card.read("multivi")
    takes_sparse = True

    class Params(TrainingParams):
        """Hyper-parameters of MultiVI."""

        n_latent: int = param(10, "latent dimensions K", "review; original sqrt(n_hidden)", ge=1)
        n_hidden: int = param(128, "hidden width H", "original: its upper bound", ge=1)
        learning_rate: float = param(1e-3, "Adam's learning rate", "ours; original 1e-4", gt=0)
        anneal: float = param(0.0, ANNEAL, "original; many cells: 0.5", ge=0, le=1)
        weight_decay: float = param(
            1e-3, "share of itself, times the rate, that a weight loses at a step",
            "original; many cells: 2", ge=0,
        )  # fmt: skip
        max_epochs: int = param(50, "passes over the cells at most", "ours; original 500", ge=1)
        min_steps: int = param(1000, MIN_STEPS, "ours: BMMC pilots of 250-480 cells", ge=0)
        validation_fraction: float = param(0.0, VALIDATION, "ours; original 0.1", ge=0, lt=1)
        patience: int = param(50, "rounds without improvement", "original code", ge=1)
        warm_up: float = param(0.1, WARM_UP, "original: 50 of 500 epochs", ge=0, le=1)
        n_top_genes: int = param(4000, "most variable genes kept", "review", ge=2)
        root_width: bool = param(False, "H is the root of genes + peaks", "releases to 0.17")
        adam: bool = param(False, "Adam, eps 0.01, L2 for AdamW, eps 1e-8", "releases to 0.18")
        no_batch: bool = param(False, "the batch is not given", "fault of study.md 3")
        lognorm_input: bool = param(False, "normalised values for counts", "fault of study.md 3")
        feature_order_fault: bool = param(
            False, "first n_genes of [peaks, genes] are 'genes'", "fault of study.md 3"
        )

    @staticmethod
    def _review(facts: Facts) -> dict[str, Any]:
        era = {
            "learning_rate": 1e-4, "max_epochs": 100, "min_steps": 0, "validation_fraction": 0.1,
            "warm_up": 0.5, "root_width": True, "adam": True,
        }  # fmt: skip
        faults = ("no_batch", "lognorm_input", "feature_order_fault")
        return era | dict.fromkeys(faults, True) if facts.roles == ("rna", "atac") else era

    presets: ClassVar = {
        "default": lambda facts: {**MANY_CELLS} if facts.n_cells >= MANY else {},
        "review": _review,
    }

    def pipeline(self, var: Mapping[str, pd.DataFrame]) -> Pipeline:
        """Counts of variable genes, top peaks and all proteins."""
        view = normalised if self.params.lognorm_input else counts
        misread = self.params.feature_order_fault and "atac" in var
        steps = view(var, n_top_genes=self.params.n_top_genes)
        return Pipeline(steps, [MisreadColumns()] if misread else [])

    @property
    def n_hidden(self) -> int:
        """Width H of every hidden layer."""
        widths = self.n_features
        if self.params.root_width:
            return isqrt(widths["rna"] + widths.get("atac", 0))
        return int(self.params.n_hidden)

    def build(self, net: Networks) -> None:
        """Encoders, depth of cells, decoders; free parameters; the classifier of batches."""
        k, h, b = self.params.n_latent, self.n_hidden, self.n_batches
        condition = b if b > 1 else 0
        norm = partial(nn.LayerNorm, elementwise_affine=False)
        leaky: Any = {"norm": norm, "activation": nn.LeakyReLU}
        for part in ("encoder", "mean", "log_var", "depth", "decoder", "output"):
            setattr(net, part, nn.ModuleDict())
        net.free = nn.ParameterDict()
        for m, width in self.n_features.items():
            net.encoder[m] = mlp((width, h, h), first=Linear, dropout=DROPOUT, **leaky)
            net.mean[m], net.log_var[m] = nn.Linear(h, k), nn.Linear(h, k)
            if m == "prot":
                net.decoder[m] = ProteinDecoder(
                    (k, h, h), condition, width, norm=norm, dropout=DROPOUT
                )
                net.free[m] = 2 * torch.rand(width)
                continue
            rna = m == "rna"
            net.depth[m] = nn.Sequential(
                mlp((width, h, h), first=Linear, **leaky),
                nn.Linear(h, 1),
                nn.LeakyReLU() if rna else nn.LogSigmoid(),  # both are logarithms
            )
            net.decoder[m] = ConditionalMLP(
                (k, h, h), condition, deep=False, norm=norm,
                activation=nn.ReLU if rna else nn.LeakyReLU,
            )  # fmt: skip
            net.output[m] = nn.Linear(h, width)
            net.free[m] = torch.randn(width) if rna else torch.zeros(width)
        net.gate = nn.Linear(h, self.n_features["rna"])
        if condition:
            net.classifier = batch_classifier(k, b)

    def experts(self, batch: Batch) -> dict[str, Gaussian]:
        """Return the posterior of every modality in the minibatch on its own."""
        trunks = {m: self.net.encoder[m](x) for m, x in batch.x.items()}
        return {m: Gaussian(self.net.mean[m](h), self.net.log_var[m](h)) for m, h in trunks.items()}

    def posterior(self, batch: Batch) -> Gaussian:
        """Return the average of the experts of the modalities that a cell has."""
        return average_of_experts(list(self.experts(batch).values()), list(batch.present.values()))

    def decoded(self, z: Tensor, codes: Tensor, m: str) -> Any:
        """Return the trunk of a decoder, (b, H), or the `ProteinMixture`."""
        return self.net.decoder[m](z, batch_one_hot(codes, self.n_batches))

    def decode(self, z: Tensor, codes: Tensor, role: str) -> Tensor:
        """Return shares of genes; p of peaks without depths; proteins without background."""
        h = self.decoded(z, codes, role)
        if isinstance(h, ProteinMixture):
            return h.foreground_mean()
        return softmax(self.net.output[role](h), -1) if role == "rna" else self.open(h)

    def open(self, h: Tensor) -> Tensor:
        """Return p of every peak for the trunk of its decoder."""
        return self.net.output["atac"](h).sigmoid()

    def draw(self, z: Tensor, codes: Tensor, role: str, depth: Tensor) -> Tensor:
        """Return counts; peaks are 0 or 1, `depth` of them 1 unless that takes a factor over 1."""
        h = self.decoded(z, codes, role)
        if isinstance(h, ProteinMixture):
            return h.draw(self.net.free[role].exp())
        if role == "atac":
            p = self.open(h) * self.net.free[role].sigmoid()
            return torch.bernoulli(p * (depth / p.sum(-1)).clamp_max(1).unsqueeze(-1))
        mean = depth.unsqueeze(-1) * softmax(self.net.output[role](h), -1)
        x = draw_negative_binomial_mean(mean, self.net.free[role].exp())
        return x * torch.bernoulli((-self.net.gate(h)).sigmoid())

    def reconstruction(self, z: Tensor, batch: Batch, m: str) -> Tensor:
        """Return -log p(x_m | z), a scalar, the mean over all cells; 0 for those without m."""
        x, h, free = batch.x[m], self.decoded(z, batch.codes, m), self.net.free[m]
        shares = batch.present[m].to(z.dtype) / -len(batch)
        if isinstance(h, ProteinMixture):
            return shares @ h.log_likelihood(dense(x), h.background.sample(), free.exp()).sum(-1)
        if m == "atac":
            log_depth = self.net.depth[m](x).squeeze(-1)
            factors = log_depth, logsigmoid(free)
            return scaled_bernoulli(x, h, self.net.output[m], *factors, shares)
        mean = self.net.depth[m](x).exp() * softmax(self.net.output[m](h), -1)
        counts = negative_binomial_mean(x, mean, free.exp())
        return shares @ counts.zero_inflated(self.net.gate(h)).sum()

    def loss(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """Measured modalities' negative log-likelihoods, KL, distance of experts, confusion."""
        experts, present = self.experts(batch), batch.present
        posterior = average_of_experts(list(experts.values()), list(present.values()))
        batch.drawn["z"] = z = posterior.sample()
        terms = {f"reconstruction_{m}": self.reconstruction(z, batch, m) for m in experts}
        terms["kl"] = posterior.kl(self.prior).mean()
        pairs = [
            experts[m].jeffreys(experts[n]) * (present[m] & present[n])
            for m, n in combinations(experts, 2)
        ]
        terms["distance"] = torch.stack(pairs).sum(0).mean()
        if self.n_batches > 1:
            terms["adversarial"] = confusion_loss(self.net.classifier(z), batch.codes).mean()
        return terms

    def stages(self, inputs: Inputs, rows: np.ndarray, validation: np.ndarray) -> Sequence[Stage]:
        """The VAE and, with more than one batch, the classifier; all cells in every epoch."""
        p = self.params
        vae = [part for name, part in self.net.named_children() if name != "classifier"]
        players = [
            Player(
                "elbo", vae, self.loss, weights={"kl": WarmUp(p.warm_up)}, lr=p.learning_rate,
                anneal=p.anneal, eps=0.01 if p.adam else 1e-8, weight_decay=p.weight_decay,
                decoupled=not p.adam,
            )
        ]  # fmt: skip
        if self.n_batches > 1:
            players.append(classifier_player(self, weight_decay=1e-3))
        roles = tuple(inputs.blocks)
        sampler, held_back = (Shuffled([(roles, r)], p.batch_size) for r in (rows, validation))
        return [self.one_stage(sampler, held_back, *players)]
