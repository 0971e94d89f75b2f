"""The page docs/results/speed.md: every number and verdict is computed from what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from speed_goals import (
    NONE,
    STEP_GOALS,
    TITLES,
    Found,
    Row,
    goals,
    growth,
    memory_ratio,
    named,
    race,
    study_share,
)
from speed_parts import ratios, summary

from coembed.files import write_bytes

SIDES = {
    "ours": "coembed, default sizes",
    "ours_at_their_sizes": "coembed, scvi-tools' sizes",
    "scvi": "scvi-tools",
}


def write_page(path: Path, found: Found, *, quick: bool = False) -> None:
    """Write the page of everything that has been measured.

    Args:
        path: of the Markdown file; written atomically.
        found: the records.
        quick: says on the page that the sizes were tiny.
    """
    about = "**A smoke run at tiny sizes: these numbers say nothing of speed.**" if quick else ""
    parts = [
        "# Speed and memory",
        about
        or "Written by `make bench`; every number is measured, [speed.json](speed.json) has "
        "all of them. How it is measured: benchmarks/README.md.",
        _conditions(found),
        "## What was asked for (issue 4)",
        table(("what", "goal", "measured", "holds"), goals(found)),
        *(text for section in SECTIONS for text in _section(section, found)),
    ]
    write_bytes(path, ("\n\n".join(part for part in parts if part) + "\n").encode())


def _section(name: str, found: Found) -> list[str]:
    title, lines = SECTIONS[name]
    records = found.get(name, {})
    if not records:
        missing = "No GPU was there." if name == "gpu" else "Not measured."
        return [f"## {title}", missing]
    return [f"## {title}", *lines({part: r["result"] for part, r in records.items()})]


def _conditions(found: Found) -> str:
    """Return on what machine and with what versions the numbers were made; several if they were."""
    records = [record for section in found.values() for record in section.values()]
    lines = {
        f"- {m['processor']}, {m['cores']} cores, {m['memory_gb']} GB"
        f"{', ' + m['gpu'] if m['gpu'] else ''}; {m['system']}; Python {m['python']}, "
        f"PyTorch {m['torch']}, scvi-tools {m['scvi-tools'] or 'not installed'}; "
        f"{r['threads']} threads"
        for r in records
        for m in [r["machine"]]
    }
    if not records:
        return ""
    dates, loads = (sorted(r[key] for r in records) for key in ("date", "load_before"))
    commits = ", ".join(sorted({str(r["commit"]) for r in records}))
    lines.add(
        f"- Measured {dates[0][:10]} to {dates[-1][:10]} at {commits}; load of the machine before "
        f"a measurement {loads[0]:.1f} to {loads[-1]:.1f}"
    )
    return "\n".join(sorted(lines))


# -- sections -------------------------------------------------------------------------------------


def step(results: Mapping[str, Any]) -> list[str]:
    """Comparisons, then memory."""
    texts = [_comparison(name, r) for name, r in results.items() if "memory" not in name]
    rows = [
        (TITLES[part.split()[0]], SIDES[part.split()[-1]], *_memory(r))
        for part, r in results.items()
        if "memory" in part
    ]
    columns = ("system", "side", "after imports, MB", "with the data, MB", "peak, MB", "rise, MB")
    return [*texts, *(["Resident memory, a process each:", table(columns, rows)] if rows else [])]


def _comparison(name: str, r: Mapping[str, Any]) -> str:
    seconds, steps = r["seconds_per_epoch"], r["steps_per_epoch"]
    rows = [
        (SIDES[side], steps[side], _spread([s / steps[side] for s in s_], 1e3),
         _spread(s_, 1), _ratio(s_, seconds.get("scvi")))
        for side, s_ in seconds.items()
    ]  # fmt: skip
    columns = ("side", "steps per epoch", "ms per step", "s per epoch", "scvi-tools' time over it")
    about = f"**{named(name)}** on {_data(r['cells'])}; minibatches of {r['batch_size']}, "
    about += f"{len(seconds['ours'])} repeats by turns, on {r['device']}."
    if r["their_sizes"] and "ours_at_their_sizes" not in seconds:
        about += " The default sizes are those of scvi-tools."
    elif r["their_sizes"]:
        about += f" Sizes: ours {r['default_sizes']}, scvi-tools' {r['their_sizes']}."
    return f"{about}\n\n{table(columns, rows)}"


def quality(results: Mapping[str, Any]) -> list[str]:
    """When each side was at the peer's final objective."""
    rows = []
    for name in STEP_GOALS:
        run = race(name, results)
        if run is None:
            continue
        ours = [r for part, r in results.items() if part.startswith(f"{name} ours")]
        found = run["our_epochs"]
        rows.append((
            TITLES[name], _data(ours[0]["cells"]), f"{run['target']:.1f}",
            f"{run['their_epochs']:.0f}", _spread(run["theirs"], 1),
            NONE if run["their_first"] is None else f"{run['their_first']:.0f}",
            _spread(found, 1) if found else "never", f"{len(found)} of {run['of']}",
            _spread(run["ours"], 1) if run["ours"] else NONE,
            _ratio(run["ours"], run["theirs"]) if run["ours"] else NONE,
            f"{median(r['final'] for r in ours):.1f}", _spread(run["our_whole"], 1),
        ))  # fmt: skip
    columns = (
        "system", "cells", "scvi-tools' final objective", "its epochs", "its training, s",
        "first there after epochs", "ours there after epochs", "trainings that got there",
        "ours there, s", "its training over ours", "our final objective", "our whole training, s",
    )  # fmt: skip
    about = (
        "The objective is the negative ELBO per cell of held-out cells: reconstruction of all "
        "modalities and KL terms at weight 1, without the batches' classifier, the experts' "
        "distance and priors of efficiency and background. One function evaluates both sides: "
        "scvi-tools' weights are copied into our networks. Seconds are the epochs of a training "
        "times the seconds of an epoch, which both sides measure by turns. "
        "Both sides train by their defaults on the same cells and features; scvi-tools holds a "
        "tenth of these back to stop by."
    )
    return [about, table(columns, rows)]


