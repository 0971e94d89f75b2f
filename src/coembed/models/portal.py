"""Portal: adversarial translation between two domains in a common PC space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, mse_loss

from coembed.data.features import HighlyVariable
from coembed.data.minibatches import Batch, Inputs
from coembed.data.pipeline import Pipeline, Step
from coembed.data.views import JointPCs, LogNormalise, Standardise
from coembed.models.base import Card, Networks
from coembed.models.domains import TwoDomains, gene_space, other
from coembed.models.params import VALIDATION, TrainingParams, param
from coembed.nn.adversary import discriminator_loss, generator_loss
from coembed.nn.layers import mlp
from coembed.train.stage import Clock, Player, Stage

WIDTH = 512
LOGIT_BOUND = 50.0
WARM_STEPS = 6
"""Steps during which the discriminators' logits are not held within the margin."""


class Portal(TwoDomains):
    r"""Portal (Zhao et al. 2022): genes and gene activity as two domains A, B of one PC space.

    Each domain has an encoder E, a generator G and a discriminator D. With
    :math:`z_A = E_A(x_A)`, :math:`x_{AB} = G_B(z_A)`, :math:`z_{AB} = E_B(x_{AB})` and the mirror
    images, the discriminators tell real from translated cells, and E, G minimise

    .. math:: L_{GAN} + \lambda_{cos} L_{cos} + 10 L_{AE} + 10 L_{LA}:

    pass for real, keep a cell's direction, reconstruct, and land at the same latent point. A cell
    whose logit leaves the margin of 5 gives no gradient. The domains are drawn independently:
    nothing uses pairing. The joint embedding of a paired cell is the mean of its two embeddings
    (the review's rule). Source: specs/portal.md.
    """

    card = Card.read("portal")

    class Params(TrainingParams):
        """Hyper-parameters of Portal."""

        n_latent: int = param(20, "latent dimensions", "original code", ge=1)
        n_pcs: int = param(30, "joint principal components", "original code", ge=2)
        n_top_genes: int = param(4000, "variable genes of each domain", "original code", ge=2)
        lambda_cos: float = param(20.0, "weight of the cosine term", "original code", ge=0)
        margin: float = param(5.0, "bound on a discriminator's logit", "original code", gt=0)
        batch_size: int = param(500, "cells drawn of each domain", "a quarter, 100-500", ge=2)
        max_epochs: int = param(1, "passes over the larger domain; min_steps decides", "ours", ge=1)
        min_steps: int = param(2000, "training steps", "review; documentation 1,000", ge=0)
        validation_fraction: float = param(0.0, VALIDATION, "none for adversaries", ge=0, le=0)
        double_lognorm: bool = param(False, "genes log-normalised twice", "fault of study.md 3")

    presets: ClassVar = {
        # A quarter of few cells is as good as 500 draws of them, and several times as fast.
        "default": lambda facts: {"batch_size": min(500, max(100, facts.n_cells // 4))},
        "review": lambda facts: {
            "batch_size": max(2, min(facts.n_cells // 10, 500)),
            "lambda_cos": 10.0,
            "double_lognorm": True,
        },
    }

    def pipeline(self, var: Mapping[str, pd.DataFrame]) -> Pipeline:
        """Variable genes of both domains, log-normalised, scaled apart, in joint PCs."""
        p = self.params

        def scaled(*first: Step) -> list[Step]:
            ranked = HighlyVariable(p.n_top_genes, flavour="seurat_v3")
            return [*first, ranked, LogNormalise(), Standardise(clip=10, two_sided=False)]

        rna = scaled(LogNormalise()) if p.double_lognorm else scaled()
        return gene_space(var, rna, scaled(), JointPCs(p.n_pcs), minimum=p.n_pcs)

    def build(self, net: Networks) -> None:
        """Two of each of E, G and D; every weight and bias N(0, 0.1^2)."""
        latent, pcs = self.params.n_latent, self.n_features["rna"]
        sizes = {
            "encoder": (pcs, WIDTH, latent),
            "generator": (latent, WIDTH, pcs),
            "discriminator": (pcs, WIDTH, WIDTH, 1),
        }
        for part, widths in sizes.items():
            setattr(net, part, nn.ModuleDict({m: mlp(widths, last=False) for m in self.roles}))
        for weights in net.parameters():
            nn.init.normal_(weights, std=0.1)

    def discriminate(self, x: Tensor, m: str, clock: Clock) -> Tensor:
        """Return the logits of domain m's discriminator, (b, 1), held within the margin."""
        bound = LOGIT_BOUND if clock.step < WARM_STEPS else min(LOGIT_BOUND, self.params.margin)
        return self.net.discriminator[m](x).clamp(-bound, bound)

    def translated(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return z_m of each domain, and by source domain the cells translated to the other."""
        z = {m: self.net.encoder[m](x) for m, x in batch.x.items()}
        return z, {m: self.net.generator[other(m)](z[m]) for m in z}

    def discriminator_loss(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """L_D of both domains."""
        with torch.no_grad():
            _, fakes = self.translated(batch)
        return {
            f"discriminator_{m}": discriminator_loss(
                self.discriminate(x, m, clock),
                self.discriminate(fakes[other(m)], m, clock),
            )
            for m, x in batch.x.items()
        }

    def translator_loss(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """L_GAN, L_cos, L_AE and L_LA, each summed over the two domains."""
        z, fakes = self.translated(batch)
        per_domain = [
            (
                generator_loss(self.discriminate(fakes[m], other(m), clock)),
                (1 - cosine_similarity(fakes[m], x, eps=1e-12)).mean(),
                mse_loss(self.net.generator[m](z[m]), x),
                mse_loss(self.net.encoder[other(m)](fakes[m]), z[m]),
            )
            for m, x in batch.x.items()
        ]
        names = ("adversarial", "cosine", "autoencoder", "alignment")
        return {
            n: sum(t[1:], t[0]) for n, t in zip(names, zip(*per_domain, strict=True), strict=True)
        }

    def stages(self, inputs: Inputs, rows: np.ndarray, validation: np.ndarray) -> Sequence[Stage]:
        """Discriminators, then translators, on every pair of independent draws."""
        p, net, rate = self.params, self.net, self.params.learning_rate
        weights = {"cosine": p.lambda_cos, "autoencoder": 10.0, "alignment": 10.0}
        critics = Player("discriminators", [net.discriminator], self.discriminator_loss, lr=rate)
        translators = Player(
            "translators", [net.encoder, net.generator], self.translator_loss, weights, lr=rate
        )
        return [self.unpaired_stage(inputs, rows, p.batch_size, critics, translators)]

    def encoded(self, x: Tensor, m: str) -> Tensor:
        """Return z_m."""
        return self.net.encoder[m](x)
