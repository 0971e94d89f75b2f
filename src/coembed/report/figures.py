"""The figures of the report. Each function draws one from the results and says what it shows."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from coembed.report.picture import Picture, printable, style
from coembed.report.results import GROUPS, PARTS, Results, Score, is_number, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from coembed.report.umaps import Cloud

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6B4E9B", "#5B6670")
"""Okabe and Ito's, safe for colour-blind readers, with violet and grey for yellow and black."""

MARKERS = "osD^vPX"
GREY = "#c9ced3"
DPI = 150
_LEAST_RANGE = 0.1


def colour(results: Results, variant: str) -> str:
    """Return the colour of a variant, the same in every figure."""
    return COLOURS[list(results.variants).index(variant) % len(COLOURS)]


def heat_maps(results: Results, group: str, part: str) -> Picture:
    """Draw the median of each metric of a group, variants by sizes (the review's Figs 2 and 3)."""
    metrics, variants, sizes = results.metrics_of(group), list(results.variants), results.sizes
    columns = min(3, len(metrics))
    rows = math.ceil(len(metrics) / columns)
    width = 1.7 + max(2.0, 0.58 * len(sizes))
    with style():
        figure = _figure(results, width * columns, rows * (0.85 + 0.36 * len(variants)))
        axes = _grid(figure, rows, columns, len(metrics))
    picture = Picture(
        f"{group}_{part}",
        f"{GROUPS[group]}, {PARTS[part]}",
        f"Median over replicates on {PARTS[part]}. Each metric has its own colour scale, from its "
        f"lowest to its highest median on either kind of cells. A dash: no replicate has a value; "
        f"a star: some have the review's value for an undefined score (see below).",
        f"Heat maps of {', '.join(metrics.values())}: models in rows, numbers of training cells "
        "in columns.",
        figure,
    )
    with style():
        for axis, (metric, title) in zip(axes, metrics.items(), strict=True):
            _heat_map(picture, axis, results, metric, part)
            axis.set_title(title)
            axis.set_xticks(range(len(sizes)), [f"{size:,}" for size in sizes])
            axis.set_yticks(range(len(variants)), [printable(v) for v in variants])
            axis.set_xlim(-0.5, len(sizes) - 0.5)
            axis.set_ylim(len(variants) - 0.5, -0.5)
            axis.tick_params(length=0)
            axis.grid(False)
            axis.spines[:].set_visible(False)
    return picture


def _heat_map(picture: Picture, axis: Axes, results: Results, metric: str, part: str) -> None:
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    shown = [
        score.value
        for p in results.parts
        for v in results.variants
        for n in results.sizes
        if (score := results.score(p, metric, v, n)) is not None and is_number(score.value)
    ]
    low, high = min(shown), max(shown)
    # A narrow range must not look like a large difference.
    pad = max(0.0, _LEAST_RANGE - (high - low)) / 2
    low, high = low - pad, high + pad
    for y, variant in enumerate(results.variants):
        for x, size in enumerate(results.sizes):
            score = results.score(part, metric, variant, size)
            face: Any = "#f1f3f5"
            ink, text = "#5b6670", "–"
            if score is not None and is_number(score.value):
                fraction = (score.value - low) / (high - low)
                face = colormaps["viridis"](0.12 + 0.88 * fraction)
                ink = "white" if fraction < 0.6 else "#1d252c"
                text = f"{score.value:.2f}{'*' if score.undefined else ''}"
            words = _describe(results, score, metric, part, variant, size)
            tile = Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=face, edgecolor="white", lw=1.5)
            tile.set_gid(picture.hover([words]))
            axis.add_patch(tile)
            axis.text(x, y, text, ha="center", va="center", color=ink, fontsize=8.5)


