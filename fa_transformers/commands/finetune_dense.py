"""The command that trains detectors and instance segmenters; `scripts/finetune_dense.py` starts it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from ..options import CardOptions, LoopOptions, resolve
from ..training.dense_recipe import DATA_SOURCES, DenseDataOptions, DenseModelOptions, DenseTask, recipe_of
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
    from ..training.job import FinetuneResult

GROUPS = (
    (DenseDataOptions, ("objects", "packaged", "views"), "pictures with objects (no source = a packaged set)"),
    (DenseModelOptions, ("checkpoint", "network", "processor"), "network"),
    (
        LoopOptions,
        (
            "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "epochs",
            "dry run", "optimizer", "device", "checkpoints", "best metric",
        ),
        "training",
    ),
    (CardOptions, ("license", "base_model", "data card", "hub name", "push"), "model card and Hub"),
)  # fmt: skip
COLUMNS = tuple(
    f"{kind}_{name}" for kind in ("box", "mask") for name in ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
)


@dataclass(frozen=True)
class FinetuneDenseCommand:
    """A parsed command line of detection's training."""

    task: DenseTask
    data: DenseDataOptions
    model: DenseModelOptions
    loop: LoopOptions
    card: CardOptions
    command: str

    @property
    def resume_command(self) -> str:
        """The command that goes on after a stop."""
        return resuming(self.command)


def recipe_for(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe that follows from the flags that were typed."""
    packaged = None if any(given.get(name) for name in DATA_SOURCES) else given.get("set", "digits")
    return recipe_of(packaged, is_pretrained=given.get("model_name_or_path", "none") != "none")


def parse(argv: Sequence[str] | None = None) -> FinetuneDenseCommand:
    """Parse the flags; every option has its recipe's value where nothing was typed."""
    program = how_started("finetune_dense", "scripts/finetune_dense.py")
    parser = FlagParser(
        program,
        "Train a detector or an instance segmenter with factorized attention, score it on whole pictures, and write a "
        "folder ready to publish.",
        f"{program} --coco_folder coco/ --task instance-segmentation --output_dir outputs/mine",
        recipe_for,
    )
    parser.add_argument(
        "--task", choices=get_args(DenseTask), help="boxes, or boxes and masks (default: instance-segmentation)"
    )
    for options_class, groups, title in GROUPS:
        parser.add_options(options_class, groups, title)
    parsed = parser.parse(argv)
    recipe = recipe_for(parsed.given)
    return FinetuneDenseCommand(
        task=parsed.given.get("task", "instance-segmentation"),
        data=resolve(parsed[DenseDataOptions], recipe),
        model=resolve(parsed[DenseModelOptions], recipe),
        loop=resolve(parsed[LoopOptions], recipe),
        card=resolve(parsed[CardOptions], recipe),
        command=describe_command(program, parsed.flags),
    )


def main(argv: Sequence[str] | None = None) -> "FinetuneResult":
    """Train as the flags say; prints the scores as a table and as one line of JSON, and where the files are."""
    run = parse(argv)
    from ..training.dense import finetune_dense
    from ..training.processes import report_lost_processes
    from ..training.report import print_scores
    from ..training.run_folder import print_folder

    with ends_with_resume(run.resume_command, run.loop), report_lost_processes(run.loop.ddp_timeout):
        result = finetune_dense(
            task=run.task, data=run.data, model=run.model, loop=run.loop, card=run.card, command=run.command,
            resume_command=run.resume_command,
        )  # fmt: skip
        if result.plan:
            print(result.plan)
        if result.summary:
            print_scores(result.summary, COLUMNS, "pictures")
            print_json(result.summary)
            print_folder(result.summary["task"], result.output_dir)
    return result


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
