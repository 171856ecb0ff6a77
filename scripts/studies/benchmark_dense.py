"""Time and memory of a detector with and without attention blocks, and of DETR's encoder layer, by resolution.

python scripts/studies/benchmark_dense.py                       # 512 to 4,096 px; some 15 minutes of one CPU core
python scripts/studies/benchmark_dense.py --parts detr
python scripts/studies/benchmark_dense.py --results docs/results/dense.json --picture docs/images/dense.png

Factorized blocks beside none and beside softmax (non-local) ones, and a factorized encoder layer beside the stock one
with SDPA and eager. One thread, batch 1, random weights; the contestants of a size take turns. A run that was stopped
goes on. Ends with one line of JSON: the ratios that are asked for, and those that were measured.
"""

import json
from collections.abc import Sequence

from tqdm import tqdm

from fa_transformers.commands.flags import describe_command, mistakes_in_one_line, script_parser
from fa_transformers.studies.dense_benchmark import DenseBenchmarkOptions, measure, plan_contests
from fa_transformers.studies.dense_benchmark_report import ABOUT, compute_floors, make_tables, plot_picture
from fa_transformers.studies.page_tables import update_tables
from fa_transformers.tables import format_table

PROGRAM = "python scripts/studies/benchmark_dense.py"
SETTING = "1 thread, batch 1, random weights, float32"


def parse(argv: Sequence[str] | None = None) -> tuple[DenseBenchmarkOptions, str]:
    """Return the options, checked, and the command."""
    parser = script_parser(PROGRAM, __doc__)
    parser.add_options(DenseBenchmarkOptions, ("inputs", "files"), "benchmark")
    parsed = parser.parse(argv)
    options = parsed[DenseBenchmarkOptions]
    try:
        options.check()
    except ValueError as error:
        parsed.fail(str(error))
    return options, describe_command(PROGRAM, parsed.flags)


def main(argv: Sequence[str] | None = None) -> dict:
    options, command = parse(argv)
    found = {}
    with tqdm(measure(options), total=len(plan_contests(options)), unit="size") as progress:
        for contest, figures in progress:
            found[contest] = figures
            progress.set_description(contest.name)
    tables = make_tables(found, command)
    for table in tables.values():
        names = [column["name"] for column in table["columns"]]
        rows = [dict(zip(names, row, strict=True)) for row in table["rows"]]
        print(f"\n{table['title']}\n{format_table(rows, names)}")
    floors = compute_floors(found)
    if floors:
        print("\n" + format_table(floors, list(floors[0])))
    if options.results:
        update_tables(options.results, ABOUT, tables)
    if options.picture:
        plot_picture(found, SETTING, options.picture)
    result = {"floors": floors, "output_dir": str(options.output_dir)}
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
