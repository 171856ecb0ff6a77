"""What a benchmark leaves behind: Markdown tables, charts, and the floors that the FA models are held to."""

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from ..charts import GRID, HIGHLIGHT, HIGHLIGHT_LIGHT, MUTED, SUBTLE, chart_style, new_figure, save_figure
from .benchmark import ENCODERS, FAILED, MODES, OK, OUT_OF_MEMORY, TIMED_OUT

KINDS = {"text": ("FA-BERT", "BERT", "tokens"), "image": ("FA-ViT", "ViT", "px a side")}
"""Kind of input -> the FA model, the stock model it is made from, and the unit of the input's size."""

FLOOR_LONGEST_TO_512 = 0.9
FLOORS_TO_BERT = {512: 1.0, 8192: 2.5, 32768: 8.0}
LINEAR_PEERS = ("Longformer", "BigBird", "Nystromformer")
LINEAR_PEERS_FROM = 1024
"""FA-BERT is to be ahead of the `LINEAR_PEERS` from so many tokens on."""


def select(points: Sequence[dict], kind: str, mode: str) -> dict[str, dict[int, dict]]:
    """Points of one kind of input and one mode: curve -> size -> point, in the order of measurement."""
    curves: dict[str, dict[int, dict]] = {}
    for point in points:
        if ENCODERS[point["model"]].kind == kind and point["mode"] == mode:
            curves.setdefault(point["series"], {})[point["size"]] = point
    return curves


def fit_line(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float, float]:
    """Slope and intercept of a line by least squares, and the largest departure from it as a share of the value."""
    slope, intercept = statistics.linear_regression(xs, ys)
    departures = [abs(slope * x + intercept - y) / max(y, 1) for x, y in zip(xs, ys, strict=True)]
    return slope, intercept, max(departures)


def compute_floors(points: Sequence[dict], mode: str) -> dict:
    """What issue "Speed" asks of FA-BERT, from the points of one mode; a figure that was not measured is None.

    Where a rival ran out of time, `at_least` is a bound from the time limit. `met` says whether the floor holds.
    """
    curves = select(points, "text", mode)
    ours = {size: point for size, point in curves.get("FA-BERT", {}).items() if point["status"] == OK}
    floors: dict = {}
    if 512 in ours and (longest := max(ours)) > 512:
        ratio = ours[longest]["tokens_per_second"] / ours[512]["tokens_per_second"]
        floors[f"tokens_per_second_at_{longest}_to_512"] = judge(ratio, FLOOR_LONGEST_TO_512)
    for length, floor in FLOORS_TO_BERT.items():
        ratio, is_bound = speedup(ours.get(length), curves.get("BERT", {}).get(length))
        floors[f"times_bert_at_{length}"] = judge(ratio, floor, is_bound)
    for peer in LINEAR_PEERS:
        ratios = {
            length: speedup(ours.get(length), point)[0]
            for length, point in curves.get(peer, {}).items()
            if length >= LINEAR_PEERS_FROM
        }
        measured = {length: round(ratio, 3) for length, ratio in ratios.items() if ratio is not None}
        met = min(measured.values()) > 1 if measured else None
        floors[f"times_{peer.lower()}"] = {"by_length": measured, "floor": 1.0, "met": met}
    if len(ours) > 1:
        slope, intercept, departure = fit_line(list(ours), [point["peak_bytes"] for point in ours.values()])
        floors["peak_memory"] = {
            "bytes_per_token": round(slope),
            "hidden_states_per_token": round(slope / next(iter(ours.values()))["hidden_state_bytes"], 2),
            "intercept_mib": round(intercept / 2**20, 1),
            "largest_departure": round(departure, 3),
        }
    return floors


def speedup(ours: dict | None, rival: dict | None) -> tuple[float | None, bool]:
    """How many times faster ours is, and whether that is only a lower bound, from a rival that ran out of time."""
    if ours is None or rival is None:
        return None, False
    if rival["status"] == OK:
        return rival["median_seconds"] / ours["median_seconds"], False
    if rival["status"] == TIMED_OUT:
        return rival["time_limit_s"] * rival["depth_scale"] / ours["median_seconds"], True
    return None, False


def judge(ratio: float | None, floor: float, is_bound: bool = False) -> dict:
    if ratio is None:
        return {"value": None, "floor": floor, "met": None}
    met = True if ratio >= floor else None if is_bound else False
    return {"at_least" if is_bound else "value": round(ratio, 3), "floor": floor, "met": met}


