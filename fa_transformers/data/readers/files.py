"""A user's own documents: read, checked, labelled and tokenized, with errors that name file, row, column and the mend.

Every row is checked before training starts, because an empty document or a stray label found after an hour costs the
hour. Nothing is skipped or guessed silently: a bad row is a DataError, what was inferred or truncated is logged.

Documents and tokens stay in memory-mapped files: in memory are labels, row numbers, and a few documents at a time.
"""

import hashlib
import logging
import os
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
from transformers import PreTrainedTokenizerFast

from ...files import count_cores
from .tables import DataError, Row, Table, check_column, listing, open_table

logger = logging.getLogger(__name__)

PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")
LARGEST_FLOAT32 = float(np.finfo(np.float32).max)
STORED_CHUNK_BYTES = 2**23
TOKENIZED_BATCH_BYTES = 2**20
"""About the text that is tokenized at a time: tokens as Python integers take some ten times its memory."""
BYTES_PER_WORKER = 2**23
"""Text that is worth another process, which takes about half a second to start: a few seconds of tokenization."""


def load_text_files(
    train_file: str | Path,
    validation_file: str | Path | None = None,
    test_file: str | Path | None = None,
    *,
    text_column: str = "text",
    label_column: str = "label",
    problem_type: str | None = None,
    label_separator: str | None = None,
    validation_share: float = 0.1,
    test_share: float = 0.1,
    seed: int = 0,
    cache_dir: str | Path | None = None,
) -> datasets.DatasetDict:
    """Read csv, tsv, json, jsonl or parquet files into a DatasetDict with the columns "text" and "label".

    The type of "label" follows `problem_type`: ClassLabel for "single_label_classification", a list of ClassLabel for
    "multi_label_classification", float32 for "regression"; None infers it from the train file's labels and logs what
    was inferred. The classes are the train file's, sorted. Labels of several classes are lists in json and parquet,
    and strings that `label_separator` divides in csv, where an empty cell is then a row without labels.

    Without `validation_file`, `validation_share` of the train rows (a fraction) is drawn for it with `seed`; without
    both other files `test_share` likewise. Rows are counted from 1, the header of a csv file not counted.

    The checked documents are kept in `cache_dir` (by default in Hugging Face's cache) under a name that their content
    gives, memory-mapped, so that `Dataset.map` is cached too and a set may be larger than memory.

    Raises DataError for every file, row, column or label that can't be used.
    """
    files = {"train": train_file, "validation": validation_file, "test": test_file}
    tables = {}
    for split, path in files.items():
        if path is not None:
            unit, rows = open_table(Path(path), text_column, label_column)
            tables[split] = _store(str(path), unit, rows, cache_dir)
    dataset = _encode_tables(tables, label_column, problem_type, label_separator)
    return fill_splits(dataset, validation_share, test_share, seed)


def encode_dataset(
    dataset: datasets.DatasetDict,
    *,
    text_column: str = "text",
    label_column: str = "label",
    problem_type: str | None = None,
    label_separator: str | None = None,
    validation_share: float = 0.1,
    test_share: float = 0.1,
    seed: int = 0,
    cache_dir: str | Path | None = None,
) -> datasets.DatasetDict:
    """The same checks and the same result as `load_text_files`, for a DatasetDict that is already loaded.

    The set needs a split "train"; "validation" and "test" are used if they are there. A ClassLabel column keeps the
    order of its names.
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
        for role, column in (("text", text_column), ("label", label_column)):
            check_column(column, role, part.column_names, source)
        feature = part.features[label_column]
        class_label = getattr(feature, "feature", feature)
        table = _store(source, "row", _rows_of(part, text_column, label_column), cache_dir)
        if isinstance(class_label, datasets.ClassLabel):
            names = names or class_label.names
            table = replace(table, labels=[_class_names(label, class_label) for label in table.labels])
        tables[split] = table
    encoded = _encode_tables(tables, label_column, problem_type, label_separator, names)
    return fill_splits(encoded, validation_share, test_share, seed)


def label_names(dataset: datasets.DatasetDict) -> list[str] | None:
    """The names of the classes of the column "label" in the order of their numbers; None for regression."""
    feature = dataset["train"].features["label"]
    feature = getattr(feature, "feature", feature)
    return list(feature.names) if isinstance(feature, datasets.ClassLabel) else None


def problem_type_of(dataset: datasets.DatasetDict) -> str:
    """The problem type, in the names of transformers' configs, that the type of the column "label" stands for."""
    feature = dataset["train"].features["label"]
    if isinstance(feature, datasets.ClassLabel):
        return "single_label_classification"
    if isinstance(getattr(feature, "feature", None), datasets.ClassLabel):
        return "multi_label_classification"
    return "regression"


