"""From a file to an embedding in a file, and from there to scores: what `fit` and `score` do."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

import coembed
from coembed.data.cells import Cells
from coembed.errors import DataError, OutputError, ParameterError, did_you_mean

if TYPE_CHECKING:
    from mudata import MuData

    from coembed.models.base import Model

TRAIN, HELD_OUT = "train", "held out"


def split(cells: Cells, held_out: float, seed: int) -> np.ndarray:
    """Return (n_cells,) 'train' or 'held out': a share of every batch is kept from training.

    Raises:
        ParameterError: the share leaves fewer than two cells to train on, or is negative.
    """
    from coembed.study.plan import held_out_rows

    n = round(cells.n_cells * held_out)
    if held_out < 0 or cells.n_cells - n < 2:
        raise ParameterError(
            f"a share of {held_out:g} cannot be held out of {cells.n_cells} cells",
            remedy="Choose --held-out between 0 and, say, 0.2",
        )
    part = np.full(cells.n_cells, TRAIN, dtype=object)
    part[held_out_rows(cells.batch, n, seed)] = HELD_OUT
    return part


def require_scorable(cells: Cells, *, batch_asked: bool) -> None:
    """Refuse cells of which no score can be made, before hours are spent on them.

    Args:
        cells: the data.
        batch_asked: the user named the batch column, so that batch scores are wanted.

    Raises:
        DataError: no label, one label only, or one batch only in the column that was named.
    """
    if cells.labels is None:
        raise DataError(
            "no column with cell types was found, and every score needs them",
            where=cells.name,
            remedy=f"Name it with --label-key. Columns: {', '.join(map(str, cells.obs.columns))}",
        )
    labels = {label for label in cells.labels if label is not None}
    if len(labels) < 2:
        raise DataError(
            f"column '{cells.keys.label}' has fewer than two labels besides the ignored ones",
            where=cells.name,
            remedy="Scores compare cell types: name another column with --label-key",
        )
    if batch_asked and len(set(cells.batch)) < 2:
        raise DataError(
            f"column '{cells.keys.batch}' holds one batch only, and batch scores need two",
            where=cells.name,
            remedy="Name another column, or give --batch-key none",
        )


def attach(mdata: MuData, model: Model, cells: Cells, part: np.ndarray) -> str:
    """Embed `cells` and write the result into `mdata`; cells it lacks get NaN.

    Writes `obsm["X_<model>"]`, `obs["X_<model>_split"]` and
    `uns["coembed"]["X_<model>"]` (parameters, outcome, history, versions).

    Returns:
        The name, `X_<model>`.
    """
    name = f"X_{model.card.name}"
    z = model.get_latent_representation(cells)
    columns = [f"{name}_{i}" for i in range(z.shape[1])]
    table = pd.DataFrame(z, index=cells.obs.index, columns=columns)
    mdata.obsm[name] = table.reindex(mdata.obs_names).to_numpy()
    parts = pd.Series(part, index=cells.obs.index).reindex(mdata.obs_names)
    mdata.obs[f"{name}_split"] = pd.Categorical(parts, categories=[TRAIN, HELD_OUT])
    about = {
        "model": model.card.name,
        "preset": model.preset,
        "params": json.dumps(model.params.model_dump()),
        "outcome": json.dumps(asdict(model.outcome) if model.outcome else None),
        "history": {key: column.to_numpy() for key, column in model.history.items()},
        "reference": model.card.reference,
        "coembed": coembed.__version__,
    }
    mdata.uns["coembed"] = {**mdata.uns.get("coembed", {}), name: about}
    return name


def open_mudata(data: str, cells: Cells) -> MuData:
    """Return the MuData that a result goes into: the file's own, or one made of `cells`."""
    from coembed.data.write import to_mudata

    if Path(data).suffix == ".h5mu" and Path(data).exists():
        import mudata

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of mudata and anndata, about their own future
            return mudata.read_h5mu(data)
    return to_mudata(cells)