def show_seconds(seconds: float) -> str:
    return f"{seconds * 1000:,.0f} ms" if seconds < 1 else f"{seconds:,.2f} s" if seconds < 10 else f"{seconds:,.0f} s"


def show_bytes(count: float) -> str:
    return f"{count / 2**20:,.0f} MiB" if count < 2**30 else f"{count / 2**30:,.2f} GiB"


def show_status(point: dict) -> str:
    return f"> {point['time_limit_s']:g} s" if point["status"] == TIMED_OUT else point["status"]


MEASURES: dict[str, tuple[str, Callable[[float], str], Callable]] = {
    "Time": ("median_seconds", show_seconds, min),
    "Tokens per second": ("tokens_per_second", lambda rate: f"{rate:,.0f}", max),
    "Peak memory": ("peak_bytes", show_bytes, min),
}
"""Heading -> key of a point, how it is shown, and which value is the best."""


def render_table(curves: dict[str, dict[int, dict]], unit: str, key: str, show: Callable, best: Callable) -> str:
    """One Markdown table: a row per size, a column per model, the best of each row in bold."""
    lines = [f"| {unit} | " + " | ".join(curves) + " |", "| ---: |" + " ---: |" * len(curves)]
    for size in sorted({size for curve in curves.values() for size in curve}):
        row = [curve.get(size) for curve in curves.values()]
        values = [point[key] for point in row if point is not None and point["status"] == OK]
        cells = []
        for point in row:
            cell = "" if point is None else show(point[key]) if point["status"] == OK else show_status(point)
            is_best = point is not None and point["status"] == OK and len(values) > 1 and point[key] == best(values)
            cells.append(f"**{cell}**" if is_best else cell)
        lines.append(f"| {size:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def render_report(results: dict, charts: Sequence[Path]) -> str:
    """The whole of report.md."""
    points, settings = results["points"], results["settings"]
    parts = [
        "# Benchmark of factorized encoders",
        f"`{results['command']}`",
        f"{results['setting']} {results['machine']}. {results['versions']}. Batch 1, random weights, no padding, no "
        f"dropout. Time is the median of up to {settings['repeats']} passes after the first; memory is the peak of the "
        "first pass above weights and libraries. A training step is forward and backward of the mean squared last "
        "hidden state, without an optimiser. Each point ran in a process of its own; once a model runs out of memory "
        "or time, larger inputs are not tried. The best of each row is bold.",
        *(f"![{chart.stem}]({chart.name})" for chart in charts),
    ]
    for kind, (_, _, unit) in KINDS.items():
        for mode in MODES:
            curves = select(points, kind, mode)
            for heading, (key, show, best) in MEASURES.items() if curves else ():
                parts += [f"## {heading}: {kind}, {mode}", render_table(curves, unit, key, show, best)]
    shown = {point["model"]: point for point in points}
    notes = [f"- {model}: {ENCODERS[model].note}" for model in shown if ENCODERS[model].note]
    notes += [
        f"- {model} was run with {point['layers_run']} layers, as its kinds of layers alternate with that period; its "
        f"time is scaled by {point['depth_scale']:.3f}, its memory is not."
        for model, point in shown.items()
        if point["depth_scale"] != 1
    ]
    parts += ["## Notes", "\n".join(notes)] if notes else []
    compiled = [point for point in points if point["is_compiled"] and point["status"] == OK]
    parts += ["## torch.compile", render_compile_gain(points, compiled)] if compiled else []
    failed = [point for point in points if point["status"] == FAILED]
    for point in failed:
        title = f"## Failed: {point['series']}, {point['mode']}, {point['size']:,}"
        parts += [title, "```\n" + point["message"].strip() + "\n```"]
    return "\n\n".join(parts) + "\n"


def render_compile_gain(points: Sequence[dict], compiled: Sequence[dict]) -> str:
    """Compiled points beside the eager ones. `graphs` counts those of a warm-up at another size and of this one.

    In training Inductor's CPU backend compiles a second one for more than 4,096 tokens, which it sums in another way.
    """
    eager = {(p["model"], p["mode"], p["size"]): p for p in points if not p["is_compiled"] and p["status"] == OK}
    lines = ["| model | mode | size | times eager | graphs | compile seconds |", "| --- | --- |" + " ---: |" * 4]
    for point in compiled:
        beside = eager.get((point["model"], point["mode"], point["size"]))
        gain = f"{beside['median_seconds'] / point['median_seconds']:.2f}" if beside else ""
        lines.append(
            f"| {point['model']} | {point['mode']} | {point['size']:,} | {gain} | {point['graphs']} "
            f"| {point['compile_seconds']:.0f} |"
        )
    return "\n".join(lines)


def plot(results: dict, kind: str, path: Path) -> None:
    """Write a PNG: seconds and peak memory against the input's size, log-log, a column per mode."""
    columns = [curves for mode in MODES if (curves := select(results["points"], kind, mode))]
    modes = [next(iter(next(iter(curves.values())).values()))["mode"] for curves in columns]
    ours, _, unit = KINDS[kind]
    with chart_style():
        size = (1.2 + 5.9 * len(columns), 8.2)
        figure, grid = new_figure(2, len(columns), size=size, layout=None, squeeze=False, sharey="row")
        figure.subplots_adjust(
            left=0.75 / figure.get_figwidth(), right=1 - 1.85 / figure.get_figwidth(), top=0.86, bottom=0.07,
            wspace=0.5, hspace=0.24,
        )  # fmt: skip
        ends = {}
        for axes, curves, mode in zip(grid[0], columns, modes, strict=True):
            ends[axes] = draw_curves(axes, curves, "median_seconds", show_seconds)
            axes.set_title("Forward pass" if mode == "forward" else "Training step", loc="left", weight="bold", pad=22)
            axes.text(0, 1.03, "time, median", transform=axes.transAxes, color=SUBTLE)
        for axes, curves in zip(grid[1], columns, strict=True):
            ends[axes] = draw_curves(axes, curves, "peak_bytes", show_bytes)
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


def draw_curves(axes, curves: dict[str, dict[int, dict]], key: str, show: Callable[[float], str]) -> dict[str, tuple]:
    """Log-log curves, ours on top; returns where each ends, its colour, and why it ends there."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    sizes = sorted({size for curve in curves.values() for size in curve})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=10 if key == "median_seconds" else 2)
    axes.set_xlim(sizes[0] / 1.1, max(sizes[-1], sizes[0] * 2) * 1.1)
    ends = {}
    for series, curve in curves.items():
        done = {size: max(point[key], 1e-9) for size, point in curve.items() if point["status"] == OK}
        if not done:
            continue
        is_ours = ENCODERS[series.split(",")[0]].is_factorized
        colour = (HIGHLIGHT_LIGHT if "," in series else HIGHLIGHT) if is_ours else MUTED.get(series, "#8c8c8c")
        line = dict(linewidth=2.6, markersize=5, zorder=5) if is_ours else dict(linewidth=1.3, markersize=3.2, zorder=3)
        axes.plot(list(done), list(done.values()), color=colour, marker="o", **line)
        reason = next((show_status(p) for p in curve.values() if p["status"] in (OUT_OF_MEMORY, TIMED_OUT, FAILED)), "")
        ends[series] = (max(done), done[max(done)], colour, is_ours, reason)
    axes.set_xticks(sizes, [f"{size // 1024}k" if size % 1024 == 0 else str(size) for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(base=10 if key == "median_seconds" else 2))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: show(value).replace(".00", "")))
    axes.tick_params(which="both", length=0, labelcolor=SUBTLE)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_visible(False)
    return ends


def label_ends(axes, ends: dict[str, tuple]) -> None:
    """Names in the right margin, in the order of the curves' ends and spread so that none covers another."""
    to_fraction = axes.transData + axes.transAxes.inverted()
    anchors = {series: to_fraction.transform(end[:2]) for series, end in ends.items()}
    order = sorted(ends, key=lambda series: anchors[series][1])
    heights = spread([anchors[series][1] for series in order], gap=0.062)
    for series, height in zip(order, heights, strict=True):
        _, _, colour, is_ours, reason = ends[series]
        axes.annotate(
            f"{series}  {reason}" if reason else series,
            xy=anchors[series],
            xytext=(1.035, height),
            xycoords=axes.transAxes,
            textcoords=axes.transAxes,
            color=colour,
            weight="bold" if is_ours else "normal",
            va="center",
            annotation_clip=False,
            arrowprops=dict(arrowstyle="-", color=colour, linewidth=0.6, alpha=0.5, shrinkA=1, shrinkB=3),
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
