"""Fusion: one posterior from the experts of several modalities."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from coembed.nn.posteriors import Gaussian


def product_of_experts(
    experts: Sequence[Gaussian],
    *,
    prior: Gaussian | None = None,
    present: Sequence[Tensor] | None = None,
) -> Gaussian:
    """Return the normalised product of Gaussian experts: precisions add and weigh the means.

    Args:
        experts: one (b, K) Gaussian per modality.
        prior: one more expert, counted once.
        present: one (b,) bool per modality; an absent modality has precision 0. Without a prior
            each cell needs one present modality.
    """
    precisions = [torch.exp(-expert.log_var) for expert in experts]
    if present is not None:
        precisions = [p * mask.unsqueeze(-1) for p, mask in zip(precisions, present, strict=True)]
    means = [expert.mean for expert in experts]
    if prior is not None:
        precisions.append(torch.exp(-prior.log_var))
        means.append(prior.mean)
    precision = sum(precisions[1:], precisions[0])
    weighted = [p * mean for p, mean in zip(precisions, means, strict=True)]
    return Gaussian(sum(weighted[1:], weighted[0]) / precision, -torch.log(precision))


def mean_of_experts(means: Sequence[Tensor], present: Sequence[Tensor] | None = None) -> Tensor:
    """Return the mean of the present modalities' (b, K) locations; the mean of a mixture.

    Args:
        means: one (b, K) tensor per modality.
        present: one (b,) bool per modality; all present if None. Each cell needs one.
    """
    stacked = torch.stack(list(means))
    if present is None:
        return stacked.mean(0)
    weight = torch.stack(list(present)).to(stacked.dtype).unsqueeze(-1)
    return (stacked * weight).sum(0) / weight.sum(0)


def average_of_experts(experts: Sequence[Gaussian], present: Sequence[Tensor]) -> Gaussian:
    """Return N(mean of the means, sum of the variances / sqrt(M)) of a cell's M modalities.

    Args:
        experts: one (b, K) Gaussian per modality.
        present: one (b,) bool per modality; each cell needs one.
    """
    means, log_vars = zip(*experts, strict=True)
    m = torch.stack(list(present)).sum(0).unsqueeze(-1)
    variance = mean_of_experts([v.exp() for v in log_vars], present) * m.sqrt()
    return Gaussian(mean_of_experts(means, present), variance.log())
