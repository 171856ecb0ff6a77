"""Tables, ratios and a picture of what `dense_benchmark` measured."""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..charts import HIGHLIGHT, SUBTLE, chart_style, clear_frame, new_figure, save_figure, scale_by_size
from .dense_benchmark import GB, KINDS, WIDTH, Contest
from .page_tables import make_table

ABOUT = "Detectors and segmenters: their time and memory by blocks, and whole pictures beside tiles."
"""What the JSON file of the page says of itself."""
Figures = Mapping[str, Mapping[str, Any]]
"""Kind -> what `measure_contest` found of it."""
LABELS = {"none": "no blocks", "factorized": "factorized", "softmax": "softmax", "sdpa": "SDPA", "eager": "eager"}
COLOURS = {"none": "#9b9b9b", "factorized": HIGHLIGHT, "softmax": "#b97a7a"}
PASSES = {"forward": "forward", "training": "training step"}
FLOORS = (
    ("blocks", "forward", 2048, "factorized", "none", "wall", "at most 1.15"),
    ("blocks", "forward", 2048, "factorized", "none", "peak_bytes", "at most 1.1"),
    ("blocks", "forward", 1024, "softmax", "factorized", "wall", "at least 8"),
    ("detr", "training", 16384, "sdpa", "factorized", "wall", "at least 25"),
)
"""Part, mode, size, two kinds and the figure of which their ratio is asked for, and what it should be."""


def seconds_of(figures: Mapping[str, Any], name: str = "wall") -> float | None:
    """Return the median of a kind's seconds; None where it didn't run."""
    return statistics.median(figures[name]) if name in figures else None


def ratio(figures: Figures, above: str, below: str, name: str = "wall") -> float | None:
    """Return how much more of something one kind takes than another: of times the median ratio of passes in turn."""
    if any(name not in figures[kind] for kind in (above, below)):
        return None
    if name == "peak_bytes":
        return figures[above][name] / figures[below][name]
    pairs = zip(figures[above][name], figures[below][name], strict=True)
    return statistics.median(first / second for first, second in pairs)


def compute_floors(found: Mapping[Contest, Figures]) -> list[dict[str, Any]]:
    """Return each ratio of `FLOORS` that was measured, in wall and in CPU seconds, beside what is asked for."""
    rows = []
    for part, mode, size, above, below, name, asked in FLOORS:
        figures = found.get(Contest(part, mode, size))
        if figures is None or ratio(figures, above, below, name) is None:
            continue
        is_time = name == "wall"
        what = f"{LABELS[above]} / {LABELS[below]}, {part} at {size:,}, {'time' if is_time else 'memory'}"
        cpu = ratio(figures, above, below, "cpu") if is_time else None
        rows.append({"what": what, "ratio": ratio(figures, above, below, name), "of CPU time": cpu, "asked": asked})
    return rows


def make_tables(found: Mapping[Contest, Figures], command: str) -> dict[str, dict[str, Any]]:
    """Return the tables of a results page: "blocks_time", "blocks_memory" and "detr", those that were measured."""
    tables = {}
    blocks = {contest: figures for contest, figures in found.items() if contest.part == "blocks"}
    if blocks:
        for key, name, title, digits, scale in (
            ("blocks_time", "wall", "Time of the small FADense network by its blocks, seconds", 2, 1.0),
            ("blocks_memory", "peak_bytes", "Memory of the same passes beyond weights and image, GB", 3, GB),
        ):
            columns: dict[str, dict[str, Any]] = {"pass": {"name": "pass"}, "size": {"name": "pixels a side"}}
            columns |= {kind: {"name": LABELS[kind], "digits": digits} for kind in KINDS["blocks"]}
            columns |= {"to_none": {"name": "factorized / none", "digits": 2}}
            columns |= {"to_softmax": {"name": "softmax / factorized", "digits": 1}}
            rows = [_block_row(contest, figures, name, scale) for contest, figures in blocks.items()]
            tables[key] = make_table(title, command, columns, rows)
    layers = [(contest.size, figures) for contest, figures in found.items() if contest.part == "detr"]
    if layers:
        rows = [
            {
                "tokens": tokens,
                "attention": LABELS[kind],
                "seconds": _cell(figures[kind], "wall", 1.0),
                "ratio": ratio(figures, kind, "factorized"),
                "memory": _cell(figures[kind], "peak_bytes", GB),
            }
            for tokens, figures in layers
            for kind in KINDS["detr"]
        ]
        columns = {
            "tokens": {"name": "tokens"}, "attention": {"name": "attention"},
            "seconds": {"name": "seconds", "digits": 2}, "ratio": {"name": "time / factorized", "digits": 1},
            "memory": {"name": "memory, GB", "digits": 2},
        }  # fmt: skip
        title = f"DETR's encoder layer of width {WIDTH}, feed-forward {4 * WIDTH}, forward and backward"
        tables["detr"] = make_table(title, command, columns, rows)
    return tables


