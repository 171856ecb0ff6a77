"""Charts of a benchmark: time and memory by input size, a curve per model."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..charts import (
    HIGHLIGHT,
    HIGHLIGHT_LIGHT,
    MUTED,
    SUBTLE,
    chart_style,
    clear_frame,
    new_figure,
    save_figure,
    scale_by_size,
)
from .benchmark import ENCODERS, FAILED, MODES, OK, OUT_OF_MEMORY, TIMED_OUT
from .benchmark_report import KINDS, select, show_bytes, show_seconds, show_status

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curves = dict[str, dict[int, dict]]
"""Name of a curve -> size of the input -> point."""

SCALES: dict[str, tuple[int, Callable[[float], str]]] = {
    "median_seconds": (10, show_seconds),
    "peak_bytes": (2, show_bytes),
}
"""Key of a point -> base of its logarithmic axis, and how a value stands at it."""


@dataclass(frozen=True)
class End:
    """The last point of a curve: input size `x`, value `y`, the curve's colour, and why no larger size follows."""

    x: int
    y: float
    colour: str
    is_ours: bool
    reason: str


def plot(results: dict, kind: str, path: Path) -> None:
    """Write a PNG of one kind of input: time above peak memory by its size, log-log, a column per mode."""
    columns = [curves for mode in MODES if (curves := select(results["points"], kind, mode))]
    modes = [next(iter(next(iter(curves.values())).values()))["mode"] for curves in columns]
    ours = KINDS[kind][0]
    with chart_style():
        size = (1.2 + 5.9 * len(columns), 8.2)
        figure, grid = new_figure(2, len(columns), size=size, layout=None, squeeze=False, sharey="row")
        figure.subplots_adjust(
            left=0.75 / figure.get_figwidth(), right=1 - 1.85 / figure.get_figwidth(), top=0.86, bottom=0.07,
            wspace=0.5, hspace=0.24,
        )  # fmt: skip
        ends = {}
        for axes, curves, mode in zip(grid[0], columns, modes, strict=True):
            ends[axes] = draw_curves(axes, curves, "median_seconds")
            axes.set_title("Forward pass" if mode == "forward" else "Training step", loc="left", weight="bold", pad=22)
            axes.text(0, 1.03, "time, median", transform=axes.transAxes, color=SUBTLE)
        for axes, curves in zip(grid[1], columns, strict=True):
            ends[axes] = draw_curves(axes, curves, "peak_bytes")
            axes.text(0, 1.03, "peak memory above the weights", transform=axes.transAxes, color=SUBTLE)
            axes.set_xlabel("document length, tokens" if kind == "text" else "image size, px a side")
        low, high = (math.log2(limit) for limit in grid[1, 0].get_ylim())
        grid[1, 0].set_ylim(2 ** math.floor(low), 2 ** math.ceil(high))
        for axes in ends:  # now, as the columns of a row share their limits
            label_ends(axes, ends[axes])
        left = 0.2 / figure.get_figwidth()
        what = "the length of the document" if kind == "text" else "the size of the image"
        figure.text(left, 0.965, f"{ours}: time and memory against {what}", size=14, weight="bold")
        figure.text(left, 0.94, f"Batch 1. {results['setting']}", color=SUBTLE)
        save_figure(figure, path, dpi=150, facecolor="white", bbox_inches="tight", pad_inches=0.2)


