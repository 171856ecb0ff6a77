"""Metrics as `evaluate.Metric` modules that live in this package, so that no network is needed.

The metrics' files also work as `evaluate.load("path/to/file.py")`. With several processes, gather the predictions first
(`accelerator.gather_for_metrics`) and compute on the gathered rows, as `evaluate` in training/scoring.py does.
"""

import evaluate
import numpy as np

from .classification import ClassificationMetric
from .intervals import FEW_EXAMPLES, SCORE_NAMES, describe_intervals, score_intervals, wilson_interval
from .multi_label import MultiLabelMetric
from .regression import RegressionMetric
from .running import RunningScores

__all__ = [
    "BEST_METRICS",
    "ClassificationMetric",
    "FEW_EXAMPLES",
    "LOWER_IS_BETTER",
    "MultiLabelMetric",
    "PROBLEM_METRICS",
    "RegressionMetric",
    "RunningScores",
    "SCORE_NAMES",
    "decide",
    "describe_intervals",
    "load_metric",
    "score_intervals",
    "wilson_interval",
]

PROBLEM_METRICS: dict[str, type[evaluate.Metric]] = {
    "single_label_classification": ClassificationMetric,
    "multi_label_classification": MultiLabelMetric,
    "regression": RegressionMetric,
}
BEST_METRICS = {
    "single_label_classification": "accuracy",
    "multi_label_classification": "micro_f1",
    "regression": "mse",
}
LOWER_IS_BETTER = frozenset({"loss", "mse", "mae", "epe", "over_1px", "over_3px", "d1"})


def load_metric(problem_type: str) -> evaluate.Metric:
    """Return a fresh metric for one of transformers' `problem_type` names, which keeps its examples in memory.

    Raises:
        ValueError: `problem_type` is not a key of `PROBLEM_METRICS`.
    """
    if problem_type not in PROBLEM_METRICS:
        raise ValueError(f"problem_type must be one of {sorted(PROBLEM_METRICS)}, got {problem_type!r}.")
    return PROBLEM_METRICS[problem_type](keep_in_memory=True)


def decide(logits: np.ndarray, problem_type: str) -> np.ndarray:
    """Turn logits [B, C] into the predictions that the metric of `problem_type` takes.

    Single label: the class of the largest logit, [B]. Multi-label: 1 where the logit is above 0 (probability above one
    half), [B, C]. Regression: the number itself, [B].

    Raises:
        ValueError: a logit is not finite (the training has diverged), or `problem_type` is unknown.
    """
    if not np.isfinite(logits).all():
        raise ValueError("The model's logits are not finite: the training has diverged; lower --learning_rate.")
    if problem_type == "single_label_classification":
        return logits.argmax(axis=-1)
    if problem_type == "multi_label_classification":
        return (logits > 0).astype(int)
    if problem_type == "regression":
        return logits.reshape(len(logits))
    raise ValueError(f"problem_type must be one of {sorted(PROBLEM_METRICS)}, got {problem_type!r}.")
