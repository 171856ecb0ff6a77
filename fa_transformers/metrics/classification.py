"""Accuracy, F1, per-class table and confusion matrix for single-label classification, as one `evaluate.Metric`."""

import datasets
import evaluate
import numpy as np
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, precision_recall_fscore_support

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
    the references or the predictions), `micro_f1` (equal to accuracy here), `per_class` (rows of label, precision,
    recall, f1, support; a ratio with nothing in its denominator is 0) and `confusion_matrix` (rows are true classes).

    Raises:
        ValueError: there are no examples, or an index is not below the number of label names.
    """

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(
            description=DESCRIPTION, citation="", inputs_description=INPUTS, features=features, format="numpy"
        )

    def _compute(self, predictions: np.ndarray, references: np.ndarray, label_names: list[str]) -> dict:
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
            "micro_f1": float(f1_score(references, predictions, labels=occurring, average="micro", zero_division=0)),
            "per_class": [
                {"label": name, "precision": float(p), "recall": float(r), "f1": float(f), "support": int(s)}
                for name, p, r, f, s in zip(label_names, *columns, strict=True)
            ],
            "confusion_matrix": confusion_matrix(references, predictions, labels=classes).tolist(),
        }