def _describe(
    results: Results, score: Score | None, metric: str, part: str, variant: str, size: int
) -> str:
    where = f"{variant}, {size:,} cells, {results.titles[metric]} on {PARTS[part]}"
    if score is None:
        return f"{where}: no task ended well"
    if not is_number(score.value):
        return f"{where}: undefined in all {score.missing} replicates"
    each = ", ".join(f"{v:.3f} [{short(k)}]" for v, k in zip(score.values, score.keys, strict=True))
    return f"{where}: median {score.value:.3f} (null {score.null:.3f}) of {each}"


def curves(results: Results, part: str) -> Picture:
    """Draw every metric against the number of training cells, with its permutation null."""
    from matplotlib.lines import Line2D

    metrics = results.metrics
    picture = Picture(
        f"curves_{part}",
        f"Scores against cells, {PARTS[part]}",
        "Points: replicates (hollow: the review's value for an undefined score). Line and ribbon: "
        "median, and lowest to highest. Dashed: median of the permutation null, which is where "
        "chance would be for all but batch and site ASW: for these it is the best to be had. "
        "Only tasks that ended well.",
        f"Curves of {', '.join(metrics.values())} against the number of training cells, one line "
        "per model.",
        _panels(results, len(metrics)),
    )
    offsets = _offsets(results, 0.05)
    with style():
        for axis, (metric, title) in zip(picture.figure.axes, metrics.items(), strict=True):
            for index, variant in enumerate(results.variants):
                _curve(picture, axis, results, (part, metric, variant), index, offsets[variant])
            axis.set_title(title)
            _size_axis(axis, results)
        null = Line2D([], [], color="#5b6670", linestyle="--", linewidth=1, label="null")
        _legend(picture.figure, results, [null])
    return picture


def _curve(
    picture: Picture,
    axis: Axes,
    results: Results,
    which: tuple[str, str, str],
    index: int,
    offset: float,
) -> None:
    part, metric, variant = which
    table = results.scores[
        (results.scores["evaluated_on"] == part)
        & (results.scores["metric"] == metric)
        & (results.scores["variant"] == variant)
        & (results.scores["status"] == "ok")
        & results.scores["value"].notna()
    ]
    shade, marker = colour(results, variant), MARKERS[index % len(MARKERS)]
    spread = table.groupby("size")["value"].agg(["median", "min", "max"])
    null = table.groupby("size")["null"].median().dropna()
    axis.fill_between(spread.index, spread["min"], spread["max"], color=shade, alpha=0.13, lw=0)
    axis.plot(spread.index, spread["median"], color=shade, linewidth=1.8)
    axis.plot(null.index, null, color=shade, linewidth=1, linestyle="--", alpha=0.7)
    for undefined, face in ((False, shade), (True, "white")):
        lines = table[table["undefined"].astype(bool) == undefined]
        if lines.empty:
            continue
        words = [
            f"{variant}, {size:,} cells, replicate {replicate}: {results.titles[metric]} "
            f"{value:.3f}{' (undefined)' if undefined else ''} [{short(key)}]"
            for size, replicate, value, key in zip(
                lines["size"], lines["replicate"], lines["value"], lines["key"], strict=True
            )
        ]
        axis.plot(
            lines["size"] * offset, lines["value"], marker, color=shade, markersize=3.6,
            markerfacecolor=face, alpha=0.75, markeredgewidth=0.6, clip_on=False,
            gid=picture.hover(words),
        )  # fmt: skip