def fill_splits(
    dataset: datasets.DatasetDict, validation_share: float, test_share: float, seed: int
) -> datasets.DatasetDict:
    """Draw a missing "validation" from "train", and a missing "test" too if neither of the two was given."""
    shares = {"validation": validation_share, "test": test_share}
    if "validation" in dataset:
        return dataset
    if "test" in dataset:
        del shares["test"]
    for split, share in shares.items():
        if not 0 < share < 0.5:
            raise DataError(f"{split}_share must lie between 0 and 0.5, got {share}; or give a {split} file")
    counts = {split: max(1, round(share * len(dataset["train"]))) for split, share in shares.items()}
    if sum(counts.values()) >= len(dataset["train"]):
        raise DataError(
            f"{len(dataset['train'])} rows are too few to draw {' and '.join(counts)} from: give more rows or own files"
        )
    filled = dict(dataset)
    for split, count in counts.items():
        parts = filled["train"].train_test_split(test_size=count, seed=seed)
        filled["train"], filled[split] = parts["train"], parts["test"]
        logger.warning("no %s data was given: %d rows were drawn from train with seed %d", split, count, seed)
    return datasets.DatasetDict({split: filled[split] for split in ("train", "validation", "test") if split in filled})


def tokenize_documents(
    dataset: datasets.DatasetDict,
    tokenizer: Callable,
    max_length: int,
    strict_length: bool = False,
    num_proc: int | None = None,
    overwrite_cache: bool = False,
) -> datasets.DatasetDict:
    """Tokenize the column "text"; the result has the tokenizer's columns, "label" and "length" (tokens kept).

    A document of more than `max_length` tokens, special tokens included, is truncated, and one warning counts them;
    with `strict_length` the first of them is a DataError that names its row. Nothing is padded.

    `num_proc` processes share the work; None is one per usable core, as far as there is text that is worth them. The
    tokens are memory-mapped from a file beside the documents, which is used again unless `overwrite_cache`.
    """
    if max_length < 1:
        raise ValueError(f"max_length must be a positive number of tokens, got {max_length}")
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        # Calls leave their truncation and padding in the tokenizer, and the cache goes by a hash of all of it.
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()

    def tokenize(batch: dict[str, list]) -> dict[str, list]:
        return tokenize_texts(tokenizer, batch["text"], max_length)

    tokenized = {}
    for split, part in dataset.items():
        removed = [name for name in part.column_names if name != "label"]
        document_bytes = part.data.nbytes / max(1, part.data.num_rows)
        result = part.map(
            tokenize,
            batched=True,
            batch_size=min(128, max(1, int(TOKENIZED_BATCH_BYTES / document_bytes))),
            remove_columns=removed,
            num_proc=num_proc or choose_num_proc(int(document_bytes * len(part))),
            load_from_cache_file=not overwrite_cache,
            desc=f"tokenizing {split}",
        )
        full_length = result.with_format("numpy")["full_length"][:]
        if full_length.max() > max_length:
            too_long = full_length > max_length
            if strict_length:
                row = int(too_long.argmax())
                raise DataError(
                    f"split {split!r}, row {row + 1}: the document has {full_length[row]} tokens, the limit is "
                    f"{max_length}: raise max_length, shorten the document, or leave strict_length off to truncate"
                )
            logger.warning(
                "split %r: %d of %d documents are longer than %d tokens and were truncated; the longest has %d",
                split,
                too_long.sum(),
                len(result),
                max_length,
                full_length.max(),
            )
        tokenized[split] = result.remove_columns("full_length")
    return datasets.DatasetDict(tokenized)


