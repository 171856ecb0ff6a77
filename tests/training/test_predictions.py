"""Protects the tables of answers: the right answer in the right row, the worst errors first, nothing that executes."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from echo_answers import make_data, write_answers
from PIL import Image
from tiny_models import make_tokenizer
from transformers import BertConfig, BertForSequenceClassification

import fa_transformers as fa
from fa_transformers.tables import harmless_cell
from fa_transformers.training import finetune
from fa_transformers.training.report import describe_labels


@pytest.fixture(autouse=True)
def fresh_accelerate(tmp_path, monkeypatch):
    """Accelerate keeps its settings for the whole process, and each run must choose its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def answers(*arguments, **known) -> list[dict[str, str]]:
    return read(write_answers(*arguments, **known))


def test_each_row_has_its_class_and_probabilities():
    logits = np.random.default_rng(0).normal(size=(11, 3))
    rows = answers("single_label_classification", logits, ["ant", "bee", "cat"], source_rows=range(5, 16))
    odds = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert [row["row"] for row in rows] == [str(number) for number in range(5, 16)]
    assert [row["predicted"] for row in rows] == [["ant", "bee", "cat"][index] for index in logits.argmax(axis=1)]
    found = [[float(row[f"score of {name}"]) for name in ("ant", "bee", "cat")] for row in rows]
    np.testing.assert_allclose(found, odds, atol=1e-5)


def test_scored_rows_say_the_true_label_beside_the_predicted_one():
    logits = np.random.default_rng(0).normal(size=(11, 3))
    labels = np.arange(11) % 3
    rows = answers("single_label_classification", logits, ["ant", "bee", "cat"], labels, labels=labels.tolist())
    assert sorted((int(row["row"]), row["true"]) for row in rows) == [
        (i + 1, ["ant", "bee", "cat"][i % 3]) for i in range(11)
    ]
    assert {row["correct"] == "True" for row in rows if row["true"] == row["predicted"]} == {True}


def test_the_surest_errors_come_first_and_the_surest_right_answers_last():
    logits = np.random.default_rng(1).normal(size=(40, 3))
    labels = np.arange(40) % 3
    rows = answers("single_label_classification", logits, ["ant", "bee", "cat"], labels, labels=labels.tolist())
    wrong = [row for row in rows if row["correct"] == "False"]
    assert rows[: len(wrong)] == wrong and 10 < len(wrong) < 40
    assert all(row["true"] != row["predicted"] for row in wrong)
    scores = [float(row["score"]) for row in rows]
    assert scores[: len(wrong)] == sorted(scores[: len(wrong)], reverse=True)
    assert scores[len(wrong) :] == sorted(scores[len(wrong) :])
    assert all(float(row[f"score of {row['predicted']}"]) == float(row["score"]) for row in rows)


@pytest.mark.parametrize("num_classes", [4, 60])
def test_of_several_labels_a_row_is_right_where_all_of_them_are(num_classes):
    random = np.random.default_rng(0)
    logits = random.normal(size=(40, num_classes)) * 4 - 4
    given = (logits > 0) ^ (random.random(logits.shape) < 0.2 / num_classes)
    names, labels = [f"class {index}" for index in range(num_classes)], [np.flatnonzero(row).tolist() for row in given]
    known = dict(given=given.astype(np.float32), labels=labels)
    rows = answers("multi_label_classification", logits, names, **known)
    is_right = ((logits > 0) == given).all(axis=1)
    places = [int(row["row"]) - 1 for row in rows]
    assert [row["correct"] for row in rows] == [str(is_right[place]) for place in places]
    assert not is_right[places[0]] and is_right[places[-1]] and list(is_right[places]) == sorted(is_right)
    odds = 1 / (1 + np.exp(-logits))
    # Of the error a class that it is about is the surest one, in the first row the surest of all rows.
    worst = np.where(given, 1 - odds, odds).max(axis=1)
    if num_classes == 4:
        assert places[0] == worst.argmax()
        sureness = np.maximum(odds, 1 - odds).min(axis=1)
        np.testing.assert_allclose([float(row["score"]) for row in rows], sureness[places], atol=1e-5)


