"""Recipes of fine-tuning beside each other: three sets of real text, several seeds, each run with the same time.

The time is that of a single thread and is met by the number of steps: a few steps of the recipe are timed first, or its
run with the seed before tells, those of the attention transfer apart, and what is left of the budget after the transfer
is filled with optimiser steps.
"""

import functools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
from tqdm import tqdm

from ..checks import check_positive
from ..conversion.json_file import read_json
from ..conversion.source import read_source
from ..data.labelled import load_data
from ..data.sets.license_documents import load_license_documents
from ..data.sets.python_docs import load_python_docs
from ..files import write_json
from ..hub.folder_lock import released
from ..options import CardOptions, DataOptions, LoopOptions, ModelOptions, OptionGroup, option, resolve
from ..training.baselines import WORD_COUNTS, score_baselines
from ..training.checkpointing import prepare_output_dir
from ..training.finetune import fit
from ..training.job import FinetuneJob, Fitted
from ..training.recipes import recipe_of
from ..training.setup import make_accelerator

SETS = ("licences", "docstrings", "modules")
PLAIN: dict[str, Any] = dict(local_window=0, position_embedding_type="absolute", recovery_steps=0, short_epochs=0)
WINDOW: dict[str, Any] = dict(local_window=64, position_embedding_type="periodic", recovery_steps=0)
ALL_PARTS: dict[str, Any] = WINDOW | dict(local_kernel_size=15, key_feature_size=64)
SHORT: dict[str, Any] = dict(short_epochs=1000)
RECIPES: dict[str, dict[str, Any]] = {
    "plain operator, 2e-4": PLAIN | dict(learning_rate=2e-4),
    "window, 2e-4, cut to 128": WINDOW | SHORT | dict(learning_rate=2e-4, short_length=128),
    "window, transfer, 2e-4, cut to 128": WINDOW
    | SHORT
    | dict(learning_rate=2e-4, short_length=128, recovery_steps=20),
    "window, convolution, maps, 2e-4, cut to 128": ALL_PARTS | SHORT | dict(learning_rate=2e-4, short_length=128),
}
"""Name -> options of fine-tuning that are not those of the other recipes; pooling is the checkpoint's unless said."""
TIMED_STEPS = 10
NUM_VALIDATION = 16
"""Validation documents that are read: the last weights count, whatever these say."""
MODEL_FIELDS = {
    "local_window",
    "position_embedding_type",
    "local_kernel_size",
    "key_feature_size",
    "classifier_pooling",
}
SCORES = ("accuracy", "macro_f1")


@dataclass(frozen=True)
class RecipeOptions(OptionGroup):
    """The runs to compare."""

    sets: tuple[str, ...] = option(SETS, "texts: licences, docstrings, modules", group="recipes", common=True)
    recipes: tuple[str, ...] = option(
        tuple(RECIPES), "rows of the table, by name, quoted", group="recipes", common=True
    )
    seeds: tuple[int, ...] = option((0, 1, 2), "seeds of head, order and dropout", group="recipes", common=True)
    seconds: float = option(100.0, "training time of each run, the transfer included", group="recipes", common=True)
    model_name_or_path: str = option("minilm", "stock checkpoint to start from", group="recipes", common=True)
    max_length: int = option(512, "tokens that documents are cut to", group="recipes", common=True)
    output_dir: Path = option(
        Path("outputs/recipes"), "folder for the results; runs that are finished there are taken", group="recipes",
        common=True,
    )  # fmt: skip
    results: Path | None = option(
        None, "JSON file of a results page, into which the table is put", group="recipes", common=True
    )

    def check(self) -> None:
        """Raise ValueError, naming the flag, for what can't be run."""
        for name, known in (("sets", SETS), ("recipes", tuple(RECIPES))):
            chosen = getattr(self, name)
            if not chosen or (unknown := [each for each in chosen if each not in known]):
                wrong = f"{unknown[0]!r} is unknown" if chosen else "names none"
                raise ValueError(f"--{name} {wrong}; choose from {', '.join(map(repr, known))}.")
        if not self.seeds:
            raise ValueError("--seeds needs a number at least.")
        check_positive(self, "seconds", "max_length")


@functools.cache
def load_set(name: str) -> datasets.DatasetDict:
    """Return the splits of a set, with the columns text and label; a set of Python's sources takes a minute to read."""
    rows = load_license_documents() if name == "licences" else load_python_docs(name)  # type: ignore[arg-type]
    return datasets.DatasetDict({split: part.select_columns(["text", "label"]) for split, part in rows.items()})


def run_recipes(options: RecipeOptions) -> list[dict[str, Any]]:
    """Train every recipe on every set with every seed, and return a row for each, those that are there already too."""
    cells = [(name, recipe, seed) for seed in options.seeds for name in options.sets for recipe in options.recipes]
    rows: list[dict[str, Any]] = []
    paces: dict[tuple[str, str], Pace] = {}
    for name, recipe, seed in tqdm(cells, desc="recipes", unit="run"):
        path = options.output_dir / f"{name}-{list(RECIPES).index(recipe)}-{seed}.json"
        settings = {"recipe": RECIPES[recipe], "seconds": options.seconds, "model": options.model_name_or_path}
        kept = read_json(path, dict) if path.is_file() else {}
        if kept.get("settings") != settings | {"max_length": options.max_length}:
            kept = run_cell(options, name, recipe, seed, paces.get((name, recipe)))
            write_json(path, kept | {"settings": settings | {"max_length": options.max_length}})
        rows.append(kept["row"])
        paces[name, recipe] = Pace(**kept["pace"])
    return rows


