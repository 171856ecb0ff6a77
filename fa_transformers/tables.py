"""Plain-text tables and lines of scores, as commands print them."""

from collections.abc import Mapping, Sequence
from typing import Any


def format_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Return an aligned text table of `columns`; numbers have three decimals, missing entries are "-"."""

    def show(value: object) -> str:
        if value is None:
            return "-"
        return f"{value:.3f}" if isinstance(value, float) else str(value)

    cells = [list(columns)] + [[show(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def format_scores(scores: Mapping[str, float]) -> str:
    """Return scores on one line with four decimals each, such as "accuracy 0.9312, loss 0.2100"."""
    return ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
