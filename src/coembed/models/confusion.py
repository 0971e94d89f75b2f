"""A classifier that guesses a cell's batch from z, for the model to confuse (totalVI, MultiVI)."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from coembed.nn.layers import mlp
from coembed.train.stage import Clock, Player

if TYPE_CHECKING:
    from coembed.data.minibatches import Batch
    from coembed.models.base import Model

HIDDEN = (32, 32)


def batch_classifier(n_latent: int, n_batches: int) -> nn.Sequential:
    """Return (b, n_latent) to (b, n_batches) logits."""
    norm = partial(nn.BatchNorm1d, momentum=0.01, eps=1e-3)
    trunk = mlp((n_latent, *HIDDEN), norm=norm, dropout=0.1)
    return trunk.append(nn.Linear(HIDDEN[-1], n_batches))


def classifier_player(model: Model, weight_decay: float) -> Player:
    """Return the player that trains `net.classifier` on the z that the model's loss has drawn."""

    def loss(batch: Batch, clock: Clock) -> dict[str, Tensor]:
        z = batch.drawn["z"].detach()
        return {"classification": cross_entropy(model.net.classifier(z), batch.codes)}

    net = [model.net.classifier]
    return Player("classifier", net, loss, lr=1e-3, eps=0.01, weight_decay=weight_decay)
