"""Protects scores by length: those of documents that really end there, each beginning read once."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_predictors import NUMBER, SEVERAL, SINGLE, make_texts, write_image_model, write_text_model

import fa_transformers as fa
from fa_transformers.metrics import RunningScores, decide
from fa_transformers.prediction.decisions import DecisionRecords
from fa_transformers.prediction.lengths import decisions_at


def make_predictor(folder: Path, **options) -> fa.Predictor:
    return fa.Predictor.from_pretrained(write_text_model(folder, **options), device="cpu", max_tokens_per_batch=64)


@pytest.mark.parametrize("problem_type", [SINGLE, SEVERAL, NUMBER])
def test_a_score_is_that_of_documents_cut_by_the_tokenizer(problem_type, tmp_path, monkeypatch):
    predictor = make_predictor(tmp_path, problem_type=problem_type)
    texts = make_texts(12, longest=24)
    labels = {
        SINGLE: [n % 3 for n in range(12)],
        SEVERAL: [[n % 3] for n in range(12)],
        NUMBER: [n / 7 for n in range(12)],
    }
    read, forward = [], predictor.model.forward
    monkeypatch.setattr(predictor.model, "forward", lambda **batch: read.append(batch) or forward(**batch))
    rows = fa.score_at_lengths(predictor, texts, labels[problem_type], [20, 5, 9])
    monkeypatch.undo()
    assert [row["tokens"] for row in rows] == [5, 9, 20] and {row["examples"] for row in rows} == {12}
    whole = [len(predictor.processor(text)["input_ids"]) for text in texts]
    references = labels[problem_type]
    if problem_type == SEVERAL:
        references = [[int(number in row) for number in range(3)] for row in references]
    for row in rows:
        assert row["longer"] == sum(length > row["tokens"] for length in whole)
        scores = RunningScores(problem_type, predictor.label_names)
        for text, reference in zip(texts, references, strict=True):
            inputs = predictor.processor(text, truncation=True, max_length=row["tokens"], return_tensors="pt")
            with torch.no_grad():
                logits = predictor.model(**inputs).logits.numpy()
            scores.add(decide(logits, problem_type), np.array([reference]))
        expected = scores.compute()
        assert {name: row[name] for name in row.keys() & expected.keys()} == pytest.approx(
            {name: expected[name] for name in row.keys() & expected.keys()}, abs=1e-4
        )
    num_read = sum(len(batch["input_ids"]) for batch in read)
    assert num_read == len(texts) + sum(length > 5 for length in whole) + sum(length > 9 for length in whole)


def test_a_document_that_was_read_whole_is_not_read_again(tmp_path, monkeypatch):
    predictor = make_predictor(tmp_path)
    prepared = predictor.inputs.prepare(["sea", "law ship red", "ship " * 9])
    whole = predictor.answer(prepared).decided
    read, answer = [], predictor.answer
    monkeypatch.setattr(predictor, "answer", lambda examples: read.append(len(examples)) or answer(examples))
    at_five, at_twenty = decisions_at(predictor, prepared, [5, 20], whole)
    assert read == [1] and at_five[:2].tolist() == whole[:2].tolist() and at_twenty.tolist() == whole.tolist()


def test_a_length_beyond_the_table_of_positions_stands_for_the_table(tmp_path, caplog):
    predictor = make_predictor(tmp_path / "text", positions="absolute")
    rows = fa.score_at_lengths(predictor, ["sea " * 40, "law"], [0, 1], [8, 64, 128])
    assert [row["tokens"] for row in rows] == [8, 32] and rows[1]["longer"] == 1
    assert "the model reads at most 32 tokens" in caplog.text
    with pytest.raises(ValueError, match="--report_lengths: 2 is below 3 tokens"):
        fa.score_at_lengths(predictor, ["sea"], [0], [2])
    with pytest.raises(ValueError, match="a document can't be scored: the document is empty"):
        fa.score_at_lengths(predictor, [""], [0], [8])
    images = fa.Predictor.from_pretrained(write_image_model(tmp_path / "images"), device="cpu")
    with pytest.raises(ValueError, match="--report_lengths is for texts, and the model reads images"):
        fa.score_at_lengths(images, ["sea"], [0], [8])


@pytest.mark.parametrize("problem_type", [SINGLE, SEVERAL, NUMBER])
def test_decisions_are_read_back_from_their_file(problem_type, tmp_path):
    random = np.random.default_rng(0)
    shape = (11,) if problem_type == SEVERAL else ()
    decided, references = random.integers(0, 2, (7, 3, *shape)), random.integers(0, 2, (7, *shape))
    if problem_type == NUMBER:
        decided, references = decided + 0.25, references - 1e-9
    records = DecisionRecords(problem_type, 11, 3)
    (tmp_path / "file").write_bytes(records.encode(decided, references, np.arange(7)))
    (found,) = records.read(tmp_path / "file")
    for actual, expected in zip(found, (decided, references, np.arange(7)), strict=True):
        np.testing.assert_array_equal(actual, expected)
