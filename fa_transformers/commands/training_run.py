"""Parts that all commands of training share: the parsed options of a run, and its course from there."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ..options import CardOptions, LoopOptions, resolve
from .flags import FlagParser, Recipe, describe_command, ends_with_resume, print_json, resuming

NETWORK_GROUPS = (
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
"""Groups of options that detectors and stereo networks are trained by, as `FlagParser.add_options` takes them."""


@dataclass(frozen=True, kw_only=True)
class TrainingCommand:
    """A parsed command line of a training run; every field is an argument of the function that trains."""

    data: Any
    model: Any
    loop: LoopOptions
    card: CardOptions
    command: str

    @property
    def resume_command(self) -> str:
        """The command that goes on after a stop."""
        return resuming(self.command)


def parse_run(
    parser: FlagParser,
    program: str,
    groups: Sequence[tuple[type, Sequence[str], str]],
    recipe_for: Recipe,
    argv: Sequence[str] | None,
    names: Sequence[str] = ("data", "model", "loop", "card"),
) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """Parse a command line, and return what was typed, and fields of a `TrainingCommand` with the recipe's values.

    Args:
        parser: with the flags that are no field of options.
        groups: what `FlagParser.add_options` takes, once for each of `names`.
        recipe_for: gives the recipe from the flags that were typed.
    """
    for options_class, parts, title in groups:
        parser.add_options(options_class, parts, title)
    parsed = parser.parse(argv)
    recipe = recipe_for(parsed.given)
    options = {name: resolve(parsed[row[0]], recipe) for name, row in zip(names, groups, strict=True)}
    return parsed.given, options | {"command": describe_command(program, parsed.flags)}


def train(run: TrainingCommand, function: Callable[..., Any], tell: Callable[[Any], None]) -> Any:
    """Call `function` with the options of a run, print the plan of a dry run or `tell` the result, and return that."""
    from ..training.processes import report_lost_processes

    options = {part.name: getattr(run, part.name) for part in fields(run)}
    with ends_with_resume(run.resume_command, run.loop), report_lost_processes(run.loop.ddp_timeout):
        result = function(**options, resume_command=run.resume_command)
        if result.plan:
            print(result.plan)
        else:
            tell(result)
    return result


def tell_network(columns: Sequence[str], noun: str) -> Callable[[Any], None]:
    """Return what prints the result of a detector's or stereo network's run: scores, one line of JSON, its folder."""

    def tell(result: Any) -> None:
        from ..training.report import print_scores
        from ..training.run_folder import print_folder

        if result.summary:
            print_scores(result.summary, columns, noun)
            print_json(result.summary)
            print_folder(result.summary["task"], result.output_dir)

    return tell
