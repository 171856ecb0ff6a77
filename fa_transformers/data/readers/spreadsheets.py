"""Rows of Excel's .xlsx files, read by python-calamine: the values that the file keeps, formulas' too."""

import logging
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from .problems import Place, check_columns
from .tables import DataError, cut, listing

logger = logging.getLogger(__name__)

INSTALL = "Excel files are read by python-calamine: pip install 'fa_transformers[excel]', or save the sheet as csv"


def read_spreadsheet(
    path: Path, columns: Mapping[str, str], optional: Collection[str] = ()
) -> Iterator[tuple[Place, tuple]]:
    """Yield the place and the values of each row of a file's first sheet; the arguments are those of `open_rows`.

    The first row that isn't empty is the header, and empty rows are no rows. An empty cell is None, and so is one whose
    formula failed (#N/A), which the library doesn't tell apart. A number without a fraction is an integer, since Excel
    has one kind of number. A place's line is the number that Excel shows beside the row.

    Raises:
        DataError: python-calamine isn't installed, the file is damaged, or the sheet has no header or lacks a column.
    """
    try:
        import python_calamine
    except ImportError as error:
        raise DataError(f"{path}: {INSTALL}") from error
    try:
        with python_calamine.CalamineWorkbook.from_path(path) as book:
            names = book.sheet_names
            sheet = book.get_sheet_by_index(0)
            rows = ((line, [_value(cell) for cell in row]) for line, row in enumerate(sheet.iter_rows(), start=1))
    except (python_calamine.CalamineError, OSError, IndexError) as error:
        raise DataError(
            f"{path}: not a readable Excel file ({error}): it is damaged, cut off or of another type"
        ) from error
    filled = ((line, row) for line, row in rows if any(value is not None for value in row))
    source = f"{path}, sheet {cut(names[0])}"
    _, header = next(filled, (0, []))
    left_out = f"other sheets are not read: {listing(names[1:])}" if names[1:] else ""
    if not header:
        raise DataError(f"{source}: the sheet is empty" + (f"; {left_out}" if left_out else ""))
    titles = ["" if title is None else str(title) for title in header]
    try:
        check_columns(columns, titles, source, optional)
    except DataError as error:
        raise DataError(f"{error}; {left_out}. Put the rows into the first" if left_out else str(error)) from error
    if left_out:
        logger.warning("%s: %s", source, left_out)
    positions = [titles.index(name) if name in titles else None for name in columns.values()]
    for number, (line, row) in enumerate(filled, start=1):
        yield Place(number, line), tuple(None if at is None else row[at] for at in positions)


def _value(cell: Any) -> Any:
    if isinstance(cell, float) and cell.is_integer():
        return int(cell)
    return None if cell == "" else cell
