"""scMVP: genes and peaks in branches of their own, a mixture prior, a cycle of re-encoding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from coembed.data.features import HighlyVariable, OpenIn, TopPeaks
from coembed.data.minibatches import Batch, Inputs, slices
from coembed.data.pipeline import Pipeline
from coembed.data.views import Binarise
from coembed.models.base import Card, Networks
from coembed.models.mixture import MixturePrior
from coembed.models.params import MIN_STEPS, VALIDATION, WARM_UP, TrainingParams, param
from coembed.nn import multiview
from coembed.nn.counts import depth_of
from coembed.nn.layers import batch_one_hot
from coembed.nn.likelihoods import EPS
from coembed.nn.mixture import GaussianMixture, cluster_loss
from coembed.nn.posteriors import Gaussian
from coembed.train.stage import Clock, Player, Stage, WarmUp

WEIGHTS = {"reconstruction_rna": 3.0, "reconstruction_atac": 0.1, "concatenated": 0.1, "cycle": 0.1,
           "clusters": 0.5}  # fmt: skip
FAULTS = ("variance_as_log_variance", "improper_mixture", "reversed_entropy", "rare_peaks",
          "no_batch", "noisy_embedding")  # fmt: skip


class ScMVP(MixturePrior):
    r"""scMVP (Li et al. 2022), a VAE with two branches and a mixture of Gaussians as prior.

    Genes pass a gated layer, peaks one with self-attention. A joint encoder, of such branches,
    gives q(z); z lies in cluster c with :math:`\gamma_c \propto \pi_c N(z; \mu_c, \sigma_c^2)`.
    z and gamma (as a gate on the decoders) give every feature a share and a factor below 1; their
    product times the cell's depth is its mean, negative binomial for genes and Poisson with extra
    zeros for peaks, open or not. A second encoder per modality m gives :math:`q_m(z)`; one linear
    map joins their parameters to a :math:`q_c(z)`, and to :math:`q_r(z)` when they see the decoded
    means in place of the data. With R the negative log-likelihoods plus half the L1 distance of
    the non-zero counts, and C the clusters' term (`nn.mixture.cluster_loss`), a cell's loss is

    .. math:: 3 R_{rna} + 0.1 R_{atac} + KL(q \gamma \| p) + 0.1\,[KL(q \| q_c)
        + KL(q_c \| q_r)] + \lambda \textstyle\sum_m KL(q \| q_m) + 0.5\,C.

    The embedding is the mean of q, that of one modality the mean of q_m. Source: specs/scmvp.md.
    """

    card = Card.read("scmvp")
    takes_sparse = True

    class Params(TrainingParams):
        """Hyper-parameters of scMVP; numbers of faults are sections of the sheet."""

        n_latent: int = param(10, "latent dimensions", "original code and review", ge=1)
        n_components: int = param(10, "components of the mixture", "review; code: 20", ge=1)
        learning_rate: float = param(2e-3, "of Adam (eps 0.01)", "notebooks: 1e-3 to 5e-3", gt=0)
        batch_size: int = param(64, "cells in a minibatch", "original code", ge=2)
        max_epochs: int = param(10, "passes over the cells", "tutorial; code: 20", ge=1)
        min_steps: int = param(500, MIN_STEPS, "ours: pilots of 250-2,000 cells", ge=0)
        validation_fraction: float = param(0.1, VALIDATION, "ours: few cells overfit", ge=0, lt=1)
        warm_up: float = param(0.3, WARM_UP, "ours; code: 0 (meant: 50 epochs)", ge=0, le=1)
        single_weight: float = param(0.1, "lambda, of the KL to each q_m", "ours; code: 0", ge=0)
        n_top_genes: int = param(4000, "most variable genes kept", "review", ge=2)
        variance_as_log_variance: bool = param(False, "in the KL: var of q for its log", "fault, 6")
        improper_mixture: bool = param(False, "weights free, densities + 1e-10, no fit", "fault, 5")
        reversed_entropy: bool = param(False, "unequal use of clusters is rewarded", "fault, 6")
        rare_peaks: bool = param(False, "only peaks open in 0.1 to 10 % of the cells", "fault, 3")
        no_batch: bool = param(False, "decoders do not see the batch", "fault of study.md 3")
        noisy_embedding: bool = param(False, "embeds in training mode, 64 at a time", "fault, 9")

    presets: ClassVar = {
        "review": lambda _: {
            **{"learning_rate": 5e-4, "max_epochs": 30, "min_steps": 0, "warm_up": 0.0},
            **{"validation_fraction": 0.0, "single_weight": 0.0},
            **dict.fromkeys(FAULTS, True),
        }
    }

    def pipeline(self, var: Mapping[str, pd.DataFrame]) -> Pipeline:
        """Counts of variable genes; whether top peaks are open."""
        rare = [OpenIn(0.001, 0.1)] if self.params.rare_peaks else []
        genes = [HighlyVariable(self.params.n_top_genes)]
        return Pipeline({"rna": genes, "atac": [TopPeaks(), *rare, Binarise()]})

    def build(self, net: Networks) -> None:
        """Encoders of each modality and of both, mixture, cluster gate, decoders."""
        p, latent, widths = self.params, self.params.n_latent, self.n_features
        net.single = nn.ModuleDict({m: multiview.Single(m, n, latent) for m, n in widths.items()})
        net.joint = multiview.Joint(widths, latent)
        net.concatenator = multiview.Concatenator(latent)
        improper: Any = {"normalised": False, "floor": 1e-10} if p.improper_mixture else {}
        net.mixture = GaussianMixture(p.n_components, latent, **improper)
        net.gate = multiview.cluster_gate(p.n_components)
        told = latent + (self.n_batches if self.n_batches > 1 else 0)
        net.decoder = nn.ModuleDict({m: multiview.Decoder(m, told, n) for m, n in widths.items()})
        net.log_dispersion = nn.Parameter(torch.randn(widths["rna"]))
        net.extra_zero = nn.Linear(multiview.HIDDEN, widths["atac"])

    def posterior(self, batch: Batch) -> Gaussian:
        """Return q given both modalities, q_m given one."""
        if len(batch.x) == 1:
            ((m, x),) = batch.x.items()
            return self.net.single[m](x)
        return self.net.joint(batch.x)

    def decoded(self, z: Tensor, codes: Tensor, m: str) -> tuple[Tensor, Tensor]:
        """Return the level of every feature, and the layer that the extra zeros come from."""
        gate = self.net.gate(self.net.mixture.log_responsibilities(z).exp())
        return self.net.decoder[m](torch.cat([z, batch_one_hot(codes, self.n_batches)], -1), gate)

    def decode(self, z: Tensor, codes: Tensor, role: str) -> Tensor:
        """Return the mean count of every feature per count of the cell, without extra zeros."""
        return self.decoded(z, codes, role)[0]

    def counts_of(self, z: Tensor, codes: Tensor, depth: Tensor, m: str) -> multiview.Counts:
        """Return what modality m is drawn from in cells of a depth (b,); its loss is R."""
        level, h = self.decoded(z, codes, m)
        mean = level * depth.unsqueeze(-1) + EPS
        if m == "rna":
            return multiview.Genes(mean, self.net.log_dispersion)
        return multiview.Peaks(mean, self.net.extra_zero(h))

    def draw(self, z: Tensor, codes: Tensor, role: str, depth: Tensor) -> Tensor:
        """Return negative binomial genes; Poisson peaks with their extra zeros."""
        return self.counts_of(z, codes, depth, role).draw()

    def loss(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """Reconstructions, the mixture's KL, and what ties the posteriors and the clusters."""
        p, mixture, q = self.params, self.net.mixture, self.posterior(batch)
        z = q.sample()
        log_gamma = mixture.log_responsibilities(z)
        in_kl = Gaussian(q.mean, q.log_var.exp()) if p.variance_as_log_variance else q
        terms, means = {"kl": mixture.kl(in_kl, log_gamma).mean()}, {}
        for m, x in batch.x.items():
            counts = self.counts_of(z, batch.codes, depth_of(x), m)
            terms[f"reconstruction_{m}"] = counts.loss(x).mean()
            means[m] = counts.mean
        seen, again = multiview.encode_twice(self.net.single, batch.x, means)
        concatenated, cycle = self.net.concatenator(seen), self.net.concatenator(again)
        terms["concatenated"] = q.kl(concatenated).mean()
        terms["cycle"] = concatenated.kl(cycle).mean()
        log_again = mixture.log_responsibilities(cycle.sample())
        terms["clusters"] = cluster_loss(log_gamma, log_again, reverse=p.reversed_entropy)
        return terms | {f"single_{m}": q.kl(q_m).mean() for m, q_m in seen.items()}

    def stages(self, inputs: Inputs, rows: np.ndarray, validation: np.ndarray) -> Sequence[Stage]:
        """One player throughout; part of the way the mixture is fitted to the latent means."""
        p = self.params
        ties = {f"single_{m}": p.single_weight for m in self.roles}
        weights = {**WEIGHTS, **ties, "kl": WarmUp(p.warm_up)}
        player = Player(
            "elbo", [self.net], self.loss, weights, p.learning_rate, eps=0.01, weight_decay=1e-6
        )
        plan = self.paired_stage(rows, validation, player)
        return [plan] if p.improper_mixture else self.fitted_midway(plan, inputs, rows)

    def latent(self, inputs: Inputs, chunk: int = 1024) -> np.ndarray:
        """Return the posterior means; under the fault those of training mode."""
        if self.params.noisy_embedding and inputs.n_cells > 1:
            return self.latent_in_training_mode(inputs, slices(np.arange(inputs.n_cells), 64))
        return super().latent(inputs, chunk)
