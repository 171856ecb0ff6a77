"""Labels of a user's documents and images: what one of them means, whatever it was read from.

A csv file knows strings alone, so what other sources write as numbers, booleans, dates or nulls is brought to what csv
would hold of it, and whole numbers to their digits.
"""

import datetime
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import datasets
import numpy as np

from .tables import cut, listing

PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")
LARGEST_FLOAT32 = float(np.finfo(np.float32).max)

_WHOLE = re.compile(r"-?(0|[1-9][0-9]{0,999})(\.0*)?", re.ASCII)
_BITS: dict[Any, int] = {0: 0, "0": 0, "0.0": 0, "False": 0, 1: 1, "1": 1, "1.0": 1, "True": 1}


class LabelError(ValueError):
    """A label can't be used; the message says why, and whoever reads the row knows its place."""


@dataclass(frozen=True)
class LabelScheme:
    """The meaning of the labels of a data set, which those of its train split decide.

    Args:
        problem_type: one of `PROBLEM_TYPES`.
        names: the classes in the order of their numbers; None for regression.
        separator: string between the labels of one row.
        is_whole: the classes are whole numbers, so that 1, 1.0 and the text "1.0" are one class.
        is_indicator: a row has a zero or a one for each class.
        is_position: whole numbers are places in `names`, from 0 on.
        takes_decimals: a number such as 0.5 may name a class.
        number_needed: why a label must be a number, for messages.
        way_out: what may be done instead of mending a row of another problem type, for messages.
        origin: where the classes come from, and what to do with a label that isn't among them.
    """

    problem_type: str
    names: tuple[str, ...] | None = None
    separator: str | None = None
    is_whole: bool = False
    is_indicator: bool = False
    is_position: bool = False
    takes_decimals: bool = False
    number_needed: str = "which regression needs"
    way_out: str = " or choose another --problem_type"
    origin: tuple[str, str] = ("train, whose labels are", "mend the row, or add such rows to train")

    @property
    def is_multi_label(self) -> bool:
        """True where a row has a list of labels."""
        return self.problem_type == "multi_label_classification"

    @property
    def feature(self) -> Any:
        """The type of the column "label" in the datasets library."""
        if self.names is None:
            return datasets.Value("float32")
        class_label = datasets.ClassLabel(names=list(self.names))
        return datasets.List(class_label) if self.is_multi_label else class_label

    @cached_property
    def numbers(self) -> dict[str, int]:
        """The number of each class by its name."""
        return {name: number for number, name in enumerate(self.names or ())}

    def clean(self, value: Any, class_names: Sequence[str] | None = None) -> Any:
        """Return a label in the shape that `encode` takes; zeros and ones are never numbers of `class_names`."""
        label = clean_label(value, self.separator, class_names)
        return without_names(label, class_names) if self.is_indicator else label

    def is_missing(self, label: Any) -> bool:
        """True for no label, and for -1, as data sets write it, where the classes have no -1."""
        if isinstance(label, list):
            return bool(label) and all(self.is_missing(entry) for entry in label)
        if label is None:
            return True
        return self.names is not None and as_whole(label) == -1 and "-1" not in self.numbers

    def encode(self, label: Any) -> float | int | list[int]:
        """Return the number of a label that `clean_label` has brought into shape, or the numbers of several.

        Raises:
            LabelError: it is missing, of another type than train's, or not one of train's classes.
        """
        if self.problem_type == "regression":
            number = as_number(label)
            if label is None:
                raise LabelError("the label is missing")
            if number is None:
                raise LabelError(
                    f"{cut(label)} is not a finite float32 number, {self.number_needed}; mend the row{self.way_out}"
                )
            return number
        numbers = []
        for name in self.names_of(label):
            if name not in self.numbers:
                source, advice = self.origin
                raise LabelError(
                    f"the label {cut(name)} doesn't occur in {source} {listing(self.names or ())}; {advice}"
                )
            numbers.append(self.numbers[name])
        return numbers if self.is_multi_label else numbers[0]

    def names_of(self, label: Any) -> list[str]:
        """Return the names of a row's classes, one unless there may be several.

        Raises:
            LabelError: the label is missing, of another type than train's, or has a name twice.
        """
        if label is None and self.separator is not None and self.is_multi_label:
            return []  # an empty cell
        if self.is_missing(label):
            raise LabelError("the label is missing")
        if self.is_multi_label != isinstance(label, list):
            wanted = "a list of labels (in csv: give --label_separator)" if self.is_multi_label else "one label"
            raise LabelError(f"expected {wanted}, got {cut(label)}; mend the row{self.way_out}")
        if self.is_indicator:
            return self._names_of_bits(label)
        names = [self._name_of(value) for value in (label if isinstance(label, list) else [label])]
        if len(set(names)) < len(names):
            twice = next(name for number, name in enumerate(names) if name in names[:number])
            raise LabelError(
                f"the label {cut(twice)} stands twice in the row's list; name each once (lists of zeros and ones must "
                "all be of one length, one entry for each class)"
            )
        return names

    def _names_of_bits(self, label: list) -> list[str]:
        assert self.names is not None
        bits = bits_of(label)
        if bits is None or len(bits) != len(self.names):
            source, _ = self.origin
            raise LabelError(
                f"expected {len(self.names)} zeros and ones, one for each class, in the order of {source} "
                f"{listing(self.names)}, got {cut(label)}"
            )
        return [name for name, bit in zip(self.names, bits, strict=True) if bit]

    def _name_of(self, value: Any) -> str:
        if value is None:
            raise LabelError("a label of the row's list is missing")
        if self.is_position and self.names is not None and (position := as_whole(value)) is not None:
            if not 0 <= position < len(self.names):
                source, advice = self.origin
                raise LabelError(
                    f"the label {position} is no place among the {len(self.names)}, from 0 on, of {source} "
                    f"{listing(self.names)}; {advice}"
                )
            return self.names[position]
        if isinstance(value, float) and not value.is_integer() and not self.takes_decimals:
            raise LabelError(
                f"a class must be a string or an integer, got {value!r}; for numbers to predict choose --problem_type "
                "regression, to take it as a name --problem_type single_label_classification"
            )
        if not isinstance(value, str | int | float):
            raise LabelError(f"a class must be a string or an integer, got {cut(value)}")
        return _spell(value, self.is_whole)


