"""A study as the report reads it: the ledger's tables, in the order they are shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from coembed.errors import StudyError
from coembed.study.ledger import Ledger

if TYPE_CHECKING:
    from coembed.models.card import Card

PARTS = {"held_out": "held-out cells", "train": "training cells"}
"""The cells that an embedding is scored on; the first is what a reader should look at."""

BIOLOGY = {"nmi": "NMI", "asw_label": "Cell type ASW", "trajectory": "Trajectory", "ari": "ARI",
           "ami": "AMI"}  # fmt: skip
TECHNICAL = {"asw_batch": "Batch ASW", "asw_site": "Site ASW",
             "graph_connectivity": "Graph connectivity"}  # fmt: skip
GROUPS = {"biology": "Biological preservation", "technical": "Technical effect removal"}
"""The review's two groups of metrics (Figures 2 and 3)."""

RUN = ("cpu_s", "peak_memory_mb", "parameters", "parameters_trained", "epochs")
KEY_DIGITS = 12
"""Digits of a ledger key that are shown; enough to find its file."""


@dataclass(frozen=True)
class Score:
    """The replicates of one score: same model, size, metric and evaluated cells; all "ok".

    Attributes:
        value: median over replicates; NaN where none is defined.
        null: median of the permutation nulls.
        sd: standard deviation over replicates; NaN below two.
        noise: by how much a replicate may differ by chance: `sd`, but where all cells there are
            are trained on, so that replicates share them, at least the sd of the next smaller size.
        values: (replicates,) the defined ones.
        keys: their ledger keys.
        undefined: how many of them are the review's value of something undefined.
        missing: how many replicates have no value at all.
    """

    value: float
    null: float
    sd: float
    noise: float
    values: tuple[float, ...]
    keys: tuple[str, ...]
    undefined: int
    missing: int


