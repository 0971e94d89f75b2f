"""DAVAE: one variational autoencoder for both domains, and a classifier that must not tell them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, softplus

from coembed.data.features import HighlyVariable
from coembed.data.minibatches import Batch, Inputs
from coembed.data.pipeline import Pipeline
from coembed.data.views import LogNormalise
from coembed.models.base import Card, Networks
from coembed.models.domains import TwoDomains, gene_space
from coembed.models.params import MIN_STEPS, VALIDATION, TrainingParams, param
from coembed.nn.keras import ShiftedNorm, start_as_keras
from coembed.nn.layers import ConditionalMLP, batch_one_hot, mlp
from coembed.nn.likelihoods import gaussian_of_residuals
from coembed.nn.posteriors import Gaussian
from coembed.train.stage import Clock, Player, Stage

HIDDEN = (128, 64, 32)
CLASSIFIER_WIDTH = 16
DROPOUT = {False: (0.01, 0.05, 0.05), True: (0.1, 0.1, 0.01)}
"""Of encoder, decoder and classifier, by `conditional`."""

MIN_GENES = 30
"""Fewer shared genes than this are refused."""


class DAVAE(TwoDomains):
    r"""DAVAE (Hu, Zhong & Shang 2022): genes and gene activity as two domains of one VAE.

    A cell's two modalities are two rows x of the same D genes; b says which. One encoder
    :math:`q(z|x)` and one decoder :math:`\hat x(z)` serve both rows (`conditional`: they are
    told b, the package's DACVAE). The reconstruction is Gaussian with one variance V for all
    genes, that of the minibatch's residuals. A classifier c learns to read b from z, and encoder
    and decoder minimise

    .. math:: \tfrac{D}{2}\left(\frac{m}{V} + \log V\right) + KL(q(z|x) \| N(0, I))
        - \lambda D \, CE(b, c(z)),

    m being a row's mean squared residual. The domains are drawn independently: nothing uses
    pairing. The joint embedding of a paired cell is the mean of its two (the review's rule).
    Source: specs/davae.md.
    """

    card = Card.read("davae")

    class Params(TrainingParams):
        """Hyper-parameters of DAVAE."""

        n_latent: int = param(10, "latent dimensions", "review", ge=1)
        n_top_genes: int = param(4000, "most variable genes kept", "review", ge=2)
        conditional: bool = param(True, "the networks are told the domain", "package's default")
        domain_weight: float = param(0.01, "lambda, per gene", "ours: 0-5 tried", ge=0)
        batch_size: int = param(128, "rows in a minibatch, half of each domain", "original", ge=16)
        learning_rate: float = param(0.003, "Adam's learning rate", "ours: 0.001-0.01 tried", gt=0)
        max_epochs: int = param(25, "passes over the larger domain", "paper: 20-60", ge=1)
        min_steps: int = param(2000, MIN_STEPS, "ours: pilots of 250-2,000 cells", ge=0)
        validation_fraction: float = param(0.0, VALIDATION, "none for adversaries", ge=0, le=0)
        one_reference: bool = param(False, "genes alone are reconstructed", "fault of study.md 3")
        log_v_over_v: bool = param(False, "log V is divided by V", "fault of study.md 3")

    presets: ClassVar = {
        "review": lambda _: {
            **{"domain_weight": 6.0, "learning_rate": 0.01, "batch_size": 100},
            **{"max_epochs": 100, "min_steps": 0, "one_reference": True, "log_v_over_v": True},
        }
    }

    def pipeline(self, var: Mapping[str, pd.DataFrame]) -> Pipeline:
        """Variable genes and the activity of those seen in it, log-normalised."""
        variable, seen = HighlyVariable(self.params.n_top_genes), HighlyVariable(len(var["rna"]))
        rna, activity = [variable, LogNormalise()], [seen, LogNormalise()]
        return gene_space(var, rna, activity, minimum=MIN_GENES)

    def build(self, net: Networks) -> None:
        """Encoder with two heads, decoder, classifier; Glorot's weights, biases 0."""
        latent, genes = self.params.n_latent, self.n_features["rna"]
        told = 2 if self.params.conditional else 0
        encoder, decoder, classifier = DROPOUT[self.params.conditional]
        block = partial(ConditionalMLP, n_condition=told, deep=False, norm=ShiftedNorm)
        net.encoder = block((genes, *HIDDEN), dropout=encoder)
        net.mean = nn.Linear(HIDDEN[-1], latent)
        net.log_var = nn.Linear(HIDDEN[-1], latent)
        net.decoder = block((latent, *HIDDEN[::-1]), dropout=decoder)
        net.level = nn.Linear(HIDDEN[0], genes)
        judge = (latent, CLASSIFIER_WIDTH, len(self.roles))
        net.classifier = mlp(judge, norm=ShiftedNorm, dropout=classifier, last=False)
        start_as_keras(net)

    def told(self, domains: Tensor) -> Tensor:
        """Return what encoder and decoder are told of the domains, (b, 2) or (b, 0)."""
        return batch_one_hot(domains, len(self.roles) if self.params.conditional else 1)

    def encode(self, x: Tensor, domains: Tensor) -> Gaussian:
        """Return q(z|x), (b, K), of rows x (b, D) of these domains (b,)."""
        h = self.net.encoder(x, self.told(domains))
        return Gaussian(self.net.mean(h), self.net.log_var(h))

    def level(self, z: Tensor, domains: Tensor) -> Tensor:
        """Return the expected row of each z in its domain, (b, D)."""
        return softplus(self.net.level(self.net.decoder(z, self.told(domains))))

    def classifier_loss(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """Cross-entropy of the domain read from z."""
        x, domains = self.rows(batch)
        with torch.no_grad():
            z = self.encode(x, domains).sample()
        return {"classifier": cross_entropy(self.net.classifier(z), domains)}

    def autoencoder_loss(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """Reconstruction, KL, and the classifier's cross-entropy, of which much is good."""
        p, (x, domains) = self.params, self.rows(batch)
        posterior = self.encode(x, domains)
        z = posterior.sample()
        residuals = x - self.level(z, domains)
        if p.one_reference:
            residuals = residuals * (domains == 0).unsqueeze(-1)
        return {
            "reconstruction": -gaussian_of_residuals(residuals, log_divided=p.log_v_over_v),
            "kl": posterior.kl(self.prior).mean(),
            "adversarial": cross_entropy(self.net.classifier(z), domains),
        }

    def stages(self, inputs: Inputs, rows: np.ndarray, validation: np.ndarray) -> Sequence[Stage]:
        """Classifier, then autoencoder, on independent draws of both domains."""
        p, net = self.params, self.net
        adam = partial(Player, lr=p.learning_rate, eps=1e-7)
        autoencoder = [net.encoder, net.mean, net.log_var, net.decoder, net.level]
        weights = {"adversarial": -p.domain_weight * self.n_features["rna"]}
        players = (
            adam("classifier", [net.classifier], self.classifier_loss),
            adam("autoencoder", autoencoder, self.autoencoder_loss, weights),
        )
        return [self.unpaired_stage(inputs, rows, p.batch_size // 2, *players)]

    def decode(self, z: Tensor, codes: Tensor, role: str) -> Tensor:
        """Return the log-normalised level of every shared gene in the domain of `role`."""
        return self.level(z, self.domain(role, len(z)))

    def encoded(self, x: Tensor, m: str) -> Tensor:
        """Return the mean of q(z|x)."""
        return self.encode(x, self.domain(m, len(x))).mean
