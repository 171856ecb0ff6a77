"""Labels of tables: train's decide what all labels are, whatever the tables were read from, and number the classes."""

import logging
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import datasets

from .labels import (
    PROBLEM_TYPES,
    LabelError,
    LabelScheme,
    as_number,
    as_whole,
    clean_label,
    indicator_of,
    without_names,
)
from .problems import BadRows, Place
from .tables import DataError, ReadingOptions, cut, listing

logger = logging.getLogger(__name__)

SHOWN_CONFUSIONS = 5
_NUMBER_AS_TEXT = re.compile(r"[+-]?(\d{1,3}(,\d{3})+(\.\d+)?|\d+,\d+|\d+[.,]\d+ ?%)", re.ASCII)


@dataclass(frozen=True)
class Table:
    """Checked rows of one file or split, whose labels are yet to be read.

    Args:
        contents: documents in the column "text", memory-mapped, or images in "image".
        labels: their labels as they were found, None for a missing one.
        numbers, lines: the number of each row and its line in the file, 0 where there is none.
        bad: takes the rows that can't be used.
        class_names: names that the labels are numbers of, or the classes in their order; None where nothing says them.
        groups: the group of each row, which no split may cut; None where there are no groups.
    """

    contents: datasets.Dataset
    labels: Sequence[Any]
    numbers: Sequence[int]
    bad: BadRows
    lines: Sequence[int] = ()
    class_names: Sequence[str] | None = None
    groups: Sequence[str | None] | None = None

    def place(self, index: int) -> Place:
        """Return the place of a row for an error message."""
        return Place(self.numbers[index], (self.lines[index] if self.lines else 0) or None)


class LabelledSplits(datasets.DatasetDict):
    """Splits with the columns "text" or "image" and "label", and perhaps "group"; `labels` is what labels mean.

    `unlabelled` are the rows of a test split without any label, "text" or "image" and "row" (number in the source).
    """

    def __init__(
        self,
        splits: Mapping[str, datasets.Dataset],
        labels: LabelScheme,
        unlabelled: datasets.Dataset | None = None,
    ):
        super().__init__(splits)
        self.labels, self.unlabelled = labels, unlabelled


@dataclass
class _Part:
    """A table and its labels as `clean_label` gives them."""

    table: Table
    labels: list[Any]
    kept: list[int] = field(default_factory=list)
    numbers: list[Any] = field(default_factory=list)

    def encode(self, scheme: LabelScheme, column: str) -> None:
        """Number the labels; rows that have none that can be used are noted as bad."""
        for index, label in enumerate(self.labels):
            try:
                self.numbers.append(scheme.encode(label))
            except LabelError as error:
                self.table.bad.add(self.table.place(index), f"column {column!r}: {error}")
            else:
                self.kept.append(index)

    def rows(self, feature: Any) -> datasets.Dataset:
        """The rows whose labels were numbered, with the column "label", and "group" where there are groups."""
        contents, groups = self.table.contents, self.table.groups
        if len(self.kept) < len(self.labels):
            contents = contents.select(self.kept)
        columns, features = {"label": self.numbers}, {"label": feature}
        if groups is not None:
            columns["group"], features["group"] = [groups[index] for index in self.kept], datasets.Value("string")
        added = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
        return datasets.concatenate_datasets([contents, added], axis=1)


def encode_tables(tables: Mapping[str, Sequence[Table]], options: ReadingOptions) -> LabelledSplits:
    """Read the labels of all tables by the meaning that train's have.

    A split "validation" without any label is left out, and one for "test" is returned apart, each with a warning. A row
    without a label in a split that has others can't be used.

    Args:
        tables: the tables of each split, "train" among them.
        options: among them the names of the classes in their order; without them those of a ClassLabel column, else
            the ones that occur in train, sorted, numbers by value.

    Raises:
        DataError: rows can't be used, or train's labels can't be told apart from others.
        ValueError: there is no such problem type.
    """
    if options.problem_type is not None and options.problem_type not in PROBLEM_TYPES:
        raise ValueError(f"problem_type must be one of {listing(PROBLEM_TYPES)} or None, got {options.problem_type!r}")
    parts = {
        split: [
            _Part(table, [clean_label(label, options.label_separator, table.class_names) for label in table.labels])
            for table in several
        ]
        for split, several in tables.items()
    }
    train = parts["train"]
    source, column = train[0].table.bad.source, options.label_column
    if all(label is None for part in train for label in part.labels):
        for part in train:
            part.table.bad.check()
        raise DataError(
            f"{source}: no row has a label in column {column!r}; name the right one with --label_column_name"
        )
    scheme = _finish(train, _decide(train, source, options), source, options)
    if scheme.is_indicator:
        for part in (part for several in parts.values() for part in several):
            part.labels = [scheme.clean(label, part.table.class_names) for label in part.table.labels]
    unlabelled = None
    for split in [split for split in parts if split != "train"]:
        if all(scheme.is_missing(label) for part in parts[split] for label in part.labels):
            removed = parts.pop(split)
            names = ", ".join(part.table.bad.source for part in removed)
            for part in removed:
                part.table.bad.check()
            fate = "they are predicted after training" if split == "test" else "it is left out"
            logger.warning("%s: no row of the %s data has a label: %s", names, split, fate)
            if split == "test":
                unlabelled = _without_labels([part.table for part in removed])
    for several in parts.values():
        for part in several:
            part.encode(scheme, column)
        for part in several:
            part.table.bad.check()
        if not any(part.kept for part in several):
            raise DataError(f"{several[0].table.bad.source}: no row is left")
    splits = {split: _joined([part.rows(scheme.feature) for part in several]) for split, several in parts.items()}
    return LabelledSplits(splits, scheme, unlabelled)


