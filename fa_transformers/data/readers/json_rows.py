"""Rows of json and jsonl files: objects of a list, of a field or one by one, or columns, whatever the ending says."""

import json
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, TextIO

from .encodings import encoding_of, open_text
from .problems import BadRows, Place, check_columns
from .tables import DataError, cut, listing

logger = logging.getLogger(__name__)

READ_CHARACTERS = 2**20
# Rows whose keys tell the columns: a row may leave out what it has no value for.
SAMPLE_ROWS = 100
SAMPLE_LINES = 20
CONTAINERS = {"[": "]", "{": "}"}
KINDS = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}

Objects = Iterator[tuple[Place, Any]]
Values = Iterator[tuple[Place, tuple]]


class _Object(dict):
    """Object of JSON that knows which of its keys stand in it twice, of which a dict keeps the last."""

    def __init__(self, pairs: list[tuple[str, Any]]):
        super().__init__(pairs)
        names = [name for name, _ in pairs] if len(self) < len(pairs) else []
        self.repeated = {name for name in names if names.count(name) > 1}


_DECODER = json.JSONDecoder(object_pairs_hook=_Object)


def read_json(path: Path, columns: Mapping[str, str], bad: BadRows, optional: Collection[str] = ()) -> Values:
    """Yield the place and the values of each row of a json or jsonl file; the arguments are those of `open_rows`.

    Rows are the objects of one list, one object per line, objects one after another, or the objects of the one field
    that has a list of them, as in {"data": [...]}; or the file is one object of columns, {"text": [...], ...}.

    Raises:
        DataError: the file is no valid JSON, or its rows or a column can't be found.
    """
    encoding = encoding_of(path)
    with open_text(path, encoding) as file:
        window = _Window(path, file)
        first = window.next_character()
        start = window.line_number()
        if not first:
            raise DataError(f"{path}: the file is empty (white space only)")
        if first == "[":
            return _rows(path, columns, bad, optional, lambda _: _items(path, encoding, None))
        try:
            if first != "{":
                window.fail("Expecting '[' or '{'", window.position)
            fields = _fields_of(window)
        except DataError:
            if _has_lines(path, encoding):
                return _rows(path, columns, bad, optional, lambda bad: _lines(path, encoding, bad))
            raise
        in_one_line = window.line_number() == start
        several = bool(window.next_character())
    if several and in_one_line:
        return _rows(path, columns, bad, optional, lambda bad: _lines(path, encoding, bad))
    text_column = next(iter(columns.values()))
    if not several and fields.get(text_column, ("", ()))[0] in ("list", "object"):
        return _columns(path, encoding, columns, fields, optional)
    if several or text_column in fields:
        return _rows(path, columns, bad, optional, lambda _: _sequence(path, encoding))
    field = _field_of_rows(path, columns, fields, optional)
    return _rows(path, columns, bad, optional, lambda _: _items(path, encoding, field))


