"""Predictions for a file or a folder: read, answered and written a window at a time, scored where there are labels."""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ..conversion.source import locate_checkpoint
from ..data.readers.tables import DataError
from ..files import sha256_of
from ..hub.folder_lock import released
from ..metrics import SCORE_NAMES, RunningScores
from ..options import PredictOptions
from ..redaction import redact
from ..tables import one_line
from .decisions import DecisionRecords
from .inputs import Prepared, prepared_ahead, windows
from .lengths import LengthScores, decisions_at, readable_lengths, references_of
from .output import Column, Output, check_output
from .page_folder import PageFolder, check_page_folder
from .predictor import Answered, Predictor
from .sources import LabelReader, Source, SourceRow, chained, open_source

MODEL_FILES = ("config.json", "*.safetensors", "*.bin", "tokenizer*", "vocab*", "*.model", "preprocessor_config.json")
TEXT_START = 200
"""Characters of a text that stand in the output."""
DECIDING_ROWS = 1000
"""First rows of a table whose labels say how all are written."""
OPTIONS_OF_READING = ("max_length", "strict_length", "max_tokens_per_batch", "chunk_size")
"""Fields of `PredictOptions` that are arguments of `Predictor`; the digits of an answer depend on all of them."""


@dataclass(frozen=True)
class Columns:
    """The meaning of the columns of a table, as typed; `label` None takes "label" where a table has it."""

    text: str = "text"
    label: str | None = None
    delimiter: str | None = None
    label_separator: str | None = None


@dataclass
class Counts:
    """Numbers of rows so far: all, those with an error, documents that were cut, and labels that the model has not."""

    rows: int = 0
    errors: int = 0
    truncated: int = 0
    tokens: int = 0
    labelled: int = 0
    unknown_labels: int = 0
    first_error: str = ""
    first_unknown: str = ""


@dataclass
class PredictionRun:
    """Result of a run over a file or folder.

    Args:
        output: the table that was written.
        counts: of its rows.
        scores: of the rows with labels, empty without any.
        by_length: rows of `score_at_lengths`, where that was asked for.
        seconds: from the first row that this start answered to the last.
        limit: tokens that a document was cut to, None where none could be.
        index: the page that leads to the explanations, None where nobody asked for them.
    """

    output: Path
    counts: Counts
    scores: dict[str, Any] = field(default_factory=dict)
    by_length: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    limit: int | None = None
    index: Path | None = None


def predict_file(
    model: str,
    path: Path,
    options: PredictOptions,
    columns: Columns,
    report_lengths: Sequence[int] = (),
    pages: Path | None = None,
) -> PredictionRun:
    """Write the predictions for a table, a document, an image or a folder.

    Rows that can't be used are rows of the output with the reason in "error". A stopped run goes on with
    `options.resume`, and gives the output that it would have given at once.

    Args:
        model: folder or repository of the Hub.
        path: file or folder to predict for.
        options: of the output and the reading.
        columns: what the columns of a table mean.
        report_lengths: tokens that documents are cut to for further scores.
        pages: folder for a page on each answer, what it rests on, and an index.

    Raises:
        DataError: the input can't be read as a whole.
        FileExistsError, ValueError: the output can't be written, as in `check_output` and `Output`.
    """
    check_output(options.output, path, overwrite=options.overwrite, resume=options.resume)
    if pages is not None:
        check_page_folder(pages, overwrite=options.overwrite, resume=options.resume)
    if not path.exists():
        raise DataError(f"{path}: there is no such file or folder")
    reading = {name: getattr(options, name) for name in OPTIONS_OF_READING}
    predictor = Predictor.from_pretrained(model, device=options.device, dtype=options.dtype, **reading)
    source = open_source(
        path, predictor, text_column=columns.text, label_column=columns.label,
        id_column=options.id_column_name, delimiter=columns.delimiter,
    )  # fmt: skip
    if report_lengths and not source.has_labels:
        raise ValueError(
            f"--report_lengths needs true labels: {path} has no column of them; name it with --label_column_name"
        )
    lengths = readable_lengths(predictor, report_lengths) if report_lengths else []
    identity = {"model": model, "weights": describe_model(locate_checkpoint(model)), "input": str(path)}
    identity |= {name: getattr(options, name) for name in (*OPTIONS_OF_READING, "dtype")} | {"report_lengths": lengths}
    identity |= {"device": predictor.model.device.type} | ({} if pages is None else {"explain": str(pages)})
    table = table_columns(predictor, source)
    output = Output(options.output, table, identity, resume=options.resume)
    with released(output.folder):
        written = None if pages is None else PageFolder(pages, predictor, output.progress.rows)
        return _Run(predictor, source, output, lengths, columns.label_separator, written).complete()


