"""The verb that says what a trained model means: `coembed explain`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coembed.cli.options import Data, Seed, reads_data
from coembed.cli.show import say, show_table
from coembed.cli.trained import Trained, read_for
from coembed.errors import DataError, OutputError, ParameterError, did_you_mean

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from coembed.data.cells import Cells
    from coembed.models.base import Model

Output = Annotated[Path, typer.Option("-o", "--output", help="The table, a .csv file.")]
Role = Annotated[str, typer.Option(help="The modality: rna, prot or atac.")]

explain = typer.Typer(
    name="explain",
    help="Say what a trained model means, in features and in cells.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)


@explain.command()
@reads_data
def traversal(
    *,
    reading: dict[str, Any],
    model: Trained,
    data: Data,
    output: Output,
    role: Role = "rna",
    steps: Annotated[int, typer.Option(min=3, help="Points on each path.")] = 20,
    top: Annotated[int, typer.Option(min=1, help="Features shown for each dimension.")] = 3,
) -> None:
    """Move each latent dimension through the cells' range and list the features that follow.

    The table has the Spearman correlation of every feature's level with the position, the level at
    both ends, and the log2 fold change. Read the two together: nearly every level is monotone.

    [bold]Example[/bold]

      coembed explain traversal model/ cells.h5mu --role prot -o traversal.csv
    """
    from coembed.explain import traversal as table_of

    trained, cells = _opened(model, data, reading, output)
    table = table_of(trained, role, cells, steps=steps)
    _write(output, table)
    _show(table.groupby("dimension").head(top))


@explain.command()
@reads_data
def differential(
    *,
    reading: dict[str, Any],
    model: Trained,
    data: Data,
    output: Output,
    group_a: Annotated[
        list[str], typer.Option(help="column=value of obs; several are taken together.")
    ],
    group_b: Annotated[
        list[str] | None, typer.Option(help="The same; if left out, all other cells with a value.")
    ] = None,
    role: Role = "rna",
    effect: Annotated[
        str, typer.Option(help="fold (log2), or difference for probabilities of open chromatin.")
    ] = "fold",
    delta: Annotated[
        float | None, typer.Option(help="Least effect; if left out, 0.5 for a fold, else 0.05.")
    ] = None,
    own_batch: Annotated[
        bool, typer.Option("--own-batch", help="Do not average over the batches of both groups.")
    ] = False,
    samples: Annotated[int, typer.Option(min=1, help="Pairs of cells drawn.")] = 1000,
    fdr: Annotated[float, typer.Option(min=0, max=1, help="Limit of what is counted.")] = 0.05,
    top: Annotated[int, typer.Option(min=1, help="Features shown.")] = 15,
    seed: Seed = 0,
) -> None:
    """Compare two groups of cells feature by feature, by the model and by the counts.

    Effect, probability and FDR are the model's; means of log-normalised counts, shares of cells
    with a count and Wilcoxon's q (Benjamini-Hochberg) are the data's. The FDR is right as far as
    the model is; Wilcoxon takes cells for replicates, which those of one donor are not.

    [bold]Examples[/bold]

      coembed explain differential model/ cells.h5mu --group-a "cell_type=B cell" -o b_cells.csv

      coembed explain differential model/ cells.h5mu --group-a type=NK --group-b type=B -o nk.csv
    """
    from coembed.explain import differential_features

    trained, cells = _opened(model, data, reading, output)
    a = _group(cells, group_a, "--group-a")
    b = _group(cells, group_b, "--group-b") if group_b else ~a & _known(cells, group_a)
    table = differential_features(
        trained,
        role,
        a,
        b,
        cells,
        effect=effect,  # type: ignore[arg-type]  # it is checked there
        delta=delta,
        batches="own" if own_batch else "shared",
        n_samples=samples,
        seed=seed,
    )
    _write(output, table)
    shown = ["feature", "effect", "probability", "fdr", "mean_a", "mean_b"]
    _show(table[[*shown, "detected_a", "detected_b", "wilcoxon_q"]].head(top))
    found = table[table["fdr"] <= fdr]
    say(
        f"{a.sum():,} cells against {b.sum():,}: {len(found):,} of {len(table):,} features at an "
        f"FDR of {fdr:g}, {(found['effect'] > 0).sum():,} of them higher in the first group, "
        f"{(found['wilcoxon_q'] <= fdr).sum():,} with a Wilcoxon q of {fdr:g} or less too"
    )


@explain.command()
@reads_data
def archetypes(
    *,
    reading: dict[str, Any],
    model: Trained,
    data: Data,
    output: Output,
    number: Annotated[int, typer.Option("-n", "--number", min=2, help="Of archetypes.")] = 6,
    seed: Seed = 0,
) -> None:
    """Find the extremes of the embedding, and write every cell as a mixture of them.

    Any model will do, also one that only embeds. What is shown are the cell types of the ten cells
    nearest to each archetype. More archetypes always explain more; look where the gain ends.

    [bold]Example[/bold]

      coembed explain archetypes model/ cells.h5mu -n 8 -o weights.csv
    """
    import pandas as pd

    from coembed.explain import archetypes as archetypes_of

    trained, cells = _opened(model, data, reading, output)
    found = archetypes_of(trained.get_latent_representation(cells), number, seed=seed)
    names = [f"archetype_{i + 1}" for i in range(number)]
    _write(output, pd.DataFrame(found.weights, cells.obs.index, names).reset_index(names="cell"))
    shares = found.weights.mean(axis=0)
    rows = [
        (name, f"{share:.3f}", _types(cells, near), ", ".join(cells.obs.index[near[:3]]))
        for name, share, near in zip(names, shares, found.nearest, strict=True)
    ]
    show_table(("archetype", "mean weight", "types of the nearest cells", "nearest cells"), rows)
    say(f"{found.explained_variance:.3f} of the embedding's variance explained")


def _opened(model: Path, data: str, reading: dict[str, Any], output: Path) -> tuple[Model, Cells]:
    """Return the model, and the cells with the batch column it was trained with."""
    from coembed.models.saving import load_model

    if output.suffix != ".csv":
        raise OutputError("does not end in .csv", where=str(output), remedy="Name a .csv file")
    trained = load_model(model)
    return trained, read_for(trained, data, reading)


def _group(cells: Cells, terms: list[str], option: str) -> np.ndarray:
    """Return which cells have one of these values, (n_cells,) bool."""
    import numpy as np

    chosen = np.zeros(cells.n_cells, dtype=bool)
    for term in terms:
        column, equals, value = term.partition("=")
        if not equals:
            raise ParameterError(
                f"'{term}' is not column=value",
                where=option,
                remedy=f'Write {option} "cell_type=B cell"',
            )
        if column not in cells.obs:
            raise DataError(
                f"there is no column '{column}' in obs",
                where=cells.name,
                remedy=did_you_mean(column, map(str, cells.obs.columns)),
            )
        values = cells.obs[column].dropna().astype(str)
        if not (values == value).any():
            raise DataError(
                f"no cell has '{value}' in '{column}'",
                where=cells.name,
                remedy=did_you_mean(value, set(values)),
            )
        chosen |= (cells.obs[column].astype(str) == value).to_numpy()
    return chosen


def _known(cells: Cells, terms: list[str]) -> np.ndarray:
    """Return which cells have a value, and none that means "not known", in the terms' columns."""
    columns = cells.obs[list({term.partition("=")[0] for term in terms})]
    unknown = columns.isna() | columns.astype(str).isin(cells.keys.ignore_labels)
    known: np.ndarray = ~unknown.any(axis=1).to_numpy()
    return known


def _types(cells: Cells, rows: np.ndarray) -> str:
    """Return the labels of some cells with their numbers."""
    if cells.labels is None:
        return "-"
    counts = Counter(str(label or "not known") for label in cells.labels[rows])
    return ", ".join(f"{label} {n}" for label, n in counts.most_common(3))


def _write(output: Path, table: pd.DataFrame) -> None:
    from coembed.files import write_bytes

    write_bytes(output, table.to_csv(index=False).encode())
    say(f"{output}: {len(table):,} rows")


def _show(table: pd.DataFrame) -> None:
    """Print a table of names and numbers."""
    rows = [
        tuple(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row)
        for row in table.itertuples(index=False)
    ]
    show_table(tuple(map(str, table.columns)), rows)
