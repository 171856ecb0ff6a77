"""Scores of a text model when only the beginning of each document is read, by the number of tokens that it reads."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ..data.collators import label_tensor
from ..metrics import SCORE_NAMES, RunningScores
from ..tables import format_table
from .inputs import Prepared, TextInputs, windows
from .predictor import Predictor

logger = logging.getLogger(__name__)


def score_at_lengths(
    predictor: Predictor, texts: Iterable[str], labels: Sequence[Any], lengths: Sequence[int]
) -> list[dict[str, Any]]:
    """Return the scores of a model by the tokens of each document that it reads, special ones included.

    Args:
        predictor: of a text model.
        texts: the documents.
        labels: their labels as `finetune`'s column "label" has them: classes by number, lists of these, or numbers.
        lengths: tokens that documents are cut to.

    Returns:
        A row for each length, shortest first: "tokens", "examples", "longer" (documents that have more tokens) and the
        scores of the problem type, such as "accuracy" and "macro_f1".

    Raises:
        ValueError: the model reads images, a length is below 3, or an answer is not finite.
    """
    lengths = readable_lengths(predictor, lengths)
    scores = LengthScores(predictor, lengths)
    pairs = tqdm(zip(texts, labels, strict=True), total=len(labels), desc="scoring by length", unit=" documents")
    for window in windows(pairs, lambda pair: predictor.inputs.weigh(pair[0]), predictor.inputs.window_limit):
        prepared = predictor.inputs.prepare([text for text, _ in window])
        if bad := next((example.error for example in prepared if example.error), None):
            raise ValueError(f"a document can't be scored: {bad}")
        references = references_of(predictor, [label for _, label in window])
        decided = np.stack(list(decisions_at(predictor, prepared, lengths)), axis=1)
        scores.add(decided, references, np.array([example.full_length for example in prepared]))
    return scores.rows()


class LengthScores:
    """Scores at each of some lengths, of decisions that come a window at a time."""

    def __init__(self, predictor: Predictor, lengths: Sequence[int]):
        self.lengths = list(lengths)
        self._scores = [RunningScores(predictor.problem_type, predictor.label_names) for _ in lengths]
        self._longer = [0 for _ in lengths]

    def add(self, decided: np.ndarray, references: np.ndarray, full_lengths: np.ndarray) -> None:
        """Add decisions [examples, lengths, ...], the true labels [examples, ...] and all tokens of the examples."""
        for number, length in enumerate(self.lengths):
            self._scores[number].add(decided[:, number], references)
            self._longer[number] += int((full_lengths > length).sum())

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows that `score_at_lengths` describes; none where nothing was added."""
        rows = []
        for length, scores, longer in zip(self.lengths, self._scores, self._longer, strict=True):
            if scores.num_examples:
                found = scores.compute()
                named = {name: found[name] for name in SCORE_NAMES if name in found}
                rows.append({"tokens": length, "examples": scores.num_examples, "longer": longer} | named)
        return rows


def references_of(predictor: Predictor, labels: Sequence[Any]) -> np.ndarray:
    """Return encoded labels in the shape of the model's decisions: classes [B], bits [B, C] or numbers [B]."""
    num_labels = len(predictor.label_names or [None])
    return label_tensor(labels, predictor.problem_type, num_labels).numpy()


def readable_lengths(predictor: Predictor, lengths: Sequence[int]) -> list[int]:
    """Return lengths in order, each once; one that is beyond what the model reads becomes that, with a warning.

    Raises:
        ValueError: the model reads images, or a length is below 3.
    """
    if not isinstance(predictor.inputs, TextInputs):
        raise ValueError("--report_lengths is for texts, and the model reads images; leave it out.")
    if too_short := [length for length in lengths if length < 3]:
        raise ValueError(f"--report_lengths: {too_short[0]} is below 3 tokens, two of which are special.")
    limit = predictor.inputs.limit
    if limit is not None and max(lengths) > limit:
        logger.warning("--report_lengths: the model reads at most %d tokens, which stands for longer ones", limit)
        lengths = [min(length, limit) for length in lengths]
    return sorted(set(lengths))


def decisions_at(
    predictor: Predictor,
    prepared: Sequence[Prepared],
    lengths: Sequence[int],
    whole: np.ndarray | None = None,
) -> Iterator[np.ndarray]:
    """Yield the model's decisions [items, ...] on the beginnings of documents, of each length, shortest first.

    A beginning that is no longer than one before is not read again.

    Args:
        prepared: what `inputs.prepare` returned, without errors.
        lengths: tokens, ascending.
        whole: the decisions on all that was prepared, where they are known.

    Raises:
        ValueError: an answer is not finite.
    """
    assert isinstance(predictor.inputs, TextInputs)
    special = set(predictor.inputs.tokenizer.all_special_ids)
    closes = [example.features["input_ids"][-1] in special for example in prepared]
    own = np.array([example.num_tokens for example in prepared])
    decided: np.ndarray | None = None
    read = np.full(len(prepared), -1)
    for length in lengths:
        wanted = np.minimum(own, length)
        again = wanted > read
        if whole is not None:
            decided = np.zeros_like(whole) if decided is None else decided.copy()
            from_whole = again & (wanted == own)
            decided[from_whole] = whole[from_whole]
            again &= ~from_whole
        indices = np.flatnonzero(again).tolist()
        if indices:
            beginnings = [prepared[index].cut(length, closes[index]) for index in indices]
            answered = predictor.answer(beginnings)
            if bad := next((answer.error for answer in answered.predictions if answer.error), None):
                raise ValueError(f"--report_lengths {length}: {bad}")
            assert answered.decided is not None
            if decided is None:
                decided = np.zeros((len(prepared), *answered.decided.shape[1:]), answered.decided.dtype)
            else:
                decided = decided.copy()
            decided[indices] = answered.decided
        read = wanted
        assert decided is not None
        yield decided


def format_lengths(rows: Sequence[dict[str, Any]]) -> str:
    """Return rows of `score_at_lengths` as a text table."""
    shown = [{name: f"{value:,}" if isinstance(value, int) else value for name, value in row.items()} for row in rows]
    return format_table(shown, list(rows[0]))
