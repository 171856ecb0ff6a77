"""The command that fine-tunes; `scripts/finetune.py` starts it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from ..options import DATA_SOURCES, CardOptions, DataOptions, LoopOptions, ModelOptions
from ..training.recipes import Task, recipe_of
from .flags import FlagParser, how_started, mistakes_in_one_line
from .training_run import TrainingCommand, parse_run, train

if TYPE_CHECKING:
    from ..training.job import FinetuneResult

GROUPS = (
    (
        DataOptions,
        ("text", "labels", "label column", "images", "streaming", "tokenizing"),
        "data (none of these = the built-in demo data)",
    ),
    (ModelOptions, ("checkpoint", "size", "strict length", "layer", "positions", "freezing", "lora"), "model"),
    (
        LoopOptions,
        (
            "batches", "packing", "epochs", "dry run", "recovery", "short epochs", "optimizer", "head rate", "device",
            "sequence parallel", "checkpoints", "best metric", "lengths",
        ),
        "training",
    ),
    (CardOptions, ("card", "data card", "hub name", "push"), "model card and Hub"),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class FinetuneCommand(TrainingCommand):
    """A parsed command line of fine-tuning."""

    task: Task
    full_recipe: bool


def task_of(given: Mapping[str, Any]) -> Task:
    """Return the task that was typed, or else the one that the source of the data stands for."""
    return given.get("task") or ("image-classification" if given.get("image_folder") else "text-classification")


def recipe_for(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe that follows from the flags that were typed."""
    return recipe_of(
        task_of(given),
        is_demo=not any(given.get(name) for name in DATA_SOURCES),
        model_name_or_path=given.get("model_name_or_path"),
        full=given.get("full_recipe", False),
    )


def parse(argv: Sequence[str] | None = None) -> FinetuneCommand:
    """Parse the flags; every option has its recipe's value where nothing was typed."""
    program = how_started("finetune", "scripts/finetune.py")
    parser = FlagParser(
        program,
        "Fine-tune a factorized encoder on long documents or large images, score it, and write a folder ready to "
        "publish. The defaults shown are those of the flags before --help: alone, the demo's; after --train_file "
        "my.csv, those of your data.",
        f"{program} --train_file my.csv --model_name_or_path minilm --max_length 8192 --output_dir outputs/mine",
        recipe_for,
    )
    parser.add_argument("--task", choices=get_args(Task), help="what to train for (default: as the data is)")
    parser.add_argument(
        "--full_recipe", action="store_true", common=False, help="demo data: all of it, whole, for several epochs"
    )
    given, options = parse_run(parser, program, GROUPS, recipe_for, argv)
    return FinetuneCommand(task=task_of(given), full_recipe=given.get("full_recipe", False), **options)


def main(argv: Sequence[str] | None = None) -> "FinetuneResult":
    """Fine-tune as the flags say; prints the scores as a table and as one line of JSON, and where the files are."""
    run = parse(argv)
    from ..training.finetune import finetune
    from ..training.report import print_results

    return train(run, finetune, lambda result: print_results(result.summary) if result.summary else None)


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
