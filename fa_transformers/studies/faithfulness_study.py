"""How faithful each method of `attribute` is to what trained classifiers answer: deletion, and known places.

A document or image is one cell, whose figures are kept in a file, so that a study that was stopped goes on, and one of
more documents takes those that are done.

"above random" is the difference of normalised comprehensiveness to the mean of orders at random of the same document.
Re-initialised models give scores that the trained model's answers are deleted by: where they do as well, a method
shows the input and not the model (Adebayo et al. 2018, "Sanity Checks for Saliency Maps", arXiv:1810.03292).
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from tqdm import tqdm

from ..conversion.json_file import read_json
from ..explain.attribution import attribute
from ..explain.deletion import faithfulness_of_each
from ..files import write_json
from . import faithfulness_tasks as tasks
from .faithfulness_tasks import Case, FaithfulnessOptions, Task

FRESH = "re-initialised"
"""Part of the name of scores that come from the re-initialised model."""
LABELS = {"integrated_gradients": "integrated_gradients, {steps} points (captum)"}


def load_tasks(options: FaithfulnessOptions) -> dict[str, Task]:
    """Load the tasks by name; needle documents of each length are one."""
    loaders: dict[str, Callable[[], Task]] = {}
    for name in options.tasks:
        if name == "needle":
            loaders |= {
                f"needle-{length}": partial(tasks.needle_documents, options, length) for length in options.lengths
            }
        else:
            loaders[name] = partial(getattr(tasks, name), options)
    return {name: load() for name, load in tqdm(loaders.items(), desc="tasks", unit="task")}


def run_study(options: FaithfulnessOptions) -> dict[str, dict[str, Any]]:
    """Judge every method on every document of the tasks, those that are done already too.

    Returns:
        By task "about" and "cells", a list with the figures of each document by method.
    """
    options.check_sources()
    torch.set_num_threads(1)
    loaded = load_tasks(options)
    found: dict[str, dict[str, Any]] = {name: {"about": task.about, "cells": []} for name, task in loaded.items()}
    with tqdm(total=sum(task.count for task in loaded.values()), unit="document") as progress:
        for name, task in loaded.items():
            progress.set_description(name)
            for number in range(task.count):
                found[name]["cells"].append(kept_cell(options, name, task, number))
                progress.update()
    return found


def kept_cell(options: FaithfulnessOptions, name: str, task: Task, number: int) -> dict[str, dict[str, float]]:
    """Return the figures of one document by method, from its file where that was made with the same settings.

    Those of licences are also told with scores of a re-initialised model, which has other weights for each document, so
    that what one draw of weights happens to see in certain words is no property of the mean.
    """
    path = options.output_dir / name / f"{number}.json"
    names = ("methods", "steps", "beam_size", "num_random", "seed")
    settings = task.settings | {field: getattr(options, field) for field in names}
    settings["methods"] = sorted(options.methods)
    kept = read_json(path, dict) if path.is_file() else {}
    if kept.get("settings") != settings:
        fresh = reinitialised(task.model, options.seed + number) if name == "licences" else None
        kept = {"settings": settings, "figures": judge(options, task.model, task.case(number), number, fresh)}
        write_json(path, kept)
    return kept["figures"]


def reinitialised(model: Any, seed: int) -> nn.Module:
    """Return a model of the same configuration with weights that nothing was trained into."""
    torch.manual_seed(seed)
    return type(model)(model.config).eval()


def judge(
    options: FaithfulnessOptions, model: nn.Module, case: Case, number: int, fresh: nn.Module | None
) -> dict[str, dict[str, float]]:
    """Return the figures of one document by method.

    Returns:
        "seconds" of CPU time; with `case.units`, normalised, "comprehensiveness", "sufficiency", "random" and
        "length_matched", left out where no order differs from another; with `case.points` "first", "share" and "all",
        whether the first unit holds the truth, how many of as many units as hold it do, and whether all do, the same
        "_by_size" of scores without their sign, and "chance"; with a `fresh` model, for its scores "rank_correlation"
        with those of `model`.
    """
    with torch.inference_mode():
        target = int(model(**case.inputs).logits.argmax())
    figures: dict[str, dict[str, float]] = {}
    orders: dict[str, Tensor] = {}
    for method in options.methods:
        started = time.process_time()
        units = case.points if case.points is not None else case.units
        assert units is not None
        scores = score(model, case.inputs, target, method, units, number, options)
        figures[method] = {"seconds": time.process_time() - started}
        if case.points is not None:
            figures[method] |= point(scores, case.truth)
        if case.units is not None:
            known = case.points is None
            orders[method] = scores if known else score(model, case.inputs, target, method, case.units, number, options)
        if fresh is not None and method != "random":
            name = f"{method}, {FRESH}"
            orders[name] = score(fresh, case.inputs, target, method, units, number, options)
            figures[name] = {"rank_correlation": correlate(orders[method], orders[name])}
    if case.units is not None:
        found = faithfulness_of_each(
            model, case.inputs, orders, case.units, target, num_random=options.num_random,
            beam_size=options.beam_size, seed=number,
        )  # fmt: skip
        for name, one in found.items():
            if one.highest > one.lowest:
                figures[name] |= {
                    "comprehensiveness": one.normalized_comprehensiveness,
                    "sufficiency": one.normalized_sufficiency,
                    "random": one.normalize(one.random),
                    "length_matched": one.normalize(one.length_matched),
                }
    return figures


def score(
    model: nn.Module, inputs: Mapping[str, Tensor], target: int, method: str, units: Tensor, number: int,
    options: FaithfulnessOptions,
) -> Tensor:  # fmt: skip
    """Return the scores of the units of one document by a method: [S]."""
    if method == "random":
        generator = torch.Generator().manual_seed(options.seed + number)
        return torch.rand(int(units.max()) + 1, generator=generator)
    return attribute(model, inputs, target, method, units, steps=options.steps)[0]  # type: ignore[arg-type]


def point(scores: Tensor, truth: frozenset[int]) -> dict[str, float]:
    """Return how well the highest scores, and those of the largest size, point to the units that hold the truth."""
    figures = {"chance": len(truth) / len(scores)}
    for suffix, ranked in (("", scores), ("_by_size", scores.abs())):
        best = ranked.argsort(descending=True, stable=True)[: len(truth)].tolist()
        hits = [float(unit in truth) for unit in best]
        figures |= {
            f"first{suffix}": hits[0],
            f"share{suffix}": statistics.fmean(hits),
            f"all{suffix}": float(all(hits)),
        }
    return figures


def correlate(one: Tensor, other: Tensor) -> float:
    """Return Spearman's rank correlation of two scores of the same units; 0 where one of them is constant."""
    found = float(spearmanr(one.double(), other.double()).statistic)
    return 0.0 if math.isnan(found) else found


