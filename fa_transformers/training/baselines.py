"""Scores of what needs no training of ours, on the split that a model is scored on."""

import logging
import statistics
from collections import Counter

from ..data.collators import label_tensor
from ..data.labelled import LabelledData
from ..data.word_counts import tfidf_baseline
from ..metrics import load_metric

logger = logging.getLogger(__name__)

TFIDF_MAX_CLASSES = 100
"""Classes up to which TF-IDF is scored: it fits 50,000 weights for each of them, one class after the other."""


def constant_scores(data: LabelledData) -> dict:
    """Scores of the best constant answer: the majority class, each label that most rows have, or the mean number."""
    labels = list(data.dataset["train"]["label"])
    references = list(data.dataset[data.score_split]["label"])
    names = {"label_names": data.label_names}
    if data.problem_type == "single_label_classification":
        answer = Counter(labels).most_common(1)[0][0]
    elif data.problem_type == "multi_label_classification":
        rows = label_tensor(labels, data.problem_type, data.num_labels)
        answer = (rows.mean(dim=0) > 0.5).int().tolist()
        references = label_tensor(references, data.problem_type, data.num_labels).int().tolist()
    else:
        answer, names = statistics.fmean(labels), {}
    return load_metric(data.problem_type).compute(
        predictions=[answer] * len(references), references=references, **names
    )


def score_baselines(data: LabelledData) -> dict[str, dict]:
    """Scores of what needs no network: a constant answer, and for single-label text TF-IDF + logistic regression.

    A stream is never in memory as a whole, so its constant answer comes from the validation rows, and TF-IDF is left
    out. So it is above `TFIDF_MAX_CLASSES` classes, and where it fails, with a warning.
    """
    part = "training" if data.stream is None else "validation"
    constant = f"mean of the {part} labels" if data.problem_type == "regression" else "majority class"
    if data.stream is not None:
        return {constant: constant_scores(data)}
    scores = {constant: constant_scores(data)}
    is_text = "text" in data.dataset["train"].column_names
    if data.problem_type == "single_label_classification" and is_text and data.num_labels <= TFIDF_MAX_CLASSES:
        try:
            scores["TF-IDF + logistic regression"] = tfidf_baseline(data.dataset, data.score_split)
        except Exception as error:  # whatever it is: the trained model is complete without the comparison
            logger.warning("TF-IDF + logistic regression was not scored: %s: %s", type(error).__name__, error)
    return scores
