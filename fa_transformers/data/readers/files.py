"""A user's own documents: read from files or taken from Python, checked, and kept in a memory-mapped cache.

Every row is checked before training starts, because an empty document or a stray label found after an hour costs the
hour. Nothing is skipped or guessed silently: a bad row is a DataError that names file, row, column and what to do, and
what was inferred is logged.

Documents stay in memory-mapped files: in memory are labels, row numbers, and a few documents at a time.
"""

import hashlib
import logging
import shutil
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import pyarrow

from .labels import class_names, encode_tables
from .splits import fill_splits
from .tables import DataError, ReadingOptions, Row, Table, check_column, listing, open_table

logger = logging.getLogger(__name__)

STORED_CHUNK_BYTES = 2**23
DEFAULTS = ReadingOptions()


def load_text_files(
    train_file: str | Path,
    validation_file: str | Path | None = None,
    test_file: str | Path | None = None,
    options: ReadingOptions = DEFAULTS,
) -> datasets.DatasetDict:
    """Read csv, tsv, json, jsonl or parquet files into a DatasetDict with the columns "text" and "label".

    The type of "label" follows `options.problem_type`: ClassLabel for "single_label_classification", a list of
    ClassLabel for "multi_label_classification", float32 for "regression". The classes are the train file's, sorted.
    Labels of several classes are lists in json and parquet, and strings that `options.label_separator` divides in csv,
    where an empty cell is then a row without labels.

    Without `validation_file`, `options.validation_share` of the train rows is drawn for it with `options.seed`; without
    both other files `options.test_share` likewise. Rows are counted from 1, the header of a csv file not counted.

    The checked documents are kept in `options.cache_dir` under a name that their content gives, memory-mapped, so that
    `Dataset.map` is cached too and a set may be larger than memory.

    Raises:
        DataError: a file, row, column or label can't be used.
    """
    files = {"train": train_file, "validation": validation_file, "test": test_file}
    tables = {}
    for split, path in files.items():
        if path is not None:
            unit, rows = open_table(Path(path), options.text_column, options.label_column)
            tables[split] = _store(str(path), unit, rows, options.cache_dir)
    return _fill(encode_tables(tables, options), options)


def encode_dataset(dataset: datasets.DatasetDict, options: ReadingOptions = DEFAULTS) -> datasets.DatasetDict:
    """Check and label a DatasetDict that is already loaded, as `load_text_files` does files.

    The set needs a split "train"; "validation" and "test" are used if they are there. A ClassLabel column keeps the
    order of its names.

    Raises:
        DataError: a split, column, row or label can't be used.
    """
    if "train" not in dataset:
        raise DataError(f"the data set has no split 'train', only {listing(dataset)}: name one of them 'train'")
    tables = {}
    names = None
    for split in ("train", "validation", "test"):
        if split not in dataset:
            continue
        source = f"split {split!r}"
        part = dataset[split]
        for role, column in options.columns.items():
            check_column(column, role, part.column_names, source)
        feature = part.features[options.label_column]
        class_label = getattr(feature, "feature", feature)
        table = _store(source, "row", _rows_of(part, options), options.cache_dir)
        if isinstance(class_label, datasets.ClassLabel):
            names = names or class_label.names
            table = replace(table, labels=[class_names(label, class_label) for label in table.labels])
        tables[split] = table
    return _fill(encode_tables(tables, options, names), options)


def encode_columns(columns: Mapping[str, Sequence], options: ReadingOptions = DEFAULTS) -> datasets.DatasetDict:
    """Check and label rows that are given in Python, {name of a column: its values}, as `load_text_files` does files.

    All rows are train's; other splits are drawn from them. Values may be lists, numpy arrays, tensors or pandas Series.

    Raises:
        DataError: a column is missing, is no list, or is longer than another; or a row or label can't be used.
    """
    values = {}
    for role, column in options.columns.items():
        check_column(column, role, list(columns), "rows")
        values[role] = list_of(columns[column], f"rows, column {column!r}")
    texts, labels = values["text"], values["label"]
    if len(texts) != len(labels):
        raise DataError(
            f"rows: column {options.text_column!r} has {len(texts)} values and {options.label_column!r} has "
            f"{len(labels)}: give one label for each document"
        )
    rows = zip(range(1, len(texts) + 1), texts, labels, strict=True)
    return _fill(encode_tables({"train": _store("rows", "row", rows, options.cache_dir)}, options), options)


def list_of(values: Any, where: str) -> list:
    """Return the values of a column as a list of Python objects.

    Raises:
        DataError: they are a string or no sequence at all; the message begins with `where`.
    """
    if hasattr(values, "tolist"):  # else the numbers of an array would be numpy's, which are no labels
        values = values.tolist()
    if isinstance(values, str | bytes) or not isinstance(values, Sequence):
        raise DataError(f"{where}: a column must be a list of values, got {type(values).__name__}")
    return list(values)


