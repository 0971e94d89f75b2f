"""The Gaussian mixture prior: against torch.distributions, and scmvp.md section 10."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch import distributions as D

from coembed.nn.mixture import GaussianMixture
from coembed.nn.posteriors import Gaussian


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_mixture(**options: object) -> GaussianMixture:
    mixture = GaussianMixture(5, 3, **options)
    for i, parameter in enumerate(mixture.parameters()):
        parameter.data = noise(*parameter.shape, seed=i)
    return mixture


def reference(mixture: GaussianMixture) -> tuple[D.Categorical, D.Independent]:
    spread = torch.exp(0.5 * mixture.log_vars)
    return D.Categorical(logits=mixture.logits), D.Independent(D.Normal(mixture.means, spread), 1)


def test_responsibilities_are_bayes_rule() -> None:
    mixture, z = random_mixture(), noise(7, 3, seed=9)
    weights, components = reference(mixture)
    joint = weights.logits + components.log_prob(z.unsqueeze(1))
    expected = joint - D.MixtureSameFamily(weights, components).log_prob(z).unsqueeze(1)
    torch.testing.assert_close(mixture.log_responsibilities(z), expected)


def test_kl_is_that_of_the_pair_of_latent_and_component() -> None:
    mixture = random_mixture()
    q = Gaussian(noise(7, 3, seed=5), noise(7, 3, seed=6))
    log_gamma = torch.log_softmax(noise(7, 5, seed=7), -1)
    weights, components = reference(mixture)
    law = D.Independent(D.Normal(q.mean.unsqueeze(1), torch.exp(0.5 * q.log_var).unsqueeze(1)), 1)
    each = D.kl_divergence(law.expand((7, 5)), components.expand((7, 5)))
    gamma = log_gamma.exp()
    expected = (gamma * each).sum(-1) + D.kl_divergence(D.Categorical(probs=gamma), weights)
    torch.testing.assert_close(mixture.kl(q, log_gamma), expected)


def test_kl_of_one_standard_component_is_zero_at_the_prior() -> None:
    """scmvp.md 10.4: with the variance for its logarithm the original has 5 (e - 2)."""
    mixture, zero = GaussianMixture(1, 10), torch.zeros(2, 10)
    log_gamma = mixture.log_responsibilities(zero)
    torch.testing.assert_close(mixture.kl(Gaussian(zero, zero), log_gamma), torch.zeros(2))
    faulty = mixture.kl(Gaussian(zero, zero.exp()), log_gamma)
    torch.testing.assert_close(faulty, torch.full((2,), 3.591409))


def test_identical_components_share_alike_and_a_floor_makes_far_points_ambiguous() -> None:
    """scmvp.md 10.5."""
    point = torch.zeros(1, 10)
    for floor in (0.0, 1e-10):
        shares = GaussianMixture(4, 10, floor=floor).log_responsibilities(point).exp()
        torch.testing.assert_close(shares, torch.full((1, 4), 0.25))
    for floor, largest in ((0.0, 1.0), (1e-10, 0.25)):
        mixture = GaussianMixture(4, 10, floor=floor)
        mixture.means.data[2] = 5.0
        shares = mixture.log_responsibilities(point + 20).exp()
        assert shares.max().item() == pytest.approx(largest, abs=1e-5)


@pytest.mark.parametrize(("n_latent", "share"), [(20, 0.9997), (10, 0.01)])
def test_in_many_dimensions_nearly_every_density_is_below_the_floor(
    n_latent: int, share: float
) -> None:
    """scmvp.md section 5, K = 8."""
    weighted = Gaussian(torch.zeros(()), torch.zeros(())).log_prob(noise(100_000, n_latent))
    below = (weighted - math.log(8) < math.log(1e-10)).double().mean().item()
    assert below == pytest.approx(share, abs=0.005)


def test_weights_sum_to_one_unless_they_are_left_free() -> None:
    for normalised, total in ((True, 1.0), (False, 3.0)):
        mixture = GaussianMixture(3, 2, normalised=normalised)
        torch.testing.assert_close(mixture.log_weights.exp().sum().item(), 1.0)
        mixture.logits.data += math.log(3)
        torch.testing.assert_close(mixture.log_weights.exp().sum().item(), total)


def test_gradients_are_finite_where_a_component_is_out_of_reach() -> None:
    mixture = GaussianMixture(3, 2)
    mixture.means.data[1] = 1e3
    z = torch.zeros(4, 2, requires_grad=True)
    log_gamma = mixture.log_responsibilities(z)
    assert log_gamma.exp().min() == 0
    mixture.kl(Gaussian(z, torch.zeros(4, 2)), log_gamma).sum().backward()
    assert z.grad is not None
    assert all(g.isfinite().all() for g in (z.grad, *(p.grad for p in mixture.parameters())))


def test_fit_finds_clusters_and_leaves_numpy_alone() -> None:
    random = np.random.default_rng(0)
    centres = np.array([[-4.0, 0, 0], [4, 0, 0], [0, 6, 0]])
    z = centres[random.choice(3, size=900, p=[0.5, 0.3, 0.2])] + random.normal(0, 0.5, (900, 3))
    mixture, before = GaussianMixture(3, 3), np.random.get_state()[1].copy()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mixture.fit(z.astype("f4"))
    np.testing.assert_array_equal(np.random.get_state()[1], before)
    order = mixture.log_weights.argsort(descending=True)
    np.testing.assert_allclose(
        mixture.log_weights[order].exp().detach(), [0.5, 0.3, 0.2], atol=0.05
    )
    np.testing.assert_allclose(mixture.means[order].detach(), centres, atol=0.2)
    assert (mixture.log_vars.exp() >= 0.25).all()


def test_draws_follow_the_density() -> None:
    mixture = random_mixture(normalised=False)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        draws = mixture.sample(50_000)
    law = D.MixtureSameFamily(*reference(mixture))
    torch.testing.assert_close(draws.mean(0), law.mean.detach(), atol=0.05, rtol=0)
    torch.testing.assert_close(draws.var(0), law.variance.detach(), atol=0.1, rtol=0.05)
