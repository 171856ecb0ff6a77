"""Search large pictures with a trained FADense as a whole and in SAHI's tiles: speed, precision, and what borders cost.

python scripts/studies/whole_or_tiles.py outputs/dense --standard                   # 20 canvases of 2,048 px
python scripts/studies/whole_or_tiles.py outputs/dense --slices 256 --digit_px 40 64   # objects beyond the overlap
python scripts/studies/whole_or_tiles.py outputs/dense --masks --num_images 5
python scripts/studies/whole_or_tiles.py outputs/stamps-model --coco_folder outputs/stamps --slices 512 --shrunk

Pictures are held-out canvases of drawn digits, or the test pictures of a COCO folder. Needs the package sahi; one
thread, the ways take turns at each picture. Writes results.json, and ends with one line of JSON.
"""

import json
from collections.abc import Sequence
from typing import Any

from fa_transformers.commands.flags import describe_command, mistakes_in_one_line, script_parser
from fa_transformers.files import write_json
from fa_transformers.studies.dense_benchmark_report import ABOUT
from fa_transformers.studies.page_tables import make_table, update_tables
from fa_transformers.studies.tiling import TilingOptions, compare
from fa_transformers.tables import format_table

COLUMNS: dict[str, dict[str, Any]] = {
    "method": {"name": "way"}, "pictures_per_second": {"name": "pictures / s", "digits": 2},
    "slower_wall": {"name": "time / whole", "digits": 2}, "slower_cpu": {"name": "CPU time / whole", "digits": 2},
    "box_ap": {"name": "box AP", "digits": 3}, "box_ap50": {"name": "AP50", "digits": 3},
    "box_ap_small": {"name": "AP small", "digits": 3}, "mask_ap": {"name": "mask AP", "digits": 3},
}  # fmt: skip
BORDER_COLUMNS = {"slices": "slices, px", "overlap_px": "overlap, px", "objects": "objects", "number": "number"}
PROGRAM = "python scripts/studies/whole_or_tiles.py"


def parse(argv: Sequence[str] | None = None) -> tuple[str, TilingOptions, str]:
    """Return the model's folder, the options, checked, and the command."""
    parser = script_parser(f"{PROGRAM} MODEL [flags]", __doc__)
    parser.add_argument("model", metavar="MODEL", help="folder of a trained FADense")
    parser.add_options(TilingOptions, ("pictures", "tiles", "files"), "study")
    parsed = parser.parse(argv)
    options = parsed[TilingOptions]
    try:
        options.check()
    except ValueError as error:
        parsed.fail(str(error))
    return parsed.given["model"], options, describe_command(PROGRAM, parsed.flags)


def make_tables(found: dict[str, Any], options: TilingOptions, command: str) -> dict[str, dict[str, Any]]:
    """Return the two tables of a results page, by name."""
    kind = options.coco_folder or f"digits of {options.digit_px[0]} to {options.digit_px[1]} px"
    pictures = f"{options.num_images} pictures, {kind}"
    columns = {name: column for name, column in COLUMNS.items() if options.masks or name != "mask_ap"}
    title = f"One detector, whole pictures beside tiles: {pictures}"
    tables = {options.table: make_table(title, command, columns, found["methods"])}
    columns = {name: {"name": label} for name, label in BORDER_COLUMNS.items()}
    columns |= {"tiled": {"name": "AP in slices", "digits": 3}}
    columns |= {"shrunk": {"name": "with the picture shrunk", "digits": 3}} if options.shrunk else {}
    columns |= {"standard": {"name": "with the whole picture", "digits": 3}} if options.standard else {}
    columns |= {"whole": {"name": "AP in the whole picture", "digits": 3}}
    title = f"Box AP of the objects at the borders of slices: {pictures}"
    return tables | {f"{options.table}_borders": make_table(title, command, columns, found["borders"])}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    model, options, command = parse(argv)
    found = compare(model, options)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(options.output_dir / "results.json", found)
    tables = make_tables(found, options, command)
    for table in tables.values():
        names = [column["name"] for column in table["columns"]]
        rows = [dict(zip(names, row, strict=True)) for row in table["rows"]]
        print(f"\n{table['title']}\n{format_table(rows, names)}")
    if options.results:
        update_tables(options.results, ABOUT, tables)
    print(json.dumps(found))
    return found


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
