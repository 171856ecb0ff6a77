"""The command that distils; `scripts/distill.py` starts it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from ..distillation.recipes import GROUPS, Recipe, Task, recipe_of
from ..options import CardOptions, DataOptions, DistillationOptions, LoopOptions, ModelOptions, resolve
from .flags import (
    FlagParser,
    describe_command,
    ends_with_resume,
    how_started,
    mistakes_in_one_line,
    print_json,
    resuming,
)

if TYPE_CHECKING:
    from ..distillation.job import DistillationResult


@dataclass(frozen=True)
class DistillCommand:
    """A parsed command line of a distillation."""

    task: Task
    recipe: Recipe
    data: DataOptions
    model: ModelOptions
    loop: LoopOptions
    distillation: DistillationOptions
    card: CardOptions
    command: str

    @property
    def resume_command(self) -> str:
        """The command that goes on after a stop."""
        return resuming(self.command)


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
    for options_class, groups, title in GROUPS:
        parser.add_options(options_class, groups, title)
    parsed = parser.parse(argv)
    recipe = recipe_for(parsed.given)
    return DistillCommand(
        task=task_of(parsed.given),
        recipe=parsed.given.get("recipe", "quick"),
        data=resolve(parsed[DataOptions], recipe),
        model=resolve(parsed[ModelOptions], recipe),
        loop=resolve(parsed[LoopOptions], recipe),
        distillation=resolve(parsed[DistillationOptions], recipe),
        card=resolve(parsed[CardOptions], recipe),
        command=describe_command(program, parsed.flags),
    )


def main(argv: Sequence[str] | None = None) -> "DistillationResult":
    """Distil as the flags say; prints the receipt as tables and as one line of JSON."""
    run = parse(argv)

    from ..distillation.distill import distill
    from ..distillation.receipt import print_receipt
    from ..training.processes import report_lost_processes

    with ends_with_resume(run.resume_command, run.loop), report_lost_processes(run.loop.ddp_timeout):
        result = distill(
            task=run.task,
            recipe=run.recipe,
            data=run.data,
            model=run.model,
            loop=run.loop,
            distillation=run.distillation,
            card=run.card,
            command=run.command,
            resume_command=run.resume_command,
        )
        if result.plan:
            print(result.plan)
        if result.receipt:
            print_receipt(result.receipt)
            print_json(result.receipt)
    return result


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