def tokenize_texts(tokenizer: Callable, texts: list[str], max_length: int) -> dict[str, list]:
    """The tokenizer's columns, "length" (tokens kept, at most `max_length`) and "full_length" (without truncation)."""
    encoded = tokenizer(texts, truncation=False, padding=False, verbose=False)
    full_length = [len(token_ids) for token_ids in encoded["input_ids"]]
    if max(full_length) > max_length:
        encoded = tokenizer(texts, truncation=True, max_length=max_length, padding=False, verbose=False)
    length = [len(token_ids) for token_ids in encoded["input_ids"]]
    return {**encoded, "length": length, "full_length": full_length}


def choose_num_proc(num_bytes: int) -> int | None:
    """Processes to tokenize `num_bytes` of text with; None is the present one alone."""
    num_workers = min(count_cores(), num_bytes // BYTES_PER_WORKER)
    return num_workers if num_workers > 1 else None


def _rows_of(part: datasets.Dataset, text_column: str, label_column: str) -> Iterable[Row]:
    batches = part.select_columns([text_column, label_column]).iter(batch_size=64)
    rows = chain.from_iterable(zip(batch[text_column], batch[label_column], strict=True) for batch in batches)
    for number, (text, label) in enumerate(rows, start=1):
        yield number, text, label


def _store(source: str, unit: str, rows: Iterable[Row], cache_dir: str | Path | None) -> Table:
    """Check every document and write it, a chunk at a time, to a file in a folder that is named by their content."""
    root = Path(cache_dir) if cache_dir else Path(datasets.config.HF_CACHE_HOME) / "fa_transformers"
    root = root / "files"
    root.mkdir(parents=True, exist_ok=True)
    temporary = root / f"{os.getpid()}.tmp"
    schema = pyarrow.schema([("text", pyarrow.string())])
    digest, labels, numbers = hashlib.sha256(), [], array("q")
    chunk: list[bytes] = []
    chunk_bytes = 0
    try:
        with pyarrow.OSFile(str(temporary), "wb") as file, pyarrow.ipc.new_stream(file, schema) as writer:
            for number, text, label in rows:
                document = check_text(text, f"{source}, {unit} {number}")
                digest.update(len(document).to_bytes(8, "little"))
                digest.update(document)
                labels.append(label)
                numbers.append(number)
                if chunk and chunk_bytes + len(document) > STORED_CHUNK_BYTES:
                    writer.write_batch(pyarrow.record_batch([pyarrow.array(chunk, pyarrow.string())], schema))
                    chunk, chunk_bytes = [], 0
                chunk.append(document)
                chunk_bytes += len(document)
            if not chunk:
                raise DataError(f"{source}: there are no rows")
            writer.write_batch(pyarrow.record_batch([pyarrow.array(chunk, pyarrow.string())], schema))
        stored = root / digest.hexdigest()[:32] / "documents.arrow"
        stored.parent.mkdir(exist_ok=True)
        if not stored.exists():
            temporary.rename(stored)
    finally:
        temporary.unlink(missing_ok=True)
    return Table(source, datasets.Dataset.from_file(str(stored)), labels, unit, numbers)


def check_text(text: Any, where: str) -> bytes:
    """The document in UTF-8."""
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


def _encode_tables(
    tables: dict[str, Table],
    label_column: str,
    problem_type: str | None,
    label_separator: str | None,
    names: list[str] | None = None,
) -> datasets.DatasetDict:
    if problem_type is not None and problem_type not in PROBLEM_TYPES:
        raise ValueError(f"problem_type must be one of {listing(PROBLEM_TYPES)} or None, got {problem_type!r}")
    if label_separator is not None:
        tables = {split: _split_labels(table, label_separator) for split, table in tables.items()}
    for table in tables.values():
        _check_labels_present(table, label_column)
    if problem_type is None:
        problem_type = _infer_problem_type(tables["train"].labels) if names is None else _type_of_named(tables["train"])
        logger.warning(
            "no problem_type was given: %s was inferred from the labels of %s", problem_type, tables["train"].source
        )
    if problem_type == "regression":
        feature: Any = datasets.Value("float32")
        labels: dict[str, list] = {split: _parse_numbers(table, label_column) for split, table in tables.items()}
    else:
        several = problem_type == "multi_label_classification"
        parsed = {split: _parse_names(table, label_column, several) for split, table in tables.items()}
        names = names or _sorted_names(parsed["train"])
        if len(names) < 2:
            raise DataError(
                f"{tables['train'].source}, column {label_column!r}: a classifier needs two or more labels, the only "
                f"one is {listing(names) or 'none at all'}"
            )
        class_label = datasets.ClassLabel(names=names)
        feature = datasets.List(class_label) if several else class_label
        labels = {split: _number_names(tables[split], rows, names, label_column) for split, rows in parsed.items()}
        if not several:
            labels = {split: [numbers[0] for numbers in rows] for split, rows in labels.items()}
    features = datasets.Features({"label": feature})
    columns = {split: datasets.Dataset.from_dict({"label": labels[split]}, features=features) for split in tables}
    return datasets.DatasetDict(
        {split: datasets.concatenate_datasets([tables[split].texts, columns[split]], axis=1) for split in tables}
    )


def _check_labels_present(table: Table, label_column: str) -> None:
    for index, label in enumerate(table.labels):
        if label is None or (isinstance(label, str) and not label.strip()):
            raise DataError(f"{table.where(index)}, column {label_column!r}: the label is missing")


def _split_labels(table: Table, separator: str) -> Table:
    labels = [
        [name.strip() for name in label.split(separator) if name.strip()] if isinstance(label, str) else label
        for label in table.labels
    ]
    return replace(table, labels=labels)


def _infer_problem_type(labels: Sequence[Any]) -> str:
    if any(isinstance(label, list) for label in labels):
        return "multi_label_classification"
    values = [as_number(label) for label in labels]
    if all(value is not None for value in values) and not all(value.is_integer() for value in values if value):
        return "regression"
    return "single_label_classification"


def _type_of_named(table: Table) -> str:
    several = any(isinstance(label, list) for label in table.labels)
    return "multi_label_classification" if several else "single_label_classification"


def as_number(label: Any) -> float | None:
    """The number that a label stands for, or None if there is none that float32 can hold."""
    if isinstance(label, bool) or not isinstance(label, int | float | str):
        return None
    try:
        number = float(label)
    except (ValueError, OverflowError):
        return None
    return number if abs(number) <= LARGEST_FLOAT32 else None


def _parse_numbers(table: Table, label_column: str) -> list[Any]:
    numbers = []
    for index, label in enumerate(table.labels):
        number = as_number(label)
        if number is None:
            raise DataError(
                f"{table.where(index)}, column {label_column!r}: {label!r} is not a finite float32 number, which "
                "regression needs; mend the row or choose another problem_type"
            )
        numbers.append(number)
    return numbers


def _parse_names(table: Table, label_column: str, several: bool) -> list[list[str]]:
    """Every row's labels as names; integers become their digits, so that 1 and "1" are one class."""
    rows = []
    for index, label in enumerate(table.labels):
        if several != isinstance(label, list):
            wanted = "a list of labels (in csv: give label_separator)" if several else "one label"
            raise DataError(
                f"{table.where(index)}, column {label_column!r}: expected {wanted}, got {label!r}; mend the row or "
                "choose another problem_type"
            )
        rows.append([as_name(value, table.where(index), label_column) for value in (label if several else [label])])
    return rows


def as_name(value: Any, where: str, label_column: str) -> str:
    """The name of a class: integers become their digits."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str | int):
        return str(value)
    raise DataError(
        f"{where}, column {label_column!r}: a class must be a string or an integer, got {value!r}; for numbers to "
        'predict choose problem_type "regression"'
    )


def _sorted_names(rows: list[list[str]]) -> list[str]:
    names = {name for row in rows for name in row}
    numeric = all(name.lstrip("-").isdecimal() for name in names)
    return sorted(names, key=int) if numeric else sorted(names)


def _number_names(table: Table, rows: list[list[str]], names: list[str], label_column: str) -> list[Any]:
    numbers = {name: number for number, name in enumerate(names)}
    for index, row in enumerate(rows):
        for name in row:
            if name not in numbers:
                raise DataError(
                    f"{table.where(index)}, column {label_column!r}: the label {name!r} doesn't occur in train, whose "
                    f"labels are {listing(names)}; mend the row, or add such documents to train"
                )
    return [[numbers[name] for name in row] for row in rows]


def _class_names(label: Any, feature: datasets.ClassLabel) -> Any:
    """The name(s) of a ClassLabel's number(s); -1, which stands for no label, becomes None."""
    if isinstance(label, list):
        return [_class_names(number, feature) for number in label]
    return None if label is None or label < 0 else feature.int2str(label)
