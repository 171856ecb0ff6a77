"""A model's answers to single examples: of those that were scored, the worst errors first, and of unlabelled rows."""

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from torch.utils.data import DataLoader

from ..data.batching import LengthGroupedBatchSampler
from ..data.labelled import LabelledData
from ..files import written_by_rename
from ..metrics import decide
from ..redaction import redact
from ..tables import harmless_cell, one_line

PREDICTIONS_FILE = "predictions.csv"
UNLABELLED_FILE = "unlabelled_predictions.csv"
WRITTEN_CLASSES = 50
"""Classes up to which each has a column, and beyond them the most classes of a row that are named."""
NUM_BEST = 5
"""Best classes of a row that are written with their scores where there are more than `WRITTEN_CLASSES`."""
TEXT_START = 200
"""Characters of a document that stand in the table."""
_READ_START = 10 * TEXT_START  # blanks become one, and a token of the Hub that is cut would no longer be seen
_BLOCK_ROWS = 500


class Predictions:
    """A model's answers to examples, kept small: all scores up to `WRITTEN_CLASSES` classes, beyond them the best.

    A score is a probability (softmax, or of several labels the sigmoid), and in regression the number itself.

    Args:
        data: says what the labels are.
        loader: of the examples, whose order it decides.
        rows: the examples themselves, in the order of the data, with the column "text" or "image"; None leaves the
            beginnings of the texts and the files' names out. They are read when the table is written.
        source_rows: the number of each example in its source, from 1 on; None counts.
        labels: the true labels of the examples as their column "label" has them, or None.
    """

    def __init__(
        self,
        data: LabelledData,
        loader: DataLoader,
        rows: datasets.Dataset | None = None,
        source_rows: Sequence[int] | None = None,
        labels: Sequence[Any] | None = None,
    ):
        self.problem_type, self.names = data.problem_type, data.label_names
        sampler = find_sampler(loader)
        self.order, self.lengths = example_order(loader), sampler.lengths
        self.rows, self.source_rows, self.labels = rows, source_rows, labels
        self._shown_names = redact(list(data.label_names or []))
        self.has_several = data.problem_type == "multi_label_classification"
        self._is_short = data.num_labels > WRITTEN_CLASSES
        self._batches: list[tuple[np.ndarray, ...]] = []
        self._ordered: tuple[np.ndarray, ...] | None = None

    def shorten(self, logits: np.ndarray) -> tuple[np.ndarray, ...]:
        """Return what is kept of logits [B, C]: scores [B, kept], their classes, and the number of classes chosen [B].

        Raises:
            ValueError: a logit is not finite.
        """
        decided = decide(logits, self.problem_type)
        chosen = decided.sum(axis=1) if self.has_several else np.ones(len(logits), np.int64)
        if self.problem_type == "regression":
            return logits, np.zeros(logits.shape, np.int32), chosen
        if self.has_several:
            sigmoid = (1 / (1 + np.exp(-np.clip(logits, -80, 80)))).astype(np.float32)
            above_half = np.nextafter(np.float32(0.5), np.float32(1))  # where a small logit's sigmoid rounds to 0.5
            scores = np.where(decided > 0, np.maximum(sigmoid, above_half), sigmoid)
        else:
            powers = np.exp(logits - logits.max(axis=1, keepdims=True))
            scores = powers / powers.sum(axis=1, keepdims=True)
        if not self._is_short:
            return scores, np.broadcast_to(np.arange(scores.shape[1], dtype=np.int32), scores.shape), chosen
        kept = WRITTEN_CLASSES if self.has_several else NUM_BEST
        best = np.argpartition(-logits, kept - 1, axis=1)[:, :kept]
        best = np.take_along_axis(best, np.argsort(-np.take_along_axis(logits, best, 1), axis=1, kind="stable"), 1)
        return np.take_along_axis(scores, best, 1), best.astype(np.int32), chosen

    def add(self, answers: Sequence[np.ndarray], is_right: np.ndarray) -> None:
        """Keep what `shorten` returned of the next examples in the loader's order, and which answers are right [B]."""
        self._batches.append((*answers, is_right))

    def write(self, path: Path) -> None:
        """Write the table as csv in UTF-8: a row an example, the worst errors first, or without labels as in the data.

        Its columns are `row` (from 1), `text` (its first `TEXT_START` characters on one line) or `image` (the file),
        `true` where labels are known, `predicted`, `score` and `correct`, or of numbers `error`, and the scores: "score
        of NAME" for each class, or the best as "best 1", "score 1" and on. Labels of several are a JSON list of names,
        and `score` is that of the least sure one, that it is as predicted; of more than `WRITTEN_CLASSES` classes the
        best are named, and `num_predicted` counts all. A cell that a spreadsheet would take for a formula has an
        apostrophe before it.
        """
        with written_by_rename(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(self._header())
            for block in self._blocks(self.worst_first() if self.labels is not None else np.arange(len(self.order))):
                writer.writerows(block)

    def table(self, limit: int) -> tuple[list[str], list[list]]:
        """Return the header and the first `limit` rows of what `write` writes, without the scores of single classes."""
        header = self._first_columns()
        blocks = self._blocks(self.worst_first()[:limit])
        return header, [row[: len(header)] for block in blocks for row in block]

    def worst_first(self) -> np.ndarray:
        """Return the indices of labelled examples: the surest errors first, the surest right answers last.

        Of numbers the largest errors are first. Equally bad ones stay in the order of the data.
        """
        return np.argsort(-self._badness(), kind="stable")

    def is_right(self) -> np.ndarray:
        """Return whether the answer to each labelled example is right in all of its labels [examples]."""
        return self._kept()[3].astype(bool)

    def errors(self) -> np.ndarray:
        """Return the predicted minus the true number of each labelled example, in regression [examples]."""
        assert self.labels is not None
        return self._kept()[0][:, 0] - np.asarray(self.labels, np.float64)

    def _kept(self) -> tuple[np.ndarray, ...]:
        """Return the scores, classes, numbers chosen and right answers that were kept, in the order of the data."""
        if self._ordered is None:
            places = np.empty(len(self.order), np.int64)
            places[self.order] = np.arange(len(self.order))
            self._ordered = tuple(np.concatenate(column)[places] for column in zip(*self._batches, strict=True))
            self._batches.clear()
        return self._ordered

    def _badness(self) -> np.ndarray:
        """A number for each example that is the larger the worse its answer is, and above 1 where it is wrong."""
        if self.names is None:
            return np.abs(self.errors())
        scores, classes, _, is_right = self._kept()
        if not self.has_several:
            best = scores.max(axis=1).astype(np.float64)
            return np.where(is_right, 1 - best, 1 + best)
        assert self.labels is not None
        worst = np.empty(len(scores))
        for index, labels in enumerate(self.labels):
            is_true = np.isin(classes[index], labels)
            distance = np.where(is_true, 1 - scores[index], scores[index])
            # A true class that is not among the kept ones has a score below all of them.
            missed = 1 - scores[index].min() if is_true.sum() < len(labels) else 0.0
            worst[index] = max(distance.max(initial=0.0), missed)
        return worst + np.where(is_right, 0.0, 1.0)

    @property
    def _example_column(self) -> str | None:
        """The name of the column that shows an example: "text", "image" where files have names, or None."""
        if self.rows is None or not len(self.rows):
            return None
        if "text" in self.rows.column_names:
            return "text"
        return "image" if "image" in self.rows.column_names and self._paths()[0]["image"]["path"] else None

    def _paths(self) -> datasets.Dataset:
        assert self.rows is not None
        return self.rows.select_columns("image").cast_column("image", datasets.Image(decode=False))

    def _first_columns(self) -> list[str]:
        """The header without the scores of single classes."""
        header = ["row", *([self._example_column] if self._example_column else [])]
        if self.labels is not None:
            header += ["true", "predicted", *(["error"] if self.names is None else ["score", "correct"])]
        else:
            header += ["predicted", *([] if self.names is None else ["score"])]
        return header

    def _header(self) -> list[str]:
        header = self._first_columns()
        if self.names is None:
            return header
        if not self._is_short:
            return header + [f"score of {name}" for name in self._shown_names]
        best = [f"{noun} {place}" for place in range(1, NUM_BEST + 1) for noun in ("best", "score")]
        return header + (["num_predicted"] if self.has_several else []) + best

    def _blocks(self, indices: np.ndarray) -> Iterator[list[list]]:
        """The rows of the table for these examples, some hundreds at a time."""
        column = self._example_column
        paths = self._paths() if column == "image" else None
        for start in range(0, len(indices), _BLOCK_ROWS):
            block = indices[start : start + _BLOCK_ROWS].tolist()
            shown: list[str] = []
            if column == "text":
                assert self.rows is not None
                shown = [self.rows[index]["text"][:_READ_START] for index in block]
            elif paths is not None:
                shown = ["/".join(Path(paths[index]["image"]["path"] or "").parts[-2:]) for index in block]
            starts = [harmless_cell(one_line(text, TEXT_START)) for text in redact(shown)]
            yield [self._row(index, starts[place : place + 1] if column else []) for place, index in enumerate(block)]

    def _row(self, index: int, start: list[str]) -> list:
        scores, classes, chosen, is_right = (column[index] for column in self._kept())
        row = [index + 1 if self.source_rows is None else self.source_rows[index], *start]
        if self.names is None:
            number = float(scores[0])
            if self.labels is None:
                return [*row, self._show(number)]
            return [*row, self._show(self.labels[index]), self._show(number), f"{number - self.labels[index]:.6g}"]
        score = np.maximum(scores, 1 - scores).min() if self.has_several else scores.max()
        predicted, *rest = self._answer(scores, classes, int(chosen))
        if self.labels is None:
            return [*row, predicted, f"{score:.6g}", *rest]
        return [*row, self._show(self.labels[index]), predicted, f"{score:.6g}", bool(is_right), *rest]

    def _answer(self, scores: np.ndarray, classes: np.ndarray, chosen: int) -> list:
        shown = [f"{score:.6g}" for score in scores.tolist()]
        if self.has_several:
            predicted = self._show([int(number) for number, score in zip(classes, scores, strict=True) if score > 0.5])
        else:
            predicted = self._show(int(classes[scores.argmax()]))
        if not self._is_short:
            return [predicted, *shown]
        best = [
            cell
            for number, score in zip(classes[:NUM_BEST].tolist(), shown, strict=False)
            for cell in (self._show(number), score)
        ]
        return [predicted, *([chosen] if self.has_several else []), *best]

    def _show(self, label: Any) -> Any:
        """A cell of a label: a number, a name, or a list of names."""
        if self.names is None:
            return f"{label:.6g}"
        if isinstance(label, list):
            return json.dumps([self._shown_names[number] for number in label], ensure_ascii=False)
        return harmless_cell(self._shown_names[label])


def find_sampler(loader: DataLoader) -> LengthGroupedBatchSampler:
    """Return the sampler of a prepared loader, which decides the batches of all processes."""
    sampler: Any = loader.batch_sampler
    while not isinstance(sampler, LengthGroupedBatchSampler):
        sampler = sampler.batch_sampler
    return sampler


def example_order(loader: DataLoader) -> np.ndarray:
    """Return the index of each example that the steps of a prepared loader give, of all processes, one after the other.

    The processes take the batches of the sampler in turn, and what they gather in a step stands in that order.
    """
    return np.concatenate(find_sampler(loader).batches(0))
