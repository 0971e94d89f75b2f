"""What a trained model says of cells: levels decoded from an embedding, and new cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from scipy import sparse
from torch import Tensor

from coembed.data.cells import Cells, Keys
from coembed.data.features import log_normalised
from coembed.data.minibatches import slices
from coembed.errors import CoembedError, DataError, ParameterError, did_you_mean

if TYPE_CHECKING:
    from mudata import MuData

    from coembed.data.minibatches import Inputs
    from coembed.models.base import Model

CHUNK = 1024
"""Cells decoded, or counted, at a time."""

QUANTILES = np.linspace(0, 1, 101)
"""At which the depth of the training cells is kept, for new ones."""


def depths(inputs: Inputs) -> dict[str, list[float]]:
    """Return the quantiles (`QUANTILES`) of the cells' total counts, by input."""
    return {
        name: np.quantile(np.asarray(block.measured.sum(axis=1)), QUANTILES).tolist()
        for name, block in inputs.blocks.items()
    }


def profiles(cells: Cells, decoded: Mapping[str, Sequence[str]]) -> dict[str, np.ndarray]:
    """Return the mean of every decoded feature over the cells: what ignores its input predicts.

    Of genes and proteins log(1 + 1e4 share), of peaks the share of cells where they are open. A
    modality whose decoded features are not measured ones (gene activity) has none.
    """
    means = {}
    for role, names in decoded.items():
        columns = cells.var[role].index.get_indexer(pd.Index(names)) if role in cells.var else [-1]
        if min(columns, default=-1) >= 0:
            total, rows = np.zeros(len(names)), np.flatnonzero(cells.present[role])
            for part in slices(rows, CHUNK):  # not a copy of all counts at once
                total += np.asarray(measured(cells, role, columns, part).sum(axis=0)).ravel()
            means[role] = (total / max(1, len(rows))).astype(np.float32)
    return means


def measured(
    cells: Cells,
    role: str,
    columns: Sequence[int] | np.ndarray,
    rows: np.ndarray | None = None,
) -> sparse.csr_matrix:
    """Return features of cells as translation is scored: see `profiles`.

    The cells are `rows`, or all that have `role`.
    """
    x = cells.counts[role][cells.present[role] if rows is None else rows][:, columns]
    return x.sign() if role == "atac" else log_normalised(x, np.asarray(x.sum(axis=1)).ravel(), 1e4)


def require(model: Model, ability: str, verb: str) -> None:
    """Refuse what a system cannot do.

    Raises:
        CoembedError: its card does not list the ability.
    """
    if ability not in model.card.abilities:
        from coembed.models import cards

        able = [card.name for card in cards() if ability in card.abilities]
        raise CoembedError(
            f"{model.card.title} cannot {verb}", remedy=f"These can: {', '.join(able)}"
        )


@torch.no_grad()
def levels(
    model: Model,
    role: str,
    data: Any,
    *,
    source: str | None,
    transform_batch: str | Sequence[str] | None,
) -> pd.DataFrame:
    """Decode `role` from the embedding; see `Model.get_normalized_expression`."""
    require(model, "denoise", "decode features")
    model.check_decodes(role)
    cells = model.cells_of(data)
    inputs = model.inputs_of(cells, source)
    z = torch.from_numpy(model.latent(inputs)).to(model.device)
    codes = torch.from_numpy(inputs.batch).to(model.device)
    chosen = [codes] if transform_batch is None else constant(model, codes, transform_batch)
    return pd.DataFrame(
        decoded(model, z, chosen, role),
        index=cells.obs.index,
        columns=model.decoded_features[role],
    )


@torch.no_grad()
def decoded(model: Model, z: Tensor, codes: Sequence[Tensor], role: str) -> np.ndarray:
    """Return the levels of `role` at points z (n, K), (n, n_features).

    They are the mean over `codes`, each (n,) batch codes of all points.
    """
    parts = zip(*(each.split(CHUNK) for each in (z, *codes)), strict=True)
    return np.concatenate([
        torch.stack([model.decode(points, told, role) for told in some]).mean(0).cpu().numpy()
        for points, *some in parts
    ])  # fmt: skip


