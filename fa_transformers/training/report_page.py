"""The report page of a run: scores beside the baselines, course, errors, time and memory, and how to use the model."""

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from ..data.labelled import LabelledData
from ..data.readers.images import convert_image
from ..hub.timing import describe_hardware
from ..metrics import SCORE_NAMES, wilson_interval
from ..pages.page import Matrix, Page, Picture, Section, Table, encode_picture
from ..redaction import redact, without_local_paths
from ..tables import one_line
from ..version import __version__
from .checkpointing import TrainingState
from .curve import panels_of
from .job import FinetuneJob, Fitted
from .predictions import PREDICTIONS_FILE, Predictions
from .run_folder import PAGE_FILE, list_folder, loading_lines, show_size

MATRIX_MAX_CLASSES = 30
"""Classes up to which the page has the confusion matrix, and beyond them the pairs that are confused most."""
SHOWN_PAIRS = 30
SHOWN_ERRORS = 25
SHOWN_CLASSES = 100
"""Classes that have a row in the page: above that, those with the lowest F1."""
MOST_LENGTHS = 8
"""Rows of the table of scores by length."""
SHORTEST_BUCKET = 64
THUMBNAIL_PX, PICTURE_PX = 96, 800
"""Sides that pictures in the page have at most."""


def classifier_page(
    job: FinetuneJob, data: LabelledData, fitted: Fitted, summary: Mapping[str, Any], folder: Path
) -> Page:
    """Return the page of a fine-tuned classifier or regressor; `summary` is what `all_results.json` holds."""
    sections = [
        scores_section(summary, [name for name in SCORE_NAMES if name != "micro_f1" or fitted.scored.has_several]),
        curve_section(fitted.state),
        *confusion_sections(fitted.scores, data.label_names or []),
        errors_section(fitted.scored),
        *length_sections(fitted.scored, summary, job.model.max_length if job.is_text else None),
        *class_sections(fitted.scores),
        *run_sections(summary, fitted.model.device, job.task, folder),
    ]
    return make_page(job.task, summary, data.facts.name, fitted.state.curve.metric, sections)


def make_page(task: str, summary: Mapping[str, Any], data_name: str, metric: str, sections: Sequence[Section]) -> Page:
    """Return a page with the figures that every run has on top, first of them the score by which it was chosen."""
    kind = task.replace("-", " ").capitalize()
    minutes = summary["train_seconds"] / 60
    memory = summary.get("peak_memory_gib")
    facts: list[tuple[str, Any]] = [(metric, summary["model"][metric])] if metric in summary["model"] else []
    facts += [
        ("scored split", summary["split"]),
        ("scored examples", summary["num_examples"]),
        ("parameters", summary["parameters"]),
        *([("frozen parameters", summary["frozen_parameters"])] if summary.get("frozen_parameters") else []),
        ("training", f"{minutes:,.1f} minutes" if minutes >= 1 else f"{summary['train_seconds']:.1f} seconds"),
        ("peak memory", "not measured" if memory is None else f"{memory:.2f} GiB"),
    ]
    return Page(f"{kind}: {one_line(data_name)}", "Report of a training run", facts, sections)


def network_page(
    summary: Mapping[str, Any], state: TrainingState, data_name: str, device: torch.device, folder: Path
) -> Page:
    """Return the page of a network for dense answers, with the pictures that lie in its folder."""
    names = [name for name in summary["model"] if name != "loss"]
    sections = [scores_section(summary, names), curve_section(state)]
    paths = sorted((folder / "pictures").glob("*.png"))
    if paths:
        pictures = [_read_picture(path, f"{path.parent.name}/{path.name}") for path in paths]
        sections.append(Section("Pictures", pictures=pictures))
    sections += class_sections(summary)
    sections += run_sections(summary, device, summary["task"], folder)
    return make_page(summary["task"], summary, data_name, state.curve.metric, sections)


def _read_picture(path: Path, caption: str) -> Picture:
    from PIL import Image

    with Image.open(path) as image:
        return encode_picture(image, caption, PICTURE_PX)


