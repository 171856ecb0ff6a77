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
from ..prediction.answers import AnswerRules, Answers
from ..redaction import redact
from ..tables import harmless_cell, one_line

PREDICTIONS_FILE = "predictions.csv"
UNLABELLED_FILE = "unlabelled_predictions.csv"
TEXT_START = 200
"""Characters of a document that stand in the table."""
_READ_START = 10 * TEXT_START  # blanks become one, and a token of the Hub that is cut would no longer be seen
_BLOCK_ROWS = 500


class Predictions:
    """A model's answers to examples, kept small as `AnswerRules` has them.

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
        self.rules = AnswerRules(data.problem_type, data.label_names)
        sampler = find_sampler(loader)
        self.order, self.lengths = example_order(loader), sampler.lengths
        self.rows, self.source_rows, self.labels = rows, source_rows, labels
        self._batches: list[tuple[np.ndarray, ...]] = []
        self._ordered: tuple[np.ndarray, ...] | None = None

    @property
    def names(self) -> list[str] | None:
        """Names of the classes as they may be shown; None in regression."""
        return self.rules.names

    @property
    def has_several(self) -> bool:
        """True where an example may have any number of labels."""
        return self.rules.is_several

    def shorten(self, logits: np.ndarray) -> Answers:
        """Return what is kept of logits [B, C]; ValueError where one is not finite."""
        return self.rules.shorten(logits)

    def add(self, answers: Sequence[np.ndarray], is_right: np.ndarray) -> None:
        """Keep what `shorten` returned of the next examples in the loader's order, and which answers are right [B]."""
        self._batches.append((*answers, is_right))

    def write(self, path: Path) -> None:
        """Write the table as csv in UTF-8: a row an example, the worst errors first, or without labels as in the data.

        Its columns are `row` (from 1), `text` (its first `TEXT_START` characters on one line) or `image` (the file),
        `true` where labels are known, `predicted`, `score` and `correct`, or of numbers `error`, and the scores: "score
        of NAME" for each class, or the best as "best 1", "score 1" and on. Labels of several are a JSON list of names,
        and `score` is that of the least sure one, that it is as predicted; of more than 50 classes the
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
        return self._first_columns() + self.rules.score_columns()

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
        label, values = self.rules.label_of(scores, classes), self.rules.score_values(scores, classes, int(chosen))
        predicted = json.dumps(label, ensure_ascii=False) if isinstance(label, list) else harmless_cell(str(label))
        score = f"{self.rules.score_of(scores):.6g}"
        rest = [
            f"{value:.6g}" if isinstance(value, float) else harmless_cell(value) if isinstance(value, str) else value
            for value in values
        ]
        if self.labels is None:
            return [*row, predicted, score, *rest]
        return [*row, self._show(self.labels[index]), predicted, score, bool(is_right), *rest]

    def _show(self, label: Any) -> Any:
        """A cell of a label: a number, a name, or a list of names."""
        if self.names is None:
            return f"{label:.6g}"
        if isinstance(label, list):
            return json.dumps([self.names[number] for number in label], ensure_ascii=False)
        return harmless_cell(self.names[label])


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
