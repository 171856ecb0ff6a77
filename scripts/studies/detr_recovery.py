"""Tell what a softmax detector loses when its encoder is factorized, and what a recovery without labels gives back.

python scripts/studies/detr_recovery.py                                  # Conditional DETR, two seeds of 7 CPU minutes
python scripts/studies/detr_recovery.py --detectors detr --steps 8000    # DETR, which needs more steps

Trains small detectors of transformers on frames whose class stands elsewhere in the picture, converts each, recovers it
by `distill`, and scores all on the same pictures. Writes result.json into a folder of each detector and seed, which is
taken as it is if an earlier run with the same settings left it there, and the table of all to detr.json; ends with one
line of JSON.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fa_transformers.commands.flags import describe_command, mistakes_in_one_line, script_parser
from fa_transformers.files import write_json
from fa_transformers.options import OptionGroup, option
from fa_transformers.studies.detr_recovery import DETECTORS, DetectorPlan, run_study
from fa_transformers.studies.page_tables import make_table, update_tables
from fa_transformers.tables import format_table

PROGRAM = "python scripts/studies/detr_recovery.py"
ABOUT = "What a small detector loses by a factorized encoder, and what a recovery without labels gives back."
COLUMNS = {
    "detector": {"name": "detector"}, "seed": {"name": "seed"}, "state": {"name": "encoder"},
    "box_ap": {"name": "AP", "digits": 3}, "box_ap50": {"name": "AP50", "digits": 3},
    "box_ap75": {"name": "AP75", "digits": 3}, "encoder_error": {"name": "error of the encoder", "digits": 4},
    "cpu_seconds": {"name": "CPU seconds of training", "digits": 0},
}  # fmt: skip


@dataclass(frozen=True)
class RunOptions(OptionGroup):
    """The runs of the study."""

    detectors: tuple[str, ...] = option(
        ("conditional_detr",), "transformers' detectors to train: conditional_detr, detr", group="runs", common=True
    )
    seeds: tuple[int, ...] = option((0, 1), "seeds of pictures, weights and order", group="runs", common=True)


def parse(argv: Sequence[str] | None = None) -> tuple[list[DetectorPlan], str]:
    """Return the runs that the flags ask for, checked, and the command."""
    parser = script_parser(PROGRAM, __doc__)
    parser.add_options(RunOptions, ("runs",), "runs")
    parser.add_options(DetectorPlan, ("study",), "study")
    parsed = parser.parse(argv)
    runs, plan = parsed[RunOptions], parsed[DetectorPlan]
    if unknown := [name for name in runs.detectors if name not in DETECTORS]:
        parsed.fail(f"--detectors {unknown[0]} is unknown; choose from {', '.join(DETECTORS)}.")
    if not runs.detectors or not runs.seeds:
        parsed.fail("--detectors and --seeds need a name and a number at least.")
    try:
        plan.check()
    except ValueError as error:
        parsed.fail(str(error))
    plans = [replace(plan, detector=name, seed=seed) for name in runs.detectors for seed in runs.seeds]
    return plans, describe_command(PROGRAM, parsed.flags)


def run_once(plan: DetectorPlan) -> dict[str, Any]:
    """Return the result of a run, of an earlier one where that had the same settings."""
    path = plan.folder / "result.json"
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    if earlier is None or earlier["plan"] != plan.settings:
        write_json(path, run_study(plan))
    return json.loads(path.read_text(encoding="utf-8"))


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    plans, command = parse(argv)
    rows = [row for plan in plans for row in run_once(plan)["rows"]]
    title = f"Box AP before and after a detector's softmax encoder is exchanged, on {plans[0].num_test} pictures"
    table = make_table(title, command, COLUMNS, rows)
    update_tables(plans[0].output_dir / "detr.json", ABOUT, {"recovery": table})
    print(format_table(rows, list(COLUMNS)))
    result = {"rows": rows, "plans": [plan.settings for plan in plans]}
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