def clean_label(value: Any, separator: str | None = None, class_names: Sequence[str] | None = None) -> Any:
    """Return a label as all sources give it: None, a string without blanks around it, a number, or a list of these.

    Missing are None, NaN and other nulls, empty strings, and numbers below 0 of a column with `class_names`. Strings
    are in Unicode's composed form (NFC); words such as "NA" and "null" are strings like others. Booleans, dates and
    times become the strings that csv files have for them: "True", "2020-01-01", "2020-01-01 12:30:00".
    """
    if hasattr(value, "tolist"):  # numpy's arrays and numbers
        value = value.tolist()
    if isinstance(value, str):
        value = unicodedata.normalize("NFC", value.strip())
        if separator is None:
            return value or None
        return [name.strip() for name in value.split(separator) if name.strip()] if value else None
    if isinstance(value, list | tuple):
        return [clean_label(entry, class_names=class_names) for entry in value]
    if _is_null(value):
        return None
    if class_names is not None and isinstance(value, int):
        return clean_label(class_names[value]) if 0 <= value < len(class_names) else None
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, datetime.datetime):
        is_day = value.time() == datetime.time() and value.tzinfo is None
        return value.date().isoformat() if is_day else value.isoformat(sep=" ")
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if type(value).__name__ == "Decimal":
        return str(value)
    return value


def without_names(label: Any, class_names: Sequence[str] | None) -> Any:
    """Return a list of classes with the numbers that `class_names` gives them, which are perhaps zeros and ones."""
    if class_names is None or not isinstance(label, list):
        return label
    numbers = {clean_label(name): number for number, name in enumerate(class_names)}
    return [numbers.get(entry, entry) if isinstance(entry, str) else entry for entry in label]


def _is_null(value: Any) -> bool:
    """True for None, NaN, and the nulls of pandas, which are unlike themselves."""
    try:
        return value is None or bool(value != value)
    except (TypeError, ValueError):
        return True


def as_whole(value: Any) -> int | None:
    """Return the whole number that a label is: 1, 1.0 and the texts "1" and "1.0" are 1; "007" is a name."""
    if isinstance(value, str):
        return int(value.partition(".")[0]) if _WHOLE.fullmatch(value) else None
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    return value if isinstance(value, int) else None


def as_number(label: Any) -> float | None:
    """Return the number that a label stands for, or None if there is none that float32 can hold."""
    if isinstance(label, bool) or not isinstance(label, int | float | str):
        return None
    try:
        number = float(label)
    except (ValueError, OverflowError):
        return None
    return number if abs(number) <= LARGEST_FLOAT32 else None


def _spell(value: str | int | float, is_whole: bool) -> str:
    """The name of the class that a label stands for; the error of half a surrogate pair, which no file can hold."""
    whole = as_whole(value) if is_whole else None
    name = str(value if whole is None else whole)
    if not name.isascii():
        try:
            name.encode("utf-8")
        except UnicodeEncodeError as error:
            raise LabelError(
                f"character {error.start + 1} of the label is half of a surrogate pair, which is no text"
            ) from error
    return name


def bits_of(label: Any) -> list[int] | None:
    """The zeros and ones that a list holds, None if it is none or holds anything else."""
    if not isinstance(label, list):
        return None
    bits = [_BITS.get(entry) if isinstance(entry, str | int | float) else None for entry in label]
    return None if None in bits else bits  # type: ignore[return-value]


def indicator_of(labels: Sequence[Any]) -> tuple[int, bool]:
    """Tell rows of zeros and ones, an entry for each class, from lists of classes named "0" and "1".

    More than half of the lists are of one length above 1 and hold zeros and ones alone, and if not all do, some hold
    one of the two twice, which no list of names does.

    Returns:
        The length of such rows, 0 where the labels are none, and whether any of them holds one of the two twice.
    """
    bits = [row for row in map(bits_of, labels) if row is not None and len(row) > 1]
    (length, count), *_ = [*Counter(map(len, bits)).most_common(1), (0, 0)]
    has_twice = any(len(row) == length and len(set(row)) < length for row in bits)
    is_indicator = 2 * count > len(labels) and (count == len(labels) or has_twice)
    return (length, has_twice) if is_indicator else (0, False)


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
