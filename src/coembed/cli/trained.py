"""The verbs of a trained model: translate and map."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coembed.cli.options import Data, Seed, reads_data
from coembed.cli.show import at_terminal, say, show_table
from coembed.cli.text import refuse_input

if TYPE_CHECKING:
    from coembed.data.cells import Cells
    from coembed.models.base import Model

Trained = Annotated[Path, typer.Argument(help="Folder of a trained model (`coembed fit --save`).")]
Output = Annotated[Path, typer.Option("-o", "--output", help="The new .h5mu file.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output.")]


@reads_data
def translate(
    *,
    reading: dict[str, Any],
    model: Trained,
    data: Data,
    output: Output,
    source: Annotated[str, typer.Option("--from", help="The modality to predict from.")],
    target: Annotated[str, typer.Option("--to", help="The modality to predict.")],
    transform_batch: Annotated[
        str | None, typer.Option(help="Predict as if every cell were of this batch.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Predict one modality from another with a trained model.

    The file has the predicted levels as a modality '<to>_from_<from>'. Where the cells have both
    modalities, the prediction is scored beside the mean of every feature and a permutation null.

    [bold]Examples[/bold]

      coembed translate model/ new_cells.h5mu --from rna --to prot -o predicted.h5mu

      coembed translate model/ rna_only.h5ad --from rna --to atac -o predicted.h5mu
    """
    from coembed.data.write import write_h5mu
    from coembed.models.saving import load_model
    from coembed.workflow import add_levels, open_mudata, score_translation

    refuse_input(data, output, overwrite)
    trained = load_model(model)
    cells = read_for(trained, data, reading)
    levels = trained.translate(
        target, source=source, data=cells, transform_batch=transform_batch or None
    )
    mdata = add_levels(open_mudata(data, cells), levels, f"{target}_from_{source}", trained)
    write_h5mu(mdata, output, overwrite=overwrite)
    say(f"{output}: modality '{target}_from_{source}', {len(levels):,} cells x {levels.shape[1]:,}")
    scores = score_translation(trained, cells, levels, source=source, target=target)
    if scores is None:
        say(f"no cell has both '{source}' and '{target}' measured, so there is nothing to score")
        return
    columns = [name for name in ("value", "baseline", "null", "depth_only") if name in scores]
    show_table(
        ("metric", *columns),
        [
            (str(row["metric"]), *(f"{row[name]:.3f}" for name in columns))
            for _, row in scores.iterrows()
        ],
    )
    say("baseline: each feature's mean over the training cells; null: cells permuted")


@reads_data
def map_verb(
    *,
    reading: dict[str, Any],
    model: Trained,
    data: Data,
    output: Output,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of a new batch's part.")] = 200,
    save: Annotated[Path | None, typer.Option(help="Folder for the mapped model.")] = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Map new cells into a trained model; the cells it was trained on keep their place.

    A batch that the model does not know gets a part of its own, which alone is trained.

    [bold]Examples[/bold]

      coembed map model/ new_cells.h5mu -o mapped.h5mu

      coembed map model/ new_donor.h5mu --batch-key donor --save mapped/ -o mapped.h5mu
    """
    import numpy as np

    from coembed.data.write import write_h5mu
    from coembed.models.saving import load_model
    from coembed.workflow import HELD_OUT, attach, open_mudata

    refuse_input(data, output, overwrite)
    trained = load_model(model)
    cells = read_for(trained, data, reading)
    mapped = trained.map_query(cells, steps=steps, seed=seed, progress=at_terminal())
    mdata = open_mudata(data, cells)
    name = attach(mdata, mapped, cells, np.full(cells.n_cells, HELD_OUT, dtype=object))
    write_h5mu(mdata, output, overwrite=overwrite)
    if save is not None:
        mapped.save(save, overwrite=overwrite)
    new = [batch for batch in mapped.batches if batch not in trained.batches]
    say(f"{output}: obsm['{name}'], {cells.n_cells:,} cells")
    say(f"new batches: {', '.join(new)}" if new else "no new batch, so nothing was trained")
    say(f"next: coembed score {output}")


def read_for(model: Model, data: str, reading: dict[str, Any]) -> Cells:
    """Return the cells of a file or pilot, with the model's own batch column if none is named."""
    from coembed.data.pilots import resolve

    return resolve(data, **{"batch_key": model.batch_key, **reading, "query": True})
