"""Rows of parquet files, with the names of classes that a data set's own file declares."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet

from .problems import BadRows, Place, check_columns
from .tables import DataError

LARGEST_BATCH = 64
BATCH_BYTES = 2**22
READ_BYTES = 2**20


def read_parquet(
    path: Path, columns: Mapping[str, str], bad: BadRows, optional: Collection[str] = ()
) -> Iterator[tuple[Place, tuple]]:
    """Yield the place and the values of each row of a parquet file; the arguments are those of `open_rows`.

    Numbers of a ClassLabel column, which `datasets` declares in the files that it writes, become the names of the
    classes, and -1, which stands for no label, None.

    Raises:
        DataError: the file is damaged or a column is missing.
    """
    try:
        # With a buffer pages are read one by one, without one, or with a memory map, all of a column stays in memory.
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=READ_BYTES) as file:
            existing = file.schema_arrow.names
            check_columns(columns, existing, str(path), optional)
            present = list(dict.fromkeys(column for column in columns.values() if column in existing))
            classes = {column: _class_names(file.schema_arrow, column) for column in present}
            number = 0
            for batch in file.iter_batches(_batch_size(file.metadata), columns=present):
                for row in batch.to_pylist():
                    number += 1
                    try:
                        named = {column: _named(value, classes[column], column) for column, value in row.items()}
                    except DataError as error:
                        bad.add(Place(number), str(error))
                    else:
                        yield Place(number), tuple(named.get(column) for column in columns.values())
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{path}: not a readable parquet file ({error}): it is damaged, cut off or of another type"
        ) from error


def declared_classes(path: Path, column: str) -> list[str] | None:
    """Return the classes of a ClassLabel column in their order; None where the file declares none.

    Raises:
        DataError: the file is damaged.
    """
    try:
        return _class_names(pyarrow.parquet.read_schema(path), column)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file ({error})") from error


def _class_names(schema: pyarrow.Schema, column: str) -> list[str] | None:
    if b"huggingface" not in (schema.metadata or {}) or column not in schema.names:
        return None
    feature = datasets.Features.from_arrow_schema(schema).get(column)
    feature = getattr(feature, "feature", feature)
    return list(feature.names) if isinstance(feature, datasets.ClassLabel) else None


def _named(value: Any, names: Sequence[str] | None, column: str) -> Any:
    """Return the name of a class or the names of several, where there are names."""
    if names is None or value is None or value == -1:
        return None if names is not None else value
    if isinstance(value, list):
        return [_named(number, names, column) for number in value]
    if not 0 <= value < len(names):
        raise DataError(f"column {column!r} has the number {value}, the file declares {len(names)} classes from 0")
    return names[value]


def _batch_size(metadata: pyarrow.parquet.FileMetaData) -> int:
    """Return the number of rows that is read at once: few, and one where documents are very long."""
    size = sum(metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups))
    return max(1, min(LARGEST_BATCH, BATCH_BYTES * metadata.num_rows // max(1, size)))
