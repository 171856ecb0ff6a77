"""The text and the label column of one file or split, each row with its place in the file for error messages."""

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

FILE_TYPES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
SHOWN_NAMES = 12


class DataError(ValueError):
    """The data can't be used as it is; the message names file, row and column, and says what to do."""


@dataclass(frozen=True)
class Table:
    """The two columns that are needed, of one file or split, and where each row stands for error messages."""

    source: str
    texts: Sequence[Any]
    labels: Sequence[Any]
    unit: str
    numbers: Sequence[int]

    def where(self, index: int) -> str:
        return f"{self.source}, {self.unit} {self.numbers[index]}"


def listing(names: Iterable) -> str:
    """The first names, quoted, and how many more there are."""
    names = [repr(name) for name in names]
    shown = ", ".join(names[:SHOWN_NAMES])
    return shown + (f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else "")


def check_column(column: str, role: str, existing: Sequence[str], source: str) -> None:
    """Raise DataError if there is no such column; `role` is "text" or "label"."""
    if column not in existing:
        raise DataError(
            f"{source}: there is no {role} column {column!r}; the columns are {listing(existing)}. Name the right one "
            f"with {role}_column"
        )


def read_table(path: Path, text_column: str, label_column: str) -> Table:
    """Read a csv, tsv, json, jsonl or parquet file; DataError if it is missing, empty, damaged or not UTF-8."""
    if path.suffix not in FILE_TYPES:
        raise DataError(f"{path}: the ending {path.suffix!r} is not one of {listing(FILE_TYPES)}")
    if not path.is_file():
        raise DataError(f"{path}: there is no such file")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty (0 bytes)")
    if path.suffix == ".parquet":
        return _read_parquet(path, text_column, label_column)
    _check_utf8(path)
    if path.suffix in (".csv", ".tsv"):
        return _read_csv(path, text_column, label_column)
    return _read_json(path, text_column, label_column)


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


def _read_csv(path: Path, text_column: str, label_column: str) -> Table:
    # The default limit of 131,072 characters in a field is less than a long document.
    previous_limit = csv.field_size_limit(max(path.stat().st_size, csv.field_size_limit()))
    rows: list[list[str]] = []
    numbers: list[int] = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.reader(lines, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
            next_line = 1
            for row in reader:
                if row:
                    rows.append(row)
                    numbers.append(next_line)
                next_line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}, the row that starts in line {next_line}: {error}. A text with the delimiter, a quote or a line "
            'break stands in double quotes, and a quote inside it is doubled ("")'
        ) from error
    finally:
        csv.field_size_limit(previous_limit)
    if not rows:
        raise DataError(f"{path}: the file has no header and no rows")
    header = rows.pop(0)
    del numbers[0]
    for role, column in (("text", text_column), ("label", label_column)):
        check_column(column, role, header, str(path))
        if header.count(column) > 1:
            raise DataError(f"{path}: the header has {header.count(column)} columns {column!r}: rename all but one")
    for row, number in zip(rows, numbers, strict=True):
        if len(row) != len(header):
            raise DataError(
                f"{path}, line {number}: the row has {len(row)} fields, the header has {len(header)}. A text that "
                "contains the delimiter must stand in double quotes"
            )
    texts = [row[header.index(text_column)] for row in rows]
    labels = [row[header.index(label_column)] for row in rows]
    return Table(str(path), texts, labels, "line", numbers)


def _read_json(path: Path, text_column: str, label_column: str) -> Table:
    """A file of one JSON object per line, or of one list of objects."""
    content = path.read_text(encoding="utf-8-sig")
    if content.lstrip().startswith("["):
        unit = "row"
        try:
            rows = json.loads(content)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}, line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}"
            ) from error
        numbers = list(range(1, len(rows) + 1))
    else:
        unit = "line"
        rows, numbers = [], []
        for number, line in enumerate(content.split("\n"), start=1):
            if not line.strip():
                continue
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path}, line {number}: not valid JSON ({error.msg}, column {error.colno}). The file must hold "
                    "one object per line, or one list of objects"
                ) from error
            numbers.append(number)
    for row, number in zip(rows, numbers, strict=True):
        if not isinstance(row, dict):
            raise DataError(f"{path}, {unit} {number}: expected an object with the columns, got {type(row).__name__}")
        for role, column in (("text", text_column), ("label", label_column)):
            check_column(column, role, list(row), f"{path}, {unit} {number}")
    return Table(str(path), [row[text_column] for row in rows], [row[label_column] for row in rows], unit, numbers)


def _read_parquet(path: Path, text_column: str, label_column: str) -> Table:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for role, column in (("text", text_column), ("label", label_column)):
                check_column(column, role, file.schema_arrow.names, str(path))
            table = file.read(columns=[text_column, label_column])
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{path}: not a readable parquet file ({error}): it is damaged, cut off or of another type"
        ) from error
    texts, labels = table[text_column].to_pylist(), table[label_column].to_pylist()
    return Table(str(path), texts, labels, "row", range(1, len(texts) + 1))
