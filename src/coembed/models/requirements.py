"""What a system asks of cells, before training and when it embeds others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from scipy import sparse

from coembed.data.cells import Cells
from coembed.errors import DataError
from coembed.models.card import Card

MIN_CELLS = 10
"""Fewer cells than this are not trained on."""


def check_trainable(card: Card, cells: Cells) -> None:
    """Refuse cells that a system cannot be trained on.

    Raises:
        DataError: other modalities, too few cells, or unpaired ones where pairs are needed.
    """
    if cells.roles not in card.modalities:
        wanted = " or ".join(" + ".join(roles) for roles in card.modalities)
        raise DataError(
            f"{card.title} takes {wanted}, the data have {' + '.join(cells.roles)}",
            where=cells.name,
            remedy="`coembed models` lists what each system takes",
        )
    if cells.n_cells < MIN_CELLS:
        raise DataError(
            f"{cells.n_cells} cells are too few to train on",
            where=cells.name,
            remedy=f"At least {MIN_CELLS} are needed",
        )
    for role in cells.roles:
        if cells.present[role].sum() < 2:
            raise DataError(
                "fewer than two cells were measured",
                where=f"{cells.name}, modality '{role}'",
                remedy="Add cells, or leave the modality out",
            )
    check_pairing(card, cells, cells.roles)
    if "unpaired" not in card.pairing and cells.paired.sum() < 2:
        raise DataError(
            f"{int(cells.paired.sum())} cells have all of {', '.join(cells.roles)}, and "
            f"{card.title} needs some to place the others by",
            where=cells.name,
            remedy="Add paired cells, or use a system for unpaired data (`coembed models`)",
        )


def check_pairing(card: Card, cells: Cells, roles: Sequence[str]) -> None:
    """Refuse cells that lack one of `roles` where the system needs every one."""
    lacking = int((~np.logical_and.reduce([cells.present[role] for role in roles])).sum())
    if lacking and card.pairing == ("paired",):
        raise DataError(
            f"{lacking} of {cells.n_cells} cells lack a modality, "
            f"and {card.title} needs every cell in all of them",
            where=cells.name,
            remedy="Keep the paired cells, or use a system for mosaic data (`coembed models`)",
        )


def aligned(cells: Cells, features: Mapping[str, Sequence[str]]) -> Cells:
    """Return `cells` with `features` (role -> names) in their order, and no others.

    A modality that the cells lack altogether is one that none of them has.

    Raises:
        DataError: no modality is there, or features of one are missing.
    """
    if not set(cells.roles) & set(features):
        raise DataError(
            f"none of {', '.join(features)} is in the data",
            where=cells.name,
            remedy="Give cells of a modality that the model was trained on",
        )
    counts, var, present = {}, {}, {}
    for role, names in features.items():
        if role not in cells.roles:
            shape = (cells.n_cells, len(names))
            counts[role] = sparse.csr_matrix(shape, dtype=np.float32)  # type: ignore[arg-type]
            var[role] = pd.DataFrame(index=pd.Index(names))
            present[role] = np.zeros(cells.n_cells, dtype=bool)
            continue
        counts[role], var[role] = cells.counts[role], cells.var[role]
        present[role] = cells.present[role]
        if list(var[role].index) == names:
            continue
        columns = var[role].index.get_indexer(pd.Index(names))
        if (columns < 0).any():
            first = names[int(np.argmax(columns < 0))]
            raise DataError(
                f"{(columns < 0).sum()} of the {len(names)} features the model was trained on "
                f"are missing, the first is '{first}'",
                where=f"{cells.name}, modality '{role}'",
                remedy="Give the data the same features, under the same names",
            )
        counts[role], var[role] = counts[role][:, columns], var[role].iloc[columns]
    return replace(cells, counts=counts, var=var, present=present)
