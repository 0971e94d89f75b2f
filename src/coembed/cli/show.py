"""What a person sees."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    import pandas as pd

    from coembed.data.cells import Cells


def say(text: str) -> None:
    """Print a line for a person."""
    typer.echo(text)


def at_terminal() -> bool:
    """Say whether somebody is watching."""
    return sys.stderr.isatty()


def show_table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Print a table; nothing in it is read as markup."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(box=box.SIMPLE_HEAD)
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*map(_plain, row))
    if not console.is_terminal:
        console.width = 160
    console.print(table)


def _plain(text: str) -> Any:
    """Return text that rich does not read as markup: names come from files."""
    from rich.text import Text

    return Text(text)


def show_scores(table: pd.DataFrame) -> None:
    """Print the table that `coembed.workflow.score_embeddings` makes."""

    def number(value: float) -> str:
        return "-" if value != value else f"{value:.3f}"

    rows = [
        (
            row["embedding"],
            row["evaluated_on"],
            row["metric"],
            number(row["value"]),
            f"{number(row['null'])} ± {number(row['null_sd'])}"
            if row["null"] == row["null"]
            else "-",
            f"{row['n_scored']:,}",
            f"{row['n_left_out']:,}",
            row["reason"],
        )
        for row in table.to_dict("records")
    ]
    header = ("embedding", "cells", "metric", "score", "null", "scored", "left out", "remark")
    show_table(header, rows)


def show_cells(cells: Cells, fitting: tuple[str, ...]) -> None:
    """Print what a data set holds, and the models that fit it."""
    from coembed.study.ledger import data_card

    kind = "simulated" if cells.about.get("simulated") else "real"
    say(f"{cells.name} ({kind}): {cells.n_cells:,} cells, {int(cells.paired.sum()):,} in all of "
         f"{', '.join(cells.roles)}")  # fmt: skip
    card = data_card(cells)
    rows = [
        (role, *(str(value) for value in facts.values()))
        for role, facts in card["modalities"].items()
    ]
    first = next(iter(card["modalities"].values()))
    show_table(("modality", *(key.replace("_", " ") for key in first)), rows)
    for what in ("batches", "sites", "labels"):
        counts = card.get(what) or {}
        if counts:
            listed = ", ".join(f"{name} {n:,}" for name, n in list(counts.items())[:12])
            say(f"{what} ({len(counts)}): {listed}{', ...' if len(counts) > 12 else ''}")
    say(f"models for these data: {', '.join(fitting)}")


def source_of(info: Any) -> str:
    """Return where a hyper-parameter's default comes from."""
    return str((info.json_schema_extra or {}).get("source", ""))
