"""Protects answers in numbers: each is what the model alone says, in order, whatever the batches, lengths and sizes."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_predictors import NUMBER, SEVERAL, SINGLE, make_texts, write_image_model, write_text_model
from transformers import BertConfig, BertForSequenceClassification

import fa_transformers as fa
from fa_transformers.data.readers.tables import DataError
from fa_transformers.prediction import inputs
from fa_transformers.prediction.answers import AnswerRules
from fa_transformers.prediction.predictor import Predictor

# Scores are probabilities of logits of order one from sums of some hundred float32 terms: 2^-24 · 2^7 · a few.
ATOL = 3e-5
TINY = dict(max_tokens_per_batch=48, chunk_size=10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_text_model(tmp_path_factory.mktemp("models") / "text")


@pytest.fixture(scope="module")
def predictor(folder) -> Predictor:
    return Predictor.from_pretrained(folder, device="cpu", **TINY)


def alone(predictor: Predictor, text: str) -> np.ndarray:
    """The probabilities of one text, read at once."""
    with torch.no_grad():
        logits = predictor.model(**predictor.processor(text, return_tensors="pt", verbose=False)).logits[0]
    return logits.softmax(dim=0).numpy()


def test_each_text_has_the_answer_that_it_gets_alone_in_the_order_of_the_texts(predictor):
    texts = make_texts(16)
    answers = predictor(texts)
    lengths = [answer.num_tokens for answer in answers]
    assert max(lengths) > TINY["max_tokens_per_batch"] > min(lengths)  # in chunks, and in batches
    for text, answer in zip(texts, answers, strict=True):
        expected = alone(predictor, text)
        np.testing.assert_allclose(list(answer.scores.values()), expected, atol=ATOL)
        assert answer.label == ["ant", "bee", "cat"][expected.argmax()] and answer.score == max(answer.scores.values())
        assert not answer.is_truncated and answer.error is None
    assert len({answer.label for answer in answers}) > 1


def test_one_text_a_list_and_any_iterable_are_told_apart(predictor):
    assert isinstance(predictor("sea"), fa.Prediction)
    assert [answer.label for answer in predictor(("sea", "law"))] == [predictor(word).label for word in ("sea", "law")]
    lazy = predictor(word for word in ("sea", "law"))
    assert not isinstance(lazy, list) and next(lazy).label == predictor("sea").label
    assert predictor([]) == []


def test_items_are_read_two_windows_ahead_at_most(predictor, monkeypatch):
    monkeypatch.setattr(inputs, "WINDOW_ITEMS", 4)
    read = []
    answers = predictor.predict(read.append(number) or "sea ship" for number in itertools.count())
    assert len(list(itertools.islice(answers, 5))) == 5 and len(read) == 12
    answers.close()


def test_windows_end_at_their_weight_and_number_of_items(monkeypatch):
    monkeypatch.setattr(inputs, "WINDOW_ITEMS", 3)
    assert list(inputs.windows([1, 1, 1, 1, 9, 1], lambda item: item, 5)) == [[1, 1, 1], [1, 9], [1]]


def test_a_batch_has_the_tokens_that_are_allowed_and_only_longer_documents_go_in_chunks(predictor, monkeypatch):
    calls = []
    forward = predictor.model.forward

    def spy(**batch):
        calls.append((*batch["input_ids"].shape, batch.get("chunk_size"), "attention_mask" in batch))
        return forward(**batch)

    monkeypatch.setattr(predictor.model, "forward", spy)
    predictor([*make_texts(12), "sea", "sea", "sea"])
    assert any(number > 1 for number, *_ in calls)
    for number, longest, chunk_size, _ in calls:
        assert number * longest <= TINY["max_tokens_per_batch"] or number == 1
        assert chunk_size == (10 if longest > TINY["max_tokens_per_batch"] else None)
    calls.clear()
    predictor(["sea ship", "law court"])
    assert calls == [(2, 4, None, False)]  # nothing is padded


@pytest.mark.parametrize("problem_type", [SINGLE, SEVERAL, NUMBER])
@pytest.mark.parametrize("num_classes", [3, 60])
def test_scores_and_labels_follow_from_the_logits(problem_type, num_classes):
    names = [f"class {number}" for number in range(num_classes)]
    logits = np.random.default_rng(0).normal(size=(9, 1 if problem_type == NUMBER else num_classes)) - 1
    rules = AnswerRules(problem_type, None if problem_type == NUMBER else names)
    answers = rules.shorten(logits)
    for values, scores, classes, chosen in zip(logits, *answers, strict=True):
        answer = rules.prediction(scores, classes)
        cells = dict(zip(rules.score_columns(), rules.score_values(scores, classes, chosen), strict=True))
        if problem_type == NUMBER:
            assert answer.label == answer.score == values[0] and answer.scores == cells == {}
            continue
        odds = np.exp(values) / np.exp(values).sum() if problem_type == SINGLE else 1 / (1 + np.exp(-values))
        for name, score in answer.scores.items():
            assert score == pytest.approx(odds[names.index(name)], abs=1e-6)
        if problem_type == SINGLE:
            assert answer.label == names[values.argmax()] and answer.score == pytest.approx(odds.max())
        else:
            assert set(answer.label) == {names[number] for number in np.flatnonzero(values > 0)}
            assert answer.score == pytest.approx(np.maximum(odds, 1 - odds).min(), abs=1e-6) or num_classes > 50
        best = names[values.argmax()]
        assert cells[f"score of {best}" if num_classes == 3 else "score 1"] == pytest.approx(odds.max(), abs=1e-6)
        assert num_classes == 3 or cells["best 1"] == best


def test_a_table_of_positions_cuts_documents_which_is_said_once(tmp_path, caplog):
    cut = Predictor.from_pretrained(write_text_model(tmp_path / "absolute", positions="absolute"), device="cpu")
    texts = ["sea " * 100, "law", "ship " * 31]
    answers = list(cut.predict(iter(texts)))
    assert [answer.is_truncated for answer in answers] == [True, False, True]
    assert [answer.num_tokens for answer in answers] == [32, 3, 32]
    assert answers[0].scores == pytest.approx(cut("sea " * 30).scores, abs=ATOL)
    said = [record.message for record in caplog.records if "was not read" in record.message]
    assert said == ["2 of 3 documents were longer than 32 tokens: the rest was not read"]
    strict = Predictor(cut.model, cut.processor, strict_length=True)
    with pytest.raises(DataError, match="item 2: the document has 102 tokens, the limit is 32"):
        strict(["law", "sea " * 100])
    with pytest.raises(ValueError, match="`max_length=33` is more than the model reads: .* has 32 rows"):
        Predictor(cut.model, cut.processor, max_length=33)
    assert Predictor(cut.model, cut.processor, max_length=8)(texts)[0].num_tokens == 8


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("", "the document is empty"),
        (None, "the document is empty"),
        (7, "the document must be a string, got int"),
        ("\ud800", "half of a surrogate pair"),
        (Image.new("RGB", (8, 8)), "the document must be a string, got Image"),
    ],
)
def test_an_item_that_is_no_text_is_named_by_its_number_or_answered_with_the_reason(predictor, item, message):
    with pytest.raises(DataError, match=f"^item 2: .*{message}"):
        predictor(["sea", item])
    answers = list(predictor.predict(["sea", item, "law"], on_error="return"))
    assert message in answers[1].error and answers[1].label is None and not answers[1].scores
    assert [answers[0].label, answers[2].label] == [predictor("sea").label, predictor("law").label]


def test_an_answer_that_is_no_number_is_an_error_of_its_row(folder):
    broken = Predictor.from_pretrained(folder, device="cpu")
    with torch.no_grad():
        broken.model.bert.embeddings.word_embeddings.weight[broken.processor("ship")["input_ids"][1]] = float("nan")
    answers = list(broken.predict(["sea", "ship", "law"], on_error="return"))
    assert [answer.error is None for answer in answers] == [True, False, True]
    assert "not a finite number" in answers[1].error


def test_images_of_any_size_get_the_answer_that_they_get_alone(tmp_path):
    images = write_image_model(tmp_path / "images")
    predictor = Predictor.from_pretrained(images, device="cpu", max_tokens_per_batch=30, chunk_size=8)
    random = np.random.default_rng(0)
    sizes = [(16, 16), (24, 16), (16, 16), (64, 56), (16, 16), (24, 16), (16, 24)]
    pixels = [random.integers(0, 255, (*size, 3), np.uint8) for size in sizes]
    Image.fromarray(pixels[2]).save(tmp_path / "two.png")
    Image.fromarray(pixels[3]).save(tmp_path / "three.png")
    items = [pixels[0], Image.fromarray(pixels[1]), tmp_path / "two.png", (tmp_path / "three.png").read_bytes()]
    answers = predictor([*items, *pixels[4:]])
    for image, answer in zip(pixels, answers, strict=True):
        values = predictor.processor(images=Image.fromarray(image), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            expected = predictor.model(values).logits[0].softmax(dim=0).numpy()
        np.testing.assert_allclose(list(answer.scores.values()), expected, atol=ATOL)
    assert [answer.num_tokens for answer in answers] == [1 + -(-h // 8) * -(-w // 8) for h, w in sizes]
    (tmp_path / "broken.png").write_bytes(b"no image")
    for item, message in [
        (tmp_path / "broken.png", "no image that Pillow can read"),
        ("nothing.png", "nothing.png: there is no such file"),
        (b"no image", "the bytes are no image"),
        (3.5, "an image must be Pillow's, an array, a path or a file's bytes, got float"),
        (np.zeros((2, 2, 7), np.uint8), "the array of shape"),
    ]:
        with pytest.raises(DataError, match=f"item 1: .*{message}"):
            predictor([item])


def test_a_model_that_cannot_answer_is_refused_in_one_line_that_says_what_to_do(folder, tmp_path):
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    BertForSequenceClassification(BertConfig(vocab_size=9, **sizes)).save_pretrained(tmp_path / "stock")
    model = Predictor.from_pretrained(folder, device="cpu").model
    model.bert.save_pretrained(tmp_path / "headless")
    model.save_pretrained(tmp_path / "mute")
    for name, change in {"cut": "weights", "grown": "vocabulary", "odd": "config"}.items():
        copied = write_text_model(tmp_path / name)
        if change == "weights":
            (copied / "model.safetensors").write_bytes((copied / "model.safetensors").read_bytes()[:900])
        elif change == "vocabulary":
            model.processor = Predictor.from_pretrained(copied, device="cpu").processor
            model.processor.add_tokens(["<doc>"])
            model.processor.save_pretrained(copied)
        else:
            (copied / "config.json").write_text("{")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "my/base"}))
    (tmp_path / "empty").mkdir()
    for name, message in {
        "stock": "a stock bert model with softmax attention: convert it first .*fine-tune",
        "headless": "is a FABertModel, without a classifier's head: fine-tune it first",
        "mute": "has no tokenizer: save the one that it was trained with beside it",
        "cut": "the weights can't be loaded",
        "grown": "the tokenizer has 12 tokens, the model's table 11",
        "odd": "config.json is no JSON file",
        "adapter": "is a PEFT adapter of my/base: merge it first",
        "empty": "is no model folder: it has no config.json",
    }.items():
        with pytest.raises(ValueError, match=message) as refused:
            Predictor.from_pretrained(tmp_path / name, device="cpu")
        assert "\n" not in str(refused.value), name
    with pytest.raises(FileNotFoundError, match="'no/such' is no folder here"):
        Predictor.from_pretrained("no/such")


def test_models_and_processors_that_do_not_fit_are_refused(predictor, tmp_path):
    image = Predictor.from_pretrained(write_image_model(tmp_path / "images"), device="cpu")
    with pytest.raises(TypeError, match="processor must be the tokenizer of the model, got ViTImageProcessor"):
        Predictor(predictor.model, image.processor)
    with pytest.raises(TypeError, match="processor must be the image processor of the model, got a tokenizer"):
        Predictor(image.model, predictor.processor)
    with pytest.raises(TypeError, match="model must be an FABert or FAViT with a classifier's head, got FABertModel"):
        Predictor(predictor.model.bert, predictor.processor)
    with pytest.raises(ValueError, match="`max_length` is for texts"):
        Predictor(image.model, image.processor, max_length=9)
    with pytest.raises(ValueError, match="`chunk_size` must be at least 1, got 0"):
        Predictor(predictor.model, predictor.processor, chunk_size=0)
