"""The answer in words, from the scores alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from coembed.report.results import PARTS, Results, Score, is_number

MIN_MODELS = 4
"""Fewer models than this have no rank correlation worth a number."""


@dataclass(frozen=True)
class Standing:
    """A variant in the headline's table, best first.

    Attributes:
        variant: its name.
        linear: it is a linear baseline.
        first: its score at the smallest size.
        last: its score at the largest size.
        gain: last minus first, and what to think of it.
        lead: last minus the best linear baseline's, and what to think of it.
    """

    variant: str
    linear: bool
    first: Score | None
    last: Score
    gain: str
    lead: str


@dataclass(frozen=True)
class Headline:
    """The plain-language answer.

    Attributes:
        sentences: to be read in this order.
        metric: the title of the metric it rests on; empty where nothing could be scored.
        part: the cells it was scored on.
        sizes: the smallest and the largest size that have scores.
        standings: the variants, best first.
    """

    sentences: list[str]
    metric: str = ""
    part: str = ""
    sizes: tuple[int, int] = (0, 0)
    standings: tuple[Standing, ...] = ()


def noise(a: Score, b: Score) -> float:
    """Return what a difference must exceed: the larger of the two scores' noise; NaN if unknown."""
    return float(np.fmax(a.noise, b.noise))


def verdict(a: Score, b: Score) -> str:
    """Say whether two scores differ by more than their replicates do."""
    spread = noise(a, b)
    if not is_number(spread):
        return "one replicate: noise unknown"
    return "within noise" if abs(a.value - b.value) < spread else "beyond noise"


def headline(results: Results) -> Headline:
    """Return which variant was best, by how much, and what more cells gained."""
    intro = _intro(results)
    metric = next(iter(results.metrics), None)
    if metric is None:
        return Headline([intro, _nothing(results)])
    part = next(p for p in results.parts if _sizes(results, p, metric))
    scored = _sizes(results, part, metric)
    first, last = scored[0], scored[-1]
    final = _at(results, part, metric, last)
    ranking = sorted(final, key=lambda variant: -final[variant].value)
    title = results.titles[metric]
    sentences = [intro]
    if metric != "nmi":
        sentences.append(f"NMI could not be computed; the answer rests on {title}.")
    if last != results.sizes[-1]:
        sentences.append(
            f"Nothing could be scored at {results.sizes[-1]:,} cells; the largest size with scores "
            f"is {last:,}."
        )
    sentences += _best(results, final, ranking, title, part, last)
    sentences += _more_cells(results, part, metric, ranking[0], scored)
    return Headline(
        sentences,
        metric=title,
        part=PARTS[part],
        sizes=(first, last),
        standings=tuple(
            _standing(results, final, ranking, variant, _at(results, part, metric, first))
            for variant in ranking
        ),
    )


def rank_correlations(results: Results, part: str) -> pd.DataFrame:
    """Return Spearman's correlation of rank and number of trained parameters (study.md section 4).

    Ranks are by the medians, 1 the best; negative: larger models rank better.

    Returns:
        One line per metric and size: `metric`, `size`, `n` models, `rho` (NaN where all ranks or
        all numbers are equal). A line is left out with fewer than `MIN_MODELS` models.
    """
    lines = []
    trained = results.runs.groupby(["variant", "size"])["parameters_trained"].median()
    for metric in results.metrics:
        for size in results.sizes:
            medians = {v: s.value for v, s in _at(results, part, metric, size).items()}
            table = pd.DataFrame(
                {
                    "rank": pd.Series(medians, dtype=float).rank(ascending=False),
                    "trained": trained[trained.index.get_level_values("size") == size].droplevel(
                        "size"
                    ),
                }
            ).dropna()
            table = table[table["trained"] > 0]
            if len(table) >= MIN_MODELS:
                table["trained"] = table["trained"].rank()
                constant = (table.nunique() < 2).any()
                rho = np.nan if constant else table["rank"].corr(table["trained"])
                lines.append({"metric": metric, "size": size, "n": len(table), "rho": rho})
    return pd.DataFrame(lines, columns=["metric", "size", "n", "rho"])


def _intro(results: Results) -> str:
    plan, card = results.plan, results.card
    sizes, n = results.sizes, len(results.variants)
    span = f"{sizes[0]:,} to {sizes[-1]:,}" if len(sizes) > 1 else f"{sizes[0]:,}"
    replicates = _count(plan["replicates"], "random sub-sample")
    scored = (
        f"the same {plan['held_out']:,} cells that no training saw"
        if plan["held_out"]
        else "the cells it was trained on (none were held out)"
    )
    kind = "simulated " if card["simulated"] else ""
    return (
        f"{_count(n, 'model')} trained on {span} {kind}cells of {card['name']}, "
        f"{replicates} at each size; each embedding was scored on {scored}."
    )


