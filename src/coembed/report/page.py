"""One self-contained page of a study, and its figures and scores as files."""

from __future__ import annotations

import base64
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from coembed import __version__
from coembed.errors import ParameterError, StudyError, did_you_mean
from coembed.files import write_bytes
from coembed.report import figures
from coembed.report.findings import MIN_MODELS, headline, rank_correlations
from coembed.report.picture import FORMATS, Picture
from coembed.report.results import GROUPS, PARTS, Results, load, short
from coembed.report.umaps import Cloud, coordinates

REVIEW = {
    "text": "Brombacher E, Hackenberg M, Kreutz C, Binder H, Treppner M. The performance of deep "
    "generative models for learning joint embeddings of single-cell multi-omics data. Frontiers "
    "in Molecular Biosciences 9:962644 (2022)",
    "url": "https://doi.org/10.3389/fmolb.2022.962644",
}

AGAIN = {
    "diverged": "It would diverge again. Run the model with a lower learning rate (--set), in a "
    "new folder.",
    "error": "Put the cause right, then run the study again and ask it to retry errors.",
    "killed": "Run the same command again: it is tried again.",
    "timeout": "Run the same command again with a longer time limit.",
    "out_of_memory": "Run the same command again with fewer workers, more memory or smaller sizes.",
}
"""How to retry a task, by the status of its row."""

STOPPED = {"early": "stopped improving", "cap": "reached the limit", "none": "nothing to train"}
"""Why a training ended, in words."""

MEANING = {
    "nmi": "Do clusters of the embedding match the cell types? 1: exactly; chance is near 0 but "
    "above it for few cells. The best of several Louvain resolutions.",
    "asw_label": "Are cells closer to their own type than to the next? 1: yes; 0.5: no difference.",
    "trajectory": "Is a known order of cells, such as a differentiation, kept? 1: exactly; 0.5: "
    "not at all; 0: reversed, or undefined.",
    "ari": "Like NMI, counting pairs of cells; 0: chance.",
    "ami": "Like NMI, corrected for chance.",
    "asw_batch": "Are batches mixed within each cell type? 1: fully.",
    "asw_site": "Are sites mixed within each cell type? 1: fully.",
    "graph_connectivity": "Do the cells of each type hang together in the neighbour graph? 1: "
    "all of them.",
}
"""The scores in plain words; all but NMI's chance level follow from specs/metrics.md."""

MIN_CELLS = 4
"""Fewer cells than this have no picture."""


def build_report(
    folder: Path | str, out: Path | str | None = None, *, formats: Sequence[str] = ("png", "pdf")
) -> Path:
    """Write the report of a study; what is there under the same names is replaced.

    Args:
        folder: of the study.
        out: folder to write to: `report.html`, `figures/`, `scores.csv`, `scores.json`. By
            default the study's own.
        formats: of the figures' files: "png", "pdf", "svg".

    Returns:
        The page. It loads nothing from elsewhere, so that it can be sent on its own.

    Raises:
        StudyError: the folder is not a study, or a file in it is damaged.
        ParameterError: a format that does not exist.
        OutputError: the report cannot be written; the page is written last.
    """
    started = time.perf_counter()
    for kind in formats:
        if kind not in FORMATS:
            raise ParameterError(f"no figure format '{kind}'", remedy=did_you_mean(kind, FORMATS))
    results = load(folder)
    out = results.folder if out is None else Path(out)
    pictures = _pictures(results)
    for picture in pictures.values():
        picture.save(out / "figures", formats)
    table = _score_table(results)
    csv = table.to_csv(index=False, float_format="%.6g", lineterminator="\n").encode()
    write_bytes(out / "scores.csv", csv)
    write_bytes(out / "scores.json", table.to_json(orient="records", indent=1).encode())
    context = {
        "results": results,
        "parts": {part: PARTS[part] for part in results.parts},
        "groups": GROUPS,
        "pictures": pictures,
        "headline": headline(results),
        "cautions": _cautions(results),
        "not_shown": _not_shown(results),
        "runs": _runs(results),
        "correlations": {part: _correlations(results, part) for part in results.parts},
        "min_models": MIN_MODELS,
        "failures": [row for row in results.rows if row["status"] != "ok"],
        "again": AGAIN,
        "meaning": MEANING,
        "remarks": _remarks(results),
        "references": _references(results),
        "review": REVIEW,
        "version": __version__,
        "formats": formats,
        "csv": "data:text/csv;base64," + base64.b64encode(csv).decode(),
        "seconds": f"{time.perf_counter() - started:.1f}",
    }
    page = out / "report.html"
    write_bytes(page, _render(context).encode())
    return page


