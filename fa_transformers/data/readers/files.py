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
from typing import Any, NamedTuple

import datasets
import pyarrow

from ...tables import counted
from .formats import Row, open_rows
from .labelling import LabelledSplits, Table, encode_tables
from .labels import as_whole, clean_label
from .parquet_rows import declared_classes
from .problems import BadRows, Place, check_column, check_columns
from .splits import fill_splits
from .tables import DataError, ReadingOptions, cut, listing

logger = logging.getLogger(__name__)

STORED_CHUNK_BYTES = 2**23
DEFAULTS = ReadingOptions()
SPLITS = ("train", "validation", "test")
OPTIONAL_ROLES = ("label", "group")
"""Roles of columns that splits other than train may lack."""


def load_text_files(
    train_file: str | Path,
    validation_file: str | Path | None = None,
    test_file: str | Path | None = None,
    options: ReadingOptions = DEFAULTS,
) -> LabelledSplits:
    """Read files of any of `formats.FILE_TYPES` into splits with the columns "text" and "label".

    The type of "label" follows `options.problem_type`: ClassLabel for "single_label_classification", a list of
    ClassLabel for "multi_label_classification", float32 for "regression". The classes are the train file's, sorted.
    Labels of several classes are lists in json and parquet, and strings that `options.label_separator` divides in csv,
    where an empty cell is then a row without labels; or lists of zeros and ones, an entry for each class.

    Without `validation_file`, `options.validation_share` of the train rows is drawn for it with `options.seed`; without
    both other files `options.test_share` likewise. A test file without labels is returned apart. Rows are counted from
    1, the header of a csv file not counted.

    The checked documents are kept in `options.cache_dir` under a name that their content gives, memory-mapped, so that
    `Dataset.map` is cached too and a set may be larger than memory.

    Raises:
        DataError: a file, row, column or label can't be used; bad rows are all named at once.
    """
    files = {"train": train_file, "validation": validation_file, "test": test_file}
    return fill(
        read_files({split: [Path(path)] for split, path in files.items() if path is not None}, options), options
    )


def read_files(
    files: Mapping[str, Sequence[Path]], options: ReadingOptions = DEFAULTS, train: str = "train"
) -> LabelledSplits:
    """Read the files of each split as `load_text_files` does; no split is drawn.

    Args:
        files: paths of the files of each split.
        options: the meaning of the columns.
        train: the split that decides what labels mean, and is called "train" in the result.

    Raises:
        DataError: a file, row, column or label can't be used.
    """
    tables = {}
    for split in _named_train(files, train):
        is_train = split == "train"
        paths = files[train if is_train else split]
        tables[split] = [_read_table(path, options.columns, options, is_train) for path in paths]
    return encode_tables(tables, options)


def _named_train(splits: Iterable[str], train: str) -> list[str]:
    """The splits to read, of which `train` is called "train"."""
    return ["train"] + [split for split in SPLITS if split in splits and split not in ("train", train)]


def read_documents(files: Mapping[str, Sequence[Path]], options: ReadingOptions = DEFAULTS) -> datasets.DatasetDict:
    """Read the column "text" alone of the files of each split.

    Raises:
        DataError: a file, row or column can't be used.
    """
    read = {}
    for split, paths in files.items():
        tables = [_read_table(path, {"text": options.text_column}, options) for path in paths]
        for table in tables:
            table.bad.check()
        read[split] = datasets.concatenate_datasets([table.contents for table in tables])
    return datasets.DatasetDict(read)


def _read_table(path: Path, columns: Mapping[str, str], options: ReadingOptions, is_train: bool = True) -> Table:
    bad = BadRows(str(path), options.drop_bad_rows)
    optional = () if is_train else OPTIONAL_ROLES
    rows = open_rows(path, columns, bad, optional=optional, delimiter=options.delimiter)
    table = _store(rows, columns, bad, options.cache_dir, groups_needed=is_train)
    if path.suffix.lower() != ".parquet" or "label" not in columns:
        return table
    return replace(table, class_names=declared_classes(path, columns["label"]))


