"""The command that distils; `scripts/distill.py` starts it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from ..distillation.recipes import GROUPS, Recipe, Task, recipe_of
from ..options import DistillationOptions
from .flags import FlagParser, how_started, mistakes_in_one_line, print_json
from .training_run import TrainingCommand, parse_run, train

if TYPE_CHECKING:
    from ..distillation.job import DistillationResult


@dataclass(frozen=True, kw_only=True)
class DistillCommand(TrainingCommand):
    """A parsed command line of a distillation."""

    task: Task
    recipe: Recipe
    distillation: DistillationOptions


def task_of(given: Mapping[str, Any]) -> Task:
    """Return the task that was typed, or else the one that the source of the data stands for."""
    return given.get("task") or ("images" if given.get("image_folder") else "text")


def recipe_for(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe that follows from the flags that were typed."""
    teacher = given.get("teacher_name_or_path") or given.get("model_name_or_path")
    return recipe_of(task_of(given), given.get("recipe", "quick"), teacher)


def parse(argv: Sequence[str] | None = None) -> DistillCommand:
    """Parse the flags; every option has its recipe's value where nothing was typed."""
    program = how_started("distill", "scripts/distill.py")
    parser = FlagParser(
        program,
        "Recover the quality of a converted model: it learns from the softmax model that its weights came from. "
        "Labels aren't read, but for --probe_file and --probe_folder.",
        f"{program} --model_name_or_path outputs/converted --teacher_name_or_path minilm --train_file my.jsonl "
        "--output_dir outputs/mine",
        recipe_for,
    )
    parser.add_argument("--task", choices=get_args(Task), help="what the model reads (default: as the data is)")
    parser.add_argument("--recipe", choices=get_args(Recipe), help="how long to train (default: quick)")
    names = ("data", "model", "distillation", "loop", "card")
    given, options = parse_run(parser, program, GROUPS, recipe_for, argv, names)
    return DistillCommand(task=task_of(given), recipe=given.get("recipe", "quick"), **options)


def main(argv: Sequence[str] | None = None) -> "DistillationResult":
    """Distil as the flags say; prints the receipt as tables and as one line of JSON."""
    run = parse(argv)
    from ..distillation.distill import distill

    return train(run, distill, tell)


def tell(result: "DistillationResult") -> None:
    """Print the receipt of a distillation as tables and as one line of JSON."""
    from ..distillation.receipt import print_receipt

    if result.receipt:
        print_receipt(result.receipt)
        print_json(result.receipt)


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