class _Run:
    """A run whose parts are there."""

    def __init__(
        self,
        predictor: Predictor,
        source: Source,
        output: Output,
        lengths: list[int],
        separator: str | None,
        pages: PageFolder | None = None,
    ):
        self.predictor, self.source, self.output, self.lengths = predictor, source, output, lengths
        self.pages = pages
        num_labels = len(predictor.label_names or [None])
        self.records = DecisionRecords(predictor.problem_type, num_labels, len(lengths) + 1)
        first = islice(source.open(), DECIDING_ROWS) if source.has_labels else ()
        self.labels = LabelReader(predictor, separator, [row.label for row in first])
        self.counts = Counts(**output.progress.counts)

    def complete(self) -> PredictionRun:
        """Answer the rows that are left, score all, and put the output in its place."""
        rows, done = self.source.open(), self.output.progress.rows
        digest = ""
        for row in islice(rows, done):
            digest = chained(digest, row)
        if digest != self.output.progress.digest:
            raise DataError(
                f"--resume: the first {done:,} rows of {self.source.path} are not those that {self.output.path} was "
                f"begun with ({self.output.input}): give that, or --overwrite to begin again"
            )
        started = time.perf_counter()
        with tqdm(total=self.source.num_rows, initial=done, desc="predicting", unit=" rows") as bar:
            cut = windows(rows, self._weigh, self.predictor.inputs.window_limit)
            for window, prepared in prepared_ahead(cut, self._prepare):
                for row in window:
                    digest = chained(digest, row)
                cells, decisions = self._answer(window, prepared)
                self.counts.rows += len(window)
                self.output.add(cells, decisions, self.counts.rows, digest, vars(self.counts))
                bar.update(len(window))
        seconds = time.perf_counter() - started
        scores, by_length = self._score()
        index = None if self.pages is None else self.pages.finish(f"Answers for {self.source.path.name}")
        self.output.finish()
        limit = self.predictor.inputs.limit
        return PredictionRun(self.output.path, self.counts, scores, by_length, seconds, limit, index)

    def _weigh(self, row: SourceRow) -> int:
        return self.predictor.inputs.weigh(row.item)

    def _prepare(self, window: list[SourceRow]) -> list[Prepared]:
        items = iter(self.predictor.inputs.prepare([row.item for row in window if row.error is None]))
        return [next(items) if row.error is None else Prepared({}, error=row.error) for row in window]

    def _answer(self, window: list[SourceRow], prepared: list[Prepared]) -> tuple[list[list], bytes]:
        """Return the cells of the rows, and the records of those with a label."""
        answered = self.predictor.answer(prepared)
        labels = [self.labels.read(row.label) if self.source.has_labels else None for row in window]
        # Tokens are hidden before a text is cut, which would cut one of them in two.
        starts = redact([row.item[: 10 * TEXT_START] if isinstance(row.item, str) else None for row in window])
        parts = zip(window, starts, answered.predictions, answered.rows, labels, strict=True)
        cells = [self._cells(*part) for part in parts]
        if self.pages is not None:
            self.pages.add(window, answered.predictions, self.counts.rows + 1)
        self._count(window, answered, labels)
        scored = [
            index
            for index, (label, answer) in enumerate(zip(labels, answered.predictions, strict=True))
            if label is not None and answer.error is None
        ]
        self.counts.labelled += len(scored)
        return cells, self._records(scored, prepared, answered, labels) if scored else b""

    def _records(self, scored: list[int], prepared: list[Prepared], answered: Answered, labels: list[Any]) -> bytes:
        assert answered.decided is not None  # else no row had an answer
        whole, kept = answered.decided[scored], [prepared[index] for index in scored]
        cut = decisions_at(self.predictor, kept, self.lengths, whole) if self.lengths else ()
        references = references_of(self.predictor, [labels[index] for index in scored])
        full_lengths = np.array([example.full_length for example in kept])
        return self.records.encode(np.stack([*cut, whole], axis=1), references, full_lengths)

    def _count(self, window: list[SourceRow], answered: Answered, labels: list[Any]) -> None:
        for row, answer in zip(window, answered.predictions, strict=True):
            self.counts.tokens += answer.num_tokens
            self.counts.truncated += answer.is_truncated
            if answer.error is not None:
                self.counts.errors += 1
                place = f"row {row.number}" if row.name is None else row.name
                self.counts.first_error = self.counts.first_error or one_line(f"{place}: {answer.error}", 200)
        self.counts.unknown_labels += self.labels.num_unknown
        self.labels.num_unknown = 0
        self.counts.first_unknown = self.counts.first_unknown or self.labels.first_unknown

    def _cells(self, row: SourceRow, start: str | None, answer: Any, kept: tuple | None, label: Any) -> list:
        """Return the values of one row, in the order of `table_columns`."""
        rules, is_text = self.predictor.rules, self.predictor.inputs.noun == "text"
        cells: list[Any] = [row.number, *([row.name] if self.source.name_column else [])]
        if is_text:
            cells.append(None if start is None else one_line(start, TEXT_START))
        if self.source.has_labels:
            cells.append(_named_label(label, rules.names))
        scores = rules.score_values(*kept) if kept else [None] * len(rules.score_columns())
        cells += [answer.label, *([answer.score] if rules.names is not None else []), *scores]
        truncated = [answer.is_truncated if kept else None] if is_text else []
        return [*cells, answer.num_tokens or None, *truncated, answer.error]

    def _score(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        if not self.counts.labelled:
            return {}, []
        scores = RunningScores(self.predictor.problem_type, self.predictor.label_names)
        by_length = LengthScores(self.predictor, self.lengths)
        for decided, references, full_lengths in self.records.read(self.output.decisions):
            scores.add(decided[:, -1], references)
            by_length.add(decided, references, full_lengths)
        found = scores.compute()
        return {name: found[name] for name in SCORE_NAMES if name in found}, by_length.rows()


def _named_label(label: Any, names: Sequence[str] | None) -> Any:
    if label is None:
        return None
    if names is None:
        return float(label)
    return [names[number] for number in label] if isinstance(label, list) else names[label]


def table_columns(predictor: Predictor, source: Source) -> list[Column]:
    """Return the columns of the output: the row, its file or id, how a text begins, the true label where there may be
    one, the predicted one, the scores, the tokens that were read, whether that was not all, and the error.
    """
    rules, is_text = predictor.rules, predictor.inputs.noun == "text"
    kind = "number" if rules.names is None else "texts" if rules.is_several else "text"
    columns = [Column("row", "integer")]
    columns += [Column(source.name_column, "text")] if source.name_column else []
    columns += [Column("text", "text")] if is_text else []
    columns += [Column("true", kind)] if source.has_labels else []
    columns += [Column("predicted", kind)] + ([Column("score", "number")] if rules.names is not None else [])
    for name in rules.score_columns():
        noun = name.split(" ")[0]
        columns.append(Column(name, {"best": "text", "num_predicted": "integer"}.get(noun, "number")))
    columns += [Column("tokens" if is_text else "patches", "integer")]
    columns += [Column("truncated", "boolean")] if is_text else []
    columns.append(Column("error", "text"))
    names = [column.name for column in columns]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(
            f"--id_column_name {twice[0]}: the output has a column of this name; rename the one with the ids"
        )
    return columns


def describe_model(folder: Path) -> str:
    """Return a checksum of a model's configuration, weights and processor."""
    files = {path for pattern in MODEL_FILES for path in folder.glob(pattern) if path.is_file()}
    return hashlib.sha256("".join(sha256_of(path) for path in sorted(files)).encode()).hexdigest()
