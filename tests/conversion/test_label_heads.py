"""Protects heads of labels: one is carried over only to the same labels, and a fresh one says what was dropped."""

import pytest
import torch
from stock_models import IMAGES, TEXT, make_stock

from fa_transformers import convert_checkpoint, load_factorized

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
COLOURS = {0: "red", 1: "blue", 2: "green"}
SIZES = {0: "small", 1: "medium", 2: "large"}


def classifier(**fields):
    return make_stock("BertForSequenceClassification", {**TEXT, "max_position_embeddings": 16, **fields})


@pytest.mark.parametrize(
    ("before", "asked", "reason", "problem_type"),
    [
        ({"problem_type": SINGLE}, {"num_labels": 1, "problem_type": REGRESSION}, "3 labels, the result f", REGRESSION),
        ({"problem_type": SINGLE}, {"num_labels": 1}, "outputs for 3 labels, the result for 1 label", None),
        ({"problem_type": SINGLE}, {"num_labels": 5}, "outputs for 3 labels, the result for 5 labels", None),
        ({"problem_type": SINGLE}, {"problem_type": MULTI}, f"trained for {SINGLE}, the result is for {MULTI}", MULTI),
        ({}, {"problem_type": MULTI}, f"trained for {SINGLE}, the result is for {MULTI}", MULTI),
        ({"problem_type": MULTI}, {"problem_type": SINGLE}, f"trained for {MULTI}, the result is for {SINGLE}", SINGLE),
        ({"id2label": COLOURS, "problem_type": MULTI}, {"id2label": SIZES}, "labels are 'red', 'blue', 'green'", None),
    ],
)  # fmt: skip
def test_other_labels_get_a_fresh_head_and_one_warning(before, asked, reason, problem_type, caplog):
    stock = classifier(**{"num_labels": 3, **before})
    conversion = convert_checkpoint(stock, **asked)
    config = conversion.model.config
    assert config.problem_type == problem_type
    (warning,) = (record.getMessage() for record in caplog.records if "starts fresh" in record.getMessage())
    assert reason in warning
    assert "Dropped: classifier.weight (3 x 32), classifier.bias (3)." in warning
    assert f"Drawn anew: classifier.weight ({config.num_labels} x 32), classifier.bias ({config.num_labels})" in warning
    actions = {change.source or change.result: change.action for change in conversion.report}
    assert actions["classifier.weight"] in ("dropped", "new")
    assert not torch.equal(conversion.model.classifier.weight, stock.classifier.weight)
    assert torch.equal(conversion.model.bert.pooler.dense.weight, stock.bert.pooler.dense.weight)


@pytest.mark.parametrize(
    ("before", "asked"),
    [
        ({"id2label": COLOURS, "problem_type": MULTI}, {"num_labels": 3}),
        ({"id2label": COLOURS, "problem_type": MULTI}, {"id2label": COLOURS}),
        ({"id2label": COLOURS}, {"problem_type": SINGLE, "num_labels": 3}),  # what transformers takes it for
        ({"num_labels": 3, "problem_type": MULTI}, {"id2label": COLOURS}),  # whose names nobody gave
    ],
)
def test_the_same_labels_keep_head_names_and_problem_type(before, asked, caplog):
    stock = classifier(**before)
    model = convert_checkpoint(stock, **asked).model
    assert torch.equal(model.classifier.weight, stock.classifier.weight) and "starts fresh" not in caplog.text
    assert model.config.id2label == COLOURS
    assert model.config.problem_type == asked.get("problem_type", before.get("problem_type"))


@pytest.mark.parametrize(
    ("class_name", "fields", "asked", "dropped"),
    [
        ("BertForTokenClassification", TEXT | {"id2label": COLOURS}, {"num_labels": 2}, "classifier.weight (3 x 32)"),
        ("BertForTokenClassification", TEXT | {"id2label": COLOURS}, {"id2label": SIZES}, "classifier.weight (3 x 32)"),
        ("ViTForImageClassification", IMAGES | {"id2label": COLOURS}, {"num_labels": 4}, "classifier.weight (3 x 32)"),
        (
            "BertForQuestionAnswering",
            TEXT,
            {"auto_class": "AutoModelForSequenceClassification", "num_labels": 3},
            "qa_outputs.weight (2 x 32)",
        ),
        (
            "BertForMaskedLM",
            TEXT,
            {"auto_class": "AutoModelForTokenClassification"},
            "cls.predictions.transform.dense.weight (32 x 32)",
        ),
    ],
)  # fmt: skip
def test_other_heads_say_what_was_dropped(class_name, fields, asked, dropped, caplog):
    conversion = convert_checkpoint(make_stock(class_name, fields), **asked)
    assert caplog.text.count("is not carried over and starts fresh") == 1
    assert f"The head of {class_name}" in caplog.text and dropped in caplog.text
    label2id = {name: index for index, name in conversion.model.config.id2label.items()}
    assert conversion.model.config.label2id == label2id


def test_an_encoder_without_a_head_loses_none(caplog):
    convert_checkpoint(make_stock("BertModel", TEXT), auto_class="AutoModelForSequenceClassification", num_labels=4)
    convert_checkpoint(make_stock("BertForQuestionAnswering", TEXT), auto_class="AutoModel")
    assert "starts fresh" not in caplog.text


def test_a_folder_of_ours_is_taken_on_to_other_labels(tmp_path, caplog):
    stock = make_stock("ViTForImageClassification", {**IMAGES, "id2label": COLOURS, "problem_type": SINGLE})
    convert_checkpoint(stock).model.save_pretrained(tmp_path)
    loaded = load_factorized(tmp_path, "AutoModelForImageClassification", num_labels=1, problem_type=REGRESSION)
    assert loaded.classifier.weight.shape == (1, 32)
    assert loaded.config.problem_type == REGRESSION and caplog.text.count("starts fresh") == 1
