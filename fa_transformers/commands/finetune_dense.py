"""The command that trains detectors and instance segmenters; `scripts/finetune_dense.py` starts it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from ..training.dense_recipe import DATA_SOURCES, DenseDataOptions, DenseModelOptions, DenseTask, recipe_of
from .flags import FlagParser, how_started, mistakes_in_one_line
from .training_run import NETWORK_GROUPS, TrainingCommand, parse_run, tell_network, train

if TYPE_CHECKING:
    from ..training.job import FinetuneResult

GROUPS = (
    (DenseDataOptions, ("objects", "packaged", "views"), "pictures with objects (no source = a packaged set)"),
    (DenseModelOptions, ("checkpoint", "network", "processor"), "network"),
    *NETWORK_GROUPS,
)
COLUMNS = tuple(
    f"{kind}_{name}" for kind in ("box", "mask") for name in ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
)


@dataclass(frozen=True, kw_only=True)
class FinetuneDenseCommand(TrainingCommand):
    """A parsed command line of detection's training."""

    task: DenseTask


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
    given, options = parse_run(parser, program, GROUPS, recipe_for, argv)
    return FinetuneDenseCommand(task=given.get("task", "instance-segmentation"), **options)


def main(argv: Sequence[str] | None = None) -> "FinetuneResult":
    """Train as the flags say; prints the scores as a table and as one line of JSON, and where the files are."""
    run = parse(argv)
    from ..training.dense import finetune_dense

    return train(run, finetune_dense, tell_network(COLUMNS, "pictures"))


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
