"""The command line: a thin layer over the public API."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from coembed import __version__
from coembed.cli.explain import explain
from coembed.cli.options import Data, Device, Permutations, Preset, Seed, Settings, reads_data
from coembed.cli.show import (
    at_terminal,
    say,
    show_cells,
    show_scores,
    show_table,
    source_of,
)
from coembed.cli.text import (
    listed,
    model_settings,
    refuse_input,
    settings_of,
    sizes_of,
    takers,
)
from coembed.cli.trained import map_verb, translate
from coembed.errors import CoembedError, CoembedWarning

app = typer.Typer(
    name="coembed",
    help="Joint embeddings of single-cell multi-omics data, and how many cells they need.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"coembed {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show and exit.")
    ] = False,
) -> None:
    pass


@app.command()
@reads_data
def fit(
    *,
    reading: dict[str, Any],
    data: Data,
    output: Annotated[Path, typer.Option("-o", "--output", help="The new .h5mu file.")],
    model: Annotated[str, typer.Option("-m", "--model", help="See `coembed models`.")] = "cobolt",
    preset: Preset = "default",
    settings: Settings = None,
    held_out: Annotated[
        float,
        typer.Option(help="Share of cells kept from training, for honest scores; 0 for none."),
    ] = 0.1,
    save: Annotated[
        Path | None, typer.Option(help="Folder for the trained model (safetensors + JSON).")
    ] = None,
    seed: Seed = 0,
    device: Device = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output.")] = False,
) -> None:
    """Train a model and write the data with the embedding of every cell to a new file.

    The file has obsm["X_<model>"], which cells were held out, the history of every loss term and
    the hyper-parameters. A run that is stopped goes on when the same command is given again.

    [bold]Examples[/bold]

      coembed fit cells.h5mu -m cobolt -o embedded.h5mu

      coembed fit sim-cite -m scmm --set n_latent=20 --set max_epochs=50 -o out.h5mu

      coembed fit multiome.h5 --batch-key donor --save model/ -o embedded.h5mu
    """
    from coembed.data.pilots import resolve
    from coembed.data.write import write_h5mu
    from coembed.models import get_model
    from coembed.workflow import HELD_OUT, TRAIN, attach, open_mudata, split

    refuse_input(data, output, overwrite)
    system = get_model(model)
    values = settings_of(settings)
    cells = resolve(data, **reading)
    part = split(cells, held_out, seed)
    trained = system(cells.take(part == TRAIN), preset=preset, **values)
    checkpoint = output.with_name(f".{output.name}.{model}.checkpoint")
    try:
        trained.train(seed=seed, device=device, progress=at_terminal(), checkpoint=checkpoint)
    except KeyboardInterrupt:
        raise Stopped("Stopped. Run the same command to go on where it stopped.") from None
    outcome = trained.outcome
    assert outcome is not None
    if outcome.status != "ok":
        raise CoembedError(
            outcome.message, where=model, remedy="Try --set learning_rate=... ten times lower"
        )
    mdata = open_mudata(data, cells)
    name = attach(mdata, trained, cells, part)
    write_h5mu(mdata, output, overwrite=overwrite)
    if save is not None:
        trained.save(save, overwrite=overwrite)
    say(f"{output}: obsm['{name}'], {cells.n_cells:,} cells x {mdata.obsm[name].shape[1]}")
    say(
        f"trained on {(part == TRAIN).sum():,} cells ({(part == HELD_OUT).sum():,} held out) "
        f"for {outcome.epochs} epochs; {len(outcome.events)} restarts"
        + ("; the loss was still falling: raise max_epochs" if outcome.improving else "")
    )
    say(f"next: coembed score {output}")


@app.command()
@reads_data
def score(
    *,
    reading: dict[str, Any],
    data: Data,
    embedding: Annotated[
        list[str] | None, typer.Option("-e", "--embedding", help="Key of obsm. [default: all]")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Also write the table as CSV.")
    ] = None,
    permutations: Permutations = 20,
    seed: Seed = 0,
) -> None:
    """Score the embeddings in a file: the review's six metrics, ARI and AMI, each with its null.

    Cells that were held out of training are scored apart from those that were trained on.

    [bold]Examples[/bold]

      coembed score embedded.h5mu

      coembed score embedded.h5mu -e X_cobolt --ignore-labels unknown -o scores.csv
    """
    from coembed.data.pilots import resolve
    from coembed.files import write_bytes
    from coembed.workflow import open_mudata, require_scorable, score_embeddings

    cells = resolve(data, **reading)
    require_scorable(cells, batch_asked=reading.get("batch_key") is not None)
    mdata = open_mudata(data, cells)
    table = score_embeddings(
        mdata, cells, tuple(embedding or ()), n_permutations=permutations, seed=seed
    )
    show_scores(table)
    if output is not None:
        write_bytes(output, table.to_csv(index=False).encode())
        say(f"{output}: {len(table)} rows")


@app.command()
@reads_data
def study(
    *,
    reading: dict[str, Any],
    data: Data = "sim-multiome",
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the study.")] = Path(
        "out/study"
    ),
    models: Annotated[
        str, typer.Option(help="Names by commas. [default: all that take the data]")
    ] = "",
    sizes: Annotated[
        str, typer.Option(help="Numbers of training cells by commas. [default: five halvings]")
    ] = "",
    replicates: Annotated[int, typer.Option(min=1, help="Sub-samples of each size.")] = 3,
    held_out: Annotated[
        int | None,
        typer.Option(help="Cells never trained on. [default: a fifth, at most 5,000]"),
    ] = None,
    preset: Preset = "default",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="model.name=value, or name=value for all that have it."),
    ] = None,
    permutations: Permutations = 20,
    seed: Seed = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Tasks at a time. [default: one per processor]")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Processor threads of a task.")] = 1,
    timeout: Annotated[float | None, typer.Option(help="Seconds a task may take.")] = None,
    memory: Annotated[float | None, typer.Option(help="Memory a task may take, in GB.")] = None,
    retry_errors: Annotated[
        bool, typer.Option("--retry-errors", help="Run tasks again that ended with an error.")
    ] = False,
) -> None:
    """Train models on sub-samples of rising size and report how quality grows with cells.

    Every task has its own process and its own file in the output folder. A study that is stopped
    or killed goes on when the same command is given again; a wider one (more models, sizes,
    replicates) adds to what is there.

    [bold]Examples[/bold]

      coembed study sim-cite -o out/demo

      coembed study cells.h5mu --models pca,cobolt --sizes 500,1000,2500 --replicates 5 -o out/mine

      coembed study cells.h5mu --set cobolt.n_latent=20 --set max_epochs=50 -o out/quick
    """
    from coembed.data.pilots import resolve
    from coembed.report import build_report
    from coembed.study import Plan, run
    from coembed.study.progress import console_progress
    from coembed.workflow import require_scorable

    cells = resolve(data, **reading)
    require_scorable(cells, batch_asked=reading.get("batch_key") is not None)
    names = listed(models) or takers(cells)
    plan = Plan.make(
        cells,
        data,
        names,
        sizes=sizes_of(sizes),
        held_out=held_out,
        read=reading,
        presets=(preset,),
        params=model_settings(settings, names),
        replicates=replicates,
        seed=seed,
        n_permutations=permutations,
        threads=threads,
        device=device,
        timeout=timeout,
        memory_mb=None if memory is None else memory * 1e3,
    )
    try:
        with console_progress() as progress:
            ledger = run(
                plan, cells, output, workers=workers, retry_errors=retry_errors, progress=progress
            )
    except KeyboardInterrupt as stop:
        raise Stopped(str(stop) or "Stopped. Run the same command to go on.") from None
    failed = [row for row in ledger.rows() if row["status"] != "ok"]
    page = build_report(output)
    if failed:
        say(f"{len(failed)} tasks did not end well; the report says which and why")
    say(f"report: {page}")


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a study.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The page. [default: in the folder]")
    ] = None,
) -> None:
    """Make the report of a study: one HTML page that needs no network, and its figures.

    [bold]Examples[/bold]

      coembed report out/study

      coembed report out/study -o report.html
    """
    from coembed.report import build_report

    say(f"report: {build_report(folder, output)}")


@app.command()
def models(
    name: Annotated[str | None, typer.Argument(help="A model, for its hyper-parameters.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """List the models, or the hyper-parameters of one with the source of every default.

    [bold]Examples[/bold]

      coembed models

      coembed models cobolt

      coembed models --json
    """
    from dataclasses import asdict

    from coembed.models import cards, get_model

    if name is None:
        if as_json:
            typer.echo(json.dumps([asdict(card) for card in cards()], indent=1))
            return
        show_table(
            ("model", "architecture", "cells", "modalities", "also", "reference"),
            [
                (
                    card.name,
                    card.architecture,
                    ", ".join(card.pairing),
                    "; ".join("+".join(roles) for roles in card.modalities),
                    ", ".join(card.abilities) or "-",
                    card.url,
                )
                for card in cards()
            ],
        )
        return
    system = get_model(name)
    rows = [
        (key, json.dumps(info.default), info.description or "", source_of(info))
        for key, info in system.Params.model_fields.items()
    ]
    if as_json:
        keys = ("name", "default", "meaning", "source")
        values = [dict(zip(keys, row, strict=True)) for row in rows]
        typer.echo(json.dumps({**asdict(system.card), "params": values}, indent=1))
        return
    card = system.card
    say(f"{card.title}: {card.summary}\n{card.reference}\n{card.url}")
    for departure in card.departures:
        say(f"departs from the original: {departure}")
    say(f"presets: default, {', '.join(p for p in system.presets if p != 'default') or '-'}")
    show_table(("hyper-parameter", "default", "meaning", "source"), rows)


@app.command(name="data")
@reads_data
def data_verb(
    *,
    reading: dict[str, Any],
    data: Annotated[str | None, typer.Argument(help="A pilot or a file, to check it.")] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write it as a new .h5mu file.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output.")] = False,
) -> None:
    """List the pilot data sets, or check a file and show what coembed sees in it.

    [bold]Examples[/bold]

      coembed data

      coembed data cells.h5mu --batch-key donor

      coembed data sim-cite -o sim-cite.h5mu
    """
    from coembed.data.pilots import pilots, resolve
    from coembed.data.write import to_mudata, write_h5mu

    if data is None:
        rows = [
            (p.name, p.kind, "?" if p.n_cells is None else f"{p.n_cells:,}", p.source)
            for p in pilots()
        ]
        show_table(("pilot", "kind", "cells", "source"), rows)
        return
    cells = resolve(data, **reading)
    show_cells(cells, takers(cells))
    if output is not None:
        write_h5mu(to_mudata(cells), output, overwrite=overwrite)
        say(f"{output}: written")


app.command()(translate)
app.command(name="map")(map_verb)
app.add_typer(explain)


class Stopped(Exception):  # noqa: N818 - not an error
    """Ctrl-C, with what the user should know."""


def _print_warnings() -> None:
    """Show coembed's own warnings as a line each, without the place in our code."""
    others = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *rest: Any, **named: Any) -> None:
        if issubclass(category, CoembedWarning):
            typer.secho(f"Warning: {message}", err=True, fg=typer.colors.YELLOW)
        else:
            others(message, category, *rest, **named)

    warnings.showwarning = show
    warnings.simplefilter("always", CoembedWarning)


def main() -> None:
    """Run the command line; a user's error is a message and exit code 2, never a traceback."""
    try:
        with warnings.catch_warnings():
            _print_warnings()
            code = app(standalone_mode=False)
    except Stopped as stop:
        typer.secho(str(stop), err=True)
        sys.exit(130)
    except CoembedError as error:
        typer.secho(f"Error: {error}", err=True, fg=typer.colors.RED)
        sys.exit(2)
    except Exception as error:
        if hasattr(error, "exit_code") and hasattr(error, "show"):  # typer's own usage errors
            error.show()
            sys.exit(error.exit_code)
        raise
    sys.exit(code if isinstance(code, int) else 0)