def add_levels(mdata: MuData, levels: pd.DataFrame, name: str, model: Model) -> MuData:
    """Return the data with decoded levels as a modality of its own, marked as predicted.

    Raises:
        OutputError: there is a modality of that name.
    """
    from anndata import AnnData
    from mudata import MuData

    if name in mdata.mod:
        raise OutputError(
            f"the data already have a modality '{name}'", remedy="Start from data without it"
        )
    added = AnnData(levels)
    added.uns["coembed"] = {"predicted_by": model.card.name, "coembed": coembed.__version__}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of mudata, about its own future defaults
        grown = MuData({**mdata.mod, name: added})
        grown.obs = mdata.obs.reindex(grown.obs_names)
    grown.uns.update(mdata.uns)
    return grown


def score_translation(
    model: Model, cells: Cells, predicted: pd.DataFrame, *, source: str, target: str
) -> pd.DataFrame | None:
    """Return the scores of a translation on the cells that have both modalities.

    Genes and proteins are compared as log(1 + 1e4 share of the decoded features), peaks as open
    or not (`coembed.metrics.score_translation`); besides, FOSCTTM of the modalities' embeddings.

    Returns:
        The table, or None where the data have no measured counterpart of what was predicted.
    """
    from coembed import metrics
    from coembed.models.generate import measured

    if target not in model.profiles or not {source, target} <= set(cells.roles):
        return None
    both = np.flatnonzero(cells.present[source] & cells.present[target])
    if len(both) < 2:
        return None
    cells = cells.take(both)
    binary = target == "atac"
    columns = cells.var[target].index.get_indexer(predicted.columns)
    levels = predicted.to_numpy()[both]
    table = metrics.score_translation(
        measured(cells, target, columns),
        levels if binary else np.asarray(metrics.log_normalised(levels)),
        kind="binary" if binary else "continuous",
        baseline=model.profiles[target],
        depth=np.asarray(cells.counts[source].sum(axis=1)).ravel() if binary else None,
    )
    here, there = (model.get_latent_representation(cells, modality=m) for m in (source, target))
    shuffled = np.random.default_rng(0).permutation(there)
    foscttm = {
        "metric": "foscttm",
        "value": metrics.foscttm(here, there),
        "baseline": 0.5,
        "null": metrics.foscttm(here, shuffled),
    }
    return pd.concat([table, pd.DataFrame([foscttm])], ignore_index=True)


def score_embeddings(
    mdata: MuData, cells: Cells, names: tuple[str, ...], *, n_permutations: int, seed: int
) -> pd.DataFrame:
    """Return the scores of embeddings in `mdata.obsm`, on training and on held-out cells apart.

    Args:
        mdata: the data with the embeddings.
        cells: the same data, checked, for labels, batches, sites and pseudotimes.
        names: keys of `obsm`; all that start with `X_` if empty.
        n_permutations: of every null.
        seed: of the permutations.

    Returns:
        One row per embedding, part and metric; the columns of `coembed.score` besides. The part is
        'train', 'held out', or 'all' where the file does not say which cells were trained on.

    Raises:
        DataError: there is no embedding, or it has cells without a value.
        ParameterError: there is no such embedding.
    """
    from coembed.metrics import score

    known = [key for key in mdata.obsm if key.startswith("X_")]
    for name in names:
        if name not in known:
            raise ParameterError(f"no embedding '{name}'", remedy=did_you_mean(name, known))
    if not known:
        raise DataError(
            "the file holds no embedding (obsm key X_...)",
            remedy="Make one with `coembed fit`",
        )
    tables = []
    for name in names or tuple(known):
        z = pd.DataFrame(np.asarray(mdata.obsm[name]), index=mdata.obs_names)
        z = z.reindex(cells.obs.index)
        for part, rows in _parts(mdata, name, cells).items():
            chosen = cells.take(rows)
            table = score(
                z.to_numpy()[rows],
                **chosen.annotations,
                n_permutations=n_permutations,
                seed=seed,
            )
            table.insert(0, "embedding", name)
            table.insert(1, "evaluated_on", part)
            tables.append(table)
    return pd.concat(tables, ignore_index=True)


def _parts(mdata: Any, name: str, cells: Cells) -> dict[str, np.ndarray]:
    column = f"{name}_split"
    if column not in mdata.obs:
        return {"all": np.arange(cells.n_cells)}
    values = mdata.obs[column].reindex(cells.obs.index).astype(str).to_numpy()
    rows = {part: np.flatnonzero(values == part) for part in (TRAIN, HELD_OUT)}
    return {part: found for part, found in rows.items() if len(found)}