def boxes(results: Results, part: str) -> Picture:
    """Draw the spread of every metric over replicates (the review's Supplementary Figs 1-2)."""
    metrics, sizes, variants = results.metrics, results.sizes, list(results.variants)
    picture = Picture(
        f"boxes_{part}",
        f"Spread over replicates, {PARTS[part]}",
        "Boxes: quartiles and median; whiskers: the farthest replicate within 1.5 times the "
        "interquartile range; points: replicates beyond. Only tasks that ended well.",
        f"Box plots of {', '.join(metrics.values())} over replicates, by number of training cells "
        "and model.",
        _panels(results, len(metrics)),
    )
    width = 0.8 / len(variants)
    with style():
        for axis, (metric, title) in zip(picture.figure.axes, metrics.items(), strict=True):
            for index, variant in enumerate(variants):
                shade = colour(results, variant)
                drawn = [
                    (x + (index - (len(variants) - 1) / 2) * width, score.values)
                    for x, size in enumerate(sizes)
                    if (score := results.score(part, metric, variant, size)) and score.values
                ]
                if drawn:
                    _boxes(axis, drawn, width * 0.82, shade)
            axis.set_title(title)
            axis.set_xticks(range(len(sizes)), [f"{size:,}" for size in sizes])
            axis.set_xlim(-0.5, len(sizes) - 0.5)
            axis.grid(False, axis="x")
            for x in range(1, len(sizes)):
                axis.axvline(x - 0.5, color="#e8ebee", linewidth=0.8, zorder=0)
            axis.set_xlabel("training cells")
        _legend(picture.figure, results)
    return picture


def _boxes(
    axis: Axes, drawn: list[tuple[float, tuple[float, ...]]], width: float, shade: str
) -> None:
    line = {"color": shade, "linewidth": 1}
    axis.boxplot(
        [values for _, values in drawn],
        positions=[x for x, _ in drawn],
        widths=width,
        manage_ticks=False,
        patch_artist=True,
        boxprops={"facecolor": f"{shade}40", "edgecolor": shade, "linewidth": 1},
        medianprops=line | {"linewidth": 2},
        whiskerprops=line,
        capprops=line,
        flierprops={"marker": "o", "markersize": 2.5, "markerfacecolor": shade,
                    "markeredgewidth": 0},
    )  # fmt: skip


def cost(results: Results) -> Picture:
    """Draw CPU time and peak memory against cells, on linear and log2 axes (study.md section 4)."""
    runs = results.runs
    picture = Picture(
        "cost",
        "What a training costs",
        "Points: replicates; line: mean; ribbon: 95 % confidence interval of the mean (normal). "
        "CPU time is of training alone. Peak memory is the whole process's, with its libraries "
        "and the data. Only tasks that ended well.",
        "CPU time and peak memory against the number of training cells, on linear and logarithmic "
        "axes, one line per model.",
        _panels(results, 4, columns=2),
    )
    quantities = {"cpu_s": "CPU time (s)", "peak_memory_mb": "Peak memory (MB)"}
    with style():
        axes = iter(picture.figure.axes)
        for column, title in quantities.items():
            for log in (False, True):
                axis = next(axes)
                for index, variant in enumerate(results.variants):
                    lines = runs[(runs["variant"] == variant) & runs[column].notna()]
                    _cost(picture, axis, results, lines, (variant, column, title), index)
                axis.set_title(f"{title}, {'log2' if log else 'linear'} axes")
                if log:
                    _size_axis(axis, results)
                    axis.set_yscale("log", base=2)
                    axis.set_ylim(*_powers(*axis.get_ylim()))
                    axis.yaxis.set_major_formatter(_plain)
                else:
                    axis.set_ylim(bottom=0)
                    axis.xaxis.set_major_formatter(_plain)
                    axis.yaxis.set_major_formatter(_plain)
                    axis.set_xlabel("training cells")
        _legend(picture.figure, results)
    return picture