def _block_row(contest: Contest, figures: Figures, name: str, scale: float) -> dict[str, Any]:
    """The row of a contest in the table of one of its figures."""
    row: dict[str, Any] = {"pass": PASSES[contest.mode], "size": contest.size}
    row |= {kind: _cell(figures[kind], name, scale) for kind in KINDS["blocks"]}
    row["to_none"] = ratio(figures, "factorized", "none", name)
    return row | {"to_softmax": ratio(figures, "softmax", "factorized", name)}


def _cell(figures: Mapping[str, Any], name: str, scale: float) -> float | str:
    """A kind's seconds or bytes in units of `scale`, or why it wasn't run."""
    if "not_run" in figures:
        return figures["not_run"]
    return figures[name] / scale if name == "peak_bytes" else statistics.median(figures[name]) / scale


def plot_picture(found: Mapping[Contest, Figures], setting: str, path: Path) -> None:
    """Write a PNG for a page: time beside memory of forward passes by the side of the image, a line per kind of block.

    A cross ends the line of a kind for which the next size needs more memory than there was.
    """
    contests = {contest.size: figures for contest, figures in found.items() if contest.mode == "forward"}
    sizes = sorted(contests)
    panels = {
        "wall": ("Time of a forward pass, seconds", lambda figures: seconds_of(figures)),
        "peak_bytes": ("Memory beyond weights and image, GB", lambda figures: figures["peak_bytes"] / GB),
    }
    with chart_style():
        figure, grid = new_figure(1, 2, size=(9, 3.9), layout=None)
        figure.subplots_adjust(left=0.06, right=0.9, top=0.9, bottom=0.235, wspace=0.42)
        for axes, (title, value) in zip(grid, panels.values(), strict=True):
            scale_by_size(axes, sizes)
            axes.set_yscale("log")
            for kind in KINDS["blocks"]:
                done = {size: value(contests[size][kind]) for size in sizes if "not_run" not in contests[size][kind]}
                if not done:  # the note below the chart says why
                    continue
                is_ours = kind == "factorized"
                width, order = (2.6, 5) if is_ours else (1.3, 3)
                axes.plot(list(done), list(done.values()), "o-", color=COLOURS[kind], linewidth=width, zorder=order)
                last = max(done)
                if last < sizes[-1]:
                    axes.plot(last, done[last], "x", color=COLOURS[kind], markersize=10, markeredgewidth=2, zorder=6)
                axes.annotate(
                    LABELS[kind],
                    (last, done[last]),
                    xytext=(8, {"none": -9, "factorized": 5}.get(kind, 0)),
                    textcoords="offset points",
                    color=COLOURS[kind],
                    weight="bold" if is_ours else "normal",
                    va="center",
                )
            axes.set_title(title, loc="left", weight="bold", size=11)
            axes.set_xlabel("pixels a side")
            clear_frame(axes)
        reasons = [f"{size:,} px {figures['softmax'].get('not_run')}" for size, figures in contests.items()]
        note = "; ".join(reason for reason in reasons if not reason.endswith("None"))
        figure.text(0.012, 0.03, f"{setting}" + (f"\nSoftmax blocks: {note}." if note else ""), color=SUBTLE, size=8.5)
        save_figure(figure, path, dpi=200, facecolor="white")