class _Window:
    """The part of a JSON file that is being decoded: it grows until a value is complete and then moves on."""

    def __init__(self, path: Path, file: TextIO):
        self.path, self.file = path, file
        self.text, self.position = "", 0
        self.line, self.column = 1, 1  # where `text` starts in the file
        self._counted, self._line_counted = 0, 1

    def grow(self) -> bool:
        """Drop what is decoded and read as much again as is left, at least `READ_CHARACTERS`; False at the end."""
        decoded, self.text = self.text[: self.position], self.text[self.position :]
        self.line += decoded.count("\n")
        self.column = len(decoded) - decoded.rfind("\n") if "\n" in decoded else self.column + len(decoded)
        self.position, self._counted, self._line_counted = 0, 0, self.line
        added = self.file.read(max(READ_CHARACTERS, len(self.text)))
        self.text += added
        return bool(added)

    def line_number(self) -> int:
        """Return the line, in the file, of the position."""
        self._line_counted += self.text.count("\n", self._counted, self.position)
        self._counted = self.position
        return self._line_counted

    def next_character(self) -> str:
        """Return the next character that is no white space, which stays; "" at the end."""
        while True:
            while self.position < len(self.text) and self.text[self.position].isspace():
                self.position += 1
            if self.position < len(self.text):
                return self.text[self.position]
            if not self.grow():
                return ""

    def take(self, expected: str) -> str:
        """Return the next character and go beyond it; it must be one of `expected`."""
        character = self.next_character()
        if not character or character not in expected:
            self.fail(f"Expecting {' or '.join(map(repr, expected))}", self.position)
        self.position += 1
        return character

    def item(self) -> Any:
        """Decode the value that starts here, reading on until it is complete."""
        self.next_character()
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.position)
            except json.JSONDecodeError as error:
                offset = error.pos - self.position  # counts from 0 again when the window has moved
                if not self.grow():
                    self.fail(error.msg, offset)
            except (ValueError, RecursionError) as error:
                self.fail(_reason(error), self.position)
            else:
                length = end - self.position  # which counts from 0 again when the window has moved
                # The digits of a number may go on in what isn't read yet.
                if end < len(self.text) or isinstance(value, str | dict | list) or not self.grow():
                    self.position += length
                    return value

    def entries(self) -> Iterator[Any]:
        """Go through the list or object that starts here: yield each number or key; the caller decodes its value."""
        opening = self.take("[{")
        closing, number = CONTAINERS[opening], 0
        if self.next_character() == closing:
            self.position += 1
            return
        while True:
            key: Any = number
            if opening == "{":
                if self.next_character() != '"':
                    self.fail("Expecting a name in double quotes", self.position)
                key = self.item()
                self.take(":")
            self.next_character()
            yield key
            number += 1
            if self.take("," + closing) == closing:
                return

    def fail(self, message: str, position: int) -> None:
        """Raise DataError with the line and column, in the file, of a position in the window."""
        before = self.text[:position]
        line = self.line + before.count("\n")
        column = position - before.rfind("\n") if "\n" in before else self.column + position
        raise DataError(f"{self.path}, line {line}, column {column}: not valid JSON: {message}")


def _fields_of(window: _Window) -> dict[str, tuple[str, Any]]:
    """Go through one object; return the kind of each field, "list", "string" and so on, and the first entry in it."""
    fields: dict[str, tuple[str, Any]] = {}
    for name in window.entries():
        opening = window.next_character()
        if name in fields:
            fields[name] = ("name that stands twice", _skip(window))
        elif opening in CONTAINERS:
            fields[name] = (KINDS[list if opening == "[" else dict], _skip(window))
        else:
            value = window.item()
            fields[name] = (_kind(value), value)
    return fields


def _skip(window: _Window) -> Any:
    """Go beyond the value that starts here, an entry at a time; return the first entry of a list or object."""
    if window.next_character() not in CONTAINERS:
        return window.item()
    first = None
    for index, _ in enumerate(window.entries()):
        value = window.item()
        first = first if index else value
    return first


def _has_lines(path: Path, encoding: str) -> bool:
    """True where one of the first lines is an object of its own."""
    with open_text(path, encoding) as file:
        return any(isinstance(_decoded(line)[0], dict) for line in islice(file, SAMPLE_LINES))


def _decoded(line: str) -> tuple[Any, str]:
    """Return the content of a line and, where it is no valid JSON, why."""
    try:
        return _DECODER.decode(line), ""
    except (ValueError, RecursionError) as error:
        return None, _reason(error)


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg}, column {error.colno}"
    return "it is nested too deeply" if isinstance(error, RecursionError) else "a number has too many digits"


def _kind(value: Any) -> str:
    return "null" if value is None else KINDS[dict if isinstance(value, dict) else type(value)]


def _lines(path: Path, encoding: str, bad: BadRows) -> Objects:
    number = 0
    with open_text(path, encoding) as lines:
        for line, text in enumerate(lines, start=1):
            if not text.strip():
                continue
            number += 1
            content, reason = _decoded(text)
            if reason:
                bad.add(
                    Place(number, line),
                    f"not valid JSON ({reason})",
                    "The file must hold one object per line, or one list",
                )
            else:
                yield Place(number, line), content