@dataclass(frozen=True)
class Pace:
    """Seconds of one optimiser step of a recipe on a set, and of one step of its attention transfer."""

    step: float
    transfer_step: float


def pace_of(fitted: Fitted) -> Pace:
    """Return the pace of a run."""
    recovery = fitted.run.get("recovery", {})
    return Pace(fitted.state.seconds / fitted.state.step, recovery.get("seconds", 0.0) / recovery.get("steps", 1))


def time_steps(options: RecipeOptions, name: str, recipe: str, seed: int) -> Pace:
    """Return the pace of a few steps of a recipe on a set."""
    fields = RECIPES[recipe]
    transfer_steps = min(TIMED_STEPS, fields["recovery_steps"])
    return pace_of(train(options, name, fields, seed, TIMED_STEPS, transfer_steps, NUM_VALIDATION))


def run_cell(options: RecipeOptions, name: str, recipe: str, seed: int, pace: Pace | None) -> dict[str, Any]:
    """Train one recipe on one set with one seed for `options.seconds`, and return its row and its pace.

    Args:
        options: the comparison's.
        name, recipe, seed: the cell.
        pace: that of the run with the seed before, by which the steps are counted; None times a few steps first.
    """
    fields = RECIPES[recipe]
    pace = pace or time_steps(options, name, recipe, seed)
    steps = max(1, round((options.seconds - pace.transfer_step * fields["recovery_steps"]) / pace.step))
    fitted = train(options, name, fields, seed, steps, fields["recovery_steps"])
    spent = fitted.state.seconds + fitted.run.get("recovery", {}).get("seconds", 0.0)
    row = {"set": name, "recipe": recipe, "seed": seed, "steps": steps, "tokens": fitted.state.tokens, "seconds": spent}
    return {"row": row | {score: fitted.scores[score] for score in SCORES}, "pace": asdict(pace_of(fitted))}


def train(
    options: RecipeOptions,
    name: str,
    fields: Mapping[str, Any],
    seed: int,
    steps: int,
    recovery_steps: int,
    num_test: int | None = None,
) -> Fitted:
    """Train a recipe on a set for some steps, after some of attention transfer, and score it on its test documents."""
    given = {field: value for field, value in fields.items() if field not in MODEL_FIELDS}
    given |= {"max_steps": steps, "recovery_steps": recovery_steps}
    model = ModelOptions(
        model_name_or_path=options.model_name_or_path, max_length=options.max_length,
        **{field: value for field, value in fields.items() if field in MODEL_FIELDS},
    )  # fmt: skip
    loop = LoopOptions(
        **given, seed=seed, output_dir=options.output_dir / "run", num_threads=1, use_cpu=True, report_to="none",
        mixed_precision="auto", load_best_model_at_end=False, eval_steps=10**9, save_steps=10**9,
        max_tokens_per_batch=2048,
    )  # fmt: skip
    recipe = recipe_of("text-classification", is_demo=False, model_name_or_path=options.model_name_or_path)
    data, model, loop = resolve(DataOptions(), recipe), resolve(model, recipe), resolve(loop, recipe)
    job = FinetuneJob("text-classification", data, model, loop, resolve(CardOptions(), recipe), "", "")
    rows = datasets.DatasetDict(load_set(name))
    rows["validation"] = rows["validation"].select(range(min(NUM_VALIDATION, len(rows["validation"]))))
    rows["test"] = rows["test"].select(range(min(num_test or len(rows["test"]), len(rows["test"]))))
    accelerator = make_accelerator(loop)
    labelled = load_data(job.task, data, job.card, seed, rows=rows)
    with released(loop.output_dir):
        prepare_output_dir(loop.output_dir, overwrite=True, resume=False)
        return fit(job, read_source(options.model_name_or_path), labelled, accelerator, loop.output_dir)


def score_tfidf(name: str) -> float:
    """Return the accuracy of TF-IDF with logistic regression on the test documents of a set, read whole."""
    data = load_data("text-classification", DataOptions(), CardOptions(), 0, rows=load_set(name))
    return score_baselines(data)[WORD_COUNTS]["accuracy"]


def summarise_recipes(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each recipe: the mean accuracy over the seeds on each set, and over the sets, the best first."""
    table = []
    for recipe in dict.fromkeys(row["recipe"] for row in rows):
        ours = [row for row in rows if row["recipe"] == recipe]
        means = {
            name: statistics.fmean(row["accuracy"] for row in ours if row["set"] == name)
            for name in dict.fromkeys(row["set"] for row in ours)
        }
        spread = [row["accuracy"] - means[row["set"]] for row in ours]
        deviation = statistics.pstdev(spread) if len(spread) > len(means) else None
        table.append(
            {"recipe": recipe, **means, "mean": statistics.fmean(means.values()), "deviation": deviation}
            | {"macro_f1": statistics.fmean(row["macro_f1"] for row in ours)}
            | {"seconds": statistics.fmean(row["seconds"] for row in ours), "runs": len(ours)}
        )
    return sorted(table, key=lambda row: -row["mean"])