def mean_of(values: Sequence[float]) -> list[float] | None:
    """Return a mean and half of its 95 % interval, by the normal distribution; of one value the interval is left out.

    None where there is no value.
    """
    if not values:
        return None
    mean = statistics.fmean(values)
    return [mean, 1.96 * statistics.stdev(values) / math.sqrt(len(values))] if len(values) > 1 else [mean]


def summarise(cells: Sequence[Mapping[str, Mapping[str, float]]], methods: Sequence[str]) -> list[dict[str, Any]]:
    """Return a row for each method: the means of its figures over the documents, and "above" the random orders."""
    rows = []
    for method in methods:
        own = [cell[method] for cell in cells if method in cell]
        names = dict.fromkeys(name for one in own for name in one)
        row: dict[str, Any] = {"method": method}
        row |= {name: mean_of([one[name] for one in own if name in one]) for name in names}
        row["above"] = mean_of([one["comprehensiveness"] - one["random"] for one in own if "comprehensiveness" in one])
        rows.append(row)
    return rows


MEAN = {"digits": 2, "join": " ± "}
COUNT = {"join": " of "}
DELETION: dict[str, dict[str, Any]] = {
    "comprehensiveness": {"name": "comprehensiveness"} | MEAN,
    "sufficiency": {"name": "sufficiency"} | MEAN,
    "random": {"name": "random orders"} | MEAN,
    "length_matched": {"name": "of equal length"} | MEAN,
    "above": {"name": "comprehensiveness above random"} | MEAN,
}
SECONDS: dict[str, dict[str, Any]] = {"seconds": {"name": "CPU seconds", "digits": 2}}
METHOD: dict[str, dict[str, Any]] = {"method": {"name": "method"}}
COLUMNS: dict[str, dict[str, dict[str, Any]]] = {
    "licences": METHOD | DELETION | SECONDS,
    "dinov2": METHOD | DELETION | SECONDS,
    "digits": METHOD
    | {"hits": {"name": "first patch is right"} | COUNT, "share": {"name": "right of the first"} | MEAN}
    | {"share_by_size": {"name": "without the sign"} | MEAN}
    | DELETION
    | SECONDS,
    "needle": METHOD
    | {"tokens": {"name": "tokens"}, "hits": {"name": "the first is right"} | COUNT}
    | {"both": {"name": "both first are"} | COUNT, "both_by_size": {"name": "both without the sign"} | COUNT}
    | SECONDS,
    "sanity": METHOD
    | {"rank_correlation": {"name": "rank correlation with the trained model's"} | MEAN}
    | {name: DELETION[name] for name in ("comprehensiveness", "random", "above")},
}
HITS = {"hits": "first", "both": "all", "both_by_size": "all_by_size"}
TITLES = {
    "licences": "Deletion of what decided a licence's category",
    "dinov2": "Deletion of what decided a stamp's class, on DINOv2 features",
    "digits": "Patches that hold a whole digit, and deletion of squares",
    "needle": "The two planted statements among {passages} passages",
    "sanity": "Scores of a re-initialised model, for the answers of the trained one",
}
NOTE = "Mean ± half of the 95 % interval; comprehensiveness and sufficiency from 0 to 1."


