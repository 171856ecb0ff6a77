"""The scores of a model over all examples of a loader, whichever process they lie on."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from ..data.labelled import LabelledData
from ..evaluation import evaluating
from ..metrics import RunningScores, decide
from .predictions import Predictions
from .setup import reports_examples


def evaluate(
    model: torch.nn.Module,
    loader: DataLoader,
    accelerator: Accelerator,
    data: LabelledData,
    predictions: Predictions | None = None,
) -> dict:
    """Scores and mean loss over all examples of the loader, each counted once, equal on every process.

    `predictions` receives the answer to each example, in the loader's order.
    """
    scores = RunningScores(data.problem_type, data.label_names)
    several = data.problem_type == "multi_label_classification"
    total_loss = 0.0

    def describe(output: Any, batch: dict) -> tuple[np.ndarray, ...]:
        logits = output.logits.float().cpu().numpy()
        decided = decide(logits, data.problem_type)
        references = batch["labels"].cpu().numpy().astype(decided.dtype)
        if several:  # a bit for each class: these rows travel between processes
            decided, references = np.packbits(decided, axis=1), np.packbits(references, axis=1)
        answers = () if predictions is None else predictions.shorten(logits)
        return decided, references, np.full(len(decided), output.loss.item()), *answers

    for decided, references, losses, *answers in _gather(model, loader, accelerator, describe):
        if several:
            decided, references = (np.unpackbits(rows, axis=1, count=data.num_labels) for rows in (decided, references))
        scores.add(decided, references)
        total_loss += float(losses.sum())
        if predictions is not None:
            is_right = decided == references
            predictions.add(answers, is_right.all(axis=1) if several else is_right)
    return scores.compute() | {"loss": total_loss / scores.num_examples, "num_examples": scores.num_examples}


def predict(model: torch.nn.Module, loader: DataLoader, accelerator: Accelerator, predictions: Predictions) -> None:
    """Give `predictions` the answers to all examples of the loader, which have no labels, in the loader's order."""

    def describe(output: Any, batch: dict) -> tuple[np.ndarray, ...]:
        return predictions.shorten(output.logits.float().cpu().numpy())

    for answers in _gather(model, loader, accelerator, describe):
        predictions.add(answers, np.zeros(len(answers[0]), bool))


def _gather(
    model: torch.nn.Module, loader: DataLoader, accelerator: Accelerator, describe: Callable
) -> Iterator[tuple[np.ndarray, ...]]:
    """Yield what `describe(output, batch)` says of each step's examples, arrays [examples, ...], of all processes."""
    with evaluating(model):
        for batch in loader:
            local = list(zip(*describe(model(**batch), batch), strict=True))
            # Rows as objects: batches differ in size between processes, which tensors could not be gathered in.
            rows = accelerator.gather_for_metrics(local if reports_examples() else [], use_gather_object=True)
            if rows:
                yield tuple(np.stack(column) for column in zip(*rows, strict=True))