def test_documents_begin_on_one_line_without_formula_or_token(monkeypatch):
    token = "hf_" + "a" * 40
    monkeypatch.setenv("HF_TOKEN", token)
    texts = ["=1+1\n\nnext\x00\u202e line", "x" * 190 + f" {token}", "word " * 100_000, "-4", "plain", "@me"]
    rows = datasets.Dataset.from_dict({"text": texts})
    table = answers("single_label_classification", np.eye(2)[[0] * 6], ["a", "b"], rows=rows)
    found = [row["text"] for row in table]
    assert found[0] == "'=1+1 next line" and found[3:] == ["-4", "plain", "'@me"]
    assert found[1] == "x" * 190 + " hidden-t…" and found[2] == ("word " * 40)[:199] + "…"
    assert [row["row"] for row in table] == [str(number) for number in range(1, 7)]


@pytest.mark.parametrize("num_classes", [4, 60])
def test_several_labels_are_a_list_of_names(num_classes):
    logits = np.random.default_rng(0).normal(size=(11, num_classes)) - 1
    names = [f"class {index}" for index in range(num_classes)]
    rows = answers("multi_label_classification", logits, names)
    for row, values in zip(rows, logits, strict=True):
        assert set(json.loads(row["predicted"])) == {names[index] for index in np.flatnonzero(values > 0)}
        if num_classes > 50:
            best = np.argsort(-values)[:5]
            assert [row[f"best {place}"] for place in range(1, 6)] == [names[index] for index in best]
            assert row["num_predicted"] == str((values > 0).sum())


def test_of_many_classes_the_best_five_are_written():
    logits = np.random.default_rng(0).normal(size=(11, 1000))
    rows = answers("single_label_classification", logits, [f"class {index}" for index in range(1000)])
    odds = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    for row, values in zip(rows, odds, strict=True):
        assert len(row) == 3 + 10 and row["predicted"] == row["best 1"] == f"class {values.argmax()}"
        found = [float(row[f"score {place}"]) for place in range(1, 6)]
        np.testing.assert_allclose(found, np.sort(values)[::-1][:5], atol=1e-5)


def test_a_number_is_written_as_it_is():
    logits = np.random.default_rng(0).normal(size=(11, 1))
    rows = answers("regression", logits, [], logits[:, 0].astype(np.float32), labels=logits[:, 0].tolist())
    found = [float(row["predicted"]) for row in sorted(rows, key=lambda row: int(row["row"]))]
    np.testing.assert_allclose(found, logits[:, 0], rtol=1e-5)
    assert [row["true"] for row in rows] == [row["predicted"] for row in rows]


def test_of_numbers_the_largest_errors_come_first():
    logits = np.random.default_rng(0).normal(size=(11, 1))
    true = np.zeros(11, np.float32)
    rows = answers("regression", logits, [], true, labels=true.tolist())
    errors = [float(row["error"]) for row in rows]
    assert errors == [float(row["predicted"]) for row in rows] and min(errors) < 0 < max(errors)
    assert np.all(np.diff(np.abs(errors)) <= 0)


@pytest.mark.parametrize("text", ["=1+2", "+cmd|' /C calc'!A0", "-x", "@SUM(A1)", " =1", "\t=1", "\n@a", "-1+2"])
def test_a_name_that_spreadsheets_would_execute_is_a_text(text):
    assert harmless_cell(text) == f"'{text}"
    rows = answers("single_label_classification", np.eye(2)[[0] * 5], [text, 'b "quoted", c'])
    assert [row["predicted"] for row in rows] == [f"'{text}"] * 5
    assert all(name[0].isalpha() for name in rows[0])


@pytest.mark.parametrize("text", ["-1", "+2.5", "-1e-3", "sea", "a=b", ""])
def test_plain_names_and_numbers_stay_as_they_are(text):
    assert harmless_cell(text) == text


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    tokenizer = make_tokenizer(["red", "blue", "one", "two"], max_length=16)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    return folder


def add_unlabelled(monkeypatch, columns: dict) -> None:
    """Let the reader find rows without labels beside the others."""
    load_data = finetune.load_data
    part = datasets.Dataset.from_dict(columns)
    monkeypatch.setattr(finetune, "load_data", lambda *given: replace(load_data(*given), unlabelled=part))


