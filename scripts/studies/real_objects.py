"""Table of detectors of one set by what their backbone started from: scores and the processor time that training took.

python scripts/studies/real_objects.py outputs/stamps_frozen outputs/stamps_scratch
python scripts/studies/real_objects.py outputs/stamps_frozen outputs/stamps_scratch --results docs/results/dense.json

Each RUN is the folder of a finished `finetune_dense`; all have the same pictures. The set that the results page has is
that of `build_stamps.py`. Ends with one line of JSON.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fa_transformers.commands.flags import describe_command, mistakes_in_one_line, script_parser
from fa_transformers.data.readers.tables import DataError
from fa_transformers.hub.card import FACTS_FILE, FROM_SCRATCH, ModelFacts
from fa_transformers.models import FADenseConfig, FAResNetConfig, FAViTConfig
from fa_transformers.studies.dense_benchmark_report import ABOUT
from fa_transformers.studies.page_tables import make_table, update_tables
from fa_transformers.tables import counted, format_table

PROGRAM = "python scripts/studies/real_objects.py"
RESULTS_FILE = "all_results.json"
SCORES = ("box_ap50", "box_ap", "box_ap_small", "box_ap_medium")
COLUMNS: dict[str, dict[str, Any]] = {
    "backbone": {"name": "backbone"}, "parameters": {"name": "parameters"}, "trained": {"name": "of them train"},
    "steps": {"name": "steps"}, "cpu_seconds": {"name": "CPU seconds of training", "digits": 0},
    "box_ap50": {"name": "box AP50", "digits": 3}, "box_ap": {"name": "box AP", "digits": 3},
    "box_ap_small": {"name": "small", "digits": 3}, "box_ap_medium": {"name": "medium", "digits": 3},
}  # fmt: skip


def describe_backbone(folder: Path) -> str:
    """Return the kind of a network's backbone, and of a ViT the layers whose maps are used."""
    backbone = FADenseConfig.from_pretrained(folder).backbone_config
    if not isinstance(backbone, FAViTConfig):
        return "FAResNet" if isinstance(backbone, FAResNetConfig) else backbone.model_type
    layers = ", ".join(name.removeprefix("stage") for name in backbone.out_features)
    return f"FA-ViT ({'layers' if len(backbone.out_features) > 1 else 'layer'} {layers})"


def read_run(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the row of a finished run of `finetune_dense`, and what `all_results.json` holds.

    Raises:
        DataError: the folder has no results of such a run.
    """
    path = folder / RESULTS_FILE
    results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if "frozen_parameters" not in results:
        raise DataError(f"{path}: there are no results of a finished finetune_dense run")
    facts = ModelFacts.load(folder / FACTS_FILE)
    start = "new weights" if facts.base_model == FROM_SCRATCH else facts.base_model
    row = {
        "backbone": f"{describe_backbone(folder)}, {start}{', frozen' if results['frozen_parameters'] else ''}",
        "parameters": results["parameters"],
        "trained": results["parameters"] - results["frozen_parameters"],
        "steps": results["steps"],
        "cpu_seconds": results["cpu_seconds"],
        **{name: results["model"].get(name) for name in SCORES},
    }
    return row, results


def compare(folders: Sequence[Path]) -> tuple[list[dict[str, Any]], int]:
    """Return the rows of runs on one set, below them that of a guess, and the number of pictures scored.

    Raises:
        DataError: runs are of different sets.
    """
    rows, found = zip(*(read_run(folder) for folder in folders), strict=True)
    guess = found[0]["baselines"]["a guess"]
    for folder, results in zip(folders, found, strict=True):
        if (results["num_examples"], results["baselines"]["a guess"]) != (found[0]["num_examples"], guess):
            raise DataError(f"{folder}: this run was scored on other pictures than {folders[0]}")
    return [*rows, {"backbone": "none: a guess"} | {name: guess.get(name) for name in SCORES}], found[0]["num_examples"]


def parse(argv: Sequence[str] | None = None) -> tuple[list[Path], Path | None, str]:
    """Return the folders of the runs, the file of tables to write, if any, and the command."""
    parser = script_parser(f"{PROGRAM} RUN [RUN ...] [flags]", __doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a finished finetune_dense run")
    parser.add_argument("--results", type=Path, help="file of the results page whose table is written")
    parsed = parser.parse(argv)
    return parsed.given["runs"], parsed.given.get("results"), describe_command(PROGRAM, parsed.flags)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    folders, path, command = parse(argv)
    rows, count = compare(folders)
    if path is not None:
        title = f"Detection of real objects: scores on {counted(count, 'held-out picture')}"
        update_tables(path, ABOUT, {"real_objects": make_table(title, command, COLUMNS, rows)})
    print(format_table(rows, list(COLUMNS)))
    print(json.dumps(rows))
    return rows


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