def tables_of(found: Mapping[str, Mapping[str, Any]], options: FaithfulnessOptions) -> dict[str, dict[str, Any]]:
    """Return the tables of what `run_study` found: by name "title", "columns" by key, "rows" by key and "note"."""
    rows: dict[str, list[dict[str, Any]]] = {}
    about: dict[str, list[str]] = {}
    for name, part in found.items():
        kind, _, tokens = name.partition("-")
        for row in summarise(part["cells"], options.methods):
            if "first" in row:
                for key, name in HITS.items():
                    found_in = [cell[row["method"]][name] for cell in part["cells"]]
                    row[key] = [int(sum(found_in)), len(found_in)]
            row |= {"tokens": int(tokens)} if tokens else {}
            row["seconds"] = row["seconds"][0]
            rows.setdefault(kind, []).append(row | {"method": label_of(row["method"], options)})
        about.setdefault(kind, []).append(part["about"])
        if kind == "licences":
            names = [f"{method}, {FRESH}" for method in options.methods if method != "random"]
            rows["sanity"] = [
                row | {"method": label_of(row["method"].removesuffix(f", {FRESH}"), options)}
                for row in summarise(part["cells"], names)
            ]
            about["sanity"] = [part["about"]]
    return {
        kind: {
            "title": TITLES[kind].format(passages=tasks.PASSAGES),
            "columns": COLUMNS[kind],
            "rows": rows[kind],
            "note": f"{'; '.join(about[kind])}. {'' if kind == 'needle' else NOTE}".strip(),
        }
        for kind in TITLES
        if rows.get(kind)
    }


def label_of(method: str, options: FaithfulnessOptions) -> str:
    return LABELS.get(method, "{method}").format(method=method, steps=options.steps)


def show(value: Any, column: Mapping[str, Any]) -> str:
    """Return a cell as text, as docs/tables.py writes it."""
    if isinstance(value, list):
        return str(column["join"]).join(show(part, column) for part in value)
    return f"{value:.{column.get('digits', 3)}f}" if isinstance(value, float) else "" if value is None else str(value)
