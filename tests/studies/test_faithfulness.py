"""Protects the study of faithfulness: units, pointing, means, cells that are taken again, its page's tables."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from repository import load_script
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tiny_models import build, image_inputs, text_inputs

from fa_transformers.data.sets import digit_canvas
from fa_transformers.models import (
    FABertConfig,
    FABertForSequenceClassification,
    FAViTConfig,
    FAViTForImageClassification,
    FAViTModel,
)
from fa_transformers.studies import faithfulness_study as study
from fa_transformers.studies.faithfulness_tasks import Case, FaithfulnessOptions, Task, fit_head, join_sentences

OPTIONS = FaithfulnessOptions(methods=("gradient_x_input", "occlusion", "random"), beam_size=1, num_random=1)


def make_task(count=2):
    model = build(FABertConfig, FABertForSequenceClassification, classifier_pooling="mean", num_hidden_layers=1)
    inputs = text_inputs("AutoModel", (12,))
    units = torch.arange(12)[None] // 4
    cases = [Case(inputs, units, units, frozenset({0, 2})) for _ in range(count)]
    return Task(model, count, cases.__getitem__, "two texts", {"model": "tiny"})


def test_sentences_join_to_runs_of_about_as_many_tokens():
    sentences = torch.tensor([[-1] + [0] * 7 + [1] + [2] * 4 + [3] * 2 + [4] * 2 + [-1]])
    assert join_sentences(sentences, 4).tolist() == [[-1] + [0] * 7 + [1] + [2] * 4 + [3] * 4 + [-1]]
    assert join_sentences(sentences, 1).unique().tolist() == [-1, 0]


def test_cells_of_a_canvas_with_whole_digits_are_those_that_hold_them():
    pictures = digit_canvas.enlarge_digits(digit_canvas.DIGIT_PX)
    indices, classes = digit_canvas.split_digits(0)["test"]
    canvas, label, whole = next(digit_canvas.draw_canvases("test", 1, 128, 3, 0))
    known = {pictures[index].tobytes() for index in indices[classes == label]}
    found = []
    for cell in range(64):
        row, column = cell // 8 * 16, cell % 8 * 16
        places = [(row + down, column + right) for down in range(5) for right in range(5)]
        if any(canvas[top : top + 12, left : left + 12].tobytes() in known for top, left in places):
            found.append(cell)
    assert found == sorted(whole) and len(whole) == 3


def test_a_head_on_features_answers_as_the_logistic_regression_that_was_fitted(tmp_path):
    build(FAViTConfig, FAViTModel).save_pretrained(tmp_path / "features")
    images = [(number % 6, image_inputs(32, 32, batch=1, seed=number)) for number in range(12)]
    fit_head(tmp_path / "features", images, tmp_path / "classifier")
    model = FAViTForImageClassification.from_pretrained(tmp_path / "classifier").eval()
    with torch.no_grad():
        features = torch.cat([model.base_model(**one).last_hidden_state[:, 0] for _, one in images]).double().numpy()
        answers = torch.cat([model(**one).logits.softmax(dim=1) for _, one in images])
    fitted = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(
        features, [one for one, _ in images]
    )
    np.testing.assert_allclose(answers, fitted.predict_proba(features), atol=1e-4)


def test_pointing_counts_the_highest_and_the_largest_scores_that_hold_the_truth():
    scores = torch.tensor([3.0, -4.0, 2.0, 1.0])
    right = study.point(scores, frozenset({0, 2}))
    assert (right["first"], right["share"], right["all"], right["chance"]) == (1.0, 1.0, 1.0, 0.5)
    assert (right["first_by_size"], right["share_by_size"], right["all_by_size"]) == (0.0, 0.5, 0.0)
    wrong = study.point(scores, frozenset({1, 3}))
    assert (wrong["first"], wrong["share"], wrong["first_by_size"], wrong["share_by_size"]) == (0.0, 0.0, 1.0, 0.5)


def test_means_have_intervals_and_differences_are_those_of_a_document():
    cells = [
        {"rows": {"comprehensiveness": 0.5, "random": 0.1, "seconds": 1.0}},
        {"rows": {"comprehensiveness": 0.7, "random": 0.5, "seconds": 3.0}},
        {"rows": {"seconds": 2.0}},  # no order of whose units differs from another
    ]
    (row,) = study.summarise(cells, ["rows"])
    half = 1.96 * np.std([0.4, 0.2], ddof=1) / 2**0.5
    assert row["above"] == pytest.approx([0.3, half]) and row["seconds"][0] == 2.0
    assert study.mean_of([]) is None and study.mean_of([2.0]) == [2.0]


def test_a_document_that_is_done_is_taken_unless_the_settings_differ(tmp_path, monkeypatch):
    options, task = replace(OPTIONS, output_dir=tmp_path), make_task()
    first = study.kept_cell(options, "licences", task, 0)
    assert set(first) == {*options.methods, *(f"{name}, {study.FRESH}" for name in options.methods[:2])}
    names = {"seconds", "first", "share", "all", "chance", "comprehensiveness", "sufficiency", "random"}
    assert names < set(first["occlusion"]) and -1 <= first["occlusion, re-initialised"]["rank_correlation"] <= 1
    monkeypatch.setattr(study, "judge", lambda *_: {"occlusion": {"seconds": 9.0}})
    assert study.kept_cell(replace(options, num_licences=7), "licences", task, 0) == first
    assert study.kept_cell(replace(options, steps=3), "licences", task, 0) == {"occlusion": {"seconds": 9.0}}


def test_tables_have_their_columns_and_the_page_is_given_them(tmp_path, monkeypatch, capsys):
    options = replace(OPTIONS, output_dir=tmp_path / "out")
    task = make_task()
    fresh = study.reinitialised(task.model, 0)
    cells = [study.judge(options, task.model, task.case(number), number, fresh) for number in range(2)]
    found = {name: {"about": name, "cells": cells} for name in ("licences", "digits", "dinov2", "needle-8192")}
    script = load_script("faithfulness")
    monkeypatch.setattr(script, "run_study", lambda _: found)
    flags = ["--methods", *options.methods, "--output_dir", str(options.output_dir)]
    tables = script.main([*flags, "--results", str(tmp_path / "explain.json")])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == tables
    assert set(tables) == set(study.TITLES)
    for name, table in json.loads((tmp_path / "explain.json").read_text())["tables"].items():
        columns = tables[name.removeprefix("faithfulness-")]["columns"]
        assert all(None not in row for row in table["rows"]) and len(table["columns"]) == len(columns)
    assert [row["hits"] for row in tables["needle"]["rows"]][1][1] == 2


@pytest.mark.parametrize(
    "wrong",
    [{"tasks": ("poems",)}, {"methods": ()}, {"steps": 0}, {"lengths": (64,)}, {"num_stamps": 0}, {"seed": -1}],
)
def test_mistakes_name_the_flag(wrong):
    with pytest.raises(ValueError, match=f"--{next(iter(wrong))} "):
        FaithfulnessOptions(**wrong).check()


def test_a_missing_model_is_an_error_with_the_command_that_makes_it(tmp_path):
    options = FaithfulnessOptions(tasks=("needle",), needle=tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="--needle .*none: .* make it by accelerate launch .*needle.py"):
        options.check_sources()