def _without_labels(tables: Sequence[Table]) -> datasets.Dataset:
    rows = []
    for table in tables:
        numbers = datasets.Dataset.from_dict({"row": list(table.numbers)})
        rows.append(datasets.concatenate_datasets([table.contents, numbers], axis=1))
    return _joined(rows)


def _joined(parts: list[datasets.Dataset]) -> datasets.Dataset:
    # One part alone is not copied: each data set costs a hash of all names of classes.
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


def _decide(train: Sequence[_Part], source: str, options: ReadingOptions) -> LabelScheme:
    """The scheme of train's labels, its names still those that the data set or the options give."""
    labels = [label for part in train for label in part.labels if label is not None]
    declared = train[0].table.class_names
    names = None if declared is None else tuple(clean_label(name) or "" for name in declared)
    problem_type, number_needed = options.problem_type, LabelScheme.number_needed
    if problem_type is None:
        if any(isinstance(label, list) for label in labels):
            problem_type = "multi_label_classification"
        elif declared is not None:
            problem_type = "single_label_classification"
        else:
            _check_spelling(train, options.label_column)
            problem_type, number_needed = _infer_problem_type(labels)
        logger.warning("no problem_type was given: %s was inferred from the labels of %s", problem_type, source)
    if problem_type == "regression":
        if options.label_names:
            raise DataError(f"{source}: --label_names is for classes, and the labels are numbers to predict")
        return LabelScheme(problem_type, number_needed=number_needed)
    scheme = LabelScheme(problem_type, names, options.label_separator, takes_decimals=options.problem_type is not None)
    values = [value for label in labels for value in (label if isinstance(label, list) else [label])]
    wholes = [as_whole(value) for value in values if value is not None]
    is_whole = declared is None and None not in wholes
    if problem_type == "multi_label_classification":
        if options.label_separator and all(isinstance(label, list) and len(label) == 1 for label in labels):
            logger.warning("%s: --label_separator %r divides no label", source, options.label_separator)
        scheme = _decide_indicator(train, scheme, source, options.label_names)
    if options.label_names and not scheme.is_indicator:
        given = tuple(clean_label(name) or "" for name in options.label_names)
        is_position = is_whole and not {str(whole) for whole in wholes} & set(given)
        return replace(scheme, names=given, is_whole=is_whole, is_position=is_position)
    return replace(scheme, is_whole=is_whole)


def _infer_problem_type(labels: Sequence[Any]) -> tuple[str, str]:
    """The problem type of labels that are no lists, and for regression why a label must be a number."""
    values = [as_number(label) for label in labels]
    if any(value is not None and not value.is_integer() for value in values):
        others = [label for label, value in zip(labels, values, strict=True) if value is None]
        if not others or all(_is_float(label) for label in others):
            unlike = f"and all others of the column are ({len(others)} such rows of {len(labels)})"
            return "regression", unlike if others else LabelScheme.number_needed
    return "single_label_classification", ""


def _check_spelling(train: Sequence[_Part], column: str) -> None:
    """Refuse labels that look like lists or numbers and that would silently become the names of classes.

    Raises:
        DataError: more than half of the labels are lists or numbers written in another way, or are numbers, some of
            them with a fraction, beside others that are none.
    """
    found = [(part, index) for part in train for index, label in enumerate(part.labels) if label is not None]
    labels = [part.labels[index] for part, index in found]
    numbers = [as_number(label) for label in labels]
    is_list = [isinstance(label, str) and label[0] + label[-1] == "[]" for label in labels]
    is_spelt = [isinstance(label, str) and bool(_NUMBER_AS_TEXT.fullmatch(label)) for label in labels]
    is_none = []
    if any(number is not None and not number.is_integer() for number in numbers):
        is_none = [number is None and not _is_float(label) for label, number in zip(labels, numbers, strict=True)]
    if 2 * sum(is_list) > len(labels):
        suspects, what = is_list, "look like lists written as text"
        advice = "give lists in json, jsonl or parquet, or names with a character between them and --label_separator"
    elif 2 * sum(is_spelt) > len(labels):
        suspects, what = is_spelt, "look like numbers with a comma or a percent sign"
        advice = "write numbers to predict with a decimal point and nothing else, several labels with --label_separator"
    elif any(is_none) and 2 * numbers.count(None) < len(labels):
        suspects, what = is_none, "are no numbers, unlike the others"
        advice = "mend the rows if the labels are numbers to predict, or give --problem_type regression --drop_bad_rows"
    else:
        return
    part, index = found[suspects.index(True)]
    raise DataError(
        f"{part.table.bad.source}, {part.table.place(index)}, column {column!r}: {cut(part.labels[index])} and "
        f"{sum(suspects)} of {len(labels)} labels in all {what}: {advice}; if all are names of classes, give "
        "--problem_type single_label_classification"
    )


