"""Answers to single examples: labels and scores from logits, and the columns that they have in a table."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ..metrics import decide
from ..redaction import redact

WRITTEN_CLASSES = 50
"""Classes up to which each has a column, and beyond them the most classes of a row that are named."""
NUM_BEST = 5
"""Best classes of a row that are written with their scores where there are more than `WRITTEN_CLASSES`."""


class Answers(NamedTuple):
    """The part of logits that is kept: scores [B, kept], their classes [B, kept], and the number of classes chosen [B].

    A score is a probability (softmax, or of several labels the sigmoid), and in regression the number itself.
    """

    scores: np.ndarray
    classes: np.ndarray
    chosen: np.ndarray


@dataclass(frozen=True)
class Prediction:
    """A model's answer to one text or image.

    Args:
        label: the most likely class; of several labels, the list of those whose probability is above one half (at most
            50 where there are more classes); in regression, the number; None where `error` says why there is none.
        score: the probability of `label`; of several labels, that of the least sure class to be as predicted; in
            regression, the number.
        scores: class -> probability: softmax, or of several labels the sigmoid; of more than 50 classes only the five
            most likely, of several labels the 50. Empty in regression.
        num_tokens: tokens or patches that the model read.
        is_truncated: the document was longer than the model reads, and its end was left out.
        error: the reason why there is no answer, None where there is one.
    """

    label: str | list[str] | float | None
    score: float | None
    scores: dict[str, float] = field(default_factory=dict)
    num_tokens: int = 0
    is_truncated: bool = False
    error: str | None = None


class AnswerRules:
    """The way from a model's logits to labels and scores, small: of many classes the best ones are kept.

    Args:
        problem_type: one of transformers' names, as in `metrics.PROBLEM_METRICS`.
        names: names of the classes in the order of their numbers; None for regression.
    """

    def __init__(self, problem_type: str, names: Sequence[str] | None):
        self.problem_type = problem_type
        self.names = None if names is None else [redact(name) for name in names]
        self.is_several = problem_type == "multi_label_classification"
        self.is_short = names is not None and len(names) > WRITTEN_CLASSES

    def shorten(self, logits: np.ndarray) -> Answers:
        """Return what is kept of logits [B, C].

        Raises:
            ValueError: a logit is not finite.
        """
        decided = decide(logits, self.problem_type)
        chosen = decided.sum(axis=1) if self.is_several else np.ones(len(logits), np.int64)
        if self.problem_type == "regression":
            return Answers(logits, np.zeros(logits.shape, np.int32), chosen)
        if self.is_several:
            sigmoid = (1 / (1 + np.exp(-np.clip(logits, -80, 80)))).astype(np.float32)
            above_half = np.nextafter(np.float32(0.5), np.float32(1))  # where a small logit's sigmoid rounds to 0.5
            scores = np.where(decided > 0, np.maximum(sigmoid, above_half), sigmoid)
        else:
            powers = np.exp(logits - logits.max(axis=1, keepdims=True))
            scores = powers / powers.sum(axis=1, keepdims=True)
        if not self.is_short:
            return Answers(scores, np.broadcast_to(np.arange(scores.shape[1], dtype=np.int32), scores.shape), chosen)
        kept = WRITTEN_CLASSES if self.is_several else NUM_BEST
        best = np.argpartition(-logits, kept - 1, axis=1)[:, :kept]
        best = np.take_along_axis(best, np.argsort(-np.take_along_axis(logits, best, 1), axis=1, kind="stable"), 1)
        return Answers(np.take_along_axis(scores, best, 1), best.astype(np.int32), chosen)

    def label_of(self, scores: np.ndarray, classes: np.ndarray) -> str | list[str] | float:
        """Return the label that the kept scores [kept] of one example stand for."""
        if self.names is None:
            return float(scores[0])
        if self.is_several:
            pairs = zip(classes.tolist(), scores.tolist(), strict=True)
            return [self.names[number] for number, score in pairs if score > 0.5]
        return self.names[int(classes[scores.argmax()])]

    def score_of(self, scores: np.ndarray) -> float:
        """Return the score of the label that the kept scores [kept] of one example stand for, as in `Prediction`."""
        if self.names is None:
            return float(scores[0])
        return float(np.maximum(scores, 1 - scores).min() if self.is_several else scores.max())

    def prediction(self, scores: np.ndarray, classes: np.ndarray, **facts: Any) -> Prediction:
        """Return the answer to one example from its kept scores [kept]; `facts` are fields of `Prediction`."""
        label = self.label_of(scores, classes)
        if self.names is None:
            return Prediction(label, self.score_of(scores), **facts)
        named = {self.names[number]: score for number, score in zip(classes.tolist(), scores.tolist(), strict=True)}
        return Prediction(label, self.score_of(scores), named, **facts)

    def score_columns(self) -> list[str]:
        """Return the names of the columns of scores: "score of NAME" for each class, or of many classes "best 1" and
        "score 1" to those of the best five, after "num_predicted" where there are several labels; none in regression.
        """
        if self.names is None:
            return []
        if not self.is_short:
            return [f"score of {name}" for name in self.names]
        best = [f"{noun} {place}" for place in range(1, NUM_BEST + 1) for noun in ("best", "score")]
        return (["num_predicted"] if self.is_several else []) + best

    def score_values(self, scores: np.ndarray, classes: np.ndarray, chosen: int) -> list[float | str | int]:
        """Return the values of one example in `score_columns`: scores as numbers, classes by name."""
        if self.names is None:
            return []
        if not self.is_short:
            return scores.tolist()
        best: list[float | str | int] = [int(chosen)] if self.is_several else []
        for number, score in zip(classes[:NUM_BEST].tolist(), scores[:NUM_BEST].tolist(), strict=True):
            best += [self.names[number], score]
        return best
