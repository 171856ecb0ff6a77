"""Plain-text tables and lines of scores, as commands print them."""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

LONGEST_CELL = 80
# Control characters (terminals obey them), characters that turn the direction of what follows, and halves of pairs.
_HARMFUL = ("Cc", "Cs")
_TURNING = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f"
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?([eE][+-]?\d+)?")


def one_line(text: str, limit: int = LONGEST_CELL) -> str:
    """Return text from data as one line of at most `limit` characters, the last one "…" where it was cut.

    Blanks and line ends of any kind become one blank; control characters and those that turn the direction of writing
    are left out.
    """
    words = " ".join(text[: 4 * limit + 4].split())
    kept = _without_harmful(words)
    return kept if len(kept) <= limit and len(text) <= 4 * limit + 4 else kept[: limit - 1] + "…"


def harmless_text(text: str) -> str:
    """Return text from data with its lines, ended by "\\n", and tabs, but without what `one_line` leaves out."""
    return _without_harmful(text.replace("\r\n", "\n").replace("\r", "\n"), "\n\t")


def _without_harmful(text: str, kept: str = "") -> str:
    return "".join(c for c in text if c in kept or (unicodedata.category(c) not in _HARMFUL and c not in _TURNING))


def format_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Return an aligned text table of `columns`; numbers have three decimals, missing entries are "-".

    A text is shown as `one_line` of it.
    """

    def show(value: object) -> str:
        if value is None:
            return "-"
        return f"{value:.3f}" if isinstance(value, float) else one_line(str(value))

    cells = [list(columns)] + [[show(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def format_scores(scores: Mapping[str, float]) -> str:
    """Return scores on one line with four decimals each, such as "accuracy 0.9312, loss 0.2100"."""
    return ", ".join(f"{name} {value:.4f}" for name, value in scores.items())


def counted(number: int, noun: str, singular: str = "", plural: str = "") -> str:
    """Return a number and its noun, such as "1 process" and "2,000 processes", and what follows either.

    The plural takes -es after a hiss, which the end of "epoch" is not. With `singular` and `plural`: "1 row is",
    "2 rows are".
    """
    if number == 1:
        return f"1 {noun} {singular}".rstrip()
    hisses = noun.endswith(("s", "x", "ch", "sh")) and not noun.endswith("epoch")
    nouns = noun + ("es" if hisses else "s")
    return f"{number:,} {nouns} {plural}".rstrip()


def harmless_cell(text: str) -> str:
    """Return text that no spreadsheet takes for a formula: with an apostrophe before it where it might.

    Formulas begin with =, +, - or @, also after blanks or line ends; a plain number stays as it is.
    """
    is_formula = text.strip()[:1] in ("=", "+", "-", "@") and not _NUMBER.fullmatch(text)
    return f"'{text}" if is_formula or text[:1] in ("\t", "\r", "\n") else text