def floor(results: Mapping[str, Any]) -> list[str]:
    """Steps against their products, and their parts."""
    rows, parts = [], []
    for part, r in results.items():
        seconds, flops = median(r["seconds_per_step"]), sum(r["flops"].values())
        rows.append((
            named(part), r["batch_size"], _spread(r["seconds_per_step"], 1e3),
            f"{flops / 1e9:.3f}", f"{r['flops']['sparse'] / flops:.0%}", f"{r['rate'] / 1e9:.0f}",
            f"{r['floor_seconds'] * 1e3:.2f}", f"{r['floor_seconds'] / seconds:.0%}",
            f"{flops / r['rate_1024'] / seconds:.0%}",
        ))  # fmt: skip
        spent = r["parts"]
        names = ("gather", "forward and loss", "backward", "optimiser", "rest", "step")
        parts.append((named(part), *(f"{spent.get(n, 0.0) * 1e3:.2f}" for n in names)))
    columns = (
        "system", "batch", "ms per step", "GFLOP per step", "of it sparse", "GFLOP/s", "floor, ms",
        "share of the floor", "at the rate of 1024^3",
    )  # fmt: skip
    about = (
        "GFLOP/s is the rate at which the step's own dense products run by themselves; the floor "
        "is all products at that rate. On simulated cells, at the defaults."
    )
    head = ("system", "gather", "forward and loss", "backward", "optimiser", "rest", "step")
    return [about, table(columns, rows), "Where a step's time goes, ms:", table(head, parts)]


