"""Set `estimate_memory` against the measured peak memory, one fresh process per point, and tell how long a text trains.

python scripts/studies/measure_memory.py                            # estimate and measurement at several lengths
python scripts/studies/measure_memory.py --budgets 8 16 20          # also the longest text that trains in so many GiB
python scripts/studies/measure_memory.py --device cuda --budgets 80

Prints a table of each, and ends with one line of JSON.
"""

import itertools
import json
from collections.abc import Sequence

import torch
from tqdm import tqdm

from fa_transformers import FABertConfig
from fa_transformers.commands.flags import mistakes_in_one_line, script_parser
from fa_transformers.studies.peak_memory import (
    MODELS,
    POINTS,
    TRAINING_OPTIONS,
    MemoryOptions,
    compare,
    fit_line,
    longest_training,
)
from fa_transformers.tables import format_table


def parse(argv: Sequence[str] | None = None) -> MemoryOptions:
    """Return the options, checked."""
    parser = script_parser("python scripts/studies/measure_memory.py", __doc__)
    parser.add_options(MemoryOptions, ("memory",), "measurement")
    parsed = parser.parse(argv)
    try:
        parsed[MemoryOptions].check()
    except ValueError as error:
        parsed.fail(str(error))
    return parsed[MemoryOptions]


def find_longest(options: MemoryOptions) -> list[dict]:
    """Return the longest text of each model that trains in each budget, plainly and with gradient checkpointing."""
    texts = [name for name in options.models if MODELS[name][0] is FABertConfig]
    budgets = [int(budget * 2**30) for budget in options.budgets]
    variants = TRAINING_OPTIONS if budgets else ()
    longest = []
    for name, variant in tqdm(list(itertools.product(texts, variants)), desc="budgets"):
        line = fit_line(name, min(budgets), variant, options.device)
        for budget in budgets:
            row = longest_training(name, budget, variant, options.device, line, options.verify_up_to)
            tqdm.write(json.dumps(row))  # the next one can take minutes
            longest.append(row)
    return longest


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    points = [] if options.skip_points else [point for point in POINTS if point[0] in options.models]
    rows = [compare(*point, options.device) for point in tqdm(points, desc="points")]
    if rows:
        print(format_table(rows, list(rows[0])))
    longest = find_longest(options)
    if longest:
        print("\n" + format_table(longest, list(longest[0])))
    print(json.dumps({"device": options.device, "torch": torch.__version__, "points": rows, "longest": longest}))


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
