"""Tell what a softmax detector loses when its encoder is factorized, and what a recovery without labels gives back.

python scripts/studies/detr_recovery.py --output_dir outputs/detr_recovery      # 10 minutes of one CPU core
python scripts/studies/detr_recovery.py --seed 1 --output_dir outputs/detr_recovery_1

Trains transformers' Conditional DETR on drawn shapes, converts it, recovers it by `distill`, and scores all on the same
pictures. Writes detr_recovery.json and detr_recovery.txt, and ends with one line of JSON.
"""

import json
from collections.abc import Sequence

from fa_transformers.commands.flags import mistakes_in_one_line, script_parser
from fa_transformers.files import write_json, write_text
from fa_transformers.studies.detr_recovery import DetectorPlan, run_study
from fa_transformers.tables import format_table


def parse(argv: Sequence[str] | None = None) -> DetectorPlan:
    """Return the study that the flags ask for, checked."""
    parser = script_parser("python scripts/studies/detr_recovery.py", __doc__, lambda given: {})
    parser.add_options(DetectorPlan, ("study",), "study")
    parsed = parser.parse(argv)
    plan = parsed[DetectorPlan]
    try:
        plan.check()
    except ValueError as error:
        parsed.fail(str(error))
    return plan


def main(argv: Sequence[str] | None = None) -> dict:
    plan = parse(argv)
    result = run_study(plan)
    write_json(plan.output_dir / "detr_recovery.json", result)
    table = format_table(result["rows"], list(result["rows"][0]))
    write_text(plan.output_dir / "detr_recovery.txt", table + "\n")
    print(table)
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
