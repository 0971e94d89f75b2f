"""Options that several verbs share."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import Annotated, Any, get_type_hints

import typer

from coembed.cli.text import reading_options

Data = Annotated[
    str, typer.Argument(help="An .h5mu, .h5ad or 10x .h5 file, or a pilot's name (`coembed data`).")
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="name=value of a hyper-parameter; `coembed models NAME` lists them."
    ),
]
Preset = Annotated[
    str,
    typer.Option(help="'default' follows the paper and works; 'review' does what the study ran."),
]
Seed = Annotated[int, typer.Option(min=0, help="Of everything random.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
Permutations = Annotated[int, typer.Option(min=0, help="Of the null of each score.")]


def _option(default: Any, kind: Any, what: str, *flags: str) -> tuple[Any, Any]:
    panel = "Reading the data"
    return default, Annotated[kind, typer.Option(*flags, help=what, rich_help_panel=panel)]


READING = {
    "batch_key": _option("auto", str, "Column with the batch; 'none' for none."),
    "site_key": _option("auto", str, "Column with the site; 'none' for none."),
    "label_key": _option("auto", str, "Column with the cell type; 'none' for none."),
    "pseudotime_keys": _option("auto", str, "Columns with orderings, by commas; or 'none'."),
    "ignore_labels": _option("", str, "Labels that mean 'not known', by commas."),
    "layer": _option(None, str | None, "Layer with the counts. [default: counts, else X]"),
    "modality": _option(
        None, list[str] | None, "role=name where a name is unusual (rna=GEX).", "--modality"
    ),
    "drop_empty": _option(False, bool, "Leave out empty cells and features.", "--drop-empty"),
    "unpaired": _option(False, bool, "Allow modalities without common cells.", "--unpaired"),
}
"""Name -> default and annotation of the options by which every verb reads its data."""


def reads_data(verb: Callable[..., None]) -> Callable[..., None]:
    """Give `verb` the options of `READING`; it gets them as `reading`, for `resolve`."""

    @wraps(verb)
    def command(**values: Any) -> None:
        asked = {name: values.pop(name) for name in READING}
        verb(**values, reading=reading_options(asked))

    hints = get_type_hints(verb, include_extras=True)
    own = [
        item.replace(annotation=hints[name])
        for name, item in signature(verb).parameters.items()
        if name != "reading"
    ]
    shared = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, (default, annotation) in READING.items()
    ]
    command.__signature__ = Signature([*own, *shared])  # type: ignore[attr-defined]
    command.__annotations__ = {item.name: item.annotation for item in (*own, *shared)}
    return command