def _nothing(results: Results) -> str:
    if not any(row["status"] == "ok" for row in results.rows):
        return "No task ended well, so there is nothing to compare. The failures are listed below."
    reasons = sorted(set(results.scores["reason"]) - {""})
    return f"No score could be computed: {'; '.join(reasons) or 'no reason was recorded'}."


def _best(
    results: Results,
    final: dict[str, Score],
    ranking: list[str],
    title: str,
    part: str,
    size: int,
) -> list[str]:
    """Say who leads at the largest size, over the linear baseline and over the null."""
    best = ranking[0]
    top = final[best]
    text = (
        f"At {size:,} cells, {best} has the best {title} on {PARTS[part]}: {top.value:.3f} "
        f"(median of {_count(len(top.values), 'replicate')})"
    )
    linear = [variant for variant in ranking if results.is_linear(variant)]
    deep = [variant for variant in ranking if variant not in linear]
    if not linear:
        text += ". The study has no linear baseline to compare with."
    elif not deep:
        text += ". All models of the study with a score are linear baselines."
    elif best in linear:
        rival = deep[0]
        text += (
            f". It is a linear baseline: the best deep model, {rival} "
            f"({final[rival].value:.3f}), is {top.value - final[rival].value:.3f} below it, "
            f"{_noise_clause(top, final[rival])}."
        )
    else:
        rival = linear[0]
        text += (
            f", {top.value - final[rival].value:.3f} above the best linear baseline, {rival} "
            f"({final[rival].value:.3f}), {_noise_clause(top, final[rival])}."
        )
    if not is_number(top.null):
        return [text, "No permutation null was computed, so chance is not accounted for."]
    over_null = (
        f"With the labels shuffled, the same embeddings would score {top.null:.3f}: "
        f"{best} is {top.value - top.null:.3f} above chance."
    )
    return [text, over_null]


def _more_cells(
    results: Results, part: str, metric: str, best: str, scored: list[int]
) -> list[str]:
    """Say what more cells gained for the best variant."""
    title = results.titles[metric]
    found = [(n, s) for n in scored if (s := _value(results, part, metric, best, n)) is not None]
    if len(found) < 2:
        return [
            f"{best} has a score at one size only: the study does not say what more cells gain."
        ]
    (first, low), (last, high) = found[0], found[-1]
    gain = high.value - low.value
    verb = "gained" if gain >= 0 else "lost"
    text = (
        f"From {first:,} to {last:,} cells, {best} {verb} {abs(gain):.3f} in {title} "
        f"({low.value:.3f} to {high.value:.3f}), {_noise_clause(high, low)}."
    )
    if len(found) == 2:
        return [text]
    before, middle = found[-2]
    step = high.value - middle.value
    return [
        f"{text} The last step, from {before:,} to {last:,} cells, brought {step:+.3f}, "
        f"{_noise_clause(high, middle)}."
    ]


def _standing(
    results: Results,
    final: dict[str, Score],
    ranking: list[str],
    variant: str,
    initial: dict[str, Score],
) -> Standing:
    last, first = final[variant], initial.get(variant)
    linear = [name for name in ranking if results.is_linear(name)]
    gain = "–" if first is None or first is last else _difference(last, first)
    lead = "–" if not linear or variant == linear[0] else _difference(last, final[linear[0]])
    return Standing(variant, variant in linear, first, last, gain, lead)


def _difference(a: Score, b: Score) -> str:
    return f"{a.value - b.value:+.3f} ({verdict(a, b)})"


def _noise_clause(a: Score, b: Score) -> str:
    spread = noise(a, b)
    if not is_number(spread):
        return "but with one replicate the noise is unknown"
    if abs(a.value - b.value) < spread:
        return f"which is within noise (replicates differ by {spread:.3f}, standard deviation)"
    return f"which is beyond noise (replicates differ by {spread:.3f}, standard deviation)"


def _sizes(results: Results, part: str, metric: str) -> list[int]:
    return [size for size in results.sizes if _at(results, part, metric, size)]


def _at(results: Results, part: str, metric: str, size: int) -> dict[str, Score]:
    """Return the variants that have a value there."""
    found = {v: _value(results, part, metric, v, size) for v in results.variants}
    return {variant: score for variant, score in found.items() if score is not None}


def _value(results: Results, part: str, metric: str, variant: str, size: int) -> Score | None:
    score = results.score(part, metric, variant, size)
    return score if score is not None and is_number(score.value) else None


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"
