"""Scores of predictions that come a batch at a time."""

from collections.abc import Sequence

import numpy as np

from .classification import score_classes
from .multi_label import MultiLabelCounts
from .regression import score_numbers


class RunningScores:
    """The scores of `PROBLEM_METRICS[problem_type]`, of predictions that are added batch by batch.

    Memory is linear in examples and in classes, and never in their product: of several labels only counts are kept.

    Args:
        problem_type: a key of `PROBLEM_METRICS`.
        label_names: one name per class, in index order; None for regression.
    """

    def __init__(self, problem_type: str, label_names: Sequence[str] | None):
        self.problem_type, self.label_names = problem_type, list(label_names or [])
        self.num_examples = 0
        self._counts = MultiLabelCounts(len(self.label_names))
        self._pairs: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, predictions: np.ndarray, references: np.ndarray) -> None:
        """Add a batch: what `decide` returns, and the true values in the same shape."""
        predictions, references = np.asarray(predictions), np.asarray(references)
        self.num_examples += len(predictions)
        if self.problem_type == "multi_label_classification":
            self._counts.add(predictions, references)
            return
        kind = np.int64 if self.problem_type == "single_label_classification" else np.float64
        self._pairs.append((predictions.astype(kind), references.astype(kind)))

    def compute(self) -> dict:
        """Return the scores of all that was added.

        Raises:
            ValueError: it was nothing, or can't be scored, as in the metric of the problem type.
        """
        if self.problem_type == "multi_label_classification":
            return self._counts.scores(self.label_names)
        if not self._pairs:
            raise ValueError("The scores of no examples are undefined: add at least one.")
        predictions = np.concatenate([pair[0] for pair in self._pairs])
        references = np.concatenate([pair[1] for pair in self._pairs])
        if self.problem_type == "regression":
            return score_numbers(predictions, references)
        return score_classes(predictions, references, self.label_names)
