"""The meaning of a user's tables, and what messages about them are made of."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...mistakes import Mistake
from ...tables import LONGEST_CELL, one_line

SHOWN_NAMES = 12


class DataError(Mistake, ValueError):
    """The data can't be used as it is; the message names file, row and column, and says what to do."""


@dataclass(frozen=True, kw_only=True)
class ReadingOptions:
    """The meaning of the columns of a user's data, and the draw of missing splits from train.

    Args:
        text_column, image_column, label_column: names of the columns.
        problem_type: what the labels are, one of `labels.PROBLEM_TYPES`; None infers it from train's labels and logs
            what was inferred.
        label_separator: string between the labels of one row, for csv files and other labels that are strings.
        label_names: names of the classes in their order: of the entries of rows of zeros and ones, of whole numbers
            from 0 on, or of the labels that are names already; None takes what the data says.
        group_column: name of a column whose equal values stay in one split where splits are drawn; None groups nothing.
        delimiter: character between the fields of csv and tsv files; None finds it.
        drop_bad_rows: leave out rows that can't be used, counted in a warning; otherwise they are an error.
        validation_share, test_share: fractions of the train rows that are drawn where these splits are missing.
        seed: of that draw.
        cache_dir: folder for the checked documents; None is a folder in Hugging Face's cache.
    """

    text_column: str = "text"
    image_column: str = "image"
    label_column: str = "label"
    problem_type: str | None = None
    label_separator: str | None = None
    label_names: Sequence[str] | None = None
    group_column: str | None = None
    delimiter: str | None = None
    drop_bad_rows: bool = False
    validation_share: float = 0.1
    test_share: float = 0.1
    seed: int = 0
    cache_dir: str | Path | None = None

    @property
    def columns(self) -> dict[str, str]:
        """Role of each column of documents, "text", "label" and perhaps "group" -> its name."""
        return {"text": self.text_column} | self._other_columns

    @property
    def image_columns(self) -> dict[str, str]:
        """Role of each column of images, "image", "label" and perhaps "group" -> its name."""
        return {"image": self.image_column} | self._other_columns

    @property
    def _other_columns(self) -> dict[str, str]:
        return {"label": self.label_column} | ({"group": self.group_column} if self.group_column else {})


def cut(value: Any) -> str:
    """Return a value from data for a message: its `repr` on one line, cut, so that no document is printed."""
    # A string is cut first: `repr` of a long one would be as long again.
    return one_line(repr(value[:LONGEST_CELL] + "…" if isinstance(value, str) and len(value) > LONGEST_CELL else value))


def listing(names: Iterable) -> str:
    """Return the first names, quoted and cut, and the number of those left out."""
    names = names if isinstance(names, Sequence) else list(names)
    shown = ", ".join(cut(name) for name in names[:SHOWN_NAMES])
    return shown + (f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else "")
