"""The report of a fine-tuning run: its table, its JSON line, and the files with scores and the confusion matrix."""

import json
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
    """Write a PNG of a confusion matrix: rows are true classes, colour is the share of the row, figures are counts."""
    counts = torch.tensor(matrix, dtype=torch.float64)
    shares = counts / counts.sum(dim=1, keepdim=True).clamp_min(1)
    side = 2.5 + 0.55 * len(label_names)
    figure, axes = new_figure(size=(side, side))
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    positions = range(len(label_names))
    axes.set_xticks(positions, label_names, rotation=45, ha="right")
    axes.set_yticks(positions, label_names)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if len(label_names) <= 30:
        for row in positions:
            for column in positions:
                colour = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, str(matrix[row][column]), ha="center", va="center", color=colour)
    save_figure(figure, path)


def write_report(folder: Path, results: dict, scores: dict, label_names: Sequence[str]) -> None:
    """Write `all_results.json`, and for classification `per_class.txt` and `confusion_matrix.png`, to `folder`."""
    write_json(folder / "all_results.json", results)
    if "per_class" in scores:
        table = format_table(scores["per_class"], ["label", "precision", "recall", "f1", "support"])
        write_text(folder / "per_class.txt", table + "\n")
    if "confusion_matrix" in scores:
        plot_confusion_matrix(scores["confusion_matrix"], label_names, folder / "confusion_matrix.png")
