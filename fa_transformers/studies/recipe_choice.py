"""Recipes of fine-tuning beside each other: three sets of real text, several seeds, each run with the same time.

The time is that of a single thread and is met by the number of steps: a few steps of the recipe are timed first, those
of the attention transfer apart, and what is left of the budget after the transfer is filled with optimiser steps.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from tqdm import tqdm

from ..checks import check_positive
from ..conversion.json_file import read_json
from ..data.sets.license_documents import load_license_documents
from ..data.sets.python_docs import load_python_docs
from ..files import write_json
from ..options import CardOptions, LoopOptions, ModelOptions, OptionGroup, option
from ..training.finetune import finetune

SETS = ("licences", "docstrings", "modules")
DEMO: dict[str, Any] = dict(local_window=64, position_embedding_type="periodic")
ALL_PARTS: dict[str, Any] = DEMO | dict(local_kernel_size=15, key_feature_size=64)
SHORT: dict[str, Any] = dict(learning_rate=1e-4, short_epochs=2)
RECIPES: dict[str, dict[str, Any]] = {
    "plain operator, first token": dict(
        position_embedding_type="absolute", classifier_pooling="cls", learning_rate=2e-4, recovery_steps=0
    ),
    "window": DEMO | SHORT | dict(recovery_steps=0),
    "window, transfer": DEMO | SHORT | dict(recovery_steps=150),
    "window, convolution, maps": ALL_PARTS | SHORT | dict(recovery_steps=0),
    "window, convolution, maps, transfer": ALL_PARTS | SHORT | dict(recovery_steps=150),
    "window, rate 3e-4": DEMO | SHORT | dict(recovery_steps=0, learning_rate=3e-4),
    "window, rate 3e-4, all epochs short": DEMO | dict(recovery_steps=0, learning_rate=3e-4, short_epochs=100),
}
"""Name -> options of fine-tuning that are not those of the other recipes; pooling is the checkpoint's unless said."""
TIMED_STEPS = 10
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
    seconds: float = option(240.0, "training time of each run, the transfer included", group="recipes", common=True)
    model_name_or_path: str = option("minilm", "stock checkpoint to start from", group="recipes", common=True)
    max_length: int = option(4096, "tokens that documents are cut to", group="recipes", common=True)
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


def load_set(name: str) -> datasets.DatasetDict:
    """Return the splits of a set, with the columns text and label."""
    rows = load_license_documents() if name == "licences" else load_python_docs(name)  # type: ignore[arg-type]
    return datasets.DatasetDict({split: part.select_columns(["text", "label"]) for split, part in rows.items()})


def run_recipes(options: RecipeOptions) -> list[dict[str, Any]]:
    """Train every recipe on every set with every seed, and return a row for each, those that are there already too."""
    cells = [(name, recipe, seed) for seed in options.seeds for name in options.sets for recipe in options.recipes]
    rows = []
    for name, recipe, seed in tqdm(cells, desc="recipes", unit="run"):
        path = options.output_dir / f"{name}-{list(RECIPES).index(recipe)}-{seed}.json"
        settings = {"recipe": RECIPES[recipe], "seconds": options.seconds, "model": options.model_name_or_path}
        kept = read_json(path, dict) if path.is_file() else {}
        if kept.get("settings") != settings | {"max_length": options.max_length}:
            kept = run_cell(options, name, recipe, seed)
            write_json(path, kept | {"settings": settings | {"max_length": options.max_length}})
        rows.append(kept["row"])
    return rows


def run_cell(options: RecipeOptions, name: str, recipe: str, seed: int) -> dict[str, Any]:
    """Train one recipe on one set with one seed for `options.seconds`, and return its row."""
    rows, fields = load_set(name), RECIPES[recipe]
    folder = options.output_dir / "run"

    def train(**loop: Any) -> Any:
        model = {field: value for field, value in fields.items() if field in MODEL_FIELDS}
        given = {field: value for field, value in fields.items() if field not in MODEL_FIELDS} | loop
        return finetune(
            rows,
            model=ModelOptions(
                model_name_or_path=options.model_name_or_path, max_length=options.max_length, **model
            ),
            loop=LoopOptions(
                **given, seed=seed, output_dir=folder, overwrite_output_dir=True, num_threads=1, use_cpu=True,
                report_to="none", mixed_precision="no", load_best_model_at_end=False, eval_steps=10**9,
                save_steps=10**9, max_tokens_per_batch=2048,
            ),
            card=CardOptions(data_name=name, data_license="other", data_attribution="packaged", license="apache-2.0"),
        )  # fmt: skip

    timed = train(max_steps=TIMED_STEPS, **({"recovery_steps": TIMED_STEPS} if fields["recovery_steps"] else {}))
    seconds_per_step = timed.summary["train_seconds"] / TIMED_STEPS
    transfer = 0.0
    if fields["recovery_steps"]:
        transfer = timed.summary["recovery"]["seconds"] / TIMED_STEPS * fields["recovery_steps"]
    steps = max(1, round((options.seconds - transfer) / seconds_per_step))
    result = train(max_steps=steps)
    summary = result.summary
    spent = summary["train_seconds"] + summary.get("recovery", {}).get("seconds", 0.0)
    baseline = result.baselines.get("TF-IDF + logistic regression", {})
    row = {"set": name, "recipe": recipe, "seed": seed, "steps": steps, "tokens": summary["train_tokens"]}
    row |= {"seconds": spent, "tfidf_accuracy": baseline.get("accuracy")}
    return {"row": row | {score: summary["model"][score] for score in SCORES}}


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
