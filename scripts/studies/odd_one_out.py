"""Detect what is there once and what more often: factorized blocks beside softmax blocks and none, from one detector.

python scripts/studies/odd_one_out.py outputs/digits-none                        # six runs, one after the other
python scripts/studies/odd_one_out.py outputs/digits-none --kinds none factorized --seeds 0 --num_train_epochs 4

MODEL is a detector of digits without blocks, which `finetune_dense --attention none` trains. Each kind of blocks is put
into it and trained on the odd-one-out set. A study that was stopped goes on. Writes results.json, and ends with one
line of JSON.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from fa_transformers.commands.flags import describe_command, mistakes_in_one_line, script_parser
from fa_transformers.files import write_json
from fa_transformers.studies.dense_benchmark_report import ABOUT
from fa_transformers.studies.odd_one_out import OddOneOutOptions, run_study
from fa_transformers.studies.page_tables import make_table, update_tables
from fa_transformers.tables import format_table

PROGRAM = "python scripts/studies/odd_one_out.py"


def parse(argv: Sequence[str] | None = None) -> tuple[Path, OddOneOutOptions, str]:
    """Return the model's folder, the options, checked, and the command."""
    parser = script_parser(f"{PROGRAM} MODEL [flags]", __doc__)
    parser.add_argument("model", type=Path, metavar="MODEL", help="folder of a detector of digits without blocks")
    parser.add_options(OddOneOutOptions, ("study",), "study")
    parsed = parser.parse(argv)
    options = parsed[OddOneOutOptions]
    try:
        options.check()
    except ValueError as error:
        parsed.fail(str(error))
    return parsed.given["model"], options, describe_command(PROGRAM, parsed.flags)


def main(argv: Sequence[str] | None = None) -> list[dict]:
    model, options, command = parse(argv)
    rows = run_study(model, options)
    write_json(options.output_dir / "results.json", rows)
    columns: dict[str, dict] = {"blocks": {"name": "blocks"}}
    for name, label in (("box_ap", "AP"), ("box_ap50", "AP50")):
        columns |= {f"{name}_{seed}": {"name": f"{label}, seed {seed}", "digits": 3} for seed in options.seeds}
    columns |= {"mean_ap": {"name": "AP, mean", "digits": 3}, "cpu_seconds": {"name": "CPU seconds", "digits": 0}}
    columns |= {"peak_gb": {"name": "peak resident, GB", "digits": 2}}
    title = f"Box AP on odd one out, {options.num_eval_canvases} held-out canvases of 512 px"
    table = make_table(title, command, columns, rows)
    if options.results:
        update_tables(options.results, ABOUT, {"odd_one_out": table})
    print(format_table(rows, list(columns)))
    print(json.dumps(rows))
    return rows


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
