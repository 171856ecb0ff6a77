"""F1, exact-match accuracy and per-class table for multi-label classification as one `evaluate.Metric`, from counts."""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

BLOCK_ENTRIES = 2**22
"""Entries of rows that are counted at a time."""
DESCRIPTION = "Scores of a multi-label classifier, equal to scikit-learn's; needs no network."
INPUTS = """
Args:
    predictions: for each example a row of 0 and 1, one entry per class.
    references: the true rows.
    label_names: one name per class, in index order.
"""


class MultiLabelMetric(evaluate.Metric):
    """Scores over all examples added so far.

    `compute(predictions, references, label_names)` returns `accuracy` (share of rows that are right in every class),
    `macro_f1` (mean over all classes), `micro_f1` (over all single decisions) and `per_class`. A ratio with nothing in
    its denominator is 0.

    Raises:
        ValueError: there are no examples, a row has not one entry per label name, or an entry is not 0 or 1.
    """

    def _info(self) -> evaluate.MetricInfo:
        row = datasets.List(datasets.Value("int64"))
        features = datasets.Features({"predictions": row, "references": row})
        return evaluate.MetricInfo(description=DESCRIPTION, citation="", inputs_description=INPUTS, features=features)

    def compute(self, *, predictions: Any = None, references: Any = None, **inputs: Any) -> dict | None:
        """Return the scores of these rows and those added before; None on other processes than the first."""
        if predictions is None or references is None or self.writer is not None or self.num_process > 1:
            return super().compute(predictions=predictions, references=references, **inputs)
        # Rows that come all at once: stored first, each entry would be a Python object for a while.
        return self._compute(predictions, references, **inputs)

    def _compute(self, predictions: Any, references: Any, label_names: list[str]) -> dict:
        counts = MultiLabelCounts(len(label_names))
        for start in range(0, len(references), size := max(1, BLOCK_ENTRIES // max(1, len(label_names)))):
            counts.add(predictions[start : start + size], references[start : start + size])
        return counts.scores(label_names)


class MultiLabelCounts:
    """The counts that the scores of a multi-label classifier follow from: three of each class, whatever the rows.

    Args:
        num_classes: entries of a row.
    """

    def __init__(self, num_classes: int):
        self.num_classes = num_classes
        self.num_rows = self.num_exact = 0
        self._right, self._predicted, self._true = np.zeros((3, num_classes), np.int64)

    def add(self, predictions: Any, references: Any) -> None:
        """Count rows [rows, classes] of zeros and ones.

        Raises:
            ValueError: a row has not one entry per class, or an entry is not 0 or 1.
        """
        predicted = self._check(predictions, "predictions")
        true = self._check(references, "references")
        self.num_rows += len(true)
        self.num_exact += int((predicted == true).all(axis=1).sum())
        self._right += (predicted & true).sum(axis=0)
        self._predicted += predicted.sum(axis=0)
        self._true += true.sum(axis=0)

    def _check(self, rows: Any, name: str) -> np.ndarray:
        if isinstance(rows, np.ndarray) and rows.shape[1:] == (self.num_classes,) and ((rows == 0) | (rows == 1)).all():
            return rows.astype(bool)
        checked = np.empty((len(rows), self.num_classes), bool)
        for index, row in enumerate(rows):
            values = np.asarray(row)
            if values.shape != (self.num_classes,) or not ((values == 0) | (values == 1)).all():
                raise ValueError(
                    f"{name}[{self.num_rows + index}] must be {self.num_classes} zeros and ones, got "
                    f"{values.tolist()[:20]} ({values.size} values)."
                )
            checked[index] = values
        return checked

    def scores(self, label_names: Sequence[str]) -> dict:
        """Return the scores that `MultiLabelMetric` describes, of the rows counted so far.

        Raises:
            ValueError: there are none.
        """
        if self.num_rows == 0:
            raise ValueError("references is empty: the scores of no examples are undefined; evaluate at least one.")
        right, predicted, true = self._right, self._predicted, self._true
        f1 = _divide(2 * right, predicted + true)
        columns = (_divide(right, predicted), _divide(right, true), f1, true)
        return {
            "accuracy": self.num_exact / self.num_rows,
            "macro_f1": float(f1.mean()),
            "micro_f1": float(_divide(2 * right.sum(keepdims=True), (predicted + true).sum(keepdims=True))[0]),
            "per_class": [
                {"label": name, "precision": float(p), "recall": float(r), "f1": float(f), "support": int(s)}
                for name, p, r, f, s in zip(label_names, *columns, strict=True)
            ],
        }


def _divide(numerators: np.ndarray, denominators: np.ndarray) -> np.ndarray:
    """Ratios, 0 where there is nothing in the denominator."""
    return numerators / np.maximum(denominators, 1)
