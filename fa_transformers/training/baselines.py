"""Scores of what needs no training of ours, on the split that a model is scored on."""

import logging

import numpy as np

from ..data.collators import label_tensor
from ..data.labelled import LabelledData
from ..data.readers.splits import count_classes
from ..data.word_counts import tfidf_baseline
from ..metrics import RunningScores

logger = logging.getLogger(__name__)

COUNTED_ENTRIES = 2**22
"""Entries of labels, rows times classes, that are held at a time."""
TFIDF_MAX_CLASSES = 100
"""Classes up to which TF-IDF is scored: it fits 50,000 weights for each of them, one class after the other."""

WORD_COUNTS = "TF-IDF + logistic regression"
"""Name of the baseline that counts words."""


def constant_scores(data: LabelledData) -> dict:
    """Scores of the best constant answer: the majority class, each label that most rows have, or the mean number."""
    train, scored = data.dataset["train"], data.dataset[data.score_split]
    answer: np.ndarray
    if data.problem_type == "single_label_classification":
        answer = np.asarray(count_classes(train).argmax())
    elif data.problem_type == "multi_label_classification":
        answer = count_classes(train) > len(train) / 2
    else:
        answer = np.asarray(train["label"][:], np.float64).mean(keepdims=True)
    scores = RunningScores(data.problem_type, data.label_names)
    block = max(1, COUNTED_ENTRIES // data.num_labels)
    for batch in scored.select_columns("label").iter(batch_size=block):
        references = label_tensor(batch["label"], data.problem_type, data.num_labels).numpy()
        scores.add(np.broadcast_to(answer, references.shape), references)
    return scores.compute()


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
            scores[WORD_COUNTS] = tfidf_baseline(data.dataset, data.score_split)
        except Exception as error:  # whatever it is: the trained model is complete without the comparison
            logger.warning("%s was not scored: %s: %s", WORD_COUNTS, type(error).__name__, error)
    return scores
