"""The protein mixture against scipy, and what its decoder's parts see."""

from __future__ import annotations

import numpy as np
import torch
from scipy import stats

from coembed.nn.posteriors import Gaussian
from coembed.nn.protein import ProteinDecoder, ProteinMixture, SkipDecoder


def test_likelihood_is_two_negative_binomials() -> None:
    log_level, fold, logit, phi = (
        torch.tensor([value], dtype=torch.float64)
        for value in ([0.3, -1.0, 2.0], [1.0, 4.0, 2.5], [-2.0, 0.5, 3.0], [0.7, 2.0, 5.0])
    )
    y = torch.tensor([[0.0, 3.0, 11.0]], dtype=torch.float64)
    mixture = ProteinMixture(Gaussian(log_level, torch.zeros(1, 3)), fold, logit)
    means = [log_level.exp().numpy(), (log_level.exp() * fold).numpy()]
    r = phi.numpy()
    back, fore = (stats.nbinom.pmf(y.numpy(), r, r / (r + mean)) for mean in means)
    pi = logit.sigmoid().numpy()
    np.testing.assert_allclose(
        mixture.log_likelihood(y, log_level, phi),
        np.log(pi * back + (1 - pi) * fore),
        rtol=1e-6,
    )
    np.testing.assert_allclose(mixture.foreground_mean(), (1 - pi) * means[1], rtol=1e-6)


def test_decoder_keeps_the_foreground_above_the_background() -> None:
    torch.manual_seed(0)
    decoder = ProteinDecoder((4, 8), 2, 5)
    z, condition = torch.randn(6, 4), torch.eye(2).repeat(3, 1)
    mixture = decoder(z, condition)
    assert mixture.fold.shape == (6, 5)
    assert (mixture.fold >= 1).all()
    _, spread = decoder.background(z, condition)
    torch.testing.assert_close((0.5 * mixture.background.log_var).exp(), spread.exp())
    constant = ProteinDecoder((4, 8), 2, 5, log_sd=torch.zeros_like)
    assert (constant(z, condition).background.log_var == 0).all()


def test_heads_see_trunk_input_and_condition() -> None:
    torch.manual_seed(0)
    decoder = SkipDecoder((4, 8), 2, 3, n_heads=2)
    assert [head.in_features for head in decoder.heads] == [14, 14]
    z, condition = torch.randn(2, 4), torch.eye(2)
    trunk = decoder.trunk(z, condition)
    for head, out in zip(decoder.heads, decoder(z, condition), strict=True):
        torch.testing.assert_close(head(torch.cat([trunk, z, condition], -1)), out)
