"""Labelled documents that are read as they are needed, from files or a data set of the Hub, and never all at once."""

import glob
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from ..tokenizing import count_tokens, tokenize_texts
from .files import TextError, check_text, class_names_of
from .formats import FILE_TYPES, open_rows
from .labels import LabelError, LabelScheme
from .named import find_tables, is_saved
from .problems import BadRows, Place, check_column
from .tables import DataError, ReadingOptions, listing

PLACE_COLUMNS = ("source file", "source row", "source line")
"""Columns of the rows of files that say where a row stands, beside those of `ReadingOptions.columns`."""


def open_files(pattern: str, options: ReadingOptions) -> datasets.IterableDataset:
    """Open the rows of all files that a shell pattern such as "shards/*.parquet" names, one shard each, sorted.

    Raises:
        DataError: there is no such file, or they have an unknown ending or several.
    """
    paths = sorted(glob.glob(pattern))
    endings = sorted({Path(path).suffix.lower() for path in paths})
    if not paths:
        raise DataError(f"{pattern}: there is no such file")
    if len(endings) > 1 or endings[0] not in FILE_TYPES:
        raise DataError(f"{pattern}: files must have one of the endings {listing(FILE_TYPES)}, got {listing(endings)}")
    return open_paths(paths, options)


def open_paths(paths: Sequence[str], options: ReadingOptions) -> datasets.IterableDataset:
    """Open the rows of files as a stream: the columns of documents and labels, and `PLACE_COLUMNS`; one shard each."""
    columns = {"text": options.text_column, "label": options.label_column}
    arguments = {"columns": columns, "delimiter": options.delimiter, "drop": options.drop_bad_rows}
    return datasets.IterableDataset.from_generator(_read_rows, gen_kwargs={"paths": list(paths)} | arguments)


def _read_rows(
    paths: Sequence[str], columns: Mapping[str, str], delimiter: str | None, drop: bool
) -> Iterator[dict[str, Any]]:
    for path in paths:
        bad = BadRows(path, drop)
        for number, line, values in open_rows(Path(path), columns, bad, delimiter=delimiter):
            if not drop:
                bad.check()  # a stream may have no end at which to name all
            places = zip(PLACE_COLUMNS, (path, number, line), strict=True)
            yield dict(places) | dict(zip(columns.values(), values, strict=True))
        bad.check()


def open_named(
    name: str, config_name: str | None, options: ReadingOptions
) -> tuple[datasets.IterableDataset, datasets.DatasetDict | dict[str, list[Path]]]:
    """Open the split "train" of a data set of the Hub, or of a local folder, as a stream, and load its other splits.

    The other splits of a folder of tables are the paths of their files, for `read_files`.

    Raises:
        DataError: it lacks "train" or "validation".
    """
    files = find_tables(name, config_name)
    if files is not None:
        _check_splits(name, list(files))
        others = {split: paths for split, paths in files.items() if split != "train"}
        return open_paths([str(path) for path in files["train"]], options), others
    if is_saved(name):
        stored = datasets.load_from_disk(name)
        _check_splits(name, list(stored))
        # One shard per stored file, so that processes can share them.
        stream = stored["train"].to_iterable_dataset(max(1, len(stored["train"].cache_files)))
        return stream, datasets.DatasetDict({split: stored[split] for split in stored if split != "train"})
    splits = datasets.get_dataset_split_names(name, config_name)
    _check_splits(name, splits)
    wanted = [split for split in ("validation", "test") if split in splits]
    loaded = {split: datasets.load_dataset(name, config_name, split=split) for split in wanted}
    return datasets.load_dataset(name, config_name, split="train", streaming=True), datasets.DatasetDict(loaded)


def _check_splits(name: str, splits: Sequence[str]) -> None:
    if "train" not in splits or "validation" not in splits:
        raise DataError(f"{name} has the splits {listing(splits)}: a stream needs 'train' and 'validation'")


@dataclass(frozen=True)
class LabelledStream:
    """A stream of raw rows, and the meaning of their columns and labels, which the validation data decides.

    Rows of files have `PLACE_COLUMNS`, which name a row that can't be used; others are shown by how they begin.
    """

    rows: datasets.IterableDataset
    labels: LabelScheme
    source: str
    text_column: str = "text"
    label_column: str = "label"
    drop_bad_rows: bool = False

    def read(self, rows: list[dict]) -> tuple[list[str], list[Any]]:
        """Return the documents of rows and the numbers of their labels, those of rows that can be used.

        Raises:
            DataError: a column is missing, or rows can't be used and are not to be left out; the message names all.
        """
        for role, column in (("text", self.text_column), ("label", self.label_column)):
            check_column(column, role, list(rows[0]), self.source)
        class_names = class_names_of(self.rows.features, self.label_column)
        texts, labels = [], []
        bad: dict[str, BadRows] = {}
        for row in rows:
            try:
                check_text(row[self.text_column])
                label = self.labels.encode(self.labels.clean(row[self.label_column], class_names))
            except (TextError, LabelError) as error:
                file, number, line = map(row.get, PLACE_COLUMNS)
                begins = f"the document that begins {str(row[self.text_column])[:60]!r}"
                place = begins if number is None else Place(number, line)
                source = file or self.source
                bad.setdefault(source, BadRows(source, self.drop_bad_rows)).add(place, str(error))
                continue
            texts.append(row[self.text_column])
            labels.append(label)
        for rows_of_file in bad.values():
            rows_of_file.check()
        return texts, labels


@dataclass(frozen=True)
class DocumentStream:
    """A stream of labelled documents and how they are tokenized.

    Documents of more than `max_length` tokens are cut, or an error with `strict_length`.
    """

    stream: LabelledStream
    tokenizer: Callable
    max_length: int
    strict_length: bool = False

    @property
    def rows(self) -> datasets.IterableDataset:
        """The raw rows."""
        return self.stream.rows

    @property
    def source(self) -> str:
        """The name of the stream in messages."""
        return self.stream.source

    def encode(self, rows: list[dict]) -> list[dict]:
        """Tokenize and label rows: one dictionary a document, with "label" and "length" in tokens.

        Raises:
            DataError: a column is missing, or a document or label can't be used; the message shows where.
        """
        texts, labels = self.stream.read(rows) if rows else ([], [])
        if not texts:
            return []
        columns = tokenize_texts(self.tokenizer, texts, self.max_length)
        full_length = columns.pop("full_length")
        longest = max(range(len(texts)), key=lambda index: abs(full_length[index]))
        if self.strict_length and abs(full_length[longest]) > self.max_length:
            raise DataError(
                f"{self.source}, the document that begins {texts[longest][:60]!r} has "
                f"{count_tokens(self.tokenizer, texts[longest])} tokens, the limit is {self.max_length}: raise "
                "--max_length, shorten it, or leave --strict_length off to truncate"
            )
        examples = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        return [example | {"label": label} for example, label in zip(examples, labels, strict=True)]
