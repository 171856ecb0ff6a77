"""Tables of results in the form that docs/tables.py reads, kept in one JSON file for a page."""

import json
import platform
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from ..cores import count_cores
from ..files import write_json
from ..tables import counted


def make_table(
    title: str, command: str, columns: Mapping[str, Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], **more: Any
) -> dict[str, Any]:
    """Return a table with its title, command, machine and date.

    Args:
        columns: key in `rows` -> the column's "name", and "digits" of its numbers.
        more: "note", which stands below the table, or another "machine" or "date".
    """
    machine = f"1 thread of {platform.machine()} with {counted(count_cores(), 'CPU core')}, float32"
    table = {"title": title, "command": command, "machine": machine, "date": date.today().isoformat()} | more
    cells = [[row.get(key) for key in columns] for row in rows]
    return table | {"columns": [dict(column) for column in columns.values()], "rows": cells}


def update_tables(path: Path, about: str, tables: Mapping[str, Mapping[str, Any]]) -> None:
    """Write tables, by name, into a file; those of other names that it has already are kept."""
    kept = json.loads(path.read_text(encoding="utf-8"))["tables"] if path.is_file() else {}
    write_json(path, {"about": about, "tables": kept | dict(tables)})