def scores_section(summary: Mapping[str, Any], names: Sequence[str]) -> Section:
    """Return the scores of the model beside those of the baselines, with the intervals that are known."""
    shown = [name for name in (*names, "loss") if name in summary["model"]]
    intervals = summary.get("intervals", {})

    def cell(model: str, scores: Mapping[str, Any], name: str) -> Any:
        if name not in scores:
            return None
        if name not in intervals.get(model, {}):
            return float(scores[name])
        low, high = intervals[model][name]
        return f"{scores[name]:.3f} ({low:.3f} to {high:.3f})"

    models = {"model": summary["model"]} | summary["baselines"]
    rows = [
        ["this model" if model == "model" else model, *(cell(model, scores, name) for name in shown)]
        for model, scores in models.items()
    ]
    notes = list(summary.get("interval_notes", []))
    if intervals.get("model"):  # whose sentence the table makes superfluous
        notes[:1] = ["Ranges are 95 % intervals."]
    return Section("Scores", notes, Table(["model", *shown], rows))


def curve_section(state: TrainingState) -> Section:
    """Return the course of the run."""
    panels = panels_of(state.curve, state.best_step, state.best_score)
    text = []
    if state.best_step is not None and state.best_score is not None:
        text.append(
            f"The best checkpoint by validation {state.curve.metric}, {state.best_score:.4g}, is that of step "
            f"{state.best_step:,} of {state.step:,}."
        )
    if state.stopped_early:
        text.append("Training stopped early, as the score no longer improved.")
    return Section("Training", text if panels else ["No step was recorded."], panels=panels)


def confusion_sections(scores: Mapping[str, Any], names: Sequence[str]) -> list[Section]:
    """Return the confusion matrix, or the pairs that are confused most where there are too many classes for one."""
    title, matrix = "Confusions", scores.get("confusion_matrix")
    if matrix is not None and len(names) == 1:
        return [Section(title, ["There is one class, so that no answer can be wrong: the scores say nothing."])]
    if matrix is not None and len(names) <= MATRIX_MAX_CLASSES:
        text = "Rows are true classes, columns the predicted ones; the colour is the share of the row."
        return [Section(title, [text], matrix=Matrix(names, matrix))]
    pairs = scores.get("most_confused")
    if pairs is None and matrix is None:
        return []
    if pairs is None:
        counts = np.asarray(matrix)
        np.fill_diagonal(counts, 0)
        order = np.argsort(-counts, axis=None, kind="stable")[:SHOWN_PAIRS]
        places = [divmod(int(place), len(names)) for place in order]
        pairs = [
            {"true": names[true], "predicted": names[found], "count": int(counts[true, found])}
            for true, found in places
            if counts[true, found]
        ]
    if not pairs:
        return [Section(title, [f"None of the {len(names):,} classes was taken for another one."])]
    rows = [[pair["true"], pair["predicted"], pair["count"]] for pair in pairs[:SHOWN_PAIRS]]
    text = f"Of {len(names):,} classes, the pairs that are confused most."
    return [Section(title, [text], Table(["true", "predicted", "examples"], rows))]


def errors_section(scored: Predictions) -> Section:
    """Return the worst errors, as `predictions.csv` begins with; of images with a small picture."""
    count = SHOWN_ERRORS if scored.names is None else min(SHOWN_ERRORS, int((~scored.is_right()).sum()))
    if not count:
        return Section("Worst errors", ["Every scored example was answered right."])
    header, rows = scored.table(count)
    # The text is last: on a phone the answers would be out of sight behind it.
    columns = sorted((name for name in header if name != "correct"), key=lambda name: name in ("text", "image"))
    numbers = {"error", "score"} | ({"true", "predicted"} if scored.names is None else set())
    cells = [dict(zip(header, row, strict=True)) for row in rows]
    shown = [[float(row[name]) if name in numbers else row[name] for name in columns] for row in cells]
    if scored.rows is not None and "image" in scored.rows.column_names:
        columns = ["picture", *columns]
        indices = scored.worst_first()[:count].tolist()
        shown = [[_thumbnail(scored, index), *row] for index, row in zip(indices, shown, strict=True)]
    what = "The largest errors." if scored.names is None else "Errors of which the model was surest."
    return Section("Worst errors", [f"{what} {PREDICTIONS_FILE} has every example."], Table(columns, shown))


def _thumbnail(scored: Predictions, index: int) -> Picture | None:
    assert scored.rows is not None
    try:
        return encode_picture(convert_image(scored.rows[index]["image"]), f"example {index + 1}", THUMBNAIL_PX)
    except OSError:  # the file may be gone since it was scored
        return None