def constant(model: Model, codes: Tensor, batches: str | Sequence[str]) -> list[Tensor]:
    """Return codes that put every cell into one of `batches`, one tensor for each.

    Raises:
        ParameterError: a batch that the model does not know.
    """
    wanted = [batches] if isinstance(batches, str) else list(batches)
    for batch in wanted:
        if batch not in model.batches:
            raise ParameterError(
                f"no batch '{batch}' in this model", remedy=did_you_mean(batch, model.batches)
            )
    return [torch.full_like(codes, model.batches.index(batch)) for batch in wanted]


def impute(
    model: Model, role: str, data: Any, *, transform_batch: str | Sequence[str] | None
) -> pd.DataFrame:
    """Decode `role` for the cells that lack it; see `Model.impute`."""
    cells = model.cells_of(data)
    model.check_decodes(role)
    lacking = np.flatnonzero(~cells.present[role])
    if not len(lacking):
        raise DataError(
            f"every cell has '{role}', so there is nothing to impute",
            where=cells.name,
            remedy="`translate` predicts it from another modality, `get_normalized_expression` "
            "denoises it",
        )
    return levels(model, role, cells.take(lacking), source=None, transform_batch=transform_batch)


@torch.no_grad()
def sample(model: Model, n: int, *, batch: str | None, near: Any, seed: int) -> MuData:
    """Draw new cells; see `Model.sample`."""
    from coembed.data.write import to_mudata
    from coembed.train.loop import seeded

    require(model, "sample", "draw new cells")
    if n < 1:
        raise ParameterError(f"{n} cells cannot be drawn", remedy="Ask for at least one")
    with seeded(seed, model.device):
        if near is None:
            z, codes = _from_prior(model, n)
        else:
            z, codes = _from_posterior(model, near, n)
        if batch is not None:
            (codes,) = constant(model, codes, batch)
        u = torch.rand(n).numpy()  # one quantile for all modalities: deep cells are deep in each
        counts = {}
        for role in model.roles:
            depth = np.round(np.interp(u, QUANTILES, model.depths[role])).astype(np.float32)
            parts = [
                model.draw(z[rows], codes[rows], role, torch.from_numpy(depth)[rows].to(z.device))
                for rows in torch.arange(n).split(CHUNK)
            ]
            counts[role] = sparse.csr_matrix(torch.cat(parts).cpu().numpy().astype(np.float32))
    names = np.array([*model.batches, "unseen"])[codes.cpu().numpy()]
    key = model.batch_key or "batch"
    drawn = Cells(
        counts=counts,
        present={role: np.ones(n, dtype=bool) for role in model.roles},
        var={role: pd.DataFrame(index=model.decoded_features[role]) for role in model.roles},
        obs=pd.DataFrame({key: names}, index=[f"sample{i}" for i in range(n)]),
        keys=Keys(batch=key),
        name=f"sampled from {model.card.title}",
        about={"simulated": True, "source": f"drawn by a trained {model.card.title} model"},
    )
    return to_mudata(drawn)


def _from_prior(model: Model, n: int) -> tuple[Tensor, Tensor]:
    return model.sample_prior(n), torch.randint(len(model.batches), (n,)).to(model.device)


def _from_posterior(model: Model, near: Any, n: int) -> tuple[Tensor, Tensor]:
    inputs = model.inputs_of(near, None)
    rows = torch.randint(inputs.n_cells, (n,)).numpy()
    draws, codes = [], []
    for part in np.array_split(rows, -(-n // CHUNK)):
        batch = inputs.gather(dict.fromkeys(inputs.blocks, part))
        draws.append(model.posterior(batch).sample())
        codes.append(batch.codes)
    return torch.cat(draws), torch.cat(codes)
