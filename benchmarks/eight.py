"""The eight systems and two linear baselines on real pilots, with scvi-tools' rows beside them.

    make eight                                      everything, then docs/results/eight.md
    .venv/bin/python benchmarks/eight.py --models totalvi,scvi-totalvi --datasets bmmc_cite_600
    .venv/bin/python benchmarks/eight.py --page     the page alone, from what the ledgers hold

A run that is stopped goes on when the same command is given again. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from eight_page import Entry, write_page
from scvi_tools import EXECUTOR as SCVI_EXECUTOR
from scvi_tools import ScviPlan, version

from coembed.data.cells import Cells
from coembed.data.pilots import load_pilot
from coembed.errors import CoembedError, ParameterError, did_you_mean
from coembed.models import get_model
from coembed.models.requirements import check_trainable
from coembed.study import Ledger, Plan, run
from coembed.study.progress import console_progress
from coembed.study.run import EXECUTOR

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "out" / "eight"
PAGE = ROOT / "docs" / "results" / "eight.md"

REPLICATES, PERMUTATIONS, MAX_HELD_OUT, JOBS = 3, 20, 500, 2
SCVI = "scvi-"
"""Prefix of scvi-tools' models."""


@dataclass(frozen=True)
class Dataset:
    """A pilot and what is run on it.

    Attributes:
        name: of the pilot.
        models: coembed's, and scvi-tools' with the prefix `SCVI`, in the order of the page.
        size: number of training cells; None for all that are not held out.
    """

    name: str
    models: tuple[str, ...]
    size: int | None = None

    def folder(self, scvi: bool) -> Path:
        """Return the ledger of scvi-tools' models, or of coembed's."""
        return OUT / self.name / "scvi_tools" if scvi else OUT / self.name

    @property
    def entries(self) -> list[Entry]:
        """The lines of its tables."""
        return [
            Entry(name.removeprefix(SCVI), self.folder(name.startswith(SCVI)))
            for name in self.models
        ]

    def plan(self, cells: Cells, models: Sequence[str], kind: type[Plan] = Plan) -> Plan:
        """Return the study of `models`; its split and seeds do not depend on which they are."""
        held_out = min(MAX_HELD_OUT, cells.n_cells // 5)
        return kind.make(
            cells,
            self.name,
            models,
            sizes=(self.size or cells.n_cells - held_out,),
            held_out=held_out,
            replicates=REPLICATES,
            n_permutations=PERMUTATIONS,
        )


CITE = ("pca", "svd", "cobolt", "scmm", "totalvi", "scvi-totalvi", "scalex")
MULTIOME = ("pca", "svd", "cobolt", "scmm", "multivi", "scvi-multivi", "scmvp", "davae", "portal")
MOSAIC = ("pca", "cobolt", "totalvi", "scvi-totalvi", "multivi", "scvi-multivi")
DATASETS = {
    dataset.name: dataset
    for dataset in (
        Dataset("bmmc_cite_600", CITE),
        Dataset("pbmc10k_cite", CITE, size=2500),
        Dataset("bmmc_multiome_500", MULTIOME),
        Dataset("snare_adbrain_2500", MULTIOME),
        Dataset("pbmc_wnn_mosaic_1600", MOSAIC),
    )
}
MODELS = tuple(dict.fromkeys([*CITE, *MULTIOME, *MOSAIC]))


def runnable(models: Sequence[str], cells: Cells) -> Iterator[str]:
    """Yield those of `models` that can be run on `cells`; say on stderr why others cannot."""
    for name in models:
        try:
            if name.startswith(SCVI):
                version()
            else:
                check_trainable(get_model(name).card, cells)
        except CoembedError as error:
            _note(f"{cells.name}: {name} is left out: {error.what}. {error.remedy}")
        else:
            yield name


def run_dataset(dataset: Dataset, wanted: Sequence[str], *, jobs: int, redo: bool) -> None:
    """Run what the ledgers of a data set lack of the models that are wanted."""
    cells = load_pilot(dataset.name)
    chosen = list(runnable([name for name in dataset.models if name in wanted], cells))
    for scvi in (False, True):
        names = [name.removeprefix(SCVI) for name in chosen if name.startswith(SCVI) == scvi]
        if not names:
            continue
        folder = dataset.folder(scvi)
        if redo:
            forget(Ledger(folder), names)
        _note(f"{cells.name}: {', '.join(names)}{' of scvi-tools' if scvi else ''}")
        plan = dataset.plan(cells, names, ScviPlan if scvi else Plan)
        executor = SCVI_EXECUTOR if scvi else EXECUTOR
        with console_progress() as progress:
            run(plan, cells, folder, workers=jobs, progress=progress, executor=executor)


def forget(ledger: Ledger, models: Sequence[str]) -> None:
    """Remove the rows of `models`: a row's key does not see that a model's code has changed."""
    if (ledger.folder / "study.json").exists():
        with ledger.locked():
            for row in ledger.rows():
                if row["task"]["model"] in models:
                    ledger.discard(row["key"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is wanted, then write the page."""
    options = _parser().parse_args(arguments)
    try:
        datasets = [DATASETS[name] for name in _listed(options.datasets, tuple(DATASETS))]
        wanted = _listed(options.models, MODELS)
        if not options.page:
            for dataset in datasets:
                run_dataset(dataset, wanted, jobs=options.jobs, redo=options.redo)
        write_page(PAGE, {name: dataset.entries for name, dataset in DATASETS.items()})
    except KeyboardInterrupt as stop:
        _note(str(stop) or "Stopped. Run the same command to go on.")
        sys.exit(130)
    except CoembedError as error:
        _note(f"Error: {error}")
        sys.exit(2)
    print(PAGE)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--datasets", default="", help=f"by commas, of {', '.join(DATASETS)}")
    parser.add_argument("--models", default="", help=f"by commas, of {', '.join(MODELS)}")
    parser.add_argument("--jobs", type=int, default=JOBS, help=f"tasks at a time (default {JOBS})")
    parser.add_argument(
        "--redo",
        action="store_true",
        help="run the chosen models anew: for models whose code or defaults have changed",
    )
    parser.add_argument("--page", action="store_true", help="write the page, run nothing")
    return parser


def _listed(text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names in a list by commas; all of them for an empty one."""
    names = tuple(name.strip() for name in text.split(",") if name.strip()) or known
    for name in names:
        if name not in known:
            raise ParameterError(f"there is no '{name}' here", remedy=did_you_mean(name, known))
    return names


def _note(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    main()
