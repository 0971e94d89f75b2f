"""The page docs/results/eight.md: tables of ledgers and a verdict, all of it computed."""

from __future__ import annotations

import platform
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from coembed.errors import StudyError
from coembed.files import write_bytes
from coembed.report.results import BIOLOGY, PARTS, TECHNICAL, Results, Score, is_number, load

SIX = ("nmi", "asw_label", "trajectory", "asw_batch", "asw_site", "graph_connectivity")
TITLES = {**BIOLOGY, **TECHNICAL}
NOT_JUDGED = ("trajectory",)
"""At these sizes it flips between 0 and 0.9 across seeds (README of the pilots)."""

TWINS = {"totalvi": "totalVI", "multivi": "MultiVI"}
"""Models that scvi-tools has too."""

NONE = "–"


@dataclass(frozen=True)
class Entry:
    """A line of a data set's tables: a model and the ledger that it is in."""

    model: str
    folder: Path

    @property
    def results(self) -> Results | None:
        """What its study found; None where it has not been run."""
        results = _load(self.folder)
        return results if results and self.model in results.variants else None

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Its rows, by replicate, whatever their status."""
        results = self.results
        return results.rows_of(self.model, results.sizes[-1], ok=False) if results else []

    @property
    def ok(self) -> list[dict[str, Any]]:
        """Its rows that ended well."""
        return [row for row in self.rows if row["status"] == "ok"]

    @property
    def scvi(self) -> str | None:
        """The version of scvi-tools, of its model; None for coembed's."""
        return self.rows[0]["task"]["params"].get("scvi-tools") if self.rows else None

    @property
    def title(self) -> str:
        """What the page calls it."""
        if self.scvi:
            return f"{TWINS[self.model]} (scvi-tools {self.scvi})"
        card = self.results.cards.get(self.model) if self.results else None
        return card.title if card else self.model

    def score(self, part: str, metric: str) -> Score | None:
        """Return the seeds of a score; None where no task has it."""
        results = self.results
        return results.score(part, metric, self.model, results.sizes[-1]) if results else None

    def reasons(self, part: str, metric: str) -> list[str]:
        """Return why seeds have no value, or one that is no measurement."""
        lines = [
            line
            for row in self.ok
            for line in row["scores"]
            if (line["evaluated_on"], line["metric"]) == (part, metric)
        ]
        found = [line["reason"] for line in lines if line["undefined"] or line["value"] is None]
        if not lines:
            found = [event["message"] for row in self.ok for event in row["events"]
                     if event.get("event") == "no held-out embedding"]  # fmt: skip
        return [f"{reason} ({n} of {len(self.ok)} seeds)" for reason, n in Counter(found).items()]


@cache
def _load(folder: Path) -> Results | None:
    return load(folder) if (folder / "study.json").exists() else None


@dataclass
class Notes:
    """Footnotes of the page, each text once."""

    texts: list[str] = field(default_factory=list)

    def mark(self, text: str) -> str:
        """Return the mark of a footnote; nothing for no text."""
        if not text:
            return ""
        if text not in self.texts:
            self.texts.append(text)
        return f"[^{self.texts.index(text) + 1}]"

    def lines(self) -> list[str]:
        """Return the footnotes."""
        return [f"[^{i}]: {text}." for i, text in enumerate(self.texts, 1)]


@dataclass(frozen=True)
class Verdict:
    """Ours against scvi-tools, of one score.

    Attributes:
        ours: median over seeds.
        theirs: median over seeds.
        sd: standard deviation over seeds, pooled over both; NaN where either has none.
    """

    ours: float
    theirs: float
    sd: float

    @classmethod
    def of(cls, ours: Score | None, theirs: Score | None) -> Verdict | None:
        """Compare two scores; None where either is not there or not a measurement."""
        if ours is None or theirs is None or ours.undefined or theirs.undefined:
            return None
        if not (is_number(ours.value) and is_number(theirs.value)):
            return None
        return cls(ours.value, theirs.value, float(np.sqrt((ours.sd**2 + theirs.sd**2) / 2)))

    @property
    def difference(self) -> float:
        """Ours less theirs; more is better for every metric here."""
        return self.ours - self.theirs

    @property
    def holds(self) -> bool:
        """Say whether ours is at least as good within one seed-sd (a sd there is not is 0)."""
        return self.difference >= -(self.sd if is_number(self.sd) else 0.0)


def write_page(path: Path, datasets: Mapping[str, Sequence[Entry]]) -> None:
    """Write the page.

    Args:
        path: of the page.
        datasets: name -> the lines of its tables, in order.

    Raises:
        StudyError: no data set has been run.
        OutputError: the page cannot be written.
    """
    _load.cache_clear()
    run = {name: entries for name, entries in datasets.items() if any(e.rows for e in entries)}
    if not run:
        raise StudyError(
            "there is nothing to make the page of", remedy="Run benchmarks/eight.py without --page"
        )
    notes = Notes()
    lines = [*_head(run)]
    for name, entries in run.items():
        lines += _dataset(name, entries, notes)
    lines += _verdicts(run)
    missing = [name for name in datasets if name not in run]
    if missing:
        lines += [f"Not run yet: {', '.join(missing)}.", ""]
    lines += notes.lines()
    write_bytes(path, ("\n".join(lines) + "\n").encode())