def plot_picture(results: dict, path: Path) -> None:
    """Write a PNG of the texts' forward passes for a page: time beside peak memory by tokens, a line per model.

    A cross ends the line of a model that had too little memory or time for the next length. The picture is 1,800 pixels
    wide and made to be shown at half of that, on white.
    """
    curves = select(results["points"], "text", "forward")
    panels = {"median_seconds": "Time of a forward pass", "peak_bytes": "Peak memory, weights left out"}
    with chart_style():
        figure, grid = new_figure(1, 2, size=(9, 3.9), layout=None)
        figure.subplots_adjust(left=0.075, right=0.875, top=0.9, bottom=0.235, wspace=0.62)
        for axes, (key, title) in zip(grid, panels.items(), strict=True):
            ends = draw_curves(axes, curves, key)
            axes.set_title(title, loc="left", weight="bold", size=11)
            axes.set_xlabel("tokens")
            for end in ends.values():
                if end.reason:
                    axes.plot(end.x, end.y, "x", color=end.colour, markersize=10, markeredgewidth=2, zorder=6)
            label_ends(axes, ends, gap=0.08, with_reasons=False)
        reasons = dict.fromkeys(end.reason for end in ends.values() if end.reason)
        note = f"Batch 1, random weights. {results['setting']}"
        if reasons:
            note += f"\nA cross ends a line; at the next length: {' or '.join(reasons)}."
        figure.text(0.012, 0.03, note, color=SUBTLE, size=8.5)
        save_figure(figure, path, dpi=200, facecolor="white")


def draw_curves(axes: "Axes", curves: Curves, key: str) -> dict[str, End]:
    """Draw the values of `key` as log-log curves, ours on top, and return where each curve ends."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    base, show = SCALES[key]
    sizes = sorted({size for curve in curves.values() for size in curve})
    scale_by_size(axes, sizes)
    axes.set_yscale("log", base=base)
    axes.set_xlim(sizes[0] / 1.1, max(sizes[-1], sizes[0] * 2) * 1.1)
    ends = {}
    for series, curve in curves.items():
        done = {size: max(point[key], 1e-9) for size, point in curve.items() if point["status"] == OK}
        if not done:
            continue
        is_ours = ENCODERS[series.split(",")[0]].is_factorized
        colour = (HIGHLIGHT_LIGHT if "," in series else HIGHLIGHT) if is_ours else MUTED.get(series, "#8c8c8c")
        width, diameter, order = (2.6, 5, 5) if is_ours else (1.3, 3.2, 3)
        axes.plot(
            list(done), list(done.values()), "o-", color=colour, linewidth=width, markersize=diameter, zorder=order
        )
        reason = next((show_status(p) for p in curve.values() if p["status"] in (OUT_OF_MEMORY, TIMED_OUT, FAILED)), "")
        ends[series] = End(max(done), done[max(done)], colour, is_ours, reason)
    axes.yaxis.set_major_locator(LogLocator(base=base))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: show(value).replace(".00", "")))
    clear_frame(axes)
    return ends


def label_ends(axes: "Axes", ends: dict[str, End], gap: float = 0.062, with_reasons: bool = True) -> None:
    """Write the curves' names into the right margin, in the order of their ends, `gap` of the height apart or more."""
    axes.autoscale_view()  # else the limits are set when the figure is saved, and the curves end elsewhere
    to_fraction = axes.transData + axes.transAxes.inverted()
    anchors = {series: tuple(to_fraction.transform((end.x, end.y))) for series, end in ends.items()}
    order = sorted(ends, key=lambda series: anchors[series][1])
    heights = spread([anchors[series][1] for series in order], gap)
    for series, height in zip(order, heights, strict=True):
        end = ends[series]
        axes.annotate(
            f"{series}  {end.reason}" if end.reason and with_reasons else series,
            xy=anchors[series],
            xytext=(1.035, height),
            xycoords=axes.transAxes,
            textcoords=axes.transAxes,
            color=end.colour,
            weight="bold" if end.is_ours else "normal",
            va="center",
            annotation_clip=False,
            arrowprops=dict(arrowstyle="-", color=end.colour, linewidth=0.6, alpha=0.5, shrinkA=1, shrinkB=3),
        )


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Move ascending heights as little as needed to lie `gap` apart, within 0 and 1 where they fit."""
    moved = list(heights)
    for index in range(1, len(moved)):
        moved[index] = max(moved[index], moved[index - 1] + gap)
    ceiling = 1.0
    for index in reversed(range(len(moved))):
        moved[index] = min(moved[index], ceiling)
        ceiling = moved[index] - gap
    return moved
