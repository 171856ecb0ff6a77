"""Protects the table of answers: the right answer in the right row, whatever the batches, and nothing that executes."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from tiny_models import make_tokenizer
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput

import fa_transformers as fa
from fa_transformers.data.batching import LengthGroupedBatchSampler
from fa_transformers.data.facts import DataFacts
from fa_transformers.data.labelled import LabelledData
from fa_transformers.tables import harmless_cell
from fa_transformers.training import finetune
from fa_transformers.training.predictions import Predictions
from fa_transformers.training.report import describe_labels
from fa_transformers.training.scoring import evaluate, predict

PROBLEM_TYPES = ["single_label_classification", "multi_label_classification", "regression"]


@pytest.fixture(autouse=True)
def fresh_accelerate(tmp_path, monkeypatch):
    """Accelerate keeps its settings for the whole process, and each run must choose its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


class Echo(torch.nn.Module):
    """Gives back the logits that the batch holds."""

    def forward(self, logits, labels=None):
        return SequenceClassifierOutput(loss=None if labels is None else logits.mean(), logits=logits)


def make_data(problem_type: str, names: list[str]) -> LabelledData:
    facts = DataFacts(name="d", license="l", attribution="a")
    known = None if problem_type == "regression" else names
    return LabelledData(datasets.DatasetDict(), problem_type, known, facts, is_demo=False)


def make_loader(accelerator: Accelerator, logits: np.ndarray, labels: np.ndarray | None = None) -> DataLoader:
    """A loader whose batches are of unequal size and not in the order of the examples."""
    lengths = [1 + (7 * index) % 5 for index in range(len(logits))]
    sampler = LengthGroupedBatchSampler(lengths, 4, max_tokens=8, shuffle=False)

    def collate(indices: list[int]) -> dict:
        batch = {"logits": torch.tensor(logits[indices], dtype=torch.float32)}
        return batch if labels is None else batch | {"labels": torch.tensor(labels[indices])}

    return accelerator.prepare(DataLoader(range(len(logits)), batch_sampler=sampler, collate_fn=collate))


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def answers(problem_type: str, logits: np.ndarray, names: list[str], given: np.ndarray | None = None, **known) -> list:
    accelerator, data = Accelerator(cpu=True), make_data(problem_type, names)
    loader = make_loader(accelerator, logits, given)
    predictions = Predictions(data, loader, **known)
    if given is None:
        predict(Echo(), loader, accelerator, predictions)
    else:
        evaluate(Echo(), loader, accelerator, data, predictions)
    predictions.write(Path("answers.csv"))
    return read(Path("answers.csv"))


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
    assert [(row["row"], row["true"]) for row in rows] == [
        (str(i + 1), ["ant", "bee", "cat"][i % 3]) for i in range(11)
    ]


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
        assert len(row) == 2 + 10 and row["predicted"] == row["best 1"] == f"class {values.argmax()}"
        found = [float(row[f"score {place}"]) for place in range(1, 6)]
        np.testing.assert_allclose(found, np.sort(values)[::-1][:5], atol=1e-5)


def test_a_number_is_written_as_it_is():
    logits = np.random.default_rng(0).normal(size=(11, 1))
    rows = answers("regression", logits, [], logits[:, 0].astype(np.float32), labels=logits[:, 0].tolist())
    np.testing.assert_allclose([float(row["predicted"]) for row in rows], logits[:, 0], rtol=1e-5)
    assert [row["true"] for row in rows] == [row["predicted"] for row in rows]


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


def test_a_run_answers_rows_without_labels_and_uploads_none_of_it(checkpoint, monkeypatch, capsys):
    texts = ["red", "one two one", "blue blue red one two"] * 3
    add_unlabelled(monkeypatch, {"text": texts, "row": [3 * number for number in range(1, 10)]})
    rows = {"text": ["red one", "blue two"] * 20, "label": ["red", "blue"] * 20}
    model = fa.ModelOptions(model_name_or_path=str(checkpoint), max_length=16)
    loop = fa.LoopOptions(
        use_cpu=True, num_threads=1, report_to="none", max_steps=2, output_dir=Path("mine"), mixed_precision="no"
    )
    result = fa.finetune(rows, model=model, loop=replace(loop, per_device_eval_batch_size=2))
    found = read(Path("mine/predictions.csv"))
    assert [row["row"] for row in found] == [str(3 * number) for number in range(1, 10)]
    for row, text in zip(found, texts, strict=True):
        with torch.no_grad():
            odds = result.model.eval()(**result.processor(text, return_tensors="pt")).logits.softmax(dim=1)[0]
        scores = [float(row["score of blue"]), float(row["score of red"])]
        np.testing.assert_allclose(scores, odds.numpy(), atol=2e-6)
    assert len(read(Path("mine/scored_examples.csv"))) == result.summary["num_examples"]
    assert not {"predictions.csv", "scored_examples.csv"} & set(
        json.loads(Path("mine/self_test.json").read_text())["files"]
    )
    assert "wrote mine/predictions.csv" in capsys.readouterr().out


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
    assert [row["row"] for row in read(tmp_path / "mine" / "predictions.csv")] == ["1", "2", "3"]


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