def length_sections(scored: Predictions, summary: Mapping[str, Any], max_length: int | None) -> list[Section]:
    """Return the scores by the examples' length in tokens, and by the length that the same examples were cut to."""
    sections = []
    lengths = np.asarray(scored.lengths)
    if max_length is not None and lengths.min() < lengths.max():
        edges = [0, *_bucket_edges(lengths)]
        right = np.abs(scored.errors()) if scored.names is None else scored.is_right()
        name = "mean absolute error" if scored.names is None else "accuracy"
        rows: list[list[Any]] = []
        for low, high in zip(edges, edges[1:], strict=False):
            inside = right[(lengths > low) & (lengths <= high)]
            if len(inside):
                score = float(inside.mean())
                ends = () if scored.names is None else wilson_interval(score, len(inside))
                interval = [" to ".join(f"{end:.3f}" for end in ends)] if ends else []
                rows.append([f"{low + 1:,} to {high:,}", len(inside), score, *interval])
        columns = ["tokens", "examples", name, *([] if scored.names is None else ["95 % interval"])]
        num_cut = int((lengths >= max_length).sum())
        text = [f"{num_cut:,} of them reach {max_length:,} tokens, where documents are cut."] if num_cut else []
        sections.append(Section("Score by length of the document", text, Table(columns, rows)))
    cut = summary.get("by_length")
    if cut:
        columns = list(dict.fromkeys(name for row in cut for name in row))
        rows = [[row.get(name) for name in columns] for row in cut]
        text = ["The scored documents, each cut to so many tokens."]
        sections.append(Section("Score by length that is read", text, Table(columns, rows)))
    return sections


def _bucket_edges(lengths: np.ndarray) -> list[int]:
    """Powers of two, from one that the shortest lengths are below to one that no length is above."""
    top = max(SHORTEST_BUCKET, 1 << (int(lengths.max()) - 1).bit_length())
    edges = [top]
    while edges[0] > SHORTEST_BUCKET and len(edges) < MOST_LENGTHS and edges[0] // 2 >= lengths.min():
        edges.insert(0, edges[0] // 2)
    return edges


def class_sections(scores: Mapping[str, Any]) -> list[Section]:
    """Return the scores of each class, or of the worst ones where there are many."""
    per_class = scores.get("per_class")
    if not per_class:
        return []
    columns = list(per_class[0])
    text = []
    if len(per_class) > SHOWN_CLASSES:
        value = "f1" if "f1" in columns else columns[-1]
        text = [f"The {SHOWN_CLASSES} of {len(per_class):,} classes with the lowest {value}; per_class.txt has all."]
        known = [row for row in per_class if row.get("support", 1)]
        per_class = sorted(known, key=lambda row: float("inf") if row[value] is None else row[value])[:SHOWN_CLASSES]
    rows = [[row.get(name) for name in columns] for row in per_class]
    return [Section("Scores by class", text, Table(columns, rows))]


def run_sections(summary: Mapping[str, Any], device: torch.device, task: str, folder: Path) -> list[Section]:
    """Return what a run took, what it ran on, how it is repeated, how its model is loaded, and the files of its folder.

    Neither command nor lines name a path of this machine.
    """
    names = {
        "steps": "steps", "epochs": "whole epochs", "best_step": "best step", "train_tokens": "tokens trained on",
        "train_seconds": "seconds of training", "tokens_per_second": "tokens per second",
        "peak_memory_gib": "peak memory, GiB", "data_wait_share": "share of the time waiting for data", "seed": "seed",
    }  # fmt: skip
    figures = {shown: summary[name] for name, shown in names.items() if summary.get(name) is not None}
    rows = [[name, f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"] for name, value in figures.items()]
    rows.append(["hardware", describe_hardware(device)])
    versions = {
        "fa_transformers": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "Python": platform.python_version(),
    }
    rows += [[name, str(version)] for name, version in versions.items()]
    entries = [entry for entry in list_folder(folder) if entry.name != PAGE_FILE]
    files = [[entry.name, show_size(entry.num_bytes), entry.meaning] for entry in entries]
    lines = loading_lines(task, without_local_paths(f"'{folder}'").strip("'"))
    return [
        Section("Load the model", code=lines),
        Section("Time, memory and versions", table=Table(["what", "value"], rows)),
        Section("Command", code=[without_local_paths(redact(summary["command"]))], is_wrapped=True),
        Section("Files", ["Beside this page:"], Table(["file", "size", "what it is"], files)),
    ]
