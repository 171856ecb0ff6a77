"""The command that trains stereo networks; `scripts/finetune_stereo.py` starts it."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..training.stereo_recipe import StereoDataOptions, StereoModelOptions, recipe_of
from .flags import FlagParser, how_started, mistakes_in_one_line
from .training_run import NETWORK_GROUPS, TrainingCommand, parse_run, tell_network, train

if TYPE_CHECKING:
    from ..training.job import FinetuneResult

GROUPS = (
    (StereoDataOptions, ("pairs", "crops", "scenes"), "pairs (no folder = generated scenes)"),
    (StereoModelOptions, ("checkpoint", "network", "processor"), "network"),
    *NETWORK_GROUPS,
)
COLUMNS = ("epe", "over_1px", "over_3px", "d1")


def recipe_for(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe that follows from the flags that were typed."""
    is_pretrained = given.get("model_name_or_path", "none") != "none"
    return recipe_of(is_demo=not given.get("train_folder"), is_pretrained=is_pretrained)


def parse(argv: Sequence[str] | None = None) -> TrainingCommand:
    """Parse the flags; every option has its recipe's value where nothing was typed."""
    program = how_started("finetune_stereo", "scripts/finetune_stereo.py")
    parser = FlagParser(
        program,
        "Train a stereo network with factorized attention on rectified pairs, score its disparities, and write a "
        "folder ready to publish.",
        f"{program} --train_folder SceneFlow/ --max_disparity 192 --output_dir outputs/mine",
        recipe_for,
    )
    return TrainingCommand(**parse_run(parser, program, GROUPS, recipe_for, argv)[1])


def main(argv: Sequence[str] | None = None) -> "FinetuneResult":
    """Train as the flags say; prints the scores as a table and as one line of JSON, and where the files are."""
    run = parse(argv)
    from ..training.stereo import finetune_stereo

    return train(run, finetune_stereo, tell_network(COLUMNS, "pairs"))


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
