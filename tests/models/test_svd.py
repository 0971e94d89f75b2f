from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest
from contract import Contract
from easy import WIDTHS, easy_cells


class TestSVD(Contract):
    name = "svd"
    params: ClassVar = {"n_rna": 6, "n_other": 4}

    def test_every_cells_blocks_are_standardised(self, kind: str) -> None:
        z = self.model(kind).get_latent_representation()
        for block in (z[:, :6], z[:, 6:]):
            np.testing.assert_allclose(block.mean(axis=1), 0, atol=1e-5)
            np.testing.assert_allclose(block.std(axis=1), 1, atol=1e-4)

    @pytest.mark.parametrize(
        ("which", "n_rna", "n_other"), [("cite", 73, 27), ("multiome", 38, 62)]
    )
    def test_components_of_the_competition(self, which: str, n_rna: int, n_other: int) -> None:
        """study.md section 6; no more than the features of the smaller test data allow."""
        model = self.system(easy_cells(which)).train(progress=False)
        other = "prot" if which == "cite" else "atac"
        assert model.n_features == {
            "rna": min(n_rna, WIDTHS["rna"] - 1),
            other: min(n_other, WIDTHS[other] - 1),
        }
