"""The report of a benchmark: Markdown tables, and the floors that the speed of FA-BERT is held to."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from .benchmark import ENCODERS, FAILED, MODES, OK, TIMED_OUT

KINDS = {"text": ("FA-BERT", "BERT", "tokens"), "image": ("FA-ViT", "ViT", "px a side")}
"""Kind of input -> the FA model, the stock model it is made from, and the unit of the input's size."""

FLOOR_LONGEST_TO_512 = 0.9
FLOORS_TO_BERT = {512: 1.0, 8192: 2.5, 32768: 8.0}
LINEAR_CONTENDERS = ("Longformer", "BigBird", "Nystromformer")
LINEAR_CONTENDERS_FROM = 1024
"""Tokens from which on FA-BERT is to be ahead of the `LINEAR_CONTENDERS`."""


def select(points: Sequence[dict], kind: str, mode: str) -> dict[str, dict[int, dict]]:
    """Return the points of one kind of input and one mode: curve -> size -> point, in the order of measurement."""
    curves: dict[str, dict[int, dict]] = {}
    for point in points:
        if ENCODERS[point["model"]].kind == kind and point["mode"] == mode:
            curves.setdefault(point["series"], {})[point["size"]] = point
    return curves


def fit_line(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float, float]:
    """Return a least-squares line's slope, its intercept, and the largest departure from it as a share of the value."""
    slope, intercept = statistics.linear_regression(xs, ys)
    departures = [abs(slope * x + intercept - y) / max(y, 1) for x, y in zip(xs, ys, strict=True)]
    return slope, intercept, max(departures)


def compute_floors(points: Sequence[dict], mode: str) -> dict:
    """Hold FA-BERT's speed in one mode against its floors: itself at 512 tokens, BERT, and the `LINEAR_CONTENDERS`.

    A ratio that was not measured is None. Where the other model ran out of time, `at_least` is a bound from the time
    limit. `met` says whether the floor holds, and is None where that can't be told.
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
    for name in LINEAR_CONTENDERS:
        ratios = {
            length: speedup(ours.get(length), point)[0]
            for length, point in curves.get(name, {}).items()
            if length >= LINEAR_CONTENDERS_FROM
        }
        measured = {length: round(ratio, 3) for length, ratio in ratios.items() if ratio is not None}
        met = min(measured.values()) > 1 if measured else None
        floors[f"times_{name.lower()}"] = {"by_length": measured, "floor": 1.0, "met": met}
    if len(ours) > 1:
        slope, intercept, departure = fit_line(list(ours), [point["peak_bytes"] for point in ours.values()])
        floors["peak_memory"] = {
            "bytes_per_token": round(slope),
            "hidden_states_per_token": round(slope / next(iter(ours.values()))["hidden_state_bytes"], 2),
            "intercept_mib": round(intercept / 2**20, 1),
            "largest_departure": round(departure, 3),
        }
    return floors


def speedup(ours: dict | None, other: dict | None) -> tuple[float | None, bool]:
    """Return how many times faster our point is than another model's, and whether that is only a lower bound.

    It is a bound where the other model ran out of time. None where either was not measured.
    """
    if ours is None or other is None:
        return None, False
    if other["status"] == OK:
        return other["median_seconds"] / ours["median_seconds"], False
    if other["status"] == TIMED_OUT:
        return other["time_limit_s"] * other["depth_scale"] / ours["median_seconds"], True
    return None, False


def judge(ratio: float | None, floor: float, is_bound: bool = False) -> dict:
    """Return a ratio, its floor, and whether it is met; below the floor a lower bound leaves that open."""
    if ratio is None:
        return {"value": None, "floor": floor, "met": None}
    met = True if ratio >= floor else None if is_bound else False
    return {"at_least" if is_bound else "value": round(ratio, 3), "floor": floor, "met": met}


def show_seconds(seconds: float) -> str:
    """Return a time in milliseconds or seconds."""
    return f"{seconds * 1000:,.0f} ms" if seconds < 1 else f"{seconds:,.2f} s" if seconds < 10 else f"{seconds:,.0f} s"


def show_bytes(count: float) -> str:
    """Return an amount of memory in MiB or GiB."""
    return f"{count / 2**20:,.0f} MiB" if count < 2**30 else f"{count / 2**30:,.2f} GiB"


def show_status(point: dict) -> str:
    """Return why a point has no figures; for a timeout, the limit that it passed."""
    return f"> {point['time_limit_s']:g} s" if point["status"] == TIMED_OUT else point["status"]


MEASURES: dict[str, tuple[str, Callable[[float], str], Callable]] = {
    "Time": ("median_seconds", show_seconds, min),
    "Tokens per second": ("tokens_per_second", lambda rate: f"{rate:,.0f}", max),
    "Peak memory": ("peak_bytes", show_bytes, min),
}
"""Heading -> key of a point, how its value is shown, and which of two values is better."""


def render_table(curves: dict[str, dict[int, dict]], unit: str, key: str, show: Callable, best: Callable) -> str:
    """Return a Markdown table: a row per size, a column per model, the best of each row in bold."""
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
    """Return the whole of report.md: what was measured and how, charts, tables and notes."""
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
    """Return a Markdown table of compiled points beside eager ones; `graphs` counts those of the warm-up size, too.

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