def _render(context: dict[str, Any]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["short"] = short
    environment.filters["number"] = _number
    # The one place where text goes in as it is: our own drawing, serialised by an XML writer.
    environment.globals["drawing"] = lambda picture: Markup(picture.svg())
    environment.globals["colour"] = lambda name: figures.colour(context["results"], name)
    environment.globals["is_link"] = lambda text: str(text).startswith(("https://", "http://"))
    return environment.get_template("page.html").render(context)


def _number(value: float | None, form: str = ",.0f") -> str:
    return "–" if value is None or pd.isna(value) else format(value, form)


def _pictures(results: Results) -> dict[str, Picture]:
    """Return the figures there is something to draw for, by name."""
    drawn = []
    for part in results.parts if results.metrics else []:
        drawn += [
            figures.heat_maps(results, group, part) for group in GROUPS if results.metrics_of(group)
        ]
        drawn += [figures.curves(results, part), figures.boxes(results, part)]
    if len(results.runs):
        drawn.append(figures.cost(results))
    if clouds := _clouds(results):
        drawn.append(figures.umaps(results, clouds))
    return {picture.name: picture for picture in drawn}


def _clouds(results: Results) -> dict[tuple[str, int], Cloud]:
    """Return the first replicate that can be drawn, of each variant at the extreme sizes."""
    found = {}
    for variant in results.variants:
        for size in sorted({results.sizes[0], results.sizes[-1]}):
            for row in results.rows_of(variant, size):
                if (cloud := _cloud(results, row)) is not None:
                    found[variant, size] = cloud
                    break
    return found


def _cloud(results: Results, row: dict[str, Any]) -> Cloud | None:
    if row["embedding"] is None:
        return None
    arrays = results.ledger.embedding(row["key"])
    train, rows = arrays["train"], arrays["train_rows"]
    if len(train) < MIN_CELLS or not np.isfinite(train).all():
        return None
    if rows.min() < 0 or rows.max() >= len(results.cells):
        raise StudyError(
            f"has {len(results.cells)} cells, and an embedding names cell {rows.max()}",
            where=str(results.folder / "cells.csv"),
            remedy="Run the study again: it writes this file first and repeats no task",
        )
    xy = coordinates(train, results.folder / "umap" / f"{row['key']}.csv")
    labels = results.cells["label"].to_numpy(str)[rows]
    return Cloud(xy, labels, row["task"]["replicate"], row["key"])


def _score_table(results: Results) -> pd.DataFrame:
    """Return all scores, the columns that say which first."""
    table = results.scores.drop(columns="variant")
    first = ["dataset", "model", "preset", "size", "replicate", "evaluated_on", "metric", "value"]
    return table[[*first, *(name for name in table.columns if name not in first)]]


def _cautions(results: Results) -> list[str]:
    """Return what a reader must know before believing the numbers."""
    said = []
    failed = Counter(row["status"] for row in results.rows if row["status"] != "ok")
    if failed:
        kinds = ", ".join(f"{n} {status.replace('_', ' ')}" for status, n in failed.items())
        said.append(
            f"{failed.total()} of {len(results.rows)} tasks did not end well ({kinds}) and are in "
            "no median; they are listed under Failures."
        )
    if results.not_run > 0:
        said.append(
            f"{results.not_run} planned tasks have no result yet: run the study again to go on."
        )
    capped = sum(bool(row["improving"]) for row in results.rows if row["status"] == "ok")
    if capped:
        said.append(
            f"{capped} trainings reached their limit of epochs while still improving (marked "
            "below): longer ones might score better."
        )
    warned = Counter(
        event["message"]
        for row in results.rows
        for event in row["events"]
        if event.get("event") == "warning"
    )
    said += [f"{n} trainings warned: {message}" for message, n in warned.most_common(5)]
    if results.plan["replicates"] == 1:
        said.append("There is one replicate: no difference here can be told from noise.")
    versions = {json.dumps(row["versions"], sort_keys=True) for row in results.rows}
    if len(versions) > 1:
        said.append(
            f"The tasks ran with {len(versions)} different sets of software versions; "
            "their files say which."
        )
    return said


def _not_shown(results: Results) -> dict[str, str]:
    """Return title -> reason of the metrics that have no value anywhere."""
    missing = results.scores[~results.scores["metric"].isin(list(results.metrics))]
    return {
        results.titles[str(metric)]: "; ".join(sorted(set(lines["reason"]) - {""})) or "no value"
        for metric, lines in missing.groupby("metric", sort=False)
    }


@dataclass(frozen=True)
class Runs:
    """A line of the table of trainings: a variant at a size."""

    variant: str
    size: int
    n: int
    parameters: float
    parameters_trained: float
    epochs: str
    cpu_s: float
    peak_memory_mb: float
    stopped: str
    improving: int
    restarts: int
    keys: list[str]


def _runs(results: Results) -> list[Runs]:
    lines = []
    for variant in results.variants:
        for size in results.sizes:
            rows = results.rows_of(variant, size)
            if not rows:
                continue
            table = results.runs[
                (results.runs["variant"] == variant) & (results.runs["size"] == size)
            ]
            median = table[["parameters", "parameters_trained", "cpu_s", "peak_memory_mb"]].median()
            low, high = table["epochs"].min(), table["epochs"].max()
            reasons = Counter(STOPPED.get(row["stopped"], "unknown") for row in rows)
            lines.append(
                Runs(
                    variant,
                    size,
                    len(rows),
                    **{str(name): float(value) for name, value in median.items()},
                    epochs=f"{low:.0f}" if low == high else f"{low:.0f}–{high:.0f}",
                    stopped=", ".join(f"{n} {reason}" for reason, n in reasons.items()),
                    improving=sum(bool(row["improving"]) for row in rows),
                    restarts=sum("lr_factor" in e for row in rows for e in row["events"]),
                    keys=[row["key"] for row in rows],
                )
            )
    return lines


def _correlations(results: Results, part: str) -> dict[str, list[str]]:
    """Return title of a metric -> a text per size, those that could be computed."""
    table = rank_correlations(results, part)
    texts = {
        (line["metric"], line["size"]): f"{_number(line['rho'], '+.2f')} (n = {line['n']})"
        for line in table.to_dict("records")
    }
    return {
        title: [texts.get((metric, size), "–") for size in results.sizes]
        for metric, title in results.metrics.items()
        if (table["metric"] == metric).any()
    }


def _remarks(results: Results) -> list[dict[str, Any]]:
    """Return the undefined and doubtful scores of tasks that ended well, by reason."""
    table = results.scores[(results.scores["status"] == "ok") & (results.scores["reason"] != "")]
    remarks = []
    for _, lines in table.groupby(["metric", "evaluated_on", "undefined", "reason"], sort=False):
        first, values = lines.iloc[0], lines["value"].dropna()
        remarks.append(
            {
                "metric": results.titles[first["metric"]],
                "part": PARTS[first["evaluated_on"]],
                "kind": "undefined" if first["undefined"] else "doubtful",
                "reason": first["reason"],
                "shown_as": ", ".join(dict.fromkeys(f"{value:.3g}" for value in values)),
                "variants": ", ".join(dict.fromkeys(lines["variant"])),
                "keys": list(lines["key"]),
            }
        )
    return remarks


def _references(results: Results) -> list[dict[str, str]]:
    """Return one reference per model of the study."""
    found = []
    for model in dict.fromkeys(results.variants.values()):
        if (card := results.cards.get(model)) is not None:
            found.append({"name": card.title, "text": card.reference, "url": card.url})
        else:
            found.append({"name": model, "text": "No reference is known here", "url": ""})
    return found
