"""Truncated SVD of each modality side by side: the 2021 competition's linear entry."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
import torch
from torch import Tensor

from coembed.data.features import HighlyVariable, TopPeaks
from coembed.data.minibatches import Batch
from coembed.data.pipeline import Pipeline, Step
from coembed.data.views import CLR, Binarise, LogNormalise, StandardiseCells, TruncatedSVD
from coembed.models.base import Card, Model
from coembed.models.params import HyperParams, param


class SVD(Model):
    """The online-track entry of Guanlab-dengkw on CITE-seq, a plain and strong baseline.

    Log-normalised genes, centred log-ratio proteins and binary peaks are each reduced by a
    truncated SVD (73 + 27 components for RNA + protein, 38 + 62 for RNA + chromatin), every cell's
    block is standardised, and the blocks stand side by side (specs/study.md section 6).
    """

    card = Card.read("svd")

    class Params(HyperParams):
        """Hyper-parameters of the baseline."""

        n_rna: int | None = param(None, "RNA components (None: 73 with proteins, 38 with peaks)",
                                  "study.md section 6", ge=1)  # fmt: skip
        n_other: int | None = param(None, "the other modality's (None: 27 proteins, 62 peaks)",
                                    "study.md section 6", ge=1)  # fmt: skip
        n_top_genes: int = param(4000, "most variable genes kept", "review", ge=2)

    def pipeline(self, var: Mapping[str, pd.DataFrame]) -> Pipeline:
        """Reduce each modality, then standardise its block in every cell."""
        p = self.params
        rna, other = (73, 27) if "prot" in var else (38, 62)
        rna, other = p.n_rna or rna, p.n_other or other
        steps: dict[str, list[Step]] = {
            "rna": [HighlyVariable(p.n_top_genes), LogNormalise(), TruncatedSVD(rna)],
            "prot": [CLR(), TruncatedSVD(other)],
            "atac": [TopPeaks(), Binarise(), TruncatedSVD(other)],
        }
        return Pipeline({role: [*steps[role], StandardiseCells()] for role in var})

    def embed(self, batch: Batch) -> Tensor:
        """Return the blocks side by side."""
        return torch.cat(list(batch.x.values()), dim=-1)