def scaling(results: Mapping[str, Any]) -> list[str]:
    """Time and memory along one size."""
    rows = []
    for part, r in results.items():
        m, cells = r["memory"], r["cells"]
        second = list(cells["features"])[-1]
        rows.append((
            TITLES[part.split()[0]], f"{cells['cells']:,}", f"{cells['features'][second]:,}",
            f"{cells['density'][second]:.1%}", _spread(r["seconds_per_epoch"], 1),
            len(r["seconds_per_epoch"]), f"{m['csr_mb']:.0f}",
            f"{m['parameters_and_optimiser_mb']:.0f}", f"{m['peak_mb'] - m['imports_mb']:.0f}",
            f"{memory_ratio(m):.2f}x",
        ))  # fmt: skip
    columns = (
        "system", "cells", "proteins or peaks", "density", "s per epoch", "epochs", "CSR, MB",
        "parameters and Adam, MB", "peak above imports, MB", "over what is needed",
    )  # fmt: skip
    lines = ["Simulated cells, 2,000 genes.", table(columns, rows)]
    for name in dict.fromkeys(part.split()[0] for part in results):
        if (power := growth(name, results)) is not None:
            lines.append(
                f"{TITLES[name]}: over the three largest sizes the time of an epoch grows with the "
                f"power {power:.2f}."
            )
    return lines


def study(results: Mapping[str, Any]) -> list[str]:
    """Where the wall time of a study goes."""
    rows = [
        (part, r["tasks"], r["not_ok"], r["workers"], f"{r['wall_s']:.1f}",
         f"{r['training_s']:.1f}", f"{r['scoring_s']:.1f}", f"{r['in_tasks_s']:.1f}",
         f"{study_share(r):.0%}")
        for part, r in results.items()
    ]  # fmt: skip
    columns = ("run", "tasks", "not ok", "workers", "wall, s", "training, s", "scoring, s",
               "in tasks, s", "training and scoring of wall x workers")  # fmt: skip
    return [f"Fits of 500 cells of {_data(next(iter(results.values()))['cells'])}.",
            table(columns, rows)]  # fmt: skip


def gpu(results: Mapping[str, Any]) -> list[str]:
    """Comparisons on CUDA, then whole trainings."""
    fits = [
        (TITLES[part.split()[1]], _data(r["cells"]), r["epochs"], r["steps"], f"{r['seconds']:.1f}")
        for part, r in results.items()
        if part.startswith("fit ")
    ]
    texts = [_comparison(p, r) for p, r in results.items() if p.startswith("step ")]
    return [*texts, table(("system", "cells", "epochs", "steps", "s for the training"), fits)]


SECTIONS: dict[str, tuple[str, Callable[[Mapping[str, Any]], list[str]]]] = {
    "step": ("A step beside scvi-tools'", step),
    "quality": ("Time to the same held-out objective", quality),
    "floor": ("Against the matrix products alone", floor),
    "cells": ("More cells", scaling),
    "peaks": ("More peaks", scaling),
    "study": ("A study of small fits", study),
    "gpu": ("On a GPU", gpu),
}


# -- tables ---------------------------------------------------------------------------------------


def table(columns: Sequence[str], rows: Iterable[Row]) -> str:
    """Return a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _data(cells: Mapping[str, Any]) -> str:
    features = ", ".join(f"{n:,} {m}" for m, n in cells["features"].items())
    kind = " (simulated)" if cells["simulated"] else ""
    return f"{cells['cells']:,} cells of {cells['name']}{kind}, {features}"


def _spread(values: Sequence[float], factor: float) -> str:
    s = summary([value * factor for value in values])
    return f"{s['median']:.3g} ({s['min']:.3g}-{s['max']:.3g})"


def _ratio(ours: Sequence[float], theirs: Sequence[float] | None) -> str:
    if not theirs:
        return NONE
    s = ratios(ours, theirs)
    return f"{s['median']:.2f}x ({s['min']:.2f}-{s['max']:.2f})"


def _memory(m: Mapping[str, float]) -> list[str]:
    rise = m["peak_mb"] - m["imports_mb"]
    return [f"{value:.0f}" for value in (m["imports_mb"], m["data_mb"], m["peak_mb"], rise)]
