"""Train a FABert from scratch on a generated task of Long Range Arena and score it beside the majority class.

accelerate launch scripts/studies/long_range_arena.py --task listops                 # small: minutes on a CPU core
accelerate launch scripts/studies/long_range_arena.py --task pathfinder32 --model softmax  # with softmax attention
accelerate launch scripts/studies/long_range_arena.py --task listops --setting official  # for a GPU
python scripts/studies/long_range_arena.py --task pathfinder32 --picture examples.png  # only draw examples

Models: "fa" is factorized attention alone, "fa-local" adds a window and a convolution, "softmax" is ordinary attention
in every layer; all have learnt absolute positions. The official setting has the sizes, batches, steps, learning rates
and models of the benchmark's configurations (ListOps: 0.05 · rsqrt(max(step, 1000)) with linear warm-up over 1,000
steps, which is transformers' "inverse_sqrt" with a peak of 0.05 / sqrt(1000)). Ours are the optimiser (AdamW, gradients
clipped to 1), dropout on ListOps, the learnt positions, and on Pathfinder-32 Q, K and V 128 wide instead of 64. The
small setting shows that everything runs and is far too short to rank models. Writes results.json, ends with one line
of JSON.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fa_transformers.checks import check_loop
from fa_transformers.commands.flags import describe_command, mistakes_in_one_line, resuming, script_parser
from fa_transformers.options import LoopOptions, flat, resolve
from fa_transformers.studies import from_scratch
from fa_transformers.studies.long_range_arena import (
    NUM_TOKENS,
    SETTINGS,
    ArenaOptions,
    build_model,
    draw_examples,
    load_splits,
)
from fa_transformers.training.processes import report_lost_processes

PROGRAM = "accelerate launch scripts/studies/long_range_arena.py"


def recipe_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of unset options, which follow from the task, the model and the setting that were given."""
    task, model = given.get("task", "listops"), given.get("model", "fa")
    tuned = SETTINGS[given.get("setting", "small")][task]
    return from_scratch.RECIPE | tuned | {"output_dir": Path(f"outputs/{task}-{model}")}


def parse(argv: Sequence[str] | None = None) -> tuple[ArenaOptions, LoopOptions, str]:
    """Return the options, checked, and the command."""
    parser = script_parser(PROGRAM, __doc__, recipe_of)
    parser.add_options(ArenaOptions, ("arena",), "task and model")
    parser.add_options(LoopOptions, from_scratch.LOOP_GROUPS, "training")
    parsed = parser.parse(argv)
    loop = resolve(parsed[LoopOptions], recipe_of(parsed.given))
    try:
        parsed[ArenaOptions].check()
        check_loop(loop)
    except ValueError as error:
        parsed.fail(str(error))
    return parsed[ArenaOptions], loop, describe_command(PROGRAM, parsed.flags)


def main(argv: Sequence[str] | None = None) -> dict:
    options, loop, command = parse(argv)
    if options.picture:
        draw_examples(options.picture, options.drawn_difficulty, loop.seed)
        return {}
    with report_lost_processes(loop.ddp_timeout):
        return train(options, loop, command)


def train(options: ArenaOptions, loop: LoopOptions, command: str) -> dict:
    """Train and score the model, and write and print the results."""
    config = flat(options, loop) | {"command": command}
    accelerator, loop, splits = from_scratch.start_study(
        loop, "long_range_arena", lambda: load_splits(options, loop.seed), config
    )
    first_token = NUM_TOKENS[options.task]
    examples = {split: from_scratch.ArrayExamples(*part, first_token) for split, part in splits.items()}
    model, state, loaders = from_scratch.train_classifier(
        loop, build_model(options), examples, accelerator, resuming(command)
    )
    majority = np.bincount(splits["train"][1]).argmax()
    results = {
        "task": options.task,
        "model": options.model,
        "setting": options.setting,
        **({"difficulty": options.drawn_difficulty} if options.task == "pathfinder32" else {}),
        "test": from_scratch.score_classifier(model, loaders["test"], accelerator),
        "validation": from_scratch.score_classifier(model, loaders["validation"], accelerator),
        "majority_class": {name: float(np.mean(splits[name][1] == majority)) for name in ("test", "validation")},
        "sizes": options.sizes_by_split,
        **options.widths,
        "parameters": accelerator.unwrap_model(model).num_parameters(),
        "learning_rate": loop.learning_rate,
        "batch_size": loop.per_device_train_batch_size * accelerator.num_processes * loop.gradient_accumulation_steps,
    }
    accelerator.print(
        f"\n{options.task}, {options.model}, {options.setting} setting, {state.step} steps: "
        f"accuracy {results['test']['accuracy']:.3f}, majority class {results['majority_class']['test']:.3f}\n"
    )
    return from_scratch.finish_study(loop, results, state, accelerator, command)


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
