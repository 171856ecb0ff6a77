"""The report of a fine-tuning run: its table, its JSON line, and the files with scores and the confusion matrix."""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..charts import new_figure, save_figure
from ..data.labelled import LabelledData
from ..data.readers.splits import count_classes
from ..files import write_json, write_text
from ..metrics import FEW_EXAMPLES, SCORE_NAMES, describe_intervals, score_intervals
from ..pages.page import Page, write_page
from ..prediction.lengths import format_lengths
from ..redaction import redact
from ..tables import format_table, one_line
from .baselines import WORD_COUNTS
from .checkpointing import TrainingState
from .curve import CURVE_FILE, draw_curve
from .job import FinetuneJob, Fitted
from .predictions import PREDICTIONS_FILE, UNLABELLED_FILE
from .run_folder import PAGE_FILE, print_folder

logger = logging.getLogger(__name__)

LABELLED_MAX_CLASSES = 30
"""Classes up to which a picture of a confusion matrix has names and figures; it grows with them."""
SHOWN_CLASSES = 20
"""Classes that have a line in the table of labels before training."""
PICTURE_NAME_CHARACTERS = 40


def summarise(job: FinetuneJob, data: LabelledData, fitted: Fitted, baselines: dict[str, dict]) -> dict[str, Any]:
    """The content of `all_results.json` and of the JSON line: scores, those of the baselines, figures of the run."""
    kept = (*SCORE_NAMES, "loss")
    num_examples, problem_type = fitted.scores["num_examples"], data.problem_type
    scored = {"model": fitted.scores, **baselines}
    model = {name: fitted.scores[name] for name in kept if name in fitted.scores}
    summary = {
        "task": job.task,
        "data": data.facts.name,
        "split": data.score_split,
        "num_examples": num_examples,
        "model": model,
        "baselines": {name: {key: scores[key] for key in kept if key in scores} for name, scores in baselines.items()},
        "intervals": {
            name: {key: list(ends) for key, ends in score_intervals(scores, num_examples, problem_type).items()}
            for name, scores in scored.items()
        },
        "interval_notes": describe_intervals(model, num_examples, problem_type),
        "parameters": fitted.model.num_parameters(),
        **fitted.run,
        "seed": job.loop.seed,
        "command": job.command,
        "output_dir": str(job.loop.output_dir),
    }
    if data.is_demo and job.is_text and WORD_COUNTS in baselines:
        summary["lesson"] = describe_lesson(model["accuracy"], baselines[WORD_COUNTS]["accuracy"])
    return redact(summary)


def describe_lesson(model: float, words: float) -> list[str]:
    """Return a line on what the demo on licence texts shows, by the accuracies of the model and of word counts, and one
    on where the length of what is read decides."""
    choice = (
        "where words alone tell the label, count words first" if words >= model else
        "on these texts reading words in their order is worth more than counting them"
    )  # fmt: skip
    return [
        f"What this shows: {WORD_COUNTS} has an accuracy of {words:.3f}, this model {model:.3f}: {choice}.",
        "Where length decides: `make images`, digits that are lost when the image is shrunk, and "
        "`python scripts/studies/needle.py`, two statements with thousands of tokens between them.",
    ]


def describe_labels(data: LabelledData) -> str:
    """Return a table of the labels of each split: the rows of each class, or how the numbers to predict are spread.

    Of many classes the `SHOWN_CLASSES` most frequent of train have a line, and the others one together.
    """
    # Of a stream nobody has read the rows yet, and "train" stands for the validation rows.
    parts = {split: part for split, part in data.dataset.items() if split != "train" or data.stream is None}
    if data.label_names is None:
        numbers = {split: np.asarray(part["label"][:], np.float64) for split, part in parts.items()}
        rows = [
            {"split": split, "rows": len(values), "min": values.min(), "mean": values.mean(), "max": values.max()}
            for split, values in numbers.items()
        ]
        return format_table([{key: _plain(value) for key, value in row.items()} for row in rows], list(rows[0]))
    counts = {split: count_classes(part) for split, part in parts.items()}
    order = np.argsort(-next(iter(counts.values())), kind="stable")
    shown, others = order[:SHOWN_CLASSES], order[SHOWN_CLASSES:]
    lines = [{"label": data.label_names[number]} | _pick(counts, number) for number in shown]
    if len(others):
        lines.append({"label": f"({len(others):,} other classes)"} | _pick(counts, others))
    lines.append({"label": "(rows)"} | {split: f"{len(part):,}" for split, part in parts.items()})
    return format_table(lines, ["label", *parts])


def _pick(counts: dict[str, np.ndarray], numbers: Any) -> dict[str, str]:
    return {split: f"{int(count[numbers].sum()):,}" for split, count in counts.items()}


