"""Tell what a softmax detector loses when its encoder is factorized, and what a recovery without labels gives back.

python scripts/studies/detr_recovery.py                             # Conditional DETR, 10 minutes of one CPU core
python scripts/studies/detr_recovery.py --detector detr --seed 1    # DETR, other pictures and weights

Trains a small detector of transformers on frames whose class stands elsewhere in the picture, converts it, recovers it
by `distill`, and scores all on the same pictures. Writes result.json into a folder of the detector and seed, and a
table of all such results in the output folder to detr.json; ends with one line of JSON.
"""

import json
from collections.abc import Sequence

from fa_transformers.commands.flags import describe_command, script_parser
from fa_transformers.files import write_json
from fa_transformers.studies.detr_recovery import DetectorPlan, run_study
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


def parse(argv: Sequence[str] | None = None) -> tuple[DetectorPlan, str]:
    """Return the study that the flags ask for, checked, and the command."""
    parser = script_parser(PROGRAM, __doc__)
    parser.add_options(DetectorPlan, ("study",), "study")
    parsed = parser.parse(argv)
    plan = parsed[DetectorPlan]
    try:
        plan.check()
    except ValueError as error:
        parsed.fail(str(error))
    return plan, describe_command(PROGRAM, parsed.flags)


def main(argv: Sequence[str] | None = None) -> dict:
    plan, command = parse(argv)
    result = run_study(plan)
    write_json(plan.folder / "result.json", result | {"command": command})
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(plan.output_dir.glob("*/result.json"))]
    rows = [row for run in runs for row in run["rows"]]
    title = f"Box AP before and after a detector's softmax encoder is exchanged, on {plan.num_test} pictures"
    commands = "\n".join(run["command"] for run in runs)
    update_tables(plan.output_dir / "detr.json", ABOUT, {"recovery": make_table(title, commands, COLUMNS, rows)})
    print(format_table(result["rows"], list(COLUMNS)))
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"error: {error}") from error
