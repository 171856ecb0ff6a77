"""The command that trains stereo networks; `scripts/finetune_stereo.py` starts it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..options import CardOptions, LoopOptions, resolve
from ..training.stereo_recipe import StereoDataOptions, StereoModelOptions, recipe_of
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
    (StereoDataOptions, ("pairs", "crops", "scenes"), "pairs (no folder = generated scenes)"),
    (StereoModelOptions, ("checkpoint", "network", "processor"), "network"),
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
COLUMNS = ("epe", "over_1px", "over_3px", "d1")


@dataclass(frozen=True)
class FinetuneStereoCommand:
    """A parsed command line of stereo training."""

    data: StereoDataOptions
    model: StereoModelOptions
    loop: LoopOptions
    card: CardOptions
    command: str

    @property
    def resume_command(self) -> str:
        """The command that goes on after a stop."""
        return resuming(self.command)


def recipe_for(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe that follows from the flags that were typed."""
    is_pretrained = given.get("model_name_or_path", "none") != "none"
    return recipe_of(is_demo=not given.get("train_folder"), is_pretrained=is_pretrained)


def parse(argv: Sequence[str] | None = None) -> FinetuneStereoCommand:
    """Parse the flags; every option has its recipe's value where nothing was typed."""
    program = how_started("finetune_stereo", "scripts/finetune_stereo.py")
    parser = FlagParser(
        program,
        "Train a stereo network with factorized attention on rectified pairs, score its disparities, and write a "
        "folder ready to publish.",
        f"{program} --train_folder SceneFlow/ --max_disparity 192 --output_dir outputs/mine",
        recipe_for,
    )
    for options_class, groups, title in GROUPS:
        parser.add_options(options_class, groups, title)
    parsed = parser.parse(argv)
    recipe = recipe_for(parsed.given)
    return FinetuneStereoCommand(
        data=resolve(parsed[StereoDataOptions], recipe),
        model=resolve(parsed[StereoModelOptions], recipe),
        loop=resolve(parsed[LoopOptions], recipe),
        card=resolve(parsed[CardOptions], recipe),
        command=describe_command(program, parsed.flags),
    )


def main(argv: Sequence[str] | None = None) -> "FinetuneResult":
    """Train as the flags say; prints the scores as a table and as one line of JSON, and where the files are."""
    run = parse(argv)
    from ..training.processes import report_lost_processes
    from ..training.report import print_scores
    from ..training.run_folder import print_folder
    from ..training.stereo import finetune_stereo

    with ends_with_resume(run.resume_command, run.loop), report_lost_processes(run.loop.ddp_timeout):
        result = finetune_stereo(
            data=run.data, model=run.model, loop=run.loop, card=run.card, command=run.command,
            resume_command=run.resume_command,
        )  # fmt: skip
        if result.plan:
            print(result.plan)
        if result.summary:
            print_scores(result.summary, COLUMNS, "pairs")
            print_json(result.summary)
            print_folder(result.summary["task"], result.output_dir)
    return result


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
