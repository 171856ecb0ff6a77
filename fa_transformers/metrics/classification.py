"""Accuracy, F1, per-class table and confusion matrix for single-label classification, as one `evaluate.Metric`."""

import datasets
import evaluate
import numpy as np
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, precision_recall_fscore_support

MATRIX_MAX_CLASSES = 100
"""Classes up to which the confusion matrix is made: it has as many entries as their square."""
NUM_CONFUSED_PAIRS = 100
DESCRIPTION = "Scores of a single-label classifier, computed with scikit-learn; needs no network."
INPUTS = """
Args:
    predictions: predicted class indices.
    references: true class indices.
    label_names: one name per class, in index order.
"""


class ClassificationMetric(evaluate.Metric):
    """Scores over all examples added so far.

    `compute(predictions, references, label_names)` returns `accuracy`, `macro_f1` (mean over the classes that occur in
    the references or the predictions) and `per_class` (rows of label, precision, recall, f1, support; a ratio with
    nothing in its denominator is 0). Micro-averaged F1 isn't there: with one label for each example it is the accuracy.
    Up to `MATRIX_MAX_CLASSES` classes there is also `confusion_matrix` (rows are true classes), beyond them
    `most_confused`: up to `NUM_CONFUSED_PAIRS` rows of true, predicted, count, the most frequent errors first. Memory
    and time are linear in examples and classes.

    Raises:
        ValueError: there are no examples, or an index is not below the number of label names.
    """

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(
            description=DESCRIPTION, citation="", inputs_description=INPUTS, features=features, format="numpy"
        )

    def _compute(self, predictions: np.ndarray, references: np.ndarray, label_names: list[str]) -> dict:
        return score_classes(predictions, references, label_names)


def score_classes(predictions: np.ndarray, references: np.ndarray, label_names: list[str]) -> dict:
    """Return the scores that `ClassificationMetric` describes, of class indices [examples]."""
    if len(references) == 0:
        raise ValueError("references is empty: the scores of no examples are undefined; evaluate at least one.")
    for name, values in (("predictions", predictions), ("references", references)):
        outside = values[(values < 0) | (values >= len(label_names))]
        if len(outside):
            raise ValueError(f"{name} hold class {outside[0]}, but label_names has {len(label_names)} names.")
    classes = np.arange(len(label_names))
    occurring = np.union1d(predictions, references)
    columns = precision_recall_fscore_support(references, predictions, labels=classes, zero_division=0)
    return {
        "accuracy": float(accuracy_score(references, predictions)),
        "macro_f1": float(f1_score(references, predictions, labels=occurring, average="macro", zero_division=0)),
        "per_class": [
            {"label": name, "precision": float(p), "recall": float(r), "f1": float(f), "support": int(s)}
            for name, p, r, f, s in zip(label_names, *columns, strict=True)
        ],
        **_describe_errors(predictions, references, label_names),
    }


def _describe_errors(predictions: np.ndarray, references: np.ndarray, label_names: list[str]) -> dict:
    num_classes = len(label_names)
    if num_classes <= MATRIX_MAX_CLASSES:
        matrix = confusion_matrix(references, predictions, labels=np.arange(num_classes))
        return {"confusion_matrix": matrix.tolist()}
    wrong = predictions != references
    # One number for each pair: unique over rows of two columns is slower by far.
    pairs, counts = np.unique(references[wrong] * num_classes + predictions[wrong], return_counts=True)
    order = np.argsort(-counts, kind="stable")[:NUM_CONFUSED_PAIRS]
    rows = [
        (label_names[pair // num_classes], label_names[pair % num_classes], int(counts[index]))
        for index, pair in zip(order, pairs[order], strict=True)
    ]
    return {"most_confused": [dict(zip(("true", "predicted", "count"), row, strict=True)) for row in rows]}
