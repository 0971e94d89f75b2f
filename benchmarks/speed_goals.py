"""What issue 4 asks of speed and memory, judged by what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np
from speed_parts import ratios
from speed_quality import reached

Found = Mapping[str, Mapping[str, Any]]
"""Section -> part -> record (`speed_parts.measure`)."""

Row = Sequence[object]

TITLES = {
    "totalvi": "totalVI", "multivi": "MultiVI", "cobolt": "Cobolt", "scmm": "scMM",
    "scalex": "SCALEX", "scmvp": "scMVP", "davae": "DAVAE", "portal": "Portal",
}  # fmt: skip
STEP_GOALS = {"multivi": 3.0, "totalvi": 1.7}
QUALITY_GOAL, MEMORY_GOAL, STUDY_GOAL = 8.0, 1.5, 0.8
FLOOR_GOALS = dict.fromkeys(("cobolt", "scmm", "totalvi", "multivi"), 0.6)
OTHER_FLOOR_GOAL = 0.4
POWER_GOAL = 1.1
"""What counts as linear."""
NONE = "–"


def named(part: str) -> str:
    """Return the name of a part with the systems' titles."""
    return " ".join(TITLES.get(word, word) for word in part.split())


def goals(found: Found) -> list[Row]:
    """Return a row for every goal: what, how much, how much it is, whether it holds."""
    results = {s: {p: r["result"] for p, r in parts.items()} for s, parts in found.items()}
    rows: list[Row] = []

    def judge(what: str, goal: float, value: float | None, unit: str, most: bool = False) -> None:
        sign = "at most" if most else "at least"
        holds = value is not None and (value <= goal if most else value >= goal)
        shown = NONE if value is None else f"{value:.2f}{unit}"
        verdict = NONE if value is None else "yes" if holds else "**no**"
        rows.append((what, f"{sign} {goal:g}{unit}", shown, verdict))

    steps = results.get("step", {})
    for name, goal in STEP_GOALS.items():
        seconds = steps.get(name, {}).get("seconds_per_epoch", {})
        ratio = ratios(seconds["ours"], seconds["scvi"])["median"] if "scvi" in seconds else None
        judge(f"a step of {TITLES[name]} against scvi-tools'", goal, ratio, "x")
    for name in STEP_GOALS:
        run = race(name, results.get("quality", {}))
        what = f"{TITLES[name]} to scvi-tools' final held-out objective"
        judge(what, QUALITY_GOAL, run["ratio"]["median"] if run and run["ratio"] else None, "x")
    for part, result in results.get("floor", {}).items():
        name = part.split()[0]
        share = result["floor_seconds"] / median(result["seconds_per_step"])
        goal = FLOOR_GOALS.get(name, OTHER_FLOOR_GOAL)
        judge(f"{named(part)}: share of the floor", goal, share, "")
    largest = results.get("cells", {}).get("multivi 100000")
    used = memory_ratio(largest["memory"]) if largest else None
    judge("memory at 100,000 cells x 30,000 peaks", MEMORY_GOAL, used, "x", most=True)
    power = growth("multivi", results.get("cells", {}))
    judge("power with which time grows with cells, MultiVI", POWER_GOAL, power, "", most=True)
    runs = results.get("study", {}).values()
    useful = median(map(study_share, runs)) if runs else None
    judge("a study's time in training and scoring", STUDY_GOAL, useful, "")
    return rows


def race(name: str, results: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return when ours and scvi-tools' trainings were at the latter's final objective.

    None without both sides and the pace of both. Seconds are epochs times the pace, a number per
    repeat; `ours` is None where half of the trainings or more never got there.
    """
    theirs = [r for part, r in results.items() if part.startswith(f"{name} scvi")]
    ours = [r for part, r in results.items() if part.startswith(f"{name} ours")]
    pace = results.get(f"{name} pace", {}).get("seconds_per_epoch")
    if not theirs or not ours or pace is None:
        return None
    target = median(r["final"] for r in theirs)
    epochs = [reached(r["curve"], target) for r in ours]
    found = [n for n in epochs if n is not None]
    first = [n for r in theirs if (n := reached(r["curve"], target)) is not None]
    their_epochs = median(r["epochs"] for r in theirs)
    whole = [their_epochs * s for s in pace["scvi"]]
    there = [median(found) * s for s in pace["ours"]] if 2 * len(found) > len(epochs) else None
    return {
        "target": target, "theirs": whole, "their_epochs": their_epochs,
        "their_first": median(first) if first else None,
        "ours": there, "our_epochs": found, "of": len(epochs),
        "our_whole": [median(r["epochs"] for r in ours) * s for s in pace["ours"]],
        "ratio": ratios(there, whole) if there else None,
    }  # fmt: skip


def growth(name: str, results: Mapping[str, Any]) -> float | None:
    """Return the power with which an epoch's time grows over the three largest sizes, if any."""
    times = {
        int(part.split()[1]): median(r["seconds_per_epoch"])
        for part, r in results.items()
        if part.startswith(f"{name} ")
    }
    upper = sorted(times)[-3:]
    return slope(upper, [times[n] for n in upper]) if len(upper) == 3 else None


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Return the exponent of growth: the slope of log y over log x, by least squares."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def memory_ratio(memory: Mapping[str, float]) -> float:
    """Return the peak above the imports, over the data, parameters and optimiser state."""
    needed = memory["csr_mb"] + memory["parameters_and_optimiser_mb"]
    return (memory["peak_mb"] - memory["imports_mb"]) / needed


def study_share(run: Mapping[str, float]) -> float:
    """Return the share of workers' wall time that was training and scoring."""
    return (run["training_s"] + run["scoring_s"]) / (run["wall_s"] * run["workers"])
