"""Time and memory of FA-BERT and FA-ViT beside stock encoders, by length: JSON, charts and a Markdown report.

python scripts/studies/benchmark.py --quick                    # within 5 minutes
python scripts/studies/benchmark.py                            # 512 to 65,536 tokens, 224 to 4,096 px; hours on 2 cores
python scripts/studies/benchmark.py --models FA-BERT --compile  # what torch.compile gains, and how often it compiles
python scripts/studies/benchmark.py --models FA-BERT --lengths 1048576 --mode forward --chunk_size 8192
python scripts/studies/benchmark.py --mode forward --image_sizes --picture docs/speed.png  # one picture for a page

One process per point. What runs out of memory or time becomes a cell of the table, and larger inputs of that model are
not tried. Ends with one line of JSON: the speed that is asked of FA-BERT, and what it reached.
"""

import json
import sys
from collections.abc import Sequence

from fa_transformers.commands.flags import describe_command, mistakes_in_one_line, script_parser
from fa_transformers.files import write_text
from fa_transformers.studies.benchmark import ENCODERS, FAILED, OK
from fa_transformers.studies.benchmark_charts import plot, plot_picture
from fa_transformers.studies.benchmark_report import KINDS, compute_floors, render_report
from fa_transformers.studies.benchmark_run import BenchmarkOptions, complete, measure_points, recipe_of

PROGRAM = "python scripts/studies/benchmark.py"


def parse(argv: Sequence[str] | None = None) -> tuple[BenchmarkOptions, str]:
    """Return the options, complete and checked, and the command."""
    parser = script_parser(PROGRAM, __doc__, lambda given: recipe_of(given.get("quick", False)))
    parser.add_options(BenchmarkOptions, ("inputs", "sizes", "limits", "files"), "benchmark")
    parsed = parser.parse(argv)
    try:
        return complete(parsed[BenchmarkOptions]), describe_command(PROGRAM, parsed.flags)
    except ValueError as error:
        parsed.fail(str(error))


def main(argv: Sequence[str] | None = None) -> int:
    options, command = parse(argv)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    results = measure_points(options, command)
    points = results["points"]
    measured = {ENCODERS[point["model"]].kind for point in points if point["status"] == OK}
    charts = [options.output_dir / f"{kind}.png" for kind in KINDS if kind in measured]
    for chart in charts:
        plot(results, chart.stem, chart)
    if options.picture:
        plot_picture(results, options.picture)
    markdown = render_report(results, charts)
    write_text(options.output_dir / "report.md", markdown)
    print(markdown)
    failed = [f"{p['series']}, {p['mode']}, {p['size']}" for p in points if p["status"] == FAILED]
    floors = {mode: compute_floors(points, mode) for mode in options.modes}
    line = {"floors": floors, "failed": failed, "setting": results["setting"], "wall_seconds": results["wall_seconds"]}
    print(json.dumps(line | {"output_dir": str(options.output_dir)}))
    return 1 if failed else 0


if __name__ == "__main__":
    with mistakes_in_one_line():
        sys.exit(main())
