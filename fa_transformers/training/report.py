"""The report of a fine-tuning run: its table, its JSON line, and the files with scores and the confusion matrix."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..charts import new_figure, save_figure
from ..data.labelled import LabelledData
from ..files import write_json, write_text
from ..redaction import redact
from ..tables import format_table, one_line
from .checkpointing import TrainingState
from .job import FinetuneJob, Fitted

logger = logging.getLogger(__name__)

LABELLED_MAX_CLASSES = 30
"""Classes up to which a picture of a confusion matrix has names and figures; it grows with them."""
PICTURE_NAME_CHARACTERS = 40
TABLE_COLUMNS = ("accuracy", "macro_f1", "micro_f1", "mse", "mae", "pearson", "spearman")


def summarise(job: FinetuneJob, data: LabelledData, fitted: Fitted, baselines: dict[str, dict]) -> dict[str, Any]:
    """The content of `all_results.json` and of the JSON line: scores, those of the baselines, figures of the run."""
    kept = (*TABLE_COLUMNS, "loss")
    summary = {
        "task": job.task,
        "data": data.facts.name,
        "split": data.score_split,
        "num_examples": fitted.scores["num_examples"],
        "model": {name: fitted.scores[name] for name in kept if name in fitted.scores},
        "baselines": {name: {key: scores[key] for key in kept if key in scores} for name, scores in baselines.items()},
        "parameters": fitted.model.num_parameters(),
        **fitted.run,
        "seed": job.loop.seed,
        "command": job.command,
        "output_dir": str(job.loop.output_dir),
    }
    return redact(summary)


def describe_run(state: TrainingState) -> dict:
    """The figures of a run: steps, whole epochs, tokens, seconds without evaluation and checkpoints."""
    return {
        "steps": state.step,
        "epochs": state.epoch,
        "best_step": state.best_step,
        "train_tokens": state.tokens,
        "train_seconds": round(state.seconds, 1),
        "tokens_per_second": round(state.tokens / max(state.seconds, 1e-9), 1),
        "data_wait_share": round(state.data_wait_share, 4),
    }


def print_results(results: dict) -> None:
    """Print the table of the model beside the baselines, then everything as one line of JSON, without NaN."""
    scored = {"this model": results["model"], **results["baselines"]}
    columns = [name for name in TABLE_COLUMNS if name in results["model"]]
    rows = [{"model": name, **scores} for name, scores in scored.items()]
    print(f"\n{one_line(results['data'])}, {results['split']} split, {results['num_examples']} examples:\n")
    print(format_table(rows, ["model", *columns]))
    print(json.dumps(results, ensure_ascii=False, allow_nan=False))


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


def draw_report(folder: Path, scores: dict, label_names: Sequence[str]) -> None:
    """Draw `confusion_matrix.png` in `folder` where there are few enough classes; a failure is a warning.

    A picture is decoration: it is drawn when all else of a run is written.
    """
    if "confusion_matrix" not in scores:
        return
    try:
        plot_confusion_matrix(scores["confusion_matrix"], label_names, folder / "confusion_matrix.png")
    except Exception as error:  # whatever it is: the run is complete without the picture
        logger.warning("confusion_matrix.png was not drawn: %s: %s", type(error).__name__, error)
