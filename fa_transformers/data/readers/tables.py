"""The text and the label column of a file, read row by row, each with its place in the file for error messages.

No more than a row, a line or a megabyte is held at a time, whatever the size of the file.
"""

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

import datasets
import pyarrow
import pyarrow.parquet

FILE_TYPES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
SHOWN_NAMES = 12
READ_CHARACTERS = 2**20

Row = tuple[int, Any, Any]
"""Number in the file, text and label."""


class DataError(ValueError):
    """The data can't be used as it is; the message names file, row and column, and says what to do."""


@dataclass(frozen=True, kw_only=True)
class ReadingOptions:
    """The meaning of the columns of a user's data, and the draw of missing splits from train.

    Args:
        text_column, image_column, label_column: names of the columns.
        problem_type: what the labels are, one of `labels.PROBLEM_TYPES`; None infers it from train's labels and logs
            what was inferred.
        label_separator: string between the labels of one row, for csv files and other labels that are strings.
        label_names: names of the classes in their order: of the entries of rows of zeros and ones, of whole numbers
            from 0 on, or of the labels that are names already; None takes what the data says.
        group_column: name of a column whose equal values stay in one split where splits are drawn; None groups nothing.
        delimiter: character between the fields of csv and tsv files; None finds it.
        drop_bad_rows: leave out rows that can't be used, counted in a warning; otherwise they are an error.
        validation_share, test_share: fractions of the train rows that are drawn where these splits are missing.
        seed: of that draw.
        cache_dir: folder for the checked documents; None is a folder in Hugging Face's cache.
    """

    text_column: str = "text"
    image_column: str = "image"
    label_column: str = "label"
    problem_type: str | None = None
    label_separator: str | None = None
    label_names: Sequence[str] | None = None
    group_column: str | None = None
    delimiter: str | None = None
    drop_bad_rows: bool = False
    validation_share: float = 0.1
    test_share: float = 0.1
    seed: int = 0
    cache_dir: str | Path | None = None

    @property
    def columns(self) -> dict[str, str]:
        """Role of each column of documents, "text", "label" and perhaps "group" -> its name."""
        return {"text": self.text_column} | self._other_columns

    @property
    def image_columns(self) -> dict[str, str]:
        """Role of each column of images, "image", "label" and perhaps "group" -> its name."""
        return {"image": self.image_column} | self._other_columns

    @property
    def _other_columns(self) -> dict[str, str]:
        return {"label": self.label_column} | ({"group": self.group_column} if self.group_column else {})


@dataclass(frozen=True)
class Table:
    """One file or split: its checked documents, memory-mapped, its raw labels, and where each row stands."""

    source: str
    texts: datasets.Dataset
    labels: Sequence[Any]
    unit: str
    numbers: Sequence[int]

    def where(self, index: int) -> str:
        """Return the place of a row for an error message, such as "train.csv, line 3"."""
        return f"{self.source}, {self.unit} {self.numbers[index]}"


def listing(names: Iterable) -> str:
    """Return the first names, quoted, and the number of those left out."""
    names = names if isinstance(names, Sequence) else list(names)
    shown = ", ".join(repr(name) for name in names[:SHOWN_NAMES])
    return shown + (f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else "")


def check_column(column: str, role: str, existing: Sequence[str], source: str) -> None:
    """Raise DataError if there is no such column; `role` is "text" or "label"."""
    if column not in existing:
        raise DataError(
            f"{source}: there is no {role} column {column!r}; the columns are {listing(existing)}. Name the right one "
            f"with --{role}_column_name"
        )


def open_table(path: Path, text_column: str, label_column: str) -> tuple[str, Iterator[Row]]:
    """Return the unit that row numbers count, "line" or "row", and the rows of a csv, tsv, json, jsonl or parquet file.

    Raises:
        DataError: the file is missing, empty, damaged or not UTF-8; some of it only while the rows are read.
    """
    if path.suffix not in FILE_TYPES:
        raise DataError(f"{path}: the ending {path.suffix!r} is not one of {listing(FILE_TYPES)}")
    if not path.is_file():
        raise DataError(f"{path}: there is no such file")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty (0 bytes)")
    if path.suffix == ".parquet":
        return "row", _read_parquet(path, text_column, label_column)
    _check_utf8(path)
    if path.suffix in (".csv", ".tsv"):
        return "line", _read_csv(path, text_column, label_column)
    unit, objects = ("row", _read_list(path)) if _holds_list(path) else ("line", _read_lines(path))
    return unit, _pick_columns(f"{path}, {unit}", objects, text_column, label_column)


def _check_utf8(path: Path) -> None:
    position = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}, line {number}: byte {error.start + 1} of the line (byte {position + error.start + 1} of "
                    f"the file, 0x{line[error.start]:02x}) is not valid UTF-8. Convert the file first, for example: "
                    f"iconv -f LATIN1 -t UTF-8"
                ) from error
            position += len(line)