def _plain(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def describe_run(state: TrainingState) -> dict:
    """The figures of a run: steps, epochs and parts of one, tokens, seconds without evaluation and checkpoints."""
    return {
        "steps": state.step,
        "epochs": round(state.epochs, 4),
        "best_step": state.best_step,
        "train_tokens": state.tokens,
        "train_seconds": round(state.seconds, 1),
        "tokens_per_second": round(state.tokens / max(state.seconds, 1e-9), 1),
        "data_wait_share": round(state.data_wait_share, 4),
    }


def print_results(results: dict) -> None:
    """Print the table of the model beside the baselines, everything as one line of JSON, without NaN, and the folder.

    Of fewer than `FEW_EXAMPLES` examples scores have their 95 % interval beside them.
    """
    is_small = results["num_examples"] < FEW_EXAMPLES
    intervals = {"this model": results["intervals"]["model"]} | results["intervals"] if is_small else {}
    print_scores(results, SCORE_NAMES, "examples", intervals)
    for note in results["interval_notes"] if is_small else []:
        print(note)
    if results.get("by_length"):
        print(f"\nwhen only the first tokens of each document are read:\n\n{format_lengths(results['by_length'])}")
    for line in results.get("lesson", []):
        print(f"\n{line}")
    print(json.dumps(results, ensure_ascii=False, allow_nan=False))
    print_folder(results["task"], Path(results["output_dir"]))


def print_scores(results: dict, names: Iterable[str], noun: str, intervals: Mapping[str, dict] | None = None) -> None:
    """Print the table of the model beside the baselines.

    Args:
        results: with "data", "split", "num_examples", "model" and "baselines".
        names: scores that have a column where the model has them.
        noun: what was counted, such as "examples".
        intervals: name of a model -> name of a score -> the lower and upper end that stand beside it.
    """
    rows: list[dict] = [{"model": "this model", **results["model"]}]
    rows += [{"model": name, **scores} for name, scores in results["baselines"].items()]
    for row in rows if intervals else []:
        for name, (low, high) in (intervals or {})[row["model"]].items():
            row[name] = f"{row[name]:.3f} ({low:.3f} to {high:.3f})"
    print(f"\n{one_line(results['data'])}, {results['split']} split, {results['num_examples']} {noun}:\n")
    print(format_table(rows, ["model", *(name for name in names if name in results["model"])]))


def plot_confusion_matrix(matrix: Sequence[Sequence[int]], label_names: Sequence[str], path: Path) -> None:
    """Write a PNG of a confusion matrix: rows are true classes, colour is the share of the row, figures are counts.

    Above `LABELLED_MAX_CLASSES` classes the picture has a fixed size, and neither names nor figures.
    """
    counts = torch.tensor(matrix, dtype=torch.float64)
    shares = counts / counts.sum(dim=1, keepdim=True).clamp_min(1)
    is_labelled = len(label_names) <= LABELLED_MAX_CLASSES
    side = 2.5 + 0.55 * len(label_names) if is_labelled else 10
    figure, axes = new_figure(size=(side, side))
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if is_labelled:
        positions = range(len(label_names))
        # Escaped, as a "$" would begin a formula.
        shown = [one_line(name, PICTURE_NAME_CHARACTERS).replace("$", r"\$") for name in label_names]
        axes.set_xticks(positions, shown, rotation=45, ha="right")
        axes.set_yticks(positions, shown)
        for row in positions:
            for column in positions:
                colour = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, str(matrix[row][column]), ha="center", va="center", color=colour)
    save_figure(figure, path)


def write_report(folder: Path, results: dict, scores: dict) -> None:
    """Write `all_results.json`, and for classification `per_class.txt`, to `folder`.

    Of many classes, which have no confusion matrix, `most_confused.txt` lists the most frequent errors.
    """
    write_json(folder / "all_results.json", results)
    tables = {
        "per_class": ["label", "precision", "recall", "f1", "support"],
        "most_confused": ["true", "predicted", "count"],
    }
    for name, columns in tables.items():
        if name in scores:
            write_text(folder / f"{name}.txt", format_table(scores[name], columns) + "\n")


def write_predictions(folder: Path, fitted: Fitted) -> None:
    """Write the answers to the scored examples, and to those without labels where there are any.

    Such a file of an earlier run is removed. They stay with the run: what `push` uploads is what `publish` wrote.
    """
    for name, predictions in ((PREDICTIONS_FILE, fitted.scored), (UNLABELLED_FILE, fitted.unlabelled)):
        (folder / name).unlink(missing_ok=True)
        if predictions is not None:
            predictions.write(folder / name)


def draw_report(folder: Path, scores: dict, label_names: Sequence[str]) -> None:
    """Draw `confusion_matrix.png` in `folder` where there are few enough classes; a failure is a warning.

    A picture is decoration: it is drawn when all else of a run is written.
    """
    if "confusion_matrix" in scores:
        with _decoration("confusion_matrix.png"):
            plot_confusion_matrix(scores["confusion_matrix"], label_names, folder / "confusion_matrix.png")


def draw_course(folder: Path, state: TrainingState) -> None:
    """Draw `CURVE_FILE`, the course of a run, in `folder`; a failure is a warning."""
    with _decoration(CURVE_FILE):
        draw_curve(state.curve, state.best_step, state.best_score, folder / CURVE_FILE)


def write_page_of(folder: Path, build: Callable[[], Page]) -> None:
    """Write the report page that `build` returns to `folder`; a failure is a warning, as the run is complete."""
    with _decoration(PAGE_FILE):
        (folder / PAGE_FILE).unlink(missing_ok=True)  # of an earlier run
        write_page(folder / PAGE_FILE, build())


@contextmanager
def _decoration(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever it is: the run is complete without it
        logger.warning("%s was not drawn: %s: %s", name, type(error).__name__, error)
