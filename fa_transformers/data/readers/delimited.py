"""Rows of csv and tsv files, with the delimiter that their header shows."""

import csv
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from .encodings import encoding_of, open_text
from .problems import BadRows, Place, check_columns
from .tables import DataError, cut, listing

DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "pipe"}
SPELLINGS = {"\\t": "\t"} | {name: character for character, name in DELIMITERS.items()}
SAMPLE_CHARACTERS = 2**20
SAMPLE_ROWS = 20
QUOTING = "A text with the delimiter, a quote or a line break stands in double quotes, and a quote inside it is doubled"


def read_delimited(
    path: Path, columns: Mapping[str, str], bad: BadRows, optional: Collection[str] = (), delimiter: str | None = None
) -> Iterator[tuple[Place, tuple]]:
    """Yield the place and the values of each row of a csv or tsv file; the arguments are those of `open_rows`.

    Lines without any character are no rows.

    Raises:
        DataError: there is no header, a column is missing, the delimiter can't be told, or a quote isn't closed.
    """
    encoding = encoding_of(path)
    header: list[str] = []
    positions: list[int | None] = []
    number, line = 0, 1
    with _long_fields(path), open_text(path, encoding, newline="") as file:
        delimiter, skipped = _delimiter_of(path, encoding, columns, delimiter)
        reader = csv.reader(islice(file, skipped, None), delimiter=delimiter, strict=True)
        try:
            for fields in reader:
                start, line = line + skipped, reader.line_num + 1
                if not header and fields:
                    header = fields
                    _check_divided(path, header, columns)
                    check_columns(columns, header, str(path), optional)
                    positions = [header.index(name) if name in header else None for name in columns.values()]
                elif fields:
                    number += 1
                    if len(fields) == len(header):
                        yield Place(number, start), tuple(None if at is None else fields[at] for at in positions)
                    else:
                        counts = f"the row has {len(fields)} fields, the header has {len(header)}"
                        bad.add(Place(number, start), counts, QUOTING)
        except csv.Error as error:
            raise DataError(f"{path}, the row that starts in line {line + skipped}: {error}. {QUOTING}") from error
    if not header:
        raise DataError(f"{path}: the file has no header and no rows")


def _check_divided(path: Path, header: list[str], columns: Mapping[str, str]) -> None:
    if len(header) == 1 and header[0] not in columns.values():
        raise DataError(
            f"{path}: the first line has no {', '.join(DELIMITERS.values())} that divides it into columns, it is "
            f"{cut(header[0])}: name another character with --delimiter, put the names of the columns there, or name "
            "the only column with --text_column_name"
        )


@contextmanager
def _long_fields(path: Path) -> Iterator[None]:
    # The default limit of 131,072 characters in a field is less than a long document.
    previous = csv.field_size_limit(max(path.stat().st_size, csv.field_size_limit()))
    try:
        yield
    finally:
        csv.field_size_limit(previous)


def _delimiter_of(path: Path, encoding: str, columns: Mapping[str, str], given: str | None) -> tuple[str, int]:
    """Return the delimiter and the number of lines before the header.

    Decisive is by which delimiter the header has the columns that are asked for; where several are as good, by which
    the first rows have as many fields as the header.
    """
    if given is not None:
        given = SPELLINGS.get(given, given)
        if len(given) != 1 or given in '"\r\n':
            raise DataError(f"--delimiter must be one character or 'tab', got {given!r}")
    with open_text(path, encoding, newline="") as file:
        lines = _first_lines(file)
    skipped = 0
    if lines and lines[0].startswith("sep=") and len(lines[0].rstrip("\r\n")) == 5:  # Excel writes and obeys this
        given, skipped = given or lines[0][4], 1
    if given is not None:
        return given, skipped
    readings = {character: _first_rows(lines, character) for character in DELIMITERS}
    found = {
        character: sum(column in rows[0] for column in columns.values()) for character, rows in readings.items() if rows
    }
    most = max(found.values(), default=0)
    likely = {character: readings[character] for character in found if found[character] == most}
    divided = {character: rows for character, rows in likely.items() if len(rows[0]) > 1}
    if not divided:  # one column, or nothing to go by
        return "\t" if path.suffix.lower() == ".tsv" else ",", 0
    if len(divided) > 1:
        even = {c: rows for c, rows in divided.items() if all(len(row) == len(rows[0]) for row in rows)}
        divided = even if len(even) == 1 else divided
    if len(divided) > 1:
        shown = "; ".join(f"by {DELIMITERS[c]} the columns are {listing(rows[0])}" for c, rows in divided.items())
        raise DataError(
            f"{path}: the delimiter can't be told, because several divide the header and none alone gives "
            f"{listing(columns.values())}: {shown}. Name it, such as --delimiter {DELIMITERS[next(iter(divided))]}"
        )
    return next(iter(divided)), 0


def _first_lines(file: Iterable[str]) -> list[str]:
    """Return the lines of about the first megabyte."""
    lines: list[str] = []
    size = 0
    for line in file:
        lines.append(line)
        size += len(line)
        if size > SAMPLE_CHARACTERS:
            break
    return lines


def _first_rows(lines: Iterable[str], delimiter: str) -> list[list[str]]:
    """Return the header and some rows, as far as they can be read; a row whose quote isn't closed is left out."""
    rows = []
    try:
        for row in csv.reader(lines, delimiter=delimiter, strict=True):
            rows += [row] if row else []
            if len(rows) > SAMPLE_ROWS:
                break
    except csv.Error:  # told where the file is read
        pass
    return rows