def _head(run: Mapping[str, Sequence[Entry]]) -> list[str]:
    rows = [row for entries in run.values() for entry in entries for row in entry.rows]
    versions: dict[str, set[str]] = {}
    for row in rows:
        found = {**row["versions"], "scvi-tools": row["task"]["params"].get("scvi-tools")}
        for name in ("coembed", "scvi-tools", "torch", "scanpy", "python", "platform"):
            versions.setdefault(name, set()).update({found[name]} - {None})
    plans = [e.results.plan for entries in run.values() for e in entries if e.results]
    threads, permutations, seeds = (
        " or ".join(map(str, sorted({plan[key] for plan in plans})))
        for key in ("threads", "n_permutations", "replicates")
    )
    told = "; ".join(f"{name} {', '.join(sorted(v))}" for name, v in versions.items() if v)
    return [
        "# The eight on real pilots",
        "",
        "<!-- Made by `make eight`; do not edit. -->",
        "",
        f"Made by `make eight` (`benchmarks/eight.py`) on {datetime.now(UTC):%Y-%m-%d} from the "
        f"ledgers in `out/eight`. Versions of the rows: {told}. Processor of the machine that made "
        f"the page: {_processor()}.",
        "",
        f"**How to read it.** Every model is trained with its defaults on {threads} thread, once "
        f"for each of {seeds} seeds. A score is the median over the seeds ± their standard "
        f"deviation, with the median of the permutation nulls ({permutations} permutations) in "
        "brackets; more is better in every column, and a score near its null says nothing. For "
        "batch ASW the null (batches permuted within each cell type) is the best there is to be "
        "had. Held-out cells were never trained on; each model encodes them with their own batch "
        "label. All models of a data set have the same training and held-out cells, the same "
        "permutations, and scvi-tools' models the seeds of ours. **Trajectory is shown but is not "
        "to be judged**: at these sizes it flips between 0 and 0.9 across seeds.",
        "",
        "The cost is the median over seeds: wall and processor time from counts to trained model "
        "(selection of features included, scoring not), on a machine that did other things too, "
        "so that processor time is the better one to compare; peak resident memory of the task's "
        "process, libraries included; parameters; optimiser steps. *cap*: training ended at its "
        "planned length; *early*: it stopped because the validation loss no longer fell; *none*: "
        "nothing is trained by gradients. *still falling*: it ended at its cap while its "
        "loss still fell (`Outcome.improving`).",
        "",
    ]  # fmt: skip


def _processor() -> str:
    """Return the name of the processor."""
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _dataset(name: str, entries: Sequence[Entry], notes: Notes) -> Iterator[str]:
    shown = [entry for entry in entries if entry.rows]
    yield from (f"## {name}", "", _described(shown[0]), "")
    for part, title in PARTS.items():
        yield from (f"### {name}: {title}", "", *_score_table(shown, part, notes), "")
    yield from (f"### {name}: cost", "", *_cost_table(shown, notes), "")
    missing = [
        TWINS[entry.model] + " of scvi-tools" if entry.folder.name == "scvi_tools" else entry.model
        for entry in entries
        if not entry.rows
    ]
    if missing:
        yield from (f"Not run: {', '.join(missing)}.", "")


def _described(entry: Entry) -> str:
    results = entry.results
    assert results is not None  # it has rows
    card, size, held_out = results.card, results.sizes[-1], results.plan["held_out"]
    kinds = {"rna": "genes", "prot": "proteins", "atac": "peaks"}
    features = ", ".join(
        f"{m['features']:,} {kinds[role]} (measured in {m['cells']:,} cells)"
        for role, m in card["modalities"].items()
    )
    sampled = (
        "each seed trains on all the others"
        if size + held_out == card["n_cells"]
        else "each seed has its own sub-sample of the others"
    )
    return (
        f"{card['n_cells']:,} cells{' (simulated)' if card['simulated'] else ''}: {size:,} to "
        f"train on, {held_out:,} held out ({sampled}). {features}. {len(card['labels'])} cell "
        f"types, {card['unlabelled']:,} cells without one. Batches: {len(card['batches'])}."
    )


def _score_table(entries: Sequence[Entry], part: str, notes: Notes) -> Iterator[str]:
    def defined(metric: str) -> bool:
        scores = [entry.score(part, metric) for entry in entries]
        return any(score is not None and is_number(score.value) for score in scores)

    metrics = [metric for metric in SIX if defined(metric)]
    yield from _table(
        ["model", *(TITLES[metric] for metric in metrics)],
        (
            [_named(entry, notes), *(_cell(entry, part, metric, notes) for metric in metrics)]
            for entry in entries
        ),
    )
    for metric in SIX:
        if metric not in metrics:
            why = {reason for entry in entries for reason in _bare(entry, part, metric)}
            yield ""
            yield f"{TITLES[metric]} is not defined here: {'; '.join(sorted(why))}."


