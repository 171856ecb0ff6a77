"""Labels of a user's documents: what kind they are, and their numbers, with errors that name file, row and column."""

import logging
from dataclasses import replace
from typing import Any

import datasets
import numpy as np

from .tables import DataError, ReadingOptions, Table, listing

logger = logging.getLogger(__name__)

PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")
LARGEST_FLOAT32 = float(np.finfo(np.float32).max)


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


def encode_tables(
    tables: dict[str, Table], options: ReadingOptions, names: list[str] | None = None
) -> datasets.DatasetDict:
    """Return the documents of each table with a column "label", whose type `load_text_files` describes.

    Args:
        tables: by split, "train" among them.
        names: the classes in their order, where the data set has them; None takes those that occur in train, sorted.

    Raises:
        DataError: a label is missing, of the wrong type, or not one of train's.
        ValueError: there is no such problem type.
    """
    label_column, problem_type = options.label_column, options.problem_type
    if problem_type is not None and problem_type not in PROBLEM_TYPES:
        raise ValueError(f"problem_type must be one of {listing(PROBLEM_TYPES)} or None, got {problem_type!r}")
    if options.label_separator is not None:
        tables = {split: _split_labels(table, options.label_separator) for split, table in tables.items()}
    for table in tables.values():
        _check_labels_present(table, label_column)
    if problem_type is None:
        train = tables["train"]
        problem_type = _infer_problem_type(train, label_column) if names is None else _type_of_named(train)
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


def _infer_problem_type(table: Table, label_column: str) -> str:
    labels = table.labels
    if any(isinstance(label, list) for label in labels):
        return "multi_label_classification"
    values = [as_number(label) for label in labels]
    if any(value is not None and not value.is_integer() for value in values):
        others = [index for index, value in enumerate(values) if value is None]
        unlike = [index for index in others if _is_float(labels[index])]
        if not others:
            return "regression"
        if len(unlike) == len(others):
            raise DataError(
                f"{table.where(unlike[0])}, column {label_column!r}: {labels[unlike[0]]!r} is not a finite float32 "
                f"number, and all others of the column are ({len(unlike)} such rows of {len(labels)}); mend or remove "
                "the row, or choose a problem_type"
            )
    return "single_label_classification"


def _is_float(label: Any) -> bool:
    """True for what Python reads as a number, such as "inf", "nan" and 1e300, which no float32 holds."""
    try:
        float(label)
    except (ValueError, TypeError, OverflowError):
        return isinstance(label, int) and not isinstance(label, bool)
    return not isinstance(label, bool)


def _type_of_named(table: Table) -> str:
    several = any(isinstance(label, list) for label in table.labels)
    return "multi_label_classification" if several else "single_label_classification"


def as_number(label: Any) -> float | None:
    """Return the number that a label stands for, or None if there is none that float32 can hold."""
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
    """Return the name of a class: integers become their digits.

    Raises:
        DataError: the value is neither a string nor an integer.
    """
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


def class_names(label: Any, feature: datasets.ClassLabel) -> Any:
    """The name(s) of a ClassLabel's number(s); -1, which stands for no label, becomes None."""
    if isinstance(label, list):
        return [class_names(number, feature) for number in label]
    return None if label is None or label < 0 else feature.int2str(label)
