"""Explanations of one answer add up, cost what they say, and mark the characters and patches that scores are of."""

import itertools
import json

import numpy as np
import pytest
import torch
from tiny_predictors import write_image_model, write_text_model

from fa_transformers.data.readers.tables import DataError
from fa_transformers.explain.attribution import attribute
from fa_transformers.explain.deletion import deleted_probabilities
from fa_transformers.prediction import explaining
from fa_transformers.prediction.explaining import default_methods, explain_document, explain_image, picture_of
from fa_transformers.prediction.predictor import Predictor

TEXT = "sea ship. law  court red! blue sea\n\nlaw law? ship " * 4 + "end"


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    return Predictor.from_pretrained(write_text_model(tmp_path_factory.mktemp("text")), device="cpu")


@pytest.fixture(scope="module")
def seer(tmp_path_factory):
    return Predictor.from_pretrained(write_image_model(tmp_path_factory.mktemp("image")), device="cpu")


def make_image(height: int = 30, width: int = 45) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("passage", ["sentence", 1, 4, 1000])
def test_passages_hold_the_words_that_their_scores_are_of(reader, passage):
    explanation = explain_document(reader, TEXT, passage=passage, deletion_tokens=0)
    tokenizer = reader.inputs.tokenizer
    ids = [tokenizer(explanation.text_of(number))["input_ids"][1:-1] for number in range(len(explanation.passages))]
    whole = tokenizer(TEXT)["input_ids"][1:-1]
    assert list(itertools.chain(*ids)) == whole, "each token in one passage, in order"
    if passage != "sentence":
        assert {len(own) for own in ids[:-1]} <= {passage}
    tokens = attribute(
        reader.model,
        {"input_ids": torch.tensor([[tokenizer.cls_token_id, *whole, tokenizer.sep_token_id]])},
        method="gradient_x_input",
    )
    sums = np.add.reduceat(tokens[0, 1:-1].double().numpy(), np.cumsum([0, *map(len, ids[:-1])]))
    scores = explanation.find("gradient_x_input")
    assert np.allclose(scores.values, sums, atol=1e-6)
    assert scores.label == explanation.answer.label and explanation.random is None


def test_the_answer_is_the_predictors_and_labels_are_the_most_probable(reader):
    explanation = explain_document(reader, TEXT, deletion_tokens=0)
    (answer,) = reader([TEXT])
    assert explanation.answer.label == answer.label and explanation.num_tokens == answer.num_tokens
    assert np.allclose(list(explanation.answer.scores.values()), list(answer.scores.values()), atol=1e-6)
    expected = sorted((score, name) for name, score in answer.scores.items() if score >= 0.05)[::-1]
    assert list(explanation.probabilities) == [name for _, name in expected]
    assert list(explain_document(reader, TEXT, labels=["bee", "bee"]).probabilities) == ["bee"]


def test_rows_are_of_each_layer_and_the_last_is_attributes(reader):
    explanation = explain_document(reader, TEXT, methods=["rows", "rollout"], deletion_tokens=0)
    assert [one.layer for one in explanation.scores] == [0, None]  # the model has one layer
    batch = {"input_ids": torch.tensor([reader.inputs.tokenizer(TEXT)["input_ids"]])}
    row = attribute(reader.model, batch, method="rows")[0, 1:-1].double()
    assert np.isclose(explanation.find("rows").values.sum(), float(row.sum()), atol=1e-6)
    with pytest.raises(KeyError, match="no scores by 'occlusion'"):
        explanation.find("occlusion")