def _bare(entry: Entry, part: str, metric: str) -> list[str]:
    return [reason.rpartition(" (")[0] for reason in entry.reasons(part, metric)]


def _named(entry: Entry, notes: Notes) -> str:
    """Return the title, with a footnote on seeds that did not end well."""
    lost = [f"{row['status']}: {row['message']}" for row in entry.rows if row["status"] != "ok"]
    return entry.title + notes.mark(
        f"{entry.title}: {len(lost)} of {len(entry.rows)} seeds have no result ({lost[0]})"
        if lost
        else ""
    )


def _cell(entry: Entry, part: str, metric: str, notes: Notes) -> str:
    score = entry.score(part, metric)
    mark = notes.mark("; ".join(entry.reasons(part, metric)))
    if score is None or not is_number(score.value):
        return NONE + mark
    sd = f" ± {score.sd:.3f}" if is_number(score.sd) else ""
    null = f" ({score.null:.3f})" if is_number(score.null) else ""
    return f"{score.value:.3f}{sd}{null}{mark}"


def _cost_table(entries: Sequence[Entry], notes: Notes) -> Iterator[str]:
    columns = {
        "wall, s": _median("wall_s", "{:,.1f}"),
        "processor, s": _median("cpu_s", "{:,.1f}"),
        "peak memory, MB": _median("peak_memory_mb", "{:,.0f}"),
        "parameters": _median("parameters", "{:,.0f}"),
        "steps": _median("steps", "{:,.0f}"),
        "stopped": _stopped,
    }
    yield from _table(
        ["model", *columns],
        ([_named(entry, notes), *(text(entry.ok) for text in columns.values())]
         for entry in entries),
    )  # fmt: skip


def _median(name: str, form: str) -> Callable[[list[dict[str, Any]]], str]:
    def text(rows: list[dict[str, Any]]) -> str:
        known = [row[name] for row in rows if row[name] is not None]
        return form.format(float(np.median(known))) if known else NONE

    return text


def _stopped(rows: list[dict[str, Any]]) -> str:
    """Return how the seeds ended: "cap", "early 2, cap 1, still falling 1"."""
    ends = Counter(row["stopped"] for row in rows)
    falling = sum(bool(row["improving"]) for row in rows)
    texts = list(ends) if len(ends) == 1 else [f"{end} {n}" for end, n in ends.most_common()]
    return ", ".join([*texts, *([f"still falling {falling} of {len(rows)}"] if falling else [])])


def _verdicts(run: Mapping[str, Sequence[Entry]]) -> Iterator[str]:
    yield from ("## totalVI and MultiVI against scvi-tools", "")
    yield (
        "Ours less theirs, medians over seeds; *sd* is the standard deviation over seeds, pooled "
        "over both. *Holds*: ours is at least as good within one such sd. Three seeds tell a sd "
        "only roughly."
    )
    yield ""
    lines, judged = [], []
    for name, entries in run.items():
        for ours, theirs in _pairs(entries):
            for part, metric in ((part, metric) for part in PARTS for metric in SIX):
                verdict = Verdict.of(ours.score(part, metric), theirs.score(part, metric))
                if verdict is None:
                    continue
                if metric in NOT_JUDGED:
                    answer = "not judged"
                else:
                    answer = "yes" if verdict.holds else "**no**"
                    judged.append(verdict.holds)
                lines.append([
                    ours.title, name, PARTS[part], TITLES[metric], f"{verdict.ours:.3f}",
                    f"{verdict.theirs:.3f}", f"{verdict.difference:+.3f}",
                    f"{verdict.sd:.3f}" if is_number(verdict.sd) else NONE, answer,
                ])  # fmt: skip
    if not lines:
        yield from ("No data set has both ours and scvi-tools' rows yet.", "")
        return
    header = ["model", "data", "cells", "metric", "ours", "scvi-tools", "difference", "sd", "holds"]
    yield from _table(header, lines)
    yield from ("", f"It holds in {sum(judged)} of {len(judged)} comparisons that are judged.", "")


def _pairs(entries: Sequence[Entry]) -> Iterator[tuple[Entry, Entry]]:
    """Yield coembed's and scvi-tools' entry of the models that both have results for."""
    done = [entry for entry in entries if entry.ok]
    for ours in done:
        for theirs in done:
            if ours.model == theirs.model and theirs.scvi and not ours.scvi:
                yield ours, theirs


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield _line(header)
    yield _line(["---"] * len(header))
    yield from map(_line, rows)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/').replace(chr(10), ' ') for cell in cells)} |"