def encode_dataset(dataset: datasets.DatasetDict, options: ReadingOptions = DEFAULTS) -> LabelledSplits:
    """Check and label a DatasetDict that is already loaded, as `load_text_files` does files.

    The set needs a split "train"; "validation" and "test" are used if they are there, others are named in a warning. A
    ClassLabel column keeps the order of train's names, whatever their numbers are in other splits.

    Raises:
        DataError: a split, column, row or label can't be used.
    """
    splits_to_read(dataset, "the data set")
    return fill(read_dataset(dataset, options), options)


def read_dataset(
    dataset: datasets.DatasetDict, options: ReadingOptions = DEFAULTS, train: str = "train"
) -> LabelledSplits:
    """Check and label a DatasetDict as `encode_dataset` does; no split is drawn, and `train` is as in `read_files`.

    Raises:
        DataError: a column, row or label can't be used.
    """
    tables = {}
    for split in _named_train(dataset, train):
        is_train = split == "train"
        name = train if is_train else split
        tables[split] = [_table_of(dataset[name], f"split {name!r}", options, is_train)]
    return encode_tables(tables, options)


def splits_to_read(splits: Iterable[str], source: str) -> list[str]:
    """Return the splits that are trained and scored on, in order, and warn of others.

    Raises:
        DataError: there is no split "train".
    """
    found = list(splits)
    if "train" not in found:
        raise DataError(f"{source} has no split 'train', only {listing(found)}: name one of them 'train'")
    if others := [split for split in found if split not in SPLITS]:
        logger.warning("%s: the splits %s are neither trained nor scored on", source, listing(others))
    return [split for split in SPLITS if split in found]


def _table_of(part: datasets.Dataset, source: str, options: ReadingOptions, is_train: bool) -> Table:
    check_columns(options.columns, part.column_names, source, () if is_train else OPTIONAL_ROLES)
    bad = BadRows(source, options.drop_bad_rows)
    rows = _rows_of(part, list(options.columns.values()))
    table = _store(rows, options.columns, bad, options.cache_dir, groups_needed=is_train)
    return replace(table, class_names=class_names_of(part.features, options.label_column))


def class_names_of(features: Mapping[str, Any] | None, column: str) -> list[str] | None:
    """Return the names that the numbers of a column, or those of its lists, stand for; None if they are no numbers."""
    feature = (features or {}).get(column)
    feature = getattr(feature, "feature", feature)
    return feature.names if isinstance(feature, datasets.ClassLabel) else None


def encode_columns(columns: Mapping[str, Sequence], options: ReadingOptions = DEFAULTS) -> LabelledSplits:
    """Check and label rows that are given in Python, {name of a column: its values}, as `load_text_files` does files.

    All rows are train's; other splits are drawn from them. Values may be lists, numpy arrays, tensors or pandas Series.

    Raises:
        DataError: a column is missing, is no list, or is longer than another; or a row or label can't be used.
    """
    values = []
    for role, column in options.columns.items():
        check_column(column, role, list(columns), "rows")
        values.append(list_of(columns[column], f"rows, column {column!r}"))
        if len(values[-1]) != len(values[0]):
            raise DataError(
                f"rows: column {options.text_column!r} has {len(values[0])} values and {column!r} has "
                f"{len(values[-1])}: give one {role} for each document"
            )
    rows = (Row(number, None, row) for number, row in enumerate(zip(*values, strict=True), start=1))
    table = _store(rows, options.columns, BadRows("rows", options.drop_bad_rows), options.cache_dir)
    return fill(encode_tables({"train": [table]}, options), options)


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


def fill(splits: LabelledSplits, options: ReadingOptions) -> LabelledSplits:
    """Return the splits with those that are missing drawn from train, as `fill_splits` says."""
    _warn_of_shared_groups(splits)
    filled = fill_splits(splits, options.validation_share, options.test_share, options.seed)
    return LabelledSplits(filled, splits.labels, splits.unlabelled)


def _warn_of_shared_groups(dataset: datasets.DatasetDict) -> None:
    """Warn where a split that was given has groups of train's: what was learnt of them is then scored."""
    groups = {split: set(part["group"]) for split, part in dataset.items() if "group" in part.column_names}
    for split in groups.keys() - {"train"}:
        if shared := (groups[split] & groups["train"]) - {None}:
            logger.warning(
                "%s of --group_column %s in train and in %s, such as %s: scores on it are too good",
                counted(len(shared), "group"),
                "is" if len(shared) == 1 else "are",
                split,
                listing(sorted(shared)[:3]),
            )