def _cost(
    picture: Picture,
    axis: Axes,
    results: Results,
    lines: pd.DataFrame,
    what: tuple[str, str, str],
    index: int,
) -> None:
    variant, column, title = what
    # A linear baseline may take less time than the clock can tell; a log axis has no zero.
    lines = lines[lines[column] > 0]
    if lines.empty:
        return
    shade = colour(results, variant)
    groups = lines.groupby("size")[column]
    mean = groups.mean()
    half: pd.Series = 1.96 * groups.std() / np.sqrt(groups.count())
    low = np.maximum(mean - half, lines[column].min() / 2)
    axis.fill_between(mean.index, low, mean + half, color=shade, alpha=0.15, lw=0)
    axis.plot(mean.index, mean, color=shade, linewidth=1.8)
    words = [
        f"{variant}, {size:,} cells, replicate {replicate}: {title} {value:,.3g} [{short(key)}]"
        for size, replicate, value, key in zip(
            lines["size"], lines["replicate"], lines[column], lines["key"], strict=True
        )
    ]
    axis.plot(
        lines["size"], lines[column], MARKERS[index % len(MARKERS)], color=shade, markersize=3.6,
        alpha=0.75, markeredgewidth=0, clip_on=False, gid=picture.hover(words),
    )  # fmt: skip