@dataclass(frozen=True)
class Results:
    """What a study found.

    A *variant* is what the study compares: a model, with its preset where there are several.

    Attributes:
        folder: of the study.
        study: `study.json`.
        rows: the ledger's rows.
        scores: one line per task, evaluated cells and metric, with `variant`; every status.
        cells: `cells.csv`, one line per cell, an empty label being no label.
        cards: model -> card, where there is one.
    """

    folder: Path
    study: Mapping[str, Any]
    rows: list[dict[str, Any]]
    scores: pd.DataFrame
    cells: pd.DataFrame
    cards: Mapping[str, Card]

    @property
    def ledger(self) -> Ledger:
        """Where everything here comes from."""
        return Ledger(self.folder)

    @property
    def plan(self) -> Mapping[str, Any]:
        """The plan, as `Plan.to_dict` describes it."""
        return dict(self.study["plan"])

    @property
    def card(self) -> Mapping[str, Any]:
        """The data card."""
        return dict(self.study["card"])

    def variant(self, model: str, preset: str) -> str:
        """Return what a model with this preset is called here."""
        return model if len(self.plan["presets"]) == 1 else f"{model} ({preset})"

    @cached_property
    def variants(self) -> dict[str, str]:
        """Variant -> model, in the plan's order."""
        return {
            self.variant(model, preset): model
            for model in self.plan["models"]
            for preset in self.plan["presets"]
        }

    @property
    def sizes(self) -> list[int]:
        """Numbers of training cells, rising."""
        return list(self.plan["sizes"])

    def is_linear(self, variant: str) -> bool:
        """Say whether a variant is a linear baseline."""
        card = self.cards.get(self.variants[variant])
        return card is not None and card.architecture == "linear"

    def rows_of(self, variant: str, size: int, *, ok: bool = True) -> list[dict[str, Any]]:
        """Return the rows of a variant at a size by replicate, by default those with status ok."""
        return [
            row
            for row in self.rows
            if self.variant_of(row) == variant
            and row["task"]["size"] == size
            and (row["status"] == "ok" or not ok)
        ]

    def variant_of(self, row: Mapping[str, Any]) -> str:
        """Return the variant of a row."""
        return self.variant(row["task"]["model"], row["task"]["preset"])

    @cached_property
    def not_run(self) -> int:
        """How many planned tasks have no row."""
        return len(self.variants) * len(self.sizes) * self.plan["replicates"] - len(self.rows)

    @cached_property
    def parts(self) -> list[str]:
        """The evaluated cells that there are scores for."""
        return [part for part in PARTS if (self.scores["evaluated_on"] == part).any()]

    @cached_property
    def metrics(self) -> dict[str, str]:
        """Metric -> title, those that have a value anywhere."""
        found = self.scores.loc[(self.scores["status"] == "ok"), ["metric", "value"]].dropna()
        return {name: title for name, title in self.titles.items() if name in set(found["metric"])}

    @cached_property
    def titles(self) -> dict[str, str]:
        """Metric -> title, in the order of the figures; known orders beyond the first included."""
        more = sorted(set(self.scores["metric"]) - BIOLOGY.keys() - TECHNICAL.keys())
        # The benchmark's columns begin like this (study.md section 1).
        names = {name: name.split("_", 1)[-1].removeprefix("pseudotime_order_") for name in more}
        orders = {name: f"Trajectory, {order}" for name, order in names.items()}
        return {**BIOLOGY, **orders, **TECHNICAL}

    def metrics_of(self, group: str) -> dict[str, str]:
        """Metric -> title, of "biology" or "technical"."""
        technical = group == "technical"
        return {k: v for k, v in self.metrics.items() if (k in TECHNICAL) == technical}

    def score(self, part: str, metric: str, variant: str, size: int) -> Score | None:
        """Return the replicates of a score; None where no task ended well."""
        return self._scores.get((part, metric, variant, size))

    @cached_property
    def _scores(self) -> dict[tuple[str, str, str, int], Score]:
        ok = self.scores[self.scores["status"] == "ok"]
        found: dict[tuple[str, str, str, int], Score] = {}
        # Sizes rise in a group's name, so that the next smaller one is there already.
        for _, lines in ok.groupby(["evaluated_on", "metric", "variant", "size"], sort=True):
            defined, one = lines[lines["value"].notna()], lines.iloc[0]
            which, size = (one["evaluated_on"], one["metric"], one["variant"]), int(one["size"])
            sd = noise = float(defined["value"].std())
            if size + self.plan["held_out"] == self.card["n_cells"] and size > self.sizes[0]:
                below = found.get((*which, self.sizes[self.sizes.index(size) - 1]))
                noise = sd if below is None else float(np.fmax(sd, below.sd))
            found[(*which, size)] = Score(
                value=float(defined["value"].median()),
                null=float(lines["null"].dropna().median()),
                sd=sd,
                noise=noise,
                values=tuple(defined["value"]),
                keys=tuple(defined["key"]),
                undefined=int(defined["undefined"].sum()),
                missing=len(lines) - len(defined),
            )
        return found

    @cached_property
    def runs(self) -> pd.DataFrame:
        """One line per task that ended well: what it is, and the `RUN` columns."""
        lines = [
            {
                "key": row["key"],
                "variant": self.variant_of(row),
                "size": row["task"]["size"],
                "replicate": row["task"]["replicate"],
                **{name: row[name] for name in RUN},
            }
            for row in self.rows
            if row["status"] == "ok"
        ]
        table = pd.DataFrame(lines, columns=["key", "variant", "size", "replicate", *RUN])
        return table.astype(dict.fromkeys(RUN, float))


def load(folder: Path | str) -> Results:
    """Read a study.

    Raises:
        StudyError: the folder is not a study, or a file in it is damaged.
    """
    ledger = Ledger(folder)
    study = ledger.study
    scores = ledger.scores()
    if scores.empty:
        scores = scores.reindex(columns=[*scores.columns, "undefined", "reason"])
    path = ledger.folder / "cells.csv"
    try:
        cells = pd.read_csv(path, dtype=str, keep_default_na=False)
        cells = cells[["barcode", "label", "batch", "site"]]
    except (OSError, ValueError, KeyError) as error:
        raise StudyError(
            f"is missing or damaged ({error})",
            where=str(path),
            remedy="Run the study again: it writes this file first and repeats no task",
        ) from error
    results = Results(ledger.folder, study, ledger.rows(), scores, cells, _cards())
    scores["variant"] = [
        results.variant(model, preset)
        for model, preset in zip(scores["model"], scores["preset"], strict=True)
    ]
    return results


def short(key: str) -> str:
    """Return the digits of a ledger key that are shown."""
    return key[:KEY_DIGITS]


def is_number(value: float | None) -> bool:
    """Say whether there is a value."""
    return value is not None and bool(np.isfinite(value))


def _cards() -> dict[str, Card]:
    from coembed.models import cards

    return {card.name: card for card in cards()}
