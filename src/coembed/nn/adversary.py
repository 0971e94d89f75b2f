"""Adversarial criteria on discriminator logits."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import softplus


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Return the logistic loss of telling real from fake: mean sp(-real) + mean sp(fake)."""
    return softplus(-real).mean() + softplus(fake).mean()


def generator_loss(fake: Tensor) -> Tensor:
    """Return the non-saturating loss of passing fakes for real: mean sp(-fake)."""
    return softplus(-fake).mean()
