"""Log-likelihoods of counts, (b, n_features) in and out; sums over features are the caller's."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, logsigmoid, softplus


def multinomial(x: Tensor, logits: Tensor) -> Tensor:
    """Return x_j log softmax_j(logits), the multinomial without its combinatorial constant."""
    return x * log_softmax(logits, dim=-1)


def negative_binomial(x: Tensor, r: Tensor, logit: Tensor) -> Tensor:
    """Return log NB(x; total count r, success probability sigmoid(logit)).

    Mean r exp(logit), variance mean (1 + exp(logit)) (scmm.md section 5).
    """
    seen = x.nonzero(as_tuple=True)  # at x = 0 the binomial coefficient is 1: most of the counts
    # In float32 the difference of two large lgammas is off by 0.05 at r = 1e5 and by 1 at 1e6.
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    x_seen, r_seen = x[seen].to(wide), r[seen].to(wide)
    choose = torch.lgamma(x_seen + r_seen) - torch.lgamma(r_seen) - torch.lgamma(x_seen + 1)
    log_prob = x * logit - (x + r) * softplus(logit)
    return log_prob.index_put(seen, choose.to(log_prob.dtype), accumulate=True)


def zero_inflated(x: Tensor, log_prob: Tensor, gate: Tensor) -> Tensor:
    """Return the log-likelihood when a count is 0 with probability sigmoid(gate) besides.

    Args:
        x: the counts.
        log_prob: their log-likelihood without inflation.
        gate: logit of the extra zero.
    """
    kept = log_prob - softplus(gate)
    return torch.where(x > 0, kept, torch.logaddexp(logsigmoid(gate), kept))
