"""What batches differ in as to proteins: the background's prior, the efficiency (totalVI)."""

from __future__ import annotations

import math
import warnings

import numpy as np
import torch
from torch import Tensor, nn

from coembed.data.minibatches import Inputs
from coembed.nn.layers import rows_of_batches
from coembed.nn.posteriors import Gaussian

FEW_PROTEINS = 10
"""Up to this many proteins the prior is not taken from the data."""
N_CELLS = 100
"""Cells from which the background is estimated."""
UNKNOWN = (0.0, 0.05)
"""Mean and sd where it cannot be: no count in the cell, or fewer than `MIN_PROTEINS`."""
MIN_PROTEINS = 5


class BackgroundPrior(nn.Module):
    """Normal priors of the log background of every protein in every batch, (n_batches, P).

    Args:
        n_batches: number of batches.
        n_proteins: P.
        at_random: start from random means and sds (up to 1.3.0), not from N(3, 1).
    """

    def __init__(self, n_batches: int, n_proteins: int, *, at_random: bool) -> None:
        super().__init__()
        shape = (n_batches, n_proteins)
        mean, log_sd = torch.full(shape, 3.0), torch.zeros(shape)
        if at_random:
            mean, log_sd = torch.randn(shape), torch.randn(shape).clamp(-10, 1)
        self.mean, self.log_sd = nn.Parameter(mean), nn.Parameter(log_sd)

    def kl(self, background: Gaussian, codes: Tensor) -> Tensor:
        """Return the KL of every protein's background to its prior, (b, P)."""
        mean, log_sd = (rows_of_batches(table, codes) for table in (self.mean, self.log_sd))
        prior = Gaussian(mean, 2 * log_sd)
        # One dimension each, so that the KL is not summed over the proteins.
        q, p = (
            Gaussian(g.mean.unsqueeze(-1), g.log_var.unsqueeze(-1)) for g in (background, prior)
        )
        return q.kl(p)

    @torch.no_grad()
    def estimate(self, inputs: Inputs, rows: np.ndarray) -> None:
        """Take the priors from the training cells, where there are proteins enough."""
        if self.mean.shape[1] <= FEW_PROTEINS:
            return
        rows, random = inputs.having(["prot"], rows), np.random.default_rng(torch.initial_seed())
        for code in range(len(self.mean)):
            y = inputs.blocks["prot"].x[rows[inputs.batch[rows] == code]].toarray()
            mean, sd = background_prior(y[:, y.any(0)], random)
            self.mean[code], self.log_sd[code] = mean, math.log(sd)


class Efficiency(nn.Module):
    """With what efficiency every batch measured a protein: its log, learnt, (n_batches, P).

    Args:
        n_batches: number of batches.
        n_proteins: P.
    """

    def __init__(self, n_batches: int, n_proteins: int) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.zeros(n_batches, n_proteins))

    def forward(self, codes: Tensor) -> Tensor:
        """Return the logs for the batch of each cell, (b, P); -1, a new one, has the mean."""
        return rows_of_batches(self.log, codes)

    def loss(self, codes: Tensor) -> Tensor:
        """Return -log LogNormal(0, 1) of a cell's efficiencies, (b,)."""
        log = self(codes)
        return (0.5 * (math.log(2 * math.pi) + log.square()) + log).sum(-1)


def background_prior(y: np.ndarray, random: np.random.Generator) -> tuple[float, float]:
    """Return mean and sd of the log background in a batch (specs/totalvi.md section 5).

    Two normals are fitted to log(1 + y) of each of 100 cells, drawn with replacement; the lower
    one is the cell's background. The sd is that of the mean of the cells' backgrounds.

    Args:
        y: (n_cells, n_proteins) counts of the measured proteins.
        random: for the cells and the fits.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    if len(y) == 0 or y.shape[1] < MIN_PROTEINS:
        return UNKNOWN
    lower = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for cell in y[random.integers(len(y), size=N_CELLS)]:
            if not cell.any():
                lower.append(UNKNOWN)
                continue
            fit = GaussianMixture(2, random_state=int(random.integers(2**31)))
            fit.fit(np.log1p(cell)[:, None])
            least = fit.means_.argmin()
            lower.append((fit.means_[least, 0], math.sqrt(fit.covariances_[least, 0, 0])))
    means, sds = np.array(lower).T
    return float(means.mean()), float(np.sqrt((sds**2).sum()) / N_CELLS)
