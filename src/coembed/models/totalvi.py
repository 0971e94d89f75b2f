"""totalVI: one latent variable behind genes and proteins, with a protein background."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import softmax, softplus

from coembed.data.minibatches import Batch, Inputs, Shuffled
from coembed.data.pipeline import Pipeline
from coembed.data.views import counts
from coembed.models.background import BackgroundPrior, Efficiency
from coembed.models.base import Card, Model, Networks
from coembed.models.confusion import batch_classifier, classifier_player
from coembed.models.measured import Measured
from coembed.models.params import MIN_STEPS, VALIDATION, WARM_UP, TrainingParams, param
from coembed.nn.adversary import confusion_loss
from coembed.nn.layers import ConditionalMLP, batch_one_hot
from coembed.nn.likelihoods import draw_negative_binomial_mean, negative_binomial_mean
from coembed.nn.posteriors import Gaussian
from coembed.nn.protein import ProteinDecoder, ProteinMixture, SkipDecoder, log_softplus
from coembed.nn.sparse import dense, row_sums, scale_rows
from coembed.train.stage import Clock, CoolDown, Plateau, Player, Stage, WarmUp

PULL = 1e-3
"""Weight of the pull towards background (equations of 1.3.1)."""
BatchNorm = partial(nn.BatchNorm1d, momentum=0.01, eps=1e-3)


class TotalVI(Model):
    r"""totalVI (Gayoso et al. 2021), a VAE of genes x and proteins y given the batch s.

    One encoder sees log(1 + x) and log(1 + y) side by side: :math:`z \sim N(0, I)`, and

    .. math::
        x_g &\sim NB(l\,\rho_g(z, s), \theta_g), \quad l = \textstyle\sum_g x_g, \\
        \log\beta_p &\sim N(a_p(z, s), b_p(z, s)^2)
            \text{ with a learnt prior } N(\bar a_{sp}, \bar b_{sp}^2), \\
        y_p &\sim \pi_p\,NB(\beta_p, \phi_p) + (1 - \pi_p)\,NB(\alpha_p \beta_p, \phi_p),
            \quad \alpha_p(z, s) \geq 1,

    :math:`\pi_p(z, s)` being the probability of background. A protein without a count in a batch
    was not measured there: its terms are masked. Where that happens, or a batch lacks a modality,
    a classifier learns to tell batches by z and the encoder to confuse it, with a weight that falls
    as that of the KL terms rises. The embedding is the mean of q(z). With `equations="1.3.1"` the
    encoder's counts are divided by 1 + their mean in the cell, a protein's means by a batch's
    learnt efficiency, and :math:`\pi_p` is pulled to 1. Source: specs/totalvi.md sections 4 to 7.
    """

    card = Card.read("totalvi")
    takes_sparse = True

    class Params(TrainingParams):
        """Hyper-parameters of totalVI."""

        n_latent: int = param(20, "latent dimensions K", "original code", ge=1)
        n_hidden: int = param(256, "width of every hidden layer", "original code", ge=1)
        dropout: float = param(0.2, "share of hidden units dropped", "original code", ge=0, lt=1)
        equations: Literal["paper", "1.3.1"] = param(
            "1.3.1", "the paper's, or those of scvi-tools from 1.3.1 on", "ours: the better scores"
        )
        learning_rate: float = param(4e-3, "Adam's learning rate", "original code", gt=0)
        batch_size: int = param(256, "cells in a minibatch", "original code", ge=2)
        max_epochs: int = param(100, "passes over the cells", "ours; original 400", ge=1)
        min_steps: int = param(1100, MIN_STEPS, "ours: CITE pilots of 480-2,500 cells", ge=0)
        validation_fraction: float = param(0.0, VALIDATION, "ours; original 0.1", ge=0, lt=1)
        patience: int = param(45, "epochs without improvement before the end", "paper", ge=1)
        warm_up: float = param(0.53, WARM_UP, "original: 0.75 n of 1.4 n steps", ge=0, le=1)
        n_top_genes: int = param(4000, "most variable genes kept", "tutorial and review", ge=2)
        protein_in_genes: bool = param(False, "proteins are genes too", "fault of study.md 3")
        partial_kl: bool = param(
            False, "KL weight over 0.75 n steps, which the plan may not reach", "fault of sheet 7"
        )

    presets: ClassVar = {
        "review": lambda _: {
            **{"equations": "paper", "n_latent": 10},
            **{"max_epochs": 100, "min_steps": 0},
            **{"protein_in_genes": True, "partial_kl": True},
        },
    }

    def pipeline(self, var: Mapping[str, pd.DataFrame]) -> Pipeline:
        """Counts of variable genes and all proteins."""
        return Pipeline(counts(var, n_top_genes=self.params.n_top_genes))

    @property
    def newer(self) -> bool:
        """Whether the equations are those of scvi-tools 1.3.1."""
        return bool(self.params.equations == "1.3.1")

    def build(self, net: Networks) -> None:
        """Encoder and decoders; dispersions, background priors, efficiencies; what was measured."""
        p, k, h, n_batches = self.params, self.n_latent, self.params.n_hidden, len(self.batches)
        condition, proteins = n_batches if n_batches > 1 else 0, self.n_features["prot"]
        genes = self.n_features["rna"] + (proteins if p.protein_in_genes else 0)
        style: Any = {"norm": BatchNorm, "dropout": p.dropout}
        net.encoder = ConditionalMLP((genes + proteins, h, h), condition, **style)
        net.mean, net.log_var = nn.Linear(h, k), nn.Linear(h, k)
        net.genes = SkipDecoder((k, h), condition, genes, **style)
        log_sd = log_softplus if self.newer else nn.Identity()
        net.proteins = ProteinDecoder((k, h), condition, proteins, log_sd=log_sd, **style)
        free = {"log_theta": torch.randn(genes), "log_phi": 2 * torch.rand(proteins)}
        net.free = nn.ParameterDict(free)
        if self.newer:
            net.efficiency = Efficiency(n_batches, proteins)
        net.prior = BackgroundPrior(n_batches, proteins, at_random=not self.newer)
        net.measured = Measured(n_batches, self.n_features)

    def counts(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return x, with `protein_in_genes` also y in it, and y; zeros for what is not given."""
        x, y = (
            batch.x[m] if m in batch.x else torch.zeros(len(batch), n, device=self.device)
            for m, n in self.n_features.items()
        )
        y = dense(y)
        return (torch.cat([dense(x), y], -1) if self.params.protein_in_genes else x), y

    def view(self, counts: Tensor) -> Tensor:
        """Return what the encoder sees of counts, dense."""
        if self.newer:
            counts = scale_rows(counts, 1 / (1 + row_sums(counts) / counts.shape[-1]))
        return dense(torch.log1p(counts))

    def condition(self, codes: Tensor) -> Tensor:
        """Return the one-hot of the batch that encoder and decoders see."""
        return batch_one_hot(codes, len(self.batches))

    def posterior(self, batch: Batch) -> Gaussian:
        """Return q(z | x, y, s)."""
        views = torch.cat([self.view(counts) for counts in self.counts(batch)], -1)
        h = self.net.encoder(views, self.condition(batch.codes))
        return Gaussian(self.net.mean(h), (self.net.log_var(h).exp() + 1e-4).log())

    def shares(self, z: Tensor, codes: Tensor) -> Tensor:
        """Return rho, (b, G): the share of every gene in the cell's counts."""
        (logits,) = self.net.genes(z, self.condition(codes))
        return softmax(logits, -1)

    def proteins(self, z: Tensor, codes: Tensor) -> ProteinMixture:
        """Return what the cell's proteins are drawn from, before the batch's efficiency."""
        mixture: ProteinMixture = self.net.proteins(z, self.condition(codes))
        return mixture

    def decode(self, z: Tensor, codes: Tensor, role: str) -> Tensor:
        """Return rho, or the proteins' mean count without background, (1 - pi) alpha beta."""
        codes = self.net.measured.or_average(role, codes)
        if role == "prot":
            return self.proteins(z, codes).foreground_mean()
        return self.shares(z, codes)[:, : self.n_features["rna"]]

    def draw(self, z: Tensor, codes: Tensor, role: str, depth: Tensor) -> Tensor:
        """Return negative binomial genes at a depth, or proteins from the mixture."""
        codes = self.net.measured.or_average(role, codes)
        if role == "prot":
            shift = self.net.efficiency(codes) if self.newer else 0.0
            return self.proteins(z, codes).draw(self.net.free["log_phi"].exp(), shift)
        mean = depth.unsqueeze(-1) * self.shares(z, codes)
        counts = draw_negative_binomial_mean(mean, self.net.free["log_theta"].exp())
        return counts[:, : self.n_features["rna"]]

    @torch.no_grad()
    def protein_foreground(self, data: Any = None) -> np.ndarray:
        """Return the probability 1 - pi that a count is foreground, (n_cells, P) float32."""
        inputs = self.inputs_of(data, None)
        z = torch.from_numpy(self.latent(inputs)).to(self.device)
        codes = self.net.measured.or_average("prot", torch.from_numpy(inputs.batch).to(self.device))
        return torch.sigmoid(-self.proteins(z, codes).logit).cpu().numpy()

    def loss(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """The terms of the sheet's section 6, each summed over features and masked."""
        (x, y), codes, free = self.counts(batch), batch.codes, self.net.free
        seen = self.net.measured.of("prot", codes) * batch.present["prot"].unsqueeze(-1)
        q = self.posterior(batch)
        batch.drawn["z"] = z = q.sample()
        mean = row_sums(x).unsqueeze(-1) * self.shares(z, codes)
        genes = negative_binomial_mean(x, mean, free["log_theta"].exp())
        mixture = self.proteins(z, codes)
        level = mixture.background.sample()
        if self.newer:
            level = level + self.net.efficiency(codes)
        proteins = mixture.log_likelihood(y, level, free["log_phi"].exp())
        terms = {
            "reconstruction_rna": -genes.sum() * batch.present["rna"],
            "reconstruction_prot": -(proteins * seen).sum(-1),
            "kl": q.kl(self.prior),
            "kl_background": (self.net.prior.kl(mixture.background, codes) * seen).sum(-1),
        }
        if self.newer:
            terms["efficiency"] = self.net.efficiency.loss(codes)
            terms["pull"] = PULL * softplus(-mixture.logit).sum(-1)  # -log P(background)
        if hasattr(self.net, "classifier"):
            terms["adversarial"] = confusion_loss(self.net.classifier(z), codes)
        return {name: term.mean() for name, term in terms.items()}

    def stages(self, inputs: Inputs, rows: np.ndarray, validation: np.ndarray) -> Sequence[Stage]:
        """The model and, where batches differ in what they measured, the classifier."""
        p, net = self.params, self.net
        sampler, held_back = (Shuffled([(self.roles, r)], p.batch_size) for r in (rows, validation))
        fraction = p.warm_up
        if p.partial_kl:
            planned = self.epochs(sampler.steps_per_epoch) * sampler.steps_per_epoch
            fraction = int(0.75 * inputs.n_cells) / planned
        annealed = ["kl", "kl_background"]
        annealed += ["reconstruction_prot", "efficiency", "pull"] if self.newer else []
        weights = dict.fromkeys(annealed, WarmUp(fraction)) | {"adversarial": CoolDown(fraction)}
        decay: Any = {"eps": 0.01, "weight_decay": 1e-6}
        model = list(net.children())
        players = [Player("elbo", model, self.loss, weights, lr=p.learning_rate, **decay)]
        if net.measured.note(inputs, rows) and not net.frozen:
            net.classifier = batch_classifier(p.n_latent, len(self.batches)).to(self.device)
            players.append(classifier_player(self, weight_decay=decay["weight_decay"]))
        begin = partial(net.prior.estimate, inputs, rows)
        stage = self.one_stage(sampler, held_back, *players, begin=begin)
        return [replace(stage, plateau=Plateau(factor=0.6, patience=30))]

    def finish(self, inputs: Inputs) -> None:
        """Drop the classifier: it serves the training alone."""
        if hasattr(self.net, "classifier"):
            del self.net.classifier
