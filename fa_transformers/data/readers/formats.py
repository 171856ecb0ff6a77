"""Rows of a user's file: csv, tsv, json, jsonl, parquet or xlsx, with the same values whatever the format.

No more than a row, a line or a megabyte is held at a time, whatever the size of the file; of a spreadsheet, a sheet.
"""

import difflib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from .delimited import read_delimited
from .json_rows import read_json
from .parquet_rows import read_parquet
from .problems import BadRows
from .spreadsheets import read_spreadsheet
from .tables import DataError, cut, listing

FILE_TYPES = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".xlsx")
OTHER_TYPES = {
    (".xls", ".xlsb", ".xlsm", ".ods", ".numbers"): "save it as .xlsx or as csv",
    (".gz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".tar", ".tgz"): "unpack it first",
    (".txt", ".text", ".dat", ".tab", ".psv"): "a table whose first line names the columns is read as .csv; rename it",
    (".ndjson", ".jsonlines"): "rename it to .jsonl",
    (".arrow", ".feather"): "write it as .parquet; fine-tuning takes the folder of a saved data set, too",
    (".pkl", ".pickle", ".npz", ".h5"): "write it as .parquet or csv",
}


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
    """Yield the rows of a file, read as they are asked for; what their values mean is the reader's to check.

    A value is a string in csv and tsv, "" where the cell is empty, and what json, parquet and xlsx make of it: None
    where it is missing. Whole numbers of a spreadsheet are integers.

    Args:
        columns: role -> name of its column, "text" first; the values of a row are in this order.
        bad: takes the rows that can't be read, which are not yielded; call `bad.check()` after the last.
        optional: roles whose column may be missing; their values are then None.
        delimiter: character between the fields of csv and tsv files, or "tab"; None finds it by the header.

    Raises:
        DataError: the file is missing, empty, damaged, lacks a column or is in an unknown encoding; some of it only
            when that part is read.
    """
    _check_file(path)
    ending = path.suffix.lower()
    if ending in (".csv", ".tsv"):
        rows = read_delimited(path, columns, bad, optional, delimiter)
    elif ending == ".parquet":
        rows = read_parquet(path, columns, bad, optional)
    elif ending == ".xlsx":
        rows = read_spreadsheet(path, columns, optional)
    else:
        rows = read_json(path, columns, bad, optional)
    for place, values in rows:
        yield Row(*place, values)


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise DataError(
            f"{path} is a folder: name a file in it; folders of images go to --image_folder, saved data sets to "
            "--dataset_name"
        )
    ending = path.suffix.lower()
    if ending not in FILE_TYPES:
        advice = next((advice for endings, advice in OTHER_TYPES.items() if ending in endings), "")
        raise DataError(
            f"{path}: the ending {path.suffix!r} is not one of {listing(FILE_TYPES)}"
            + (f": {advice}" if advice else "")
        )
    if not path.is_file():
        others = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, others, n=1)
        raise DataError(f"{path}: there is no such file" + (f"; did you mean {cut(near[0])}?" if near else ""))
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty (0 bytes)")
    try:
        path.open("rb").close()
    except OSError as error:
        raise DataError(f"{path}: the file can't be opened: {error.strerror}") from error
