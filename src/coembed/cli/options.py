"""Options that several verbs share."""

from __future__ import annotations

from typing import Annotated

import typer

READING = "Reading the data"
Data = Annotated[
    str, typer.Argument(help="An .h5mu, .h5ad or 10x .h5 file, or a pilot's name (`coembed data`).")
]
BatchKey = Annotated[
    str,
    typer.Option(help="Column with the batch; 'none' for none.", rich_help_panel=READING),
]
SiteKey = Annotated[
    str, typer.Option(help="Column with the site; 'none' for none.", rich_help_panel=READING)
]
LabelKey = Annotated[
    str, typer.Option(help="Column with the cell type; 'none' for none.", rich_help_panel=READING)
]
Pseudotime = Annotated[
    str,
    typer.Option(
        "--pseudotime-keys", help="Columns with orderings, by commas.", rich_help_panel=READING
    ),
]
IgnoreLabels = Annotated[
    str,
    typer.Option(help="Labels that mean 'not known', by commas.", rich_help_panel=READING),
]
Layer = Annotated[
    str | None,
    typer.Option(help="Layer with the counts. [default: counts, else X]", rich_help_panel=READING),
]
ModalityNames = Annotated[
    list[str] | None,
    typer.Option(
        "--modality", help="role=name where a name is unusual (rna=GEX).", rich_help_panel=READING
    ),
]
DropEmpty = Annotated[
    bool,
    typer.Option(
        "--drop-empty", help="Leave out empty cells and features.", rich_help_panel=READING
    ),
]
Unpaired = Annotated[
    bool,
    typer.Option(
        "--unpaired", help="Allow modalities without common cells.", rich_help_panel=READING
    ),
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
