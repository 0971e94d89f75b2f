"""Adversarial criteria on discriminator logits, and the reversal of gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, one_hot, softplus


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Return the logistic loss of telling real from fake: mean sp(-real) + mean sp(fake)."""
    return softplus(-real).mean() + softplus(fake).mean()


def generator_loss(fake: Tensor) -> Tensor:
    """Return the non-saturating loss of passing fakes for real: mean sp(-fake)."""
    return softplus(-fake).mean()


def confusion_loss(logits: Tensor, codes: Tensor) -> Tensor:
    """Return the cross-entropy of a classifier to the uniform over the *other* classes, (b,).

    Args:
        logits: (b, n_classes), at least two classes.
        codes: (b,) int64, the true class.
    """
    n_classes = logits.shape[-1]
    others = (1 - one_hot(codes, n_classes).to(logits.dtype)) / (n_classes - 1)
    return -(others * log_softmax(logits, -1)).sum(-1)


class _Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


def reverse_gradient(x: Tensor) -> Tensor:
    """Return x; gradients flow back with the opposite sign (Ganin et al. 2016)."""
    return _Reversal.apply(x)