def _rows_of(part: datasets.Dataset, columns: Sequence[str]) -> Iterator[Row]:
    """The rows of a data set; columns that it lacks are None."""
    present = [column for column in columns if column in part.column_names]
    batches = part.select_columns(present).with_format(None).iter(batch_size=64)
    rows = chain.from_iterable(zip(*(batch[column] for column in present), strict=True) for batch in batches)
    for number, row in enumerate(rows, start=1):
        found = dict(zip(present, row, strict=True))
        yield Row(number, None, tuple(found.get(column) for column in columns))


def _store(
    rows: Iterable[Row],
    columns: Mapping[str, str],
    bad: BadRows,
    cache_dir: str | Path | None,
    *,
    groups_needed: bool = True,
) -> Table:
    """Check every document and write it, a chunk at a time, to a file in a folder that is named by their content.

    The cache may be shared by processes of several machines and containers. Each writes a file of a random name, and
    a file that is already there is used when it holds these documents, and else replaced.
    """
    root = Path(cache_dir) if cache_dir else Path(datasets.config.HF_CACHE_HOME) / "fa_transformers"
    root = root / "files"
    root.mkdir(parents=True, exist_ok=True)
    found = _Found(array("q"), array("q"), [], [])
    scratch = Path(tempfile.mkdtemp(suffix=".tmp", dir=root))
    try:
        temporary = scratch / "documents.arrow"
        digest = _write_documents(_checked(rows, columns, bad, found, groups_needed), temporary)
        if not found.numbers:
            bad.check()
            raise DataError(f"{bad.source}: there are no rows" + (" left" if bad.count else ""))
        stored = root / digest[:32] / "documents.arrow"
        stored.parent.mkdir(exist_ok=True)
        if not _holds(stored, digest, len(found.numbers)):
            temporary.replace(stored)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    texts = datasets.Dataset.from_file(str(stored))
    if not _holds(stored, digest, len(found.numbers)) or len(texts) != len(found.numbers):
        raise DataError(
            f"{bad.source}: {stored} does not hold the documents that were written to it: another program writes "
            "there, or the disk is faulty. Set HF_HOME to another folder"
        )
    groups = found.groups if "group" in columns else None
    return Table(texts, found.labels, found.numbers, bad, found.lines, groups=groups)


class _Found(NamedTuple):
    """Numbers, lines, labels and groups of sound rows, noted while their documents are written."""

    numbers: array
    lines: array
    labels: list
    groups: list


def _checked(
    rows: Iterable[Row], columns: Mapping[str, str], bad: BadRows, found: _Found, groups_needed: bool
) -> Iterator[bytes]:
    """Yield each sound document in UTF-8, and note its label, group, number and line."""
    for number, line, values in rows:
        row = dict(zip(columns, values, strict=True))
        group = group_of(row.get("group"))
        try:
            document = check_text(row["text"])
            if group is None and groups_needed and "group" in columns:
                raise TextError(f"the group is missing in column {columns['group']!r}")
        except TextError as error:
            bad.add(Place(number, line), str(error))
            continue
        found.numbers.append(number)
        found.lines.append(line or 0)
        found.labels.append(row.get("label"))
        found.groups.append(group)
        yield document


def group_of(value: Any) -> str | None:
    """Return the name of the group that a cell names, 1 and 1.0 being one; None for none."""
    value = clean_label(value)
    whole = as_whole(value)
    return None if value is None else str(value if whole is None else whole)


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


class TextError(ValueError):
    """A document can't be used; the message says why, and whoever reads the row knows its place."""


def check_text(text: Any) -> bytes:
    """Return a document in UTF-8.

    Raises:
        TextError: it is empty, no string, or has half of a surrogate pair.
    """
    if text is None or (isinstance(text, str) and not text.strip()) or (isinstance(text, float) and text != text):
        raise TextError("the document is empty; remove the row or give it a text")
    if not isinstance(text, str):
        raise TextError(f"the document must be a string, got {type(text).__name__}: {cut(text)}")
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TextError(
            f"character {error.start + 1} of the document is half of a surrogate pair, which is no text; remove or "
            "replace it"
        ) from error
