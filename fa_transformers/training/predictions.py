"""A model's answers to single examples, as a table: of rows that have no label, and of those that were scored."""

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from ..data.batching import LengthGroupedBatchSampler
from ..data.labelled import LabelledData
from ..files import written_by_rename
from ..metrics import decide
from ..redaction import redact
from ..tables import harmless_cell

PREDICTIONS_FILE = "predictions.csv"
SCORED_FILE = "scored_examples.csv"
WRITTEN_CLASSES = 50
"""Classes up to which each has a column, and beyond them the most classes of a row that are named."""
NUM_BEST = 5
"""Best classes of a row that are written with their scores where there are more than `WRITTEN_CLASSES`."""


class Predictions:
    """A model's answers to examples, kept small: all scores up to `WRITTEN_CLASSES` classes, beyond them the best.

    A score is a probability (softmax, or of several labels the sigmoid), and in regression the number itself.

    Args:
        data: says what the labels are.
        loader: of the examples, whose order it decides.
        source_rows: the number of each example in its source, from 1 on; None counts.
        labels: the true labels of the examples as their column "label" has them, or None.
    """

    def __init__(
        self,
        data: LabelledData,
        loader: DataLoader,
        source_rows: Sequence[int] | None = None,
        labels: Sequence[Any] | None = None,
    ):
        self.problem_type, self.names = data.problem_type, data.label_names
        self.order = example_order(loader)
        self.source_rows, self.labels = source_rows, labels
        self._several = data.problem_type == "multi_label_classification"
        self._is_short = data.num_labels > WRITTEN_CLASSES
        self._batches: list[tuple[np.ndarray, ...]] = []

    def shorten(self, logits: np.ndarray) -> tuple[np.ndarray, ...]:
        """Return what is kept of logits [B, C]: scores [B, kept], their classes, and the number of classes chosen [B].

        Raises:
            ValueError: a logit is not finite.
        """
        decided = decide(logits, self.problem_type)
        chosen = decided.sum(axis=1) if self._several else np.ones(len(logits), np.int64)
        if self.problem_type == "regression":
            return logits, np.zeros(logits.shape, np.int32), chosen
        if self._several:
            sigmoid = (1 / (1 + np.exp(-np.clip(logits, -80, 80)))).astype(np.float32)
            above_half = np.nextafter(np.float32(0.5), np.float32(1))  # where a small logit's sigmoid rounds to 0.5
            scores = np.where(decided > 0, np.maximum(sigmoid, above_half), sigmoid)
        else:
            powers = np.exp(logits - logits.max(axis=1, keepdims=True))
            scores = powers / powers.sum(axis=1, keepdims=True)
        if not self._is_short:
            return scores, np.broadcast_to(np.arange(scores.shape[1], dtype=np.int32), scores.shape), chosen
        kept = WRITTEN_CLASSES if self._several else NUM_BEST
        best = np.argpartition(-logits, kept - 1, axis=1)[:, :kept]
        best = np.take_along_axis(best, np.argsort(-np.take_along_axis(logits, best, 1), axis=1, kind="stable"), 1)
        return np.take_along_axis(scores, best, 1), best.astype(np.int32), chosen

    def add(self, scores: np.ndarray, classes: np.ndarray, chosen: np.ndarray) -> None:
        """Keep what `shorten` returned, of the next examples in the loader's order."""
        self._batches.append((scores, classes, chosen))

    def write(self, path: Path) -> None:
        """Write the table as csv in UTF-8: a row an example, in the order of the data.

        Its columns are `row` (from 1), `true` where labels are known, `predicted`, and the scores: "score of NAME" for
        each class, or the best as "best 1", "score 1" and on. Labels of several are a JSON list of names; of more than
        `WRITTEN_CLASSES` classes the best are named, and `num_predicted` counts all. A name that a spreadsheet would
        take for a formula has an apostrophe before it.
        """
        with written_by_rename(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(self._header())
            writer.writerows(self._rows())

    def _header(self) -> list[str]:
        header = ["row", *(["true"] if self.labels is not None else []), "predicted"]
        if self.names is None:
            return header
        if not self._is_short:
            return header + [f"score of {redact(name)}" for name in self.names]
        best = [f"{noun} {place}" for place in range(1, NUM_BEST + 1) for noun in ("best", "score")]
        return header + (["num_predicted"] if self._several else []) + best

    def _rows(self) -> Iterator[list]:
        scores, classes, chosen = (np.concatenate(column) for column in zip(*self._batches, strict=True))
        places = np.empty(len(self.order), np.int64)
        places[self.order] = np.arange(len(self.order))
        for index, place in enumerate(places):
            row = [index + 1 if self.source_rows is None else self.source_rows[index]]
            if self.labels is not None:
                row.append(self._show(self.labels[index]))
            yield row + self._answer(scores[place], classes[place], int(chosen[place]))

    def _answer(self, scores: np.ndarray, classes: np.ndarray, chosen: int) -> list:
        shown = [f"{score:.6g}" for score in scores.tolist()]
        if self.names is None:
            return shown
        if self._several:
            predicted = self._show([int(number) for number, score in zip(classes, scores, strict=True) if score > 0.5])
        else:
            predicted = self._show(int(classes[scores.argmax()]))
        if not self._is_short:
            return [predicted, *shown]
        best = [
            cell
            for number, score in zip(classes[:NUM_BEST].tolist(), shown, strict=False)
            for cell in (self._show(number), score)
        ]
        return [predicted, *([chosen] if self._several else []), *best]

    def _show(self, label: Any) -> Any:
        """A cell of a label: a number, a name, or a list of names."""
        if self.names is None:
            return f"{label:.6g}"
        if isinstance(label, list):
            return redact(json.dumps([self.names[number] for number in label], ensure_ascii=False))
        return harmless_cell(redact(self.names[label]))


def example_order(loader: DataLoader) -> np.ndarray:
    """Return the index of each example that the steps of a prepared loader give, of all processes, one after the other.

    The processes take the batches of the sampler in turn, and what they gather in a step stands in that order.
    """
    sampler: Any = loader.batch_sampler
    while not isinstance(sampler, LengthGroupedBatchSampler):
        sampler = sampler.batch_sampler
    return np.concatenate(sampler.batches(0))
