"""SCALEX: a batch-free encoder and a decoder with domain-specific batch normalisation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from coembed.data.features import HighlyVariable
from coembed.data.minibatches import Batch, Inputs, Shuffled
from coembed.data.pipeline import Pipeline, Step
from coembed.data.views import CLR, Concatenate, LogNormalise, MaxAbs
from coembed.models.base import Card, Model, Networks
from coembed.models.params import MIN_STEPS, VALIDATION, TrainingParams, param
from coembed.nn.layers import DomainNorm
from coembed.nn.likelihoods import bernoulli
from coembed.nn.posteriors import Gaussian
from coembed.train.stage import Clock, Player, Stage

HIDDEN = 1024


class SCALEX(Model):
    r"""SCALEX (Xiong et al. 2022), here for cells measured in all modalities.

    The log-normalised features of a cell, side by side and scaled to [0, 1], are one vector x of
    D levels. With a batch-free encoder :math:`q(z | x)` (one layer of 1,024 and batch
    normalisation) and the prior N(0, I), the decoder is one linear layer whose normalisation
    belongs to the cell's batch b:

    .. math:: \hat x = \sigma(\mathrm{DSBN}_b(W z + c)),

    and training minimises the cross-entropy of :math:`\hat x` and x, summed over features, plus
    half the KL. What batches differ by is left to DSBN, so the embedding, the posterior's mean,
    need not hold it. Source: specs/scalex.md.

    Of its ancestor SCALE (2019, for ATAC-seq) the cross-entropy, the linear decoder, the latent
    size and the optimiser are kept. Gone are the mixture of Gaussians as prior, the second hidden
    layer of the encoder, binarised peaks as input, and an embedding that is a sample.
    """

    card = Card.read("scalex")

    class Params(TrainingParams):
        """Hyper-parameters of SCALEX."""

        n_latent: int = param(10, "latent dimensions", "paper and original code", ge=1)
        learning_rate: float = param(5e-3, "Adam's learning rate", "ours; original 2e-4", gt=0)
        weight_decay: float = param(5e-4, "L2 penalty of all parameters", "original code", ge=0)
        kl_weight: float = param(0.5, "weight of the KL", "original code", ge=0)
        batch_size: int = param(64, "cells in a minibatch", "original code", ge=2)
        max_epochs: int = param(20, "passes over the cells", "ours; min_steps decides", ge=1)
        min_steps: int = param(2000, MIN_STEPS, "ours: flat by then at 250-2,500 cells", ge=0)
        validation_fraction: float = param(0.0, VALIDATION, "original code", ge=0, lt=1)
        n_top_genes: int = param(2000, "most variable genes kept", "original code", ge=2)
        no_batch: bool = param(False, "all cells as one batch: fault of study.md 3", "review")
        double_lognorm: bool = param(
            False, "levels normalised and logged once more: fault of study.md 3", "review"
        )
        minibatch_statistics: bool = param(
            False, "embeds with the statistics of random minibatches: fault, section 9", "review"
        )

    presets: ClassVar = {
        # Of up to 30,000 steps the original's stop on the training loss left 10,880 (480 cells).
        "review": lambda _: {
            **{"learning_rate": 2e-4, "min_steps": 11_000, "n_top_genes": 4000},
            **{"no_batch": True, "double_lognorm": True, "minibatch_statistics": True},
        }
    }

    def pipeline(self, var: Mapping[str, pd.DataFrame]) -> Pipeline:
        """Log-normalised variable genes and proteins, each feature scaled by its maximum."""
        p = self.params
        twice = p.double_lognorm
        steps: dict[str, list[Step]] = {
            "rna": [HighlyVariable(p.n_top_genes), *([LogNormalise()] if twice else [])],
            "prot": [CLR()] if twice else [],
        }
        return Pipeline({m: [*steps[m], LogNormalise(), MaxAbs()] for m in var}, [Concatenate()])

    def build(self, net: Networks) -> None:
        """Encoder and decoder, both with one linear layer from or to the features."""
        latent, width = self.params.n_latent, self.n_features["joint"]
        net.hidden, net.norm = nn.Linear(width, HIDDEN), DomainNorm(HIDDEN)
        net.mean, net.log_var = nn.Linear(HIDDEN, latent), nn.Linear(HIDDEN, latent)
        net.decoder, net.domains = nn.Linear(latent, width), DomainNorm(width, self.n_batches)

    def posterior(self, batch: Batch) -> Gaussian:
        """Return q(z | x), which does not see the batch."""
        one_domain = torch.zeros_like(batch.codes)
        h = torch.relu(self.net.norm(self.net.hidden(batch.x["joint"]), one_domain))
        return Gaussian(self.net.mean(h), self.net.log_var(h))

    def logits(self, z: Tensor, codes: Tensor) -> Tensor:
        """Return the logits of all levels, (b, D); a level is a share of the feature's maximum."""
        if self.params.no_batch:
            codes = torch.zeros_like(codes)
        logits: Tensor = self.net.domains(self.net.decoder(z), codes)
        return logits

    def decode(self, z: Tensor, codes: Tensor, role: str) -> Tensor:
        """Return the levels of the features of `role`."""
        widths = [len(self.decoded_features[m]) for m in self.roles]
        return self.logits(z, codes).split(widths, dim=-1)[self.roles.index(role)].sigmoid()

    def loss(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """Cross-entropy summed over features, and the KL to the prior."""
        posterior = self.posterior(batch)
        logits = self.logits(posterior.sample(), batch.codes)
        return {
            "reconstruction": -bernoulli(batch.x["joint"], logits).mean(),
            "kl": posterior.kl(self.prior).mean(),
        }

    def stages(self, inputs: Inputs, rows: np.ndarray, validation: np.ndarray) -> Sequence[Stage]:
        """One player; minibatches mix the batches."""
        p = self.params
        player = Player(
            "elbo", [self.net], self.loss,
            weights={"kl": p.kl_weight}, lr=p.learning_rate, weight_decay=p.weight_decay,
        )  # fmt: skip
        sampler, held_back = (Shuffled([(["joint"], r)], p.batch_size) for r in (rows, validation))
        return [self.one_stage(sampler, held_back, player)]

    def latent(self, inputs: Inputs, chunk: int = 1024) -> np.ndarray:
        """Return the means; with `minibatch_statistics` those of shuffled slices of a batch."""
        if not self.params.minibatch_statistics:
            return super().latent(inputs, chunk)
        codes = np.zeros_like(inputs.batch) if self.params.no_batch else inputs.batch
        slices = Shuffled(
            [(["joint"], np.flatnonzero(codes == b)) for b in np.unique(codes)],
            self.params.batch_size,
        )
        draws = slices.epoch(np.random.default_rng(0))
        return self.latent_in_training_mode(inputs, (draw["joint"] for draw in draws))