def _sequence(path: Path, encoding: str) -> Objects:
    with open_text(path, encoding) as file:
        window, number = _Window(path, file), 0
        while window.next_character():
            number += 1
            line = window.line_number()
            yield Place(number, line), window.item()


def _items(path: Path, encoding: str, field: str | None) -> Objects:
    """Yield the entries of the list that is the file or, where it is given, a field of the object that is the file."""
    for number, (line, _, content) in enumerate(_entries(path, encoding, field), start=1):
        yield Place(number, line), content


def _entries(path: Path, encoding: str, field: str | None) -> Iterator[tuple[int, Any, Any]]:
    """Yield line, key and value of the entries of a list or object."""
    with open_text(path, encoding) as file:
        window = _Window(path, file)
        if field is not None:
            for name in window.entries():
                if name == field:
                    break
                _skip(window)
        for key in window.entries():
            line = window.line_number()
            yield line, key, window.item()
        if field is None and window.next_character():
            window.fail("Extra data", window.position)


def _rows(
    path: Path,
    columns: Mapping[str, str],
    bad: BadRows,
    optional: Collection[str],
    objects: Callable[[BadRows], Objects],
) -> Values:
    required = {role: column for role, column in columns.items() if role not in optional}
    first = (content for _, content in islice(objects(BadRows(str(path))), SAMPLE_ROWS) if isinstance(content, dict))
    names = list(dict.fromkeys(name for content in first for name in content))
    if names:
        check_columns(columns, names, str(path), optional)
    for place, content in objects(bad):
        if not isinstance(content, _Object):
            bad.add(place, f"expected an object with the columns, got: {_kind(content)}")
            continue
        missing = {role: column for role, column in required.items() if column not in content}
        repeated = [column for column in columns.values() if column in content.repeated]
        if missing:
            bad.add(place, "; ".join(f"there is no {role} column {column!r}" for role, column in missing.items()))
        elif repeated:
            bad.add(place, f"the object has {listing(repeated)} twice")
        else:
            yield place, tuple(content.get(column) for column in columns.values())


def _field_of_rows(
    path: Path, columns: Mapping[str, str], fields: dict[str, tuple[str, Any]], optional: Collection[str]
) -> str:
    """Return the name of the one field with a list of objects; of several, the one whose objects have the text."""
    lists = {name: first for name, (kind, first) in fields.items() if kind == "list" and isinstance(first, dict | None)}
    if len(lists) > 1:
        text_column = next(iter(columns.values()))
        lists = {name: first for name, first in lists.items() if text_column in (first or {})} or lists
    if not lists:
        source = f"{path}, one object without a list of rows (pandas writes one with orient='records')"
        check_columns(columns, list(fields), source, optional)
    if len(lists) > 1:
        raise DataError(
            f"{path}: the file is one object with {len(lists)} lists of rows, {listing(lists)}: write the rows of each "
            "into a file of its own, as a list"
        )
    (field,) = lists
    if len(fields) > 1:
        others = listing(name for name in fields if name != field)
        logger.warning("%s: the rows are those of the field %s; left out are %s", path, cut(field), others)
    return field


def _columns(
    path: Path,
    encoding: str,
    columns: Mapping[str, str],
    fields: dict[str, tuple[str, Any]],
    optional: Collection[str],
) -> Values:
    """Yield the rows of {"text": [...], "label": [...]}, or of objects that number the rows, as pandas writes them."""
    check_columns(columns, list(fields), str(path), optional)
    present = list(dict.fromkeys(column for column in columns.values() if column in fields))
    for column in present:
        if fields[column][0] not in ("list", "object"):
            raise DataError(f"{path}: expected a list of values in column {column!r}, got: {fields[column][0]}")
    entries = zip_longest(*(_entries(path, encoding, column) for column in present))
    for number, row in enumerate(entries, start=1):
        if None in row or len({key for _, key, _ in row}) > 1:
            raise DataError(
                f"{path}: the columns {listing(present)} don't have the same rows: they differ from row {number} on"
            )
        values = dict(zip(present, (value for _, _, value in row), strict=True))
        yield Place(number, row[0][0]), tuple(values.get(column) for column in columns.values())
