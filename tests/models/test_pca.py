from __future__ import annotations

import numpy as np
from contract import Contract
from easy import easy_cells


class TestPCA(Contract):
    name = "pca"
    kinds = ("cite", "multiome")

    def test_every_modality_has_the_same_weight(self) -> None:
        """Each block's components have a total variance of 1 before they are joined."""
        model = self.fit(easy_cells("all"), n_latent=130)
        total = model.get_latent_representation().var(axis=0).sum()
        np.testing.assert_allclose(total, 3, rtol=1e-3)

    def test_takes_three_modalities(self) -> None:
        assert self.fit(easy_cells("all")).get_latent_representation().shape == (150, 10)