@pytest.mark.parametrize(
    ("sizes", "first"),
    [
        ((64, 4096, 1), "occlusion"),
        ((65, 4096, 1), "integrated_gradients"),
        ((64, 4096, 2), "integrated_gradients"),
        ((1000, 2**18 // 24 + 1, 1), None),
    ],
)
def test_the_method_to_trust_most_comes_first_as_far_as_its_passes_are_few(sizes, first, monkeypatch):
    cheap = explaining.CHEAP_METHODS
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "captum")
    assert default_methods(*sizes, steps=8) == ((first, *cheap) if first else cheap)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert default_methods(*sizes, steps=8) == (("occlusion", *cheap) if first == "occlusion" else cheap)


def test_a_short_document_is_explained_by_occlusion_first(reader):
    explanation = explain_document(reader, TEXT, deletion_tokens=0)
    methods = list(dict.fromkeys(one.method for one in explanation.scores))
    assert methods == ["occlusion", *explaining.CHEAP_METHODS]


def test_deletions_are_measured_in_order_within_the_budget(reader, monkeypatch):
    passes = []

    def count(model, inputs, units, deletions):
        passes.extend(deletions)
        return deleted_probabilities(model, inputs, units, deletions)

    monkeypatch.setattr(explaining, "deleted_probabilities", count)
    small = explain_document(reader, TEXT, passage=1, deletion_tokens=1)
    assert len(passes) == 2 * len(explaining.DELETED_SHARES) and small.random is not None
    assert [one.deletion is not None for one in small.scores] == [True] + [False] * (len(small.scores) - 1)
    first = small.scores[0]
    (whole,) = deleted_probabilities(reader.model, *_batch_and_units(reader), [[]])
    assert np.isclose(first.deletion.probabilities[first.label][0], whole.max(), atol=1e-6)
    assert passes[3] == first.order()[: len(passes[3])], "the highest first"
    assert first.deletion.shares == pytest.approx([0, *(len(deleted) / first.values.size for deleted in passes[:4])])
    passes.clear()
    large = explain_document(reader, TEXT, passage=1, deletion_tokens=10**6)
    assert all(one.deletion is not None for one in large.scores)
    again = explain_document(reader, TEXT, passage=1, deletion_tokens=10**6)
    assert again.random == large.random, "the draws are the seed's"


def _batch_and_units(reader):
    ids = torch.tensor([reader.inputs.tokenizer(TEXT)["input_ids"]])
    return {"input_ids": ids}, torch.full(ids.shape, -1)


def test_a_document_that_is_cut_has_no_passages_behind_the_cut_and_pages_begin_where_they_are_said_to(tmp_path):
    model = write_text_model(tmp_path / "m", positions="absolute")
    explanation = explain_document(Predictor.from_pretrained(model, device="cpu"), TEXT, page_starts=[0, 40])
    assert explanation.answer.is_truncated and explanation.num_tokens == 32
    assert explanation.passages[-1].stop < len(TEXT)
    assert [passage.page for passage in explanation.passages] == [1 + (p.start >= 40) for p in explanation.passages]


@pytest.mark.parametrize(("size", "shape"), [(None, (4, 6)), (2, (2, 3))])
def test_squares_of_an_image_have_the_scores_of_their_patches(seer, size, shape):
    image = make_image()
    explanation = explain_image(seer, image, square=size, deletion_tokens=1)
    scores = explanation.find("gradient_x_input").values
    assert scores.shape == shape
    batch = seer.inputs.collate(seer.inputs.prepare([image]))
    patches = attribute(seer.model, batch, method="gradient_x_input")[0, -24:].double().numpy().reshape(4, 6)
    assert np.isclose(scores[-1, -1], patches[-(size or 1) :, -(size or 1) :].sum(), atol=1e-6)
    assert explanation.box_of(scores.size - 1) == ((40, 24, 45, 30) if size is None else (32, 16, 45, 30))
    (maps,) = explanation.context_maps.values()
    assert maps.shape == (2, 4, 4, 6) and np.allclose(maps.sum(axis=(2, 3)), maps.sum(axis=(2, 3)), atol=1e-6)
    assert (np.diff(explanation.map_shares[0], axis=1) <= 0).all()
    assert np.array_equal(explanation.pixels, image), "what the processor did to the pixels is undone"


def test_the_picture_is_what_the_model_sees_in_grey_and_in_floats():
    class Plain:
        pass

    ramp = torch.linspace(0, 1, 12).reshape(1, 3, 4)
    picture = picture_of(ramp, Plain())
    assert picture.shape == (3, 4, 3) and picture.min() == 0 and picture.max() == 255


def test_an_explanation_is_json(reader, seer):
    explanations = [explain_document(reader, TEXT), explain_image(seer, make_image())]
    document, image = (json.loads(json.dumps(one.to_json())) for one in explanations)
    assert document["passages"][1] == {"start": 10, "stop": 25, "page": None, "text": "law  court red!"}
    assert len(document["scores"][0]["values"]) == len(document["passages"])
    assert np.shape(image["scores"][0]["values"]) == (4, 6) and image["square"] == [8, 8]
    assert document["random_deletion"]["shares"][0] == 0


@pytest.mark.parametrize(
    ("kind", "options", "error", "message"),
    [
        ("reader", {"passage": 0}, ValueError, '`passage` must be "sentence" or a number of tokens'),
        ("reader", {"labels": ["dog"]}, ValueError, "the model knows no 'dog', its labels are 'ant', 'bee', 'cat'"),
        ("reader", {"labels": []}, ValueError, "at least one label"),
        ("reader", {"methods": ["lime"]}, ValueError, "got 'lime'"),
        ("reader", {"methods": []}, ValueError, "at least one method"),
        ("seer", {"square": 0}, ValueError, "`square` must be a number of patches"),
    ],
)
def test_wrong_arguments_are_named(kind, options, error, message, request):
    predictor = request.getfixturevalue(kind)
    with pytest.raises(error, match=message):
        explain_document(predictor, TEXT, **options) if kind == "reader" else explain_image(
            predictor, make_image(), **options
        )


def test_what_a_model_cannot_read_is_said(reader, seer):
    with pytest.raises(ValueError, match="use `explain_image`"):
        explain_document(seer, TEXT)
    with pytest.raises(ValueError, match="use `explain_document`"):
        explain_image(reader, make_image())
    with pytest.raises(DataError, match="the document is empty"):
        explain_document(reader, " ")
