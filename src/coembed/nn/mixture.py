"""A mixture of Gaussians as prior of the latent variable (VaDE, Jiang et al. 2017)."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from coembed.nn.posteriors import Gaussian


class GaussianMixture(nn.Module):
    r"""p(z) = sum_c pi_c N(z; mu_c, diag(var_c)), its parameters trained with the networks.

    Args:
        n_components: C.
        n_latent: K.
        normalised: whether the weights pi are kept to a sum of 1.
        floor: added to every pi_c N(z; mu_c, var_c) before responsibilities are normalised.
    """

    def __init__(
        self, n_components: int, n_latent: int, *, normalised: bool = True, floor: float = 0.0
    ) -> None:
        super().__init__()
        self.normalised, self.floor = normalised, floor
        self.logits = nn.Parameter(torch.full((n_components,), -math.log(n_components)))
        self.means = nn.Parameter(torch.zeros(n_components, n_latent))
        self.log_vars = nn.Parameter(torch.zeros(n_components, n_latent))

    @property
    def log_weights(self) -> Tensor:
        """log pi, (C,)."""
        return log_softmax(self.logits, -1) if self.normalised else self.logits

    @property
    def components(self) -> Gaussian:
        """The (C, K) components."""
        return Gaussian(self.means, self.log_vars)

    def log_responsibilities(self, z: Tensor) -> Tensor:
        """Return log gamma, the share of every component in the density at z (b, K), (b, C)."""
        joint = self.log_weights + self.components.log_prob(z.unsqueeze(-2))
        if self.floor:
            joint = torch.logaddexp(joint, torch.full_like(joint, math.log(self.floor)))
        return log_softmax(joint, -1)

    def kl(self, q: Gaussian, log_gamma: Tensor) -> Tensor:
        r"""Return KL(q(z) gamma(c) || p(z, c)), (b,).

        That is :math:`\sum_c \gamma_c KL(q \| N_c) + KL(\gamma \| \pi)`, an upper bound on
        KL(q || p).

        Args:
            q: the (b, K) posterior.
            log_gamma: (b, C), the posterior of the component.
        """
        each = Gaussian(q.mean.unsqueeze(-2), q.log_var.unsqueeze(-2)).kl(self.components)
        return (log_gamma.exp() * (each + log_gamma - self.log_weights)).sum(-1)

    @torch.no_grad()
    def fit(self, z: np.ndarray) -> None:
        """Set the parameters by expectation-maximisation on points (n, K), n at least C.

        k-means starts it; its seed is drawn from torch's random state.
        """
        from sklearn.mixture import GaussianMixture as Fit

        seed = int(torch.randint(2**31, ()))
        n_components = len(self.logits)
        floor = 0.05 * float(z.var(axis=0).mean()) + 1e-6  # no component on a single cell
        found = Fit(n_components, covariance_type="diag", reg_covar=floor, random_state=seed).fit(z)
        for parameter, value in (
            (self.logits, np.log(found.weights_)),
            (self.means, found.means_),
            (self.log_vars, np.log(found.covariances_)),
        ):
            parameter.copy_(torch.from_numpy(value))

    def sample(self, n: int) -> Tensor:
        """Return n draws, (n, K); the weights need not sum to 1."""
        which = torch.multinomial(self.log_weights.softmax(-1), n, replacement=True)
        return Gaussian(self.means[which], self.log_vars[which]).sample()


def cluster_loss(
    log_gamma: Tensor, log_again: Tensor, *, weight: float = 50.0, reverse: bool = False
) -> Tensor:
    """Return what makes clusters survive re-encoding, confident and equally used; a scalar.

    The binary cross-entropy between responsibilities before and after, summed over components,
    minus `weight` times the sum of gamma_c squared and the entropy of the minibatch's mean gamma
    (scmvp.md section 6).

    Args:
        log_gamma: (b, C) log-responsibilities.
        log_again: the same after re-encoding.
        weight: of confidence and balance.
        reverse: reward unequal use in place of balance, as scMVP's code does.
    """
    gamma = log_gamma.exp()
    p, q = torch.softmax(gamma, -1), torch.softmax(log_again.exp(), -1)  # well within (0, 1)
    consistency = -(p * q.log() + (1 - p) * torch.log1p(-q)).sum(-1).mean()
    log_use = torch.logsumexp(log_gamma, 0) - math.log(len(gamma))
    entropy = -(log_use.exp() * log_use).sum()
    balance = -entropy if reverse else entropy
    return consistency - weight * (gamma.square().sum(-1).mean() + balance)