def _read_csv(path: Path, text_column: str, label_column: str) -> Iterator[Row]:
    # The default limit of 131,072 characters in a field is less than a long document.
    previous_limit = csv.field_size_limit(max(path.stat().st_size, csv.field_size_limit()))
    header: list[str] = []
    next_line = 1
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.reader(lines, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
            for row in reader:
                number, next_line = next_line, reader.line_num + 1
                if header and row:
                    if len(row) != len(header):
                        raise DataError(
                            f"{path}, line {number}: the row has {len(row)} fields, the header has {len(header)}. A "
                            "text that contains the delimiter must stand in double quotes"
                        )
                    yield number, row[header.index(text_column)], row[header.index(label_column)]
                elif row:
                    header = row
                    _check_header(path, header, text_column, label_column)
    except csv.Error as error:
        raise DataError(
            f"{path}, the row that starts in line {next_line}: {error}. A text with the delimiter, a quote or a line "
            'break stands in double quotes, and a quote inside it is doubled ("")'
        ) from error
    finally:
        csv.field_size_limit(previous_limit)
    if not header:
        raise DataError(f"{path}: the file has no header and no rows")


def _check_header(path: Path, header: list[str], text_column: str, label_column: str) -> None:
    for role, column in (("text", text_column), ("label", label_column)):
        check_column(column, role, header, str(path))
        if header.count(column) > 1:
            raise DataError(f"{path}: the header has {header.count(column)} columns {column!r}: rename all but one")


def _pick_columns(
    source: str, objects: Iterable[tuple[int, Any]], text_column: str, label_column: str
) -> Iterator[Row]:
    for number, row in objects:
        if not isinstance(row, dict):
            raise DataError(f"{source} {number}: expected an object with the columns, got {type(row).__name__}")
        for role, column in (("text", text_column), ("label", label_column)):
            check_column(column, role, list(row), f"{source} {number}")
        yield number, row[text_column], row[label_column]


def _holds_list(path: Path) -> bool:
    with path.open(encoding="utf-8-sig") as file:
        character = file.read(1)
        while character.isspace():
            character = file.read(1)
    return character == "["


def _read_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Number and content of the JSON objects of a file that has one per line."""
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                content = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path}, line {number}: not valid JSON ({error.msg}, column {error.colno}). The file must hold "
                    "one object per line, or one list of objects"
                ) from error
            yield number, content


class _JsonWindow:
    """The part of a JSON file that is being decoded: it grows until an item is complete and then moves on."""

    def __init__(self, path: Path, file: TextIO):
        self.path, self.file = path, file
        self.text, self.position = "", 0
        self.line, self.column = 1, 1  # where `text` starts in the file

    def grow(self) -> bool:
        """Drop what is decoded and read as much again as is left, at least `READ_CHARACTERS`; False at the end."""
        decoded, self.text = self.text[: self.position], self.text[self.position :]
        self.line += decoded.count("\n")
        self.column = len(decoded) - decoded.rfind("\n") if "\n" in decoded else self.column + len(decoded)
        self.position = 0
        added = self.file.read(max(READ_CHARACTERS, len(self.text)))
        self.text += added
        return bool(added)

    def next_character(self) -> str:
        """The next character that is no white space, which stays; "" at the end."""
        while True:
            while self.position < len(self.text) and self.text[self.position].isspace():
                self.position += 1
            if self.position < len(self.text):
                return self.text[self.position]
            if not self.grow():
                return ""

    def item(self) -> Any:
        """Decode the value that starts here, reading on until it is complete."""
        while True:
            try:
                value, self.position = json.JSONDecoder().raw_decode(self.text, self.position)
                return value
            except json.JSONDecodeError as error:
                offset = error.pos - self.position  # counts from 0 again when the window has moved
                if not self.grow():
                    self.fail(error.msg, offset)

    def fail(self, message: str, position: int) -> None:
        """Raise DataError with the line and column, in the file, of a position in the window."""
        before = self.text[:position]
        line = self.line + before.count("\n")
        column = position - before.rfind("\n") if "\n" in before else self.column + position
        raise DataError(f"{self.path}, line {line}, column {column}: not valid JSON: {message}")


def _read_list(path: Path) -> Iterator[tuple[int, Any]]:
    """Number and content of the items of a file that is one JSON list."""
    with path.open(encoding="utf-8-sig") as file:
        window = _JsonWindow(path, file)
        number, expected = 0, "["
        while True:
            character = window.next_character()
            if character not in expected or not character:
                window.fail(f"Expecting {' or '.join(map(repr, expected))}", window.position)
            window.position += 1
            if character == "]" or (character == "[" and window.next_character() == "]"):
                break
            number, expected = number + 1, ",]"
            window.next_character()
            yield number, window.item()
        window.position += character == "["
        if window.next_character():
            window.fail("Extra data", window.position)


def _read_parquet(path: Path, text_column: str, label_column: str) -> Iterator[Row]:
    try:
        with pyarrow.parquet.ParquetFile(path, memory_map=True) as file:
            for role, column in (("text", text_column), ("label", label_column)):
                check_column(column, role, file.schema_arrow.names, str(path))
            batches = file.iter_batches(batch_size=64, columns=[text_column, label_column])
            rows = chain.from_iterable(batch.to_pylist() for batch in batches)
            for number, row in enumerate(rows, start=1):
                yield number, row[text_column], row[label_column]
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{path}: not a readable parquet file ({error}): it is damaged, cut off or of another type"
        ) from error
