"""Write the tables of the results pages from the JSON files beside them.

python docs/tables.py            # after a figure in docs/results/*.json changed

A table stands between `<!-- table: FILE.json NAME -->` and `<!-- end -->`. A file holds tables of its own, or is the
results.json of scripts/studies/benchmark.py as it is, whose tables are called "text" and "image".
"""

import json
import re
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PLACE = re.compile(r"(<!-- table: (\S+) (\S+) -->\n).*?(<!-- end -->)", flags=re.DOTALL)
WIDTH = 100
SPELLINGS = {"Nystromformer": "Nyströmformer"}
MODES = {"forward": "forward pass", "training": "training step"}


def fill(markdown: str, folder: Path) -> str:
    """Return a page's text with its tables as the files in `folder` say."""
    return PLACE.sub(lambda found: found[1] + render_table(folder / found[2], found[3]) + "\n" + found[4], markdown)


def render_table(path: Path, name: str) -> str:
    """Return a table as Markdown, below its title and above where it comes from.

    Raises:
        KeyError: the file has no such table.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    table = table_of_benchmark(content, name) if "points" in content else content["tables"][name]
    columns = table["columns"]
    is_right = [not any(isinstance(row[index], str) for row in table["rows"][:2]) for index in range(len(columns))]
    lines = [f"**{table['title']}**", "", row_of(column["name"] for column in columns)]
    lines.append(row_of("---:" if right else "---" for right in is_right))
    for row in table["rows"]:
        lines.append(row_of(show_cell(value, column) for value, column in zip(row, columns, strict=True)))
    lines += ["", *([table["note"], ""] if "note" in table else [])]
    lines += [f"{table['machine'][0].upper()}{table['machine'][1:]}. {table['date']}, [{path.name}]({path.name}):"]
    return "\n".join([*lines, "", "```bash", wrap_command(table["command"]), "```"])


def wrap_command(command: str) -> str:
    """Return a command in lines of at most `WIDTH` characters, as a shell reads them."""
    lines = [""]
    for part in re.split(r" (?=--)", command):
        if lines[-1] and len(lines[-1]) + len(part) + 3 > WIDTH:
            lines[-1] += " \\"
            lines.append("   ")
        lines[-1] += f" {part}" if lines[-1] else part
    return "\n".join(lines)


def row_of(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |"


def show_cell(value: Any, column: dict[str, Any]) -> str:
    """Return a cell's value, with the digits of its column if that has any; a list is joined, null is empty."""
    if isinstance(value, list):
        return column["join"].join(show_cell(part, column) for part in value)
    if isinstance(value, float):
        return f"{value:,.{column['digits']}f}" if "digits" in column else f"{value:,}"
    return f"{value:,}" if isinstance(value, int) else value or "—"


def table_of_benchmark(results: dict[str, Any], kind: str) -> dict[str, Any]:
    """Return the table of one kind of input, "text" or "image", of what scripts/studies/benchmark.py wrote.

    A cell has the seconds of a forward pass and of a training step, or why there are none.
    """
    is_image = kind == "image"
    points = [point for point in results["points"] if point["model"].endswith("ViT") == is_image]
    series = list(dict.fromkeys(point["series"] for point in points))
    found = {(point["size"], point["series"], point["mode"]): point for point in points}
    modes = [mode for mode in MODES if any(point["mode"] == mode for point in points)]
    rows = []
    for size in sorted({point["size"] for point in points}):
        cells = [[seconds_of(found.get((size, name, mode))) for mode in modes] for name in series]
        rows.append([size, *(cell[0] if len(set(map(str, cell))) == 1 else cell for cell in cells)])
    return {
        "title": f"{' / '.join(MODES[mode] for mode in modes)}, seconds".capitalize(),
        "command": results["command"],
        "machine": f"{results['machine']}; {results['setting'].rstrip('.')}",
        "date": results["date"],
        "columns": [
            {"name": "pixels a side" if is_image else "tokens"},
            *({"name": SPELLINGS.get(name, name), "digits": 2, "join": " / "} for name in series),
        ],
        "rows": rows,
    }


def seconds_of(point: dict[str, Any] | None) -> float | int | str:
    """Return a point's seconds, whole ones from 10 on, or what happened instead."""
    if point is None:
        return "not tried"
    if point["status"] == "ok":
        seconds = point["median_seconds"]
        return round(seconds) if seconds >= 10 else round(seconds, 2)
    return f"> {point['time_limit_s']:g}" if point["status"] == "timed out" else point["status"]


def main() -> None:
    for page in sorted(RESULTS.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        page.write_text(fill(text, RESULTS), encoding="utf-8")


if __name__ == "__main__":
    main()
