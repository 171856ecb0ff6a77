"""Time rollout and gradients by length beside a forward pass and dense rollout, and read their memory.

python scripts/studies/benchmark_explain.py                                    # 4,096 to 131,072 tokens
python scripts/studies/benchmark_explain.py --lengths 512 1024 --repeats 1     # a try

Prints a table, and ends with one line of JSON; takes ten minutes. The machine should do nothing else.
"""

import json
import platform
from collections.abc import Sequence

import torch
from tqdm import tqdm

from fa_transformers.commands.flags import describe_command, mistakes_in_one_line, script_parser
from fa_transformers.studies.explain_benchmark import (
    ABOUT,
    COST_COLUMNS,
    DENSE_COLUMNS,
    ExplainOptions,
    cost_rows,
    dense_rows,
    draw_chart,
    measure,
    with_ratios,
)
from fa_transformers.studies.page_tables import make_table, update_tables
from fa_transformers.tables import counted, format_table

PROGRAM = "python scripts/studies/benchmark_explain.py"
SIZE = "A model of MiniLM's size with random weights; the first token's rollout; memory beside that of the model."


def parse(argv: Sequence[str] | None = None) -> tuple[ExplainOptions, str]:
    """Return the options, checked, and the command."""
    parser = script_parser(PROGRAM, __doc__)
    parser.add_options(ExplainOptions, ("explain",), "measurement")
    parsed = parser.parse(argv)
    try:
        parsed[ExplainOptions].check()
    except ValueError as error:
        parsed.fail(str(error))
    return parsed[ExplainOptions], describe_command(PROGRAM, parsed.flags)


def main(argv: Sequence[str] | None = None) -> None:
    options, command = parse(argv)
    points = [(method, length) for length in options.lengths for method in options.methods]
    rows = with_ratios([measure(*point, options) for point in tqdm(points, desc="points")])
    print(format_table(rows, list(rows[0])))
    if options.results:
        machine = f"{counted(options.threads, 'thread')} of {platform.machine()}, float32"
        cost = make_table(
            "Rollout beside a forward pass", command, COST_COLUMNS, cost_rows(rows), note=SIZE, machine=machine
        )
        dense = make_table(
            "Dense rollout with softmax attention, of the same weights", command, DENSE_COLUMNS, dense_rows(rows),
            note="An empty cell: it did not fit into the memory that was free, or, above "
            f"{options.longest_dense:,} tokens, was not tried.", machine=machine,
        )  # fmt: skip
        update_tables(options.results, ABOUT, {"cost": cost, "cost-dense": dense})
    if options.chart:
        draw_chart(rows, options.chart)
    print(json.dumps({"threads": options.threads, "torch": torch.__version__, "points": rows}))


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
