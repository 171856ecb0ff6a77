"""F1, exact-match accuracy and per-class table for multi-label classification, as one `evaluate.Metric`."""

import datasets
import evaluate
import numpy as np
from sklearn.metrics import accuracy_score, f1_score, precision_recall_fscore_support

DESCRIPTION = "Scores of a multi-label classifier, computed with scikit-learn; needs no network."
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

    def _compute(self, predictions: list[list[int]], references: list[list[int]], label_names: list[str]) -> dict:
        if len(references) == 0:
            raise ValueError("references is empty: the scores of no examples are undefined; evaluate at least one.")
        for name, rows in (("predictions", predictions), ("references", references)):
            for index, row in enumerate(rows):
                if len(row) != len(label_names) or not set(row) <= {0, 1}:
                    raise ValueError(f"{name}[{index}] must be {len(label_names)} zeros and ones, got {row}.")
        predicted, true = np.asarray(predictions), np.asarray(references)
        columns = precision_recall_fscore_support(true, predicted, average=None, zero_division=0)
        return {
            "accuracy": float(accuracy_score(true, predicted)),
            "macro_f1": float(f1_score(true, predicted, average="macro", zero_division=0)),
            "micro_f1": float(f1_score(true, predicted, average="micro", zero_division=0)),
            "per_class": [
                {"label": name, "precision": float(p), "recall": float(r), "f1": float(f), "support": int(s)}
                for name, p, r, f, s in zip(label_names, *columns, strict=True)
            ],
        }