def umaps(results: Results, clouds: dict[tuple[str, int], Cloud]) -> Picture:
    """Draw UMAPs coloured by label, one row per size (the review's Figs 4 and 5).

    Args:
        results: of the study.
        clouds: (variant, size) -> the cells of one embedding.
    """
    sizes = sorted({results.sizes[0], results.sizes[-1]})
    columns = min(6, len(results.variants))
    rows = len(sizes) * math.ceil(len(results.variants) / columns)
    labels = results.cells["label"].value_counts()
    labels = labels[labels.index != ""]
    shades = dict(zip(labels.index, label_colours(len(labels)), strict=True))
    legend_columns = max(1, round(1.1 * columns))
    heights = [2.5 * rows, 0.2 + 0.17 * math.ceil((len(labels) + 1) / legend_columns)]
    sources = "; ".join(
        f"{variant}, {size:,} cells: replicate {cloud.replicate} [{short(cloud.key)}]"
        for (variant, size), cloud in clouds.items()
    )
    picture = Picture(
        "umaps",
        "UMAPs",
        "Embeddings of training cells, columns standardised, in two dimensions (umap-learn, seed "
        "142), coloured by label; grey: cells without one. A number stands on the middle cell of "
        "each label that has 2 % of the cells. Distances between groups mean little in such a "
        f"picture. {sources}.",
        "Scatter plots of embedded cells, coloured by cell type, one per model and size.",
        _figure(results, max(4.6, 2.3 * columns), sum(heights)),
    )
    with style():
        plots, key = picture.figure.subfigures(2, 1, height_ratios=heights, squeeze=False).flat
        grid = plots.subplots(rows, columns, squeeze=False)
        for axis in grid.flat:
            axis.set_axis_off()
        for index, variant in enumerate(results.variants):
            for row, size in enumerate(sizes):
                axis = grid[(index // columns) * len(sizes) + row, index % columns]
                axis.set_title(f"{printable(variant)}, {size:,} cells", fontsize=9)
                _scatter(axis, clouds.get((variant, size)), shades)
        _label_legend(key, shades, "" in set(results.cells["label"]), legend_columns)
    return picture


def _scatter(axis: Axes, cloud: Cloud | None, shades: dict[str, Any]) -> None:
    if cloud is None:
        axis.text(0.5, 0.5, "no embedding", ha="center", va="center", color="#5b6670",
                  transform=axis.transAxes)  # fmt: skip
        return
    # Drawn in a random order, so that no label is always on top.
    order = np.random.default_rng(0).permutation(len(cloud.xy))
    xy, labels = cloud.xy[order], cloud.labels[order]
    known = np.isin(labels, list(shades))
    size = float(np.clip(1500 / len(xy), 1.0, 9.0))
    common: dict[str, Any] = {"s": size, "linewidths": 0, "rasterized": True}
    x, y = xy.T
    axis.scatter(x[~known], y[~known], color=GREY, **common)
    axis.scatter(x[known], y[known], c=[shades[label] for label in labels[known]], **common)
    for number, label in enumerate(shades, 1):
        cells = xy[labels == label]
        if len(cells) >= max(5, 0.02 * len(xy)):
            # On the cell nearest to the middle, which itself may lie between two groups.
            middle = np.square(cells - np.median(cells, axis=0)).sum(axis=1).argmin()
            _number(axis, cells[middle], str(number))


def _number(axis: Axes, place: np.ndarray, text: str) -> None:
    from matplotlib.patheffects import withStroke

    halo = [withStroke(linewidth=1.8, foreground="white")]
    axis.text(place[0], place[1], text, fontsize=6.5, fontweight="bold", ha="center", va="center",
              color="#1d252c", path_effects=halo)  # fmt: skip


def _label_legend(figure: Any, shades: dict[str, Any], unlabelled: bool, columns: int) -> None:
    from matplotlib.lines import Line2D

    names = enumerate(shades.items(), 1)
    entries = [(f"{number} {printable(name)}", shade) for number, (name, shade) in names]
    if unlabelled:
        entries.append(("without a label", GREY))
    handles = [
        Line2D([], [], marker="o", linestyle="", color=shade, markersize=5, label=text)
        for text, shade in entries
    ]
    figure.legend(handles=handles, loc="upper center", ncols=columns, fontsize=7.5,
                  handletextpad=0.1, columnspacing=1.2, labelspacing=0.35)  # fmt: skip


def label_colours(n: int) -> list[Any]:
    """Return `n` colours, the first eight those of colour-blind readers, then many shades."""
    from matplotlib import colormaps

    more = [colormaps[name](i) for name in ("tab20b", "tab20c", "tab20") for i in range(20)]
    # Neighbours of a palette are shades of one hue: walk through it in steps.
    more = [more[(7 * i) % len(more)] for i in range(len(more))]
    known = [*COLOURS, *more]
    return [known[i % len(known)] for i in range(n)]


def _offsets(results: Results, reach: float) -> dict[str, float]:
    """Return a factor on the number of cells per variant, so that points lie side by side."""
    names = list(results.variants)
    steps = np.linspace(-reach, reach, len(names)) if len(names) > 1 else [0.0]
    return {name: float(2**step) for name, step in zip(names, steps, strict=True)}


def _figure(results: Results, width: float, height: float) -> Figure:
    """Return an empty figure, in inches; simulated data are called so on it."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with style():
        layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08)
        figure = Figure(figsize=(width, height), dpi=DPI, layout=layout)
        if results.card["simulated"]:
            figure.suptitle("simulated data", x=0.995, ha="right", fontsize=8, color="#8a6d1d")
    return figure


def _grid(figure: Figure, rows: int, columns: int, n: int) -> list[Axes]:
    with style():
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[n:]:
        axis.remove()
    return axes[:n]


def _panels(results: Results, n: int, columns: int = 4) -> Figure:
    columns = min(n, columns)
    rows = math.ceil(n / columns)
    width = max(2.9 * columns, 4.5) if columns > 2 else 4.6 * columns
    figure = _figure(results, width, 2.5 * rows + 0.4)
    _grid(figure, rows, columns, n)
    return figure


def _size_axis(axis: Axes, results: Results) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(results.sizes, [f"{size:,}" for size in results.sizes])
    axis.set_xticks([], minor=True)
    axis.set_xlabel("training cells (log2)")
    if len(results.sizes) == 1:
        axis.set_xlim(results.sizes[0] / 1.5, results.sizes[0] * 1.5)


def _powers(low: float, high: float) -> tuple[float, float]:
    """Return the powers of two around a range, so that a log axis has two ticks at least."""
    return 2.0 ** math.floor(math.log2(low)), 2.0 ** math.ceil(math.log2(high))


def _plain(value: float, _: Any) -> str:
    return f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"


def _legend(figure: Figure, results: Results, more: list[Any] | None = None) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=colour(results, v), marker=MARKERS[i % len(MARKERS)], markersize=5,
               linewidth=1.8, label=printable(v))
        for i, v in enumerate(results.variants)
    ]  # fmt: skip
    handles += more or []
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 8))