def _fill(dataset: datasets.DatasetDict, options: ReadingOptions) -> datasets.DatasetDict:
    return fill_splits(dataset, options.validation_share, options.test_share, options.seed)


def _rows_of(part: datasets.Dataset, options: ReadingOptions) -> Iterable[Row]:
    columns = [options.text_column, options.label_column]
    batches = part.select_columns(columns).iter(batch_size=64)
    rows = chain.from_iterable(zip(*(batch[column] for column in columns), strict=True) for batch in batches)
    for number, (text, label) in enumerate(rows, start=1):
        yield number, text, label


def _store(source: str, unit: str, rows: Iterable[Row], cache_dir: str | Path | None) -> Table:
    """Check every document and write it, a chunk at a time, to a file in a folder that is named by their content.

    The cache may be shared by processes of several machines and containers. Each writes a file of a random name, and
    a file that is already there is used when it holds these documents, and else replaced.
    """
    root = Path(cache_dir) if cache_dir else Path(datasets.config.HF_CACHE_HOME) / "fa_transformers"
    root = root / "files"
    root.mkdir(parents=True, exist_ok=True)
    labels: list[Any] = []
    numbers = array("q")
    documents = _checked(source, unit, rows, labels, numbers)
    scratch = Path(tempfile.mkdtemp(suffix=".tmp", dir=root))
    try:
        temporary = scratch / "documents.arrow"
        digest = _write_documents(documents, temporary)
        if not numbers:
            raise DataError(f"{source}: there are no rows")
        stored = root / digest[:32] / "documents.arrow"
        stored.parent.mkdir(exist_ok=True)
        if not _holds(stored, digest, len(numbers)):
            temporary.replace(stored)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    texts = datasets.Dataset.from_file(str(stored))
    if not _holds(stored, digest, len(numbers)) or len(texts) != len(numbers):
        raise DataError(
            f"{source}: {stored} does not hold the documents that were written to it: another program writes there, or "
            "the disk is faulty. Set HF_HOME to another folder"
        )
    return Table(source, texts, labels, unit, numbers)


def _checked(source: str, unit: str, rows: Iterable[Row], labels: list, numbers: array) -> Iterator[bytes]:
    """Yield each row's document in UTF-8, and note its label and number."""
    for number, text, label in rows:
        document = check_text(text, f"{source}, {unit} {number}")
        labels.append(label)
        numbers.append(number)
        yield document


def _write_documents(documents: Iterable[bytes], path: Path) -> str:
    """Write documents as a column "text" of an Arrow stream, a chunk at a time; return the SHA-256 of their content."""
    schema = pyarrow.schema([("text", pyarrow.string())])
    digest = hashlib.sha256()
    chunk: list[bytes] = []
    chunk_bytes = 0
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, schema) as writer:
        for document in documents:
            _add_document(digest, document)
            if chunk and chunk_bytes + len(document) > STORED_CHUNK_BYTES:
                writer.write_batch(pyarrow.record_batch([pyarrow.array(chunk, pyarrow.string())], schema))
                chunk, chunk_bytes = [], 0
            chunk.append(document)
            chunk_bytes += len(document)
        writer.write_batch(pyarrow.record_batch([pyarrow.array(chunk, pyarrow.string())], schema))
    return digest.hexdigest()


def _add_document(digest: Any, document: bytes) -> None:
    digest.update(len(document).to_bytes(8, "little"))
    digest.update(document)


def _holds(path: Path, expected: str, num_rows: int) -> bool:
    """True where an Arrow stream is whole and holds `num_rows` documents whose content has the SHA-256 `expected`."""
    digest = hashlib.sha256()
    found = 0
    try:
        with pyarrow.memory_map(str(path)) as file, pyarrow.ipc.open_stream(file) as batches:
            for batch in batches:
                found += len(batch)
                for text in batch.column("text").cast(pyarrow.binary()):
                    _add_document(digest, text.as_py())
    except (OSError, LookupError, ValueError, TypeError, AttributeError):  # pyarrow's errors are ValueErrors
        return False
    return found == num_rows and digest.hexdigest() == expected


def check_text(text: Any, where: str) -> bytes:
    """Return a document in UTF-8.

    Raises:
        DataError: it is empty, no string, or has half of a surrogate pair; the message begins with `where`.
    """
    if text is None or (isinstance(text, str) and not text.strip()):
        raise DataError(f"{where}: the document is empty; remove the row or give it a text")
    if not isinstance(text, str):
        raise DataError(f"{where}: the document must be a string, got {type(text).__name__}: {text!r}")
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: character {error.start + 1} of the document is half of a surrogate pair, which is no text; "
            "remove or replace it"
        ) from error
