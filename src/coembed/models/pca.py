"""PCA of the standardised modalities side by side: the linear baseline."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from torch import Tensor

from coembed.data.features import HighlyVariable, TopPeaks
from coembed.data.minibatches import Batch
from coembed.data.pipeline import Pipeline, Step
from coembed.data.views import (
    CLR,
    TFIDF,
    Concatenate,
    JointPCs,
    LogNormalise,
    PCs,
    Standardise,
    UnitVariance,
)
from coembed.models.base import Card, Model
from coembed.models.params import HyperParams, param


class PCA(Model):
    """Principal components of standardised modalities, each with the same total variance.

    Genes are log-normalised, proteins centred log-ratios, peaks TF-IDF; features are standardised
    (peaks are not: TF-IDF weighs them), each modality is reduced to 50 components and scaled to
    total variance 1, and the blocks side by side are reduced to K. What a deep model must beat.
    A cell without a modality has zeros, the mean, in its place.
    """

    card = Card.read("pca")

    class Params(HyperParams):
        """Hyper-parameters of the baseline."""

        n_latent: int = param(10, "components", "the study's latent size for every model", ge=1)
        n_components: int = param(50, "components of each modality before they are joined",
                                  "scanpy's habit", ge=1)  # fmt: skip
        n_top_genes: int = param(4000, "most variable genes kept", "review", ge=2)

    def pipeline(self, var: Mapping[str, pd.DataFrame]) -> Pipeline:
        """Standardise, reduce and weigh every modality; reduce them together."""
        p = self.params
        values: dict[str, list[Step]] = {
            "rna": [HighlyVariable(p.n_top_genes), LogNormalise(), Standardise()],
            "prot": [CLR(), Standardise()],
            "atac": [TopPeaks(), TFIDF()],
        }
        steps = {role: [*values[role], PCs(p.n_components), UnitVariance()] for role in var}
        return Pipeline(steps, joint=[Concatenate(), JointPCs(p.n_latent)])

    def embed(self, batch: Batch) -> Tensor:
        """Return the scores."""
        return batch.x["joint"]
