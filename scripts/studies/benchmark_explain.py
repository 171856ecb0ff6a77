"""Time rollout and gradients by length beside a forward pass and dense rollout, and read their memory.

python scripts/studies/benchmark_explain.py                                    # 4,096 to 131,072 tokens
python scripts/studies/benchmark_explain.py --lengths 512 1024 --repeats 1     # a try

Prints a table, and ends with one line of JSON. The machine should do nothing else.
"""

import json
from collections.abc import Sequence

import torch
from tqdm import tqdm

from fa_transformers.commands.flags import mistakes_in_one_line, script_parser
from fa_transformers.studies.explain_benchmark import ExplainOptions, measure, with_ratios
from fa_transformers.tables import format_table


def parse(argv: Sequence[str] | None = None) -> ExplainOptions:
    """Return the options, checked."""
    parser = script_parser("python scripts/studies/benchmark_explain.py", __doc__)
    parser.add_options(ExplainOptions, ("explain",), "measurement")
    parsed = parser.parse(argv)
    try:
        parsed[ExplainOptions].check()
    except ValueError as error:
        parsed.fail(str(error))
    return parsed[ExplainOptions]


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    points = [(method, length) for length in options.lengths for method in options.methods]
    rows = with_ratios([measure(*point, options) for point in tqdm(points, desc="points")])
    print(format_table(rows, list(rows[0])))
    print(json.dumps({"threads": options.threads, "torch": torch.__version__, "points": rows}))


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
