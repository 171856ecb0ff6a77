"""Protects the comparison of recipes: sets whose splits share no file, equal time, and runs that are taken again."""

from dataclasses import replace
from types import SimpleNamespace

import datasets
import pytest

from fa_transformers.data.sets import python_docs
from fa_transformers.studies import recipe_choice
from fa_transformers.studies.recipe_choice import RECIPES, RecipeOptions, run_recipes, score_tfidf, summarise_recipes


def documents(kind: str):
    for label in python_docs.PROJECTS:
        for file in range(20):
            yield label, f"{label}/{file}.py", [f"{label} file {file} text {number} of numpy" for number in range(3)]


def test_names_are_masked_and_a_file_is_in_one_split(monkeypatch):
    monkeypatch.setattr(python_docs, "_documents", documents)
    splits = python_docs.load_python_docs("docstrings")
    files = {name: {(row["label"], row["text"].split()[2]) for row in part} for name, part in splits.items()}
    assert all(len(part) for part in splits.values())
    assert not files["train"] & files["test"] and not files["train"] & files["validation"]
    texts = [text for part in splits.values() for text in part["text"]]
    assert len(texts) == 3 * 20 * len(python_docs.PROJECTS)
    assert all(text.startswith("NAME file") and text.endswith("of NAME") for text in texts)


def fake_fit(calls: list):
    def run(job, source, data, accelerator, output_dir):
        calls.append(job)
        loop, run = job.loop, {}
        if loop.recovery_steps:
            run["recovery"] = {"seconds": 0.5 * loop.recovery_steps, "steps": loop.recovery_steps}
        state = SimpleNamespace(seconds=2.0 * loop.max_steps, step=loop.max_steps, tokens=100 * loop.max_steps)
        return SimpleNamespace(scores={"accuracy": 0.5, "macro_f1": 0.4}, state=state, run=run)

    return run


def test_every_recipe_gets_the_same_time_and_finished_runs_are_taken_again(tmp_path, monkeypatch):
    calls: list = []
    texts = {"text": ["one", "two"] * 40, "label": ["a", "b"] * 40}
    splits = {split: datasets.Dataset.from_dict(texts) for split in ("train", "validation", "test")}
    monkeypatch.setattr(recipe_choice, "fit", fake_fit(calls))
    monkeypatch.setattr(recipe_choice, "read_source", lambda name: None)
    monkeypatch.setattr(recipe_choice, "make_accelerator", lambda loop: None)  # its precision is one for all tests
    monkeypatch.setattr(recipe_choice, "load_set", lambda name: datasets.DatasetDict(splits))
    options = RecipeOptions(sets=("licences",), seeds=(0, 1), seconds=200.0, output_dir=tmp_path)
    rows = run_recipes(options)
    assert all(abs(row["seconds"] - 200.0) <= 1.0 for row in rows), "half a step"
    transferred = {row["steps"] for row in rows if RECIPES[row["recipe"]]["recovery_steps"]}
    assert len(transferred) == 1 and max(transferred) < 100, "what the transfer takes is left for the rest"
    trained = len(RECIPES) + len(rows)
    assert len(calls) == trained == 3 * len(RECIPES), "a recipe is timed once for all seeds"
    again = run_recipes(options)
    assert again == rows and len(calls) == trained
    run_recipes(replace(options, seeds=(2,)))
    assert len(calls) == trained + 2 * len(RECIPES)
    run_recipes(replace(options, seconds=100.0))
    assert len(calls) == 2 * trained + 2 * len(RECIPES), "of another budget"
    table = summarise_recipes(rows)
    assert [row["runs"] for row in table] == [2] * len(RECIPES) and table[0]["mean"] == table[0]["licences"] == 0.5


def test_tfidf_learns_the_training_documents_and_is_scored_on_the_test_ones(monkeypatch):
    learnt = {"text": ["the first one", "the second two"] * 10, "label": ["a", "b"] * 10}
    tested = {"text": ["one", "two", "two", "two"], "label": ["a", "b", "b", "a"]}
    splits = {"train": learnt, "validation": learnt, "test": tested}
    made = datasets.DatasetDict({split: datasets.Dataset.from_dict(rows) for split, rows in splits.items()})
    monkeypatch.setattr(recipe_choice, "load_set", {"modules": made}.get)
    assert score_tfidf("modules") == 0.75, "all but the one whose label is another's"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sets": ("letters",)}, "--sets 'letters' is unknown"),
        ({"recipes": ()}, "--recipes names none"),
        ({"seconds": 0.0}, "--seconds must be above 0"),
        ({"seeds": ()}, "--seeds needs a number"),
    ],
)
def test_options_that_no_run_can_use_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        RecipeOptions(**wrong).check()
