"""Bad rows of a user's data, collected, so that one message names them all; and columns that aren't there."""

import difflib
import logging
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from .tables import DataError, listing

logger = logging.getLogger(__name__)

SHOWN_ROWS = 20
SHOWN_DROPPED = 5


class Place(NamedTuple):
    """Place of a row in its source: its number from 1, the header not counted, and its line where the source has lines.

    A row whose texts have line breaks starts in `line`. A spreadsheet's lines are the row numbers that it shows.
    """

    row: int
    line: int | None = None

    def __str__(self) -> str:
        return f"row {self.row}" + (f" (line {self.line})" if self.line is not None else "")


class BadRows:
    """Bad rows of one source: a single error names them all, or, with `drop`, they are left out and counted.

    The first 20 are kept and all are counted, so that memory doesn't grow with the file.

    Args:
        source: file or split for the message, such as "train.csv".
        drop: leave bad rows out instead of refusing the source.
    """

    def __init__(self, source: str, drop: bool = False):
        self.source, self.drop = source, drop
        self.count = 0
        self._shown: list[str] = []
        self._advice: dict[str, None] = {}

    def add(self, place: Place | str, message: str, advice: str = "") -> None:
        """Note one bad row and what is wrong with it, once for a row; `advice` on mending is printed once for all.

        `place` is text where rows have no numbers, as in a stream.
        """
        self.count += 1
        if len(self._shown) < SHOWN_ROWS:
            self._shown.append(f"{place}: {message}")
            self._advice[advice] = None

    def check(self) -> None:
        """Call this after the last row: raise, or warn where bad rows are dropped; nothing where there are none.

        Raises:
            DataError: there are bad rows and `drop` is off; the message names up to 20 by row and line.
        """
        if not self.count:
            return
        rows = "row" if self.count == 1 else "rows"
        if self.drop:
            logger.warning("%s: %d bad %s left out:%s", self.source, self.count, rows, self._lines(SHOWN_DROPPED))
            return
        advice = "".join(f"{advice}. " for advice in self._advice if advice)
        them = "it" if self.count == 1 else "them"
        raise DataError(
            f"{self.source}: {self.count} bad {rows}:{self._lines(SHOWN_ROWS)}\n{advice}Mend the {rows}, or leave "
            f"{them} out with --drop_bad_rows"
        )

    def _lines(self, most: int) -> str:
        shown = self._shown[:most]
        left = self.count - len(shown)
        return "".join(f"\n  {line}" for line in shown) + (f"\n  and {left} more" if left else "")


def check_columns(
    columns: Mapping[str, str], existing: Sequence[str], source: str, optional: Collection[str] = ()
) -> None:
    """Raise DataError unless each column is there exactly once; of the roles in `optional`, at most once.

    A missing label column is told in a warning, because it may be misspelt, and rows without labels aren't scored.

    Args:
        columns: role -> name of its column.
        existing: names of all columns.
        source: file or split for the message.
    """
    for role, column in columns.items():
        if column in existing or role not in optional:
            check_column(column, role, existing, source)
        elif role == "label":
            logger.warning("%s: there is no label column %r; the columns are %s", source, column, listing(existing))


def check_column(column: str, role: str, existing: Sequence[str], source: str) -> None:
    """Raise DataError unless `existing` has `column` exactly once; `role` is "text", "label" and so on.

    The message lists the columns and names the flag, with the column that was probably meant.
    """
    flag = f"--{role}_column_name" if role != "group" else "--group_column"
    if list(existing).count(column) > 1:
        raise DataError(f"{source}: there are {list(existing).count(column)} columns {column!r}: rename all but one")
    if column in existing:
        return
    by_plain = {name.strip().casefold(): name for name in reversed(existing)}
    near = difflib.get_close_matches(column.strip().casefold(), by_plain, n=1)
    advice = f"Did you mean {flag} {by_plain[near[0]]!r}?" if near else f"Name the right one with {flag}"
    raise DataError(
        f"{source}: there is no {role} column {column!r}; the columns are {listing(existing) or 'none'}. {advice}"
    )
