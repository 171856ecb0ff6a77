"""The report of a comparison of contenders: scores with paired differences, a Markdown table, a chart."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from ..charts import HIGHLIGHT, MUTED, SUBTLE, chart_style, clear_frame, new_figure, save_figure
from ..data.labelled import LabelledData
from ..metrics import BEST_METRICS
from .contenders import Contender, score

COLOURS = {"factorized": HIGHLIGHT, "softmax": MUTED["BERT"], "passages": MUTED["ModernBERT"], "words": MUTED["FNet"]}


def paired_difference(differences: Sequence[float]) -> dict[str, float | int] | None:
    """Return mean, standard error and 95 % t interval of two contenders' differences on the same folds or documents.

    mean ± t(0.975, n - 1) · s / sqrt(n), with s the standard deviation of the n differences; None for n < 2.
    """
    count = len(differences)
    if count < 2:
        return None
    mean = statistics.fmean(differences)
    error = statistics.stdev(differences, mean) / math.sqrt(count)
    reach = float(stats.t.ppf(0.975, count - 1)) * error
    return {"mean": mean, "standard_error": error, "low": mean - reach, "high": mean + reach, "count": count}


def summarise(
    cells: dict[tuple[Contender, int, int], dict],
    folds: Sequence[LabelledData],
    lengths: Sequence[np.ndarray],
    long_threshold: int,
) -> dict[str, Any]:
    """Return the scores of every contender on all documents and on the long ones, beside the first network.

    Differences to it are paired: over folds, or with one split and one label per document over documents, whose right
    answers count 1; seeds are averaged first.

    Args:
        cells: the results of `run_cell` for each (contender, seed, fold).
        lengths: tokens of each scored document, for each fold.
        long_threshold: documents of more tokens are the long ones.
    """
    contenders = list(dict.fromkeys(contender for contender, _, _ in cells))
    reference = next(contender for contender in contenders if contender.kind != "words")
    problem_type = folds[0].problem_type
    metric = BEST_METRICS[problem_type]
    subsets = {
        "all": [np.full(len(part), True) for part in lengths],
        "long": [part > long_threshold for part in lengths],
    }
    rows: list[dict[str, Any]] = []
    values: dict[tuple[str, Contender], list[float]] = {}
    for contender in contenders:
        own = {(seed, fold): cell for (other, seed, fold), cell in cells.items() if other is contender}
        row: dict[str, Any] = {"model": contender.name, "kind": contender.kind, "runs": len(own)}
        for name, chosen in subsets.items():
            scored = {
                (seed, fold): score(folds[fold], folds[fold].score_split, np.array(cell["predictions"]), chosen[fold])
                for (seed, fold), cell in own.items()
            }
            found = [scores for scores in scored.values() if scores] or [{}]
            # A few rows leave some scores undefined.
            shared = [key for key in found[0] if all(math.isfinite(scores.get(key, math.nan)) for scores in found)]
            row[name] = {key: statistics.fmean(scores[key] for scores in found) for key in shared}
            values[name, contender] = _paired_values(own, scored, folds, chosen, metric)
        trained = [cell for cell in own.values() if "train_tokens" in cell]
        for key in ("train_tokens", "train_seconds"):
            row[key] = round(statistics.fmean(cell[key] for cell in trained)) if trained else None
        rows.append(row)
    for row, contender in zip(rows, contenders, strict=True):
        for name in subsets:
            pairs = zip(values[name, contender], values[name, reference], strict=True)
            is_other = contender is not reference
            row[f"{name}_difference"] = (
                paired_difference([ours - theirs for ours, theirs in pairs]) if is_other else None
            )
    return {
        "metric": metric,
        "reference": reference.name,
        "paired_over": "folds" if len(folds) > 1 else "documents",
        "long_threshold": long_threshold,
        "num_documents": {name: int(sum(part.sum() for part in chosen)) for name, chosen in subsets.items()},
        "rows": rows,
    }


def _paired_values(
    own: dict[tuple[int, int], dict],
    scored: dict[tuple[int, int], dict[str, float]],
    folds: Sequence[LabelledData],
    chosen: Sequence[np.ndarray],
    metric: str,
) -> list[float]:
    """The value of each fold or, of a single split, of each document, mean over seeds; empty where undefined."""
    if len(folds) > 1:
        by_fold: dict[int, list[float]] = {}
        for (_, fold), scores in scored.items():
            if scores:
                by_fold.setdefault(fold, []).append(scores[metric])
        return [statistics.fmean(by_fold[fold]) for fold in sorted(by_fold)]
    if folds[0].problem_type != "single_label_classification":
        return []
    references = np.array(folds[0].dataset[folds[0].score_split]["label"])
    right = np.mean([np.array(cell["predictions"]) == references for cell in own.values()], axis=0)
    return right[chosen[0]].tolist()


def show_difference(difference: dict | None) -> str:
    if difference is None:
        return ""
    return f"{difference['mean']:+.3f} ± {difference['standard_error']:.3f}"


def render_table(summary: dict) -> str:
    """Return a Markdown table: a row per contender, differences with their standard error."""
    metric, counts = summary["metric"], summary["num_documents"]
    long_name = f"> {summary['long_threshold']:,} tokens"
    columns = ["model"]
    for name, shown in (("all", "all"), ("long", long_name)):
        columns += [f"{metric}, {shown} ({counts[name]:,})", f"difference, {shown}"]
    second = "macro_f1" if metric == "accuracy" else None
    columns += [*([f"{second}, all"] if second else []), "tokens trained on", "seconds"]
    lines = ["| " + " | ".join(columns) + " |", "| --- |" + " ---: |" * (len(columns) - 1)]
    for row in summary["rows"]:
        cells = [row["model"]]
        for name in ("all", "long"):
            cells.append(f"{row[name][metric]:.3f}" if metric in row[name] else "")
            cells.append(show_difference(row[f"{name}_difference"]))
        cells += [f"{row['all'][second]:.3f}"] if second else []
        cells += ["" if row[key] is None else f"{row[key]:,}" for key in ("train_tokens", "train_seconds")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def render_report(summary: dict, command: str, data_name: str, budget: int, chart: Path) -> str:
    """Return the whole of report.md: the command, the chart, the table and what it says."""
    over = summary["paired_over"]
    notes = [
        f"Every network was trained on about {budget:,} tokens, with the same optimiser and head; the best of its "
        "evaluations on the validation documents was kept.",
        f"Differences are to “{summary['reference']}”, paired over {over} after averaging over seeds, ± one standard "
        "error. "
        + (
            "Folds share training documents, so that the error is somewhat too small."
            if over == "folds"
            else "It tells what other documents could change, not what other seeds could."
        ),
        "The softmax rows are the stock encoder exactly, with mean pooling; “mean over passages” encodes a document in "
        "passages, of which the classifier reads the mean. No network drops attention weights in training.",
    ]
    parts = [
        f"# Does length help on {data_name}?",
        f"`{command}`",
        f"![{chart.stem}]({chart.name})",
        render_table(summary),
        "\n".join(f"- {note}" for note in notes),
    ]
    return "\n\n".join(parts) + "\n"


def plot(summary: dict, path: Path) -> None:
    """Write a PNG: a dot per contender, for all documents and for the long ones, with the error of its difference."""
    rows, metric = summary["rows"][::-1], summary["metric"]
    titles = {"all": "All documents", "long": f"Documents of more than {summary['long_threshold']:,} tokens"}
    panels = {name: title for name, title in titles.items() if any(metric in row[name] for row in rows)}
    with chart_style():
        size = (3.2 + 3.6 * len(panels), 1.5 + 0.36 * len(rows))
        figure, grid = new_figure(1, len(panels), size=size, squeeze=False, sharey=True)
        for axes, (name, title) in zip(grid[0], panels.items(), strict=True):
            for height, row in enumerate(rows):
                if metric not in row[name]:
                    continue
                colour, difference = COLOURS[row["kind"]], row[f"{name}_difference"]
                error = None if difference is None else difference["standard_error"]
                diameter = 7 if row["kind"] == "factorized" else 5
                axes.errorbar(
                    row[name][metric], height, xerr=error, color=colour, marker="o", markersize=diameter, linewidth=1.2
                )
                axes.annotate(
                    f"{row[name][metric]:.3f}", (row[name][metric], height), (0, 6), textcoords="offset points",
                    ha="center", color=colour, fontsize=8,
                )  # fmt: skip
            axes.set_yticks(range(len(rows)), [row["model"] for row in rows])
            axes.set_ylim(-0.6, len(rows) - 0.3)
            axes.margins(x=0.15)
            axes.set_xlabel(metric.replace("_", " "))
            axes.set_title(f"{title} ({summary['num_documents'][name]:,})", loc="left", weight="bold", size=10)
            clear_frame(axes)
        for label, row in zip(grid[0, 0].get_yticklabels(), rows, strict=True):
            label.set(color=COLOURS[row["kind"]], weight="bold" if row["kind"] == "factorized" else "normal")
        figure.supxlabel(
            f"Bars: standard error of the difference to “{summary['reference']}”, paired over {summary['paired_over']}",
            size=8, color=SUBTLE, x=0.01, ha="left",
        )  # fmt: skip
        save_figure(figure, path, dpi=150, facecolor="white")