def test_a_run_answers_rows_without_labels_and_uploads_none_of_it(checkpoint, monkeypatch):
    texts = ["red", "one two one", "blue blue red one two"] * 3
    add_unlabelled(monkeypatch, {"text": texts, "row": [3 * number for number in range(1, 10)]})
    rows = {"text": ["red one", "blue two"] * 20, "label": ["red", "blue"] * 20}
    model = fa.ModelOptions(model_name_or_path=str(checkpoint), max_length=16)
    loop = fa.LoopOptions(
        use_cpu=True, num_threads=1, report_to="none", max_steps=2, output_dir=Path("mine"), mixed_precision="no"
    )
    result = fa.finetune(rows, model=model, loop=replace(loop, per_device_eval_batch_size=2))
    found = read(Path("mine/unlabelled_predictions.csv"))
    assert [row["text"] for row in found] == texts
    assert [row["row"] for row in found] == [str(3 * number) for number in range(1, 10)]
    for row, text in zip(found, texts, strict=True):
        with torch.no_grad():
            odds = result.model.eval()(**result.processor(text, return_tensors="pt")).logits.softmax(dim=1)[0]
        scores = [float(row["score of blue"]), float(row["score of red"])]
        np.testing.assert_allclose(scores, odds.numpy(), atol=2e-6)
    scored = read(Path("mine/predictions.csv"))
    assert len(scored) == result.summary["num_examples"]
    assert all(row["text"].split()[0] == row["true"] for row in scored), "each text stands beside its own label"
    sent = json.loads(Path("mine/self_test.json").read_text())["files"]
    of_the_data = {"predictions.csv", "unlabelled_predictions.csv", "report.html", "training_curve.png"}
    assert of_the_data <= {path.name for path in Path("mine").iterdir()} and not of_the_data & set(sent)
    page = Path("mine/report.html").read_text()
    assert "outputs" not in page and "pipeline(&#34;text-classification&#34;, &#34;mine&#34;" in page


def test_images_without_labels_are_answered(monkeypatch, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (6, 16, 16, 3), np.uint8)
    features = datasets.Features({"image": datasets.Image(), "row": datasets.Value("int64")})
    columns = {"image": [Image.fromarray(image) for image in pixels[:3]], "row": [1, 2, 3]}
    part = datasets.Dataset.from_dict(columns, features=features)
    load_data = finetune.load_data
    monkeypatch.setattr(finetune, "load_data", lambda *given: replace(load_data(*given), unlabelled=part))
    rows = {"image": list(pixels) * 4, "label": ["a", "b"] * 12}
    model = fa.ModelOptions(model_name_or_path="none", image_size=16)
    loop = fa.LoopOptions(use_cpu=True, num_threads=1, report_to="none", max_steps=1, output_dir=tmp_path / "mine")
    fa.finetune(rows, task="image-classification", model=model, loop=loop)
    assert [row["row"] for row in read(tmp_path / "mine" / "unlabelled_predictions.csv")] == ["1", "2", "3"]


def test_labels_are_counted_by_split_before_training():
    names = [f"class {index}\n" for index in range(30)]
    feature = datasets.ClassLabel(names=names)
    labels = [index for index in range(30) for _ in range(index + 1)]

    def part(values: list, kind=feature) -> datasets.Dataset:
        return datasets.Dataset.from_dict({"label": values}, features=datasets.Features({"label": kind}))

    data = make_data("single_label_classification", names)
    splits = datasets.DatasetDict(train=part(labels), test=part([29, 0, 1]))
    lines = [line.split() for line in describe_labels(replace(data, dataset=splits)).splitlines()]
    assert lines[0] == ["label", "train", "test"]
    assert lines[2] == ["class", "29", "30", "1"] and len(lines) == 2 + 20 + 2
    assert lines[-2] == ["(10", "other", "classes)", str(sum(range(1, 11))), "2"]
    assert lines[-1] == ["(rows)", "465", "3"]
    several = datasets.DatasetDict(train=part([[0, 1], [], [1]], datasets.List(feature)))
    table = describe_labels(replace(data, problem_type="multi_label_classification", dataset=several)).splitlines()
    assert table[2].split() == ["class", "1", "2"] and table[-1].split() == ["(rows)", "3"]
    numbers = datasets.DatasetDict(train=part([1.0, 2.5, -3.0], datasets.Value("float32")))
    table = describe_labels(replace(make_data("regression", []), dataset=numbers)).splitlines()
    assert table[0].split() == ["split", "rows", "min", "mean", "max"]
    assert table[2].split() == ["train", "3", "-3", "0.166667", "2.5"]
