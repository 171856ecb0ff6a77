"""The rows of a user's file: csv, tsv, json, jsonl or parquet, with the same values whatever the format.

No more than a row, a line or a megabyte is held at a time, whatever the size of the file.
"""

import csv
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet

from .problems import BadRows, Place, check_column
from .tables import DataError, _check_utf8, _holds_list, _read_list, listing

FILE_TYPES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")


class Row(NamedTuple):
    """Row of a file: its number from 1, the header not counted, its line where there are lines, and its values."""

    number: int
    line: int | None
    values: tuple


def open_rows(
    path: Path,
    columns: Mapping[str, str],
    bad: BadRows,
    *,
    optional: Collection[str] = (),
    delimiter: str | None = None,
) -> Iterator[Row]:
    """Return the rows of a file, read as they are asked for; what they hold is the reader's to check.

    Args:
        columns: role ("text", "label", "group") -> name of its column; the values of a row are in this order.
        bad: takes the rows that can't be read, which are not yielded; the reader calls `bad.check()` after the last.
        optional: roles whose column may be missing; their values are then None.
        delimiter: character between the fields of a csv or tsv file; None finds it.

    Raises:
        DataError: the file is missing, empty, damaged, lacks a column or is no UTF-8; some of it only while the rows
            are read.
    """
    if path.suffix.lower() not in FILE_TYPES:
        raise DataError(f"{path}: the ending {path.suffix!r} is not one of {listing(FILE_TYPES)}")
    if not path.is_file():
        raise DataError(f"{path}: there is no such file")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty (0 bytes)")
    if path.suffix.lower() == ".parquet":
        return _read_parquet(path, columns, optional)
    _check_utf8(path)
    if path.suffix.lower() in (".csv", ".tsv"):
        default = "\t" if path.suffix.lower() == ".tsv" else ","
        return _read_csv(path, columns, bad, optional, delimiter or default)
    objects = _read_items(path) if _holds_list(path) else _read_lines(path, bad)
    return _pick_columns(path, objects, columns, bad, optional)


def _present(columns: Mapping[str, str], existing: list[str], optional: Collection[str], source: str) -> list[bool]:
    """Check the columns and return which of them are there."""
    for role, column in columns.items():
        if role not in optional or column in existing:
            check_column(column, role, existing, source)
    return [column in existing for column in columns.values()]


def _read_csv(
    path: Path, columns: Mapping[str, str], bad: BadRows, optional: Collection[str], delimiter: str
) -> Iterator[Row]:
    # The default limit of 131,072 characters in a field is less than a long document.
    previous_limit = csv.field_size_limit(max(path.stat().st_size, csv.field_size_limit()))
    header: list[str] = []
    positions: list[int | None] = []
    next_line, number = 1, 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.reader(lines, delimiter=delimiter, strict=True)
            for fields in reader:
                line, next_line = next_line, reader.line_num + 1
                if not header:
                    header = fields
                    present = _present(columns, header, optional, str(path)) if header else []
                    positions = [
                        header.index(column) if there else None
                        for column, there in zip(columns.values(), present, strict=False)
                    ]
                elif fields:
                    number += 1
                    if len(fields) != len(header):
                        bad.add(
                            Place(number, line),
                            f"the row has {len(fields)} fields, the header has {len(header)}. A text that contains the "
                            "delimiter must stand in double quotes",
                        )
                        continue
                    yield Row(number, line, tuple(None if at is None else fields[at] for at in positions))
    except csv.Error as error:
        raise DataError(
            f"{path}, the row that starts in line {next_line}: {error}. A text with the delimiter, a quote or a line "
            'break stands in double quotes, and a quote inside it is doubled ("")'
        ) from error
    finally:
        csv.field_size_limit(previous_limit)
    if not header:
        raise DataError(f"{path}: the file has no header and no rows")


def _pick_columns(
    path: Path,
    objects: Iterable[tuple[Place, Any]],
    columns: Mapping[str, str],
    bad: BadRows,
    optional: Collection[str],
) -> Iterator[Row]:
    for place, content in objects:
        if not isinstance(content, dict):
            bad.add(place, f"expected an object with the columns, got {type(content).__name__}")
            continue
        _present(columns, list(content), optional, f"{path}, {place}")
        yield Row(*place, tuple(content.get(column) for column in columns.values()))


def _read_lines(path: Path, bad: BadRows) -> Iterator[tuple[Place, Any]]:
    number = 0
    with path.open(encoding="utf-8-sig") as lines:
        for line, text in enumerate(lines, start=1):
            if not text.strip():
                continue
            number += 1
            try:
                yield Place(number, line), json.loads(text)
            except json.JSONDecodeError as error:
                bad.add(Place(number, line), f"not valid JSON ({error.msg}, column {error.colno})")


def _read_items(path: Path) -> Iterator[tuple[Place, Any]]:
    return ((Place(number), item) for number, item in _read_list(path))


def _read_parquet(path: Path, columns: Mapping[str, str], optional: Collection[str]) -> Iterator[Row]:
    try:
        with pyarrow.parquet.ParquetFile(path, memory_map=True, pre_buffer=False) as file:
            present = _present(columns, file.schema_arrow.names, optional, str(path))
            wanted = [column for column, there in zip(columns.values(), present, strict=True) if there]
            batches = file.iter_batches(batch_size=64, columns=wanted)
            rows = chain.from_iterable(batch.to_pylist() for batch in batches)
            for number, row in enumerate(rows, start=1):
                yield Row(number, None, tuple(row.get(column) for column in columns.values()))
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{path}: not a readable parquet file ({error}): it is damaged, cut off or of another type"
        ) from error
