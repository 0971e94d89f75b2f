"""Genes and the activity of genes as two domains of one space: what Portal and DAVAE share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from coembed.data.features import GeneActivity, SharedFeatures
from coembed.data.minibatches import Batch, Independent, Inputs
from coembed.data.pipeline import JointStep, Pipeline, Step
from coembed.models.base import Model
from coembed.nn.fusion import mean_of_experts
from coembed.train.stage import Player, Stage


class TwoDomains(Model):
    """A system to which the two modalities of a cell are two cells, one of each domain.

    The domains are drawn independently: nothing uses pairing. It defines `encoded`.
    """

    def encoded(self, x: Tensor, m: str) -> Tensor:
        """Return the embedding, (b, K), of cells x, (b, D), of domain m."""
        raise NotImplementedError

    def embed(self, batch: Batch) -> Tensor:
        """Return the mean of the embeddings a cell has, of genes and of gene activity."""
        z = [self.encoded(x, m) for m, x in batch.x.items()]
        return mean_of_experts(z, list(batch.present.values()))

    def domain(self, m: str, n: int) -> Tensor:
        """Return the code of domain m, n times."""
        return torch.full((n,), self.roles.index(m), device=self.device)

    def rows(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the cells of both domains, one below the other, and their domains."""
        domains = [self.domain(m, len(x)) for m, x in batch.x.items()]
        return torch.cat(list(batch.x.values())), torch.cat(domains)

    def unpaired_stage(
        self, inputs: Inputs, rows: np.ndarray, size: int, *players: Player
    ) -> Stage:
        """Return the plan in which a step draws `size` of the rows of each domain."""
        domains = {m: inputs.having([m], rows) for m in self.roles}
        return self.one_stage(Independent(domains, size), None, *players)


def gene_space(
    var: Mapping[str, pd.DataFrame],
    rna: Sequence[Step],
    activity: Sequence[Step],
    *joint: JointStep,
    minimum: int,
) -> Pipeline:
    """Return the views of genes and of gene activity, with the genes that both keep.

    Args:
        var: the features of both modalities.
        rna: steps of the genes.
        activity: steps of the activity of genes, which is counted from the peaks.
        *joint: steps after the two have the same genes.
        minimum: fewer shared genes than this are refused.
    """
    steps = {"rna": rna, "atac": [GeneActivity(var["rna"]), *activity]}
    return Pipeline(steps, joint=[SharedFeatures(minimum), *joint])


def other(m: str) -> str:
    """Return the other domain."""
    return "atac" if m == "rna" else "rna"