def _is_float(label: Any) -> bool:
    """True for what Python reads as a number, such as "inf", "nan" and 1e300, which no float32 holds."""
    try:
        float(label)
    except (ValueError, TypeError, OverflowError):
        return isinstance(label, int)
    return True


def _decide_indicator(
    train: Sequence[_Part], scheme: LabelScheme, source: str, given: Sequence[str] | None
) -> LabelScheme:
    """The scheme with a name for each entry, where train's rows are zeros and ones; other rows are then bad.

    With two entries, one of each in every row, it can't be told, so that names must be given.
    """
    found = [(label, part.table.class_names) for part in train for label in part.labels if label is not None]
    length, has_twice = indicator_of([without_names(*pair) for pair in found])
    if not length:
        return scheme
    if given is not None and len(given) != length:
        raise DataError(
            f"{source}: the rows have {length} zeros and ones, one for each class, and --label_names names {len(given)}"
        )
    names = tuple(map(str, range(length)))
    if given is not None:
        names = tuple(given)
    elif scheme.names is not None and len(scheme.names) == length:
        names = scheme.names
    elif not has_twice:
        raise DataError(
            f"{source}: every row has a list of one 0 and one 1: two classes, each row one of them, or two classes "
            'named "0" and "1", both in every row? Give --label_names with two names if the entries stand for classes, '
            "or other names than 0 and 1"
        )
    else:
        logger.warning(
            "%s: the rows have %d zeros and ones, so that each entry was taken for a class; the classes are called "
            '"0" to "%d", unless --label_names names them',
            source,
            length,
            length - 1,
        )
    return replace(scheme, names=names, is_indicator=True)


def _finish(train: Sequence[_Part], scheme: LabelScheme, source: str, options: ReadingOptions) -> LabelScheme:
    """The scheme with the names of all classes: those of train's sound rows, where nothing else names them."""
    if scheme.problem_type == "regression":
        return scheme
    if scheme.names is None:
        names: set[str] = set()
        for part in train:
            for label in part.labels:
                try:
                    names.update(scheme.names_of(label))
                except LabelError:
                    continue  # noted when it is encoded
        scheme = replace(scheme, names=tuple(_sorted_names(names)))
    elif options.label_names:
        scheme = replace(scheme, origin=("--label_names,", "mend the row, or name it there"))
    names_in_order = scheme.names or ()
    if len(names_in_order) < 2 or len(scheme.numbers) < len(names_in_order) or "" in scheme.numbers:
        if len(names_in_order) >= 2:
            raise DataError(f"{source}: the classes {listing(names_in_order)} have an empty name or one name twice")
        for part in train:  # a bad row may be the reason
            part.encode(scheme, options.label_column)
            part.table.bad.check()
        raise DataError(
            f"{source}, column {options.label_column!r}: a classifier needs two or more labels, the only one is "
            f"{listing(names_in_order) or 'none at all'}"
        )
    _warn_of_confusions(names_in_order, source)
    return scheme


def _sorted_names(names: Iterable[str]) -> list[str]:
    names = list(names)
    numeric = all(name.lstrip("-").isdecimal() for name in names)
    return sorted(names, key=lambda name: (int(name), name)) if numeric else sorted(names)


def _warn_of_confusions(names: Sequence[str], source: str) -> None:
    """Warn of classes that differ by case, blanks, zeros in front or the forms of characters alone."""
    alike = defaultdict(list)
    for name in names:
        plain = " ".join(unicodedata.normalize("NFKC", name).casefold().split())
        whole = as_whole(plain.lstrip("0") or "0")
        alike[plain if whole is None else str(whole)].append(name)
    confused = [" and ".join(map(repr, several)) for several in alike.values() if len(several) > 1]
    if confused:
        shown = "; ".join(confused[:SHOWN_CONFUSIONS])
        logger.warning(
            "%s: classes that differ only by case, blanks, zeros or forms of characters stay apart: %s%s",
            source,
            shown,
            f" and {len(confused) - SHOWN_CONFUSIONS} more" if len(confused) > SHOWN_CONFUSIONS else "",
        )
