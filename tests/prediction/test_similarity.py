"""Protects vectors of texts: they are the model's, whatever the batch and the chunk, and passages cover the text."""

import re

import pytest
import torch
from tiny_predictors import make_texts, write_image_model, write_text_model

from fa_transformers import Predictor
from fa_transformers.data.readers.tables import DataError
from fa_transformers.prediction.similarity import TextEncoder, split_at_blanks


@pytest.fixture(scope="module")
def predictor(tmp_path_factory) -> Predictor:
    return Predictor.from_pretrained(write_text_model(tmp_path_factory.mktemp("model")))


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_vectors_are_the_pooled_states_of_each_text_alone_in_batches_and_in_chunks(pooling, predictor):
    texts = make_texts(12)
    model, tokenizer = predictor.model, predictor.inputs.tokenizer
    alone = []
    for text in texts:
        states = model.base_model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].detach()
        alone.append(states.mean(dim=0) if pooling == "mean" else states[0])
    batched = TextEncoder(model, tokenizer, pooling=pooling, max_tokens_per_batch=64).embed(texts)
    chunked = TextEncoder(model, tokenizer, pooling=pooling, max_tokens_per_batch=4, chunk_size=8).embed(texts)
    torch.testing.assert_close(batched, torch.stack(alone), atol=1e-5, rtol=0)
    torch.testing.assert_close(chunked, torch.stack(alone), atol=1e-5, rtol=0)


def test_the_similarity_is_the_cosine_and_says_what_was_read(predictor):
    encoder = TextEncoder.of_predictor(predictor, max_length=6)
    assert encoder.pooling == "mean"
    value, tokens = encoder.similarity("sea law sea law sea law", "red")
    expected = torch.cosine_similarity(*encoder.embed(["sea law sea law", "red"]), dim=0)
    assert value == pytest.approx(float(expected), abs=1e-6) and tokens == (6, 3)
    assert encoder.similarity("red ship", "red ship")[0] == pytest.approx(1, abs=1e-6)


def test_passages_are_ranked_by_their_own_vectors_and_cover_the_text(predictor):
    encoder = TextEncoder.of_predictor(predictor)
    text = " ".join(make_texts(6))
    ranked = encoder.rank("sea law", text, passage=16)
    pieces = sorted((one.start, one.stop) for one in ranked)
    assert "".join(text[start:stop] for start, stop in pieces).replace(" ", "") == text.replace(" ", "")
    question, *vectors = encoder.embed(["sea law", *(text[one.start : one.stop] for one in ranked)])
    cosines = [float(torch.cosine_similarity(question, vector, dim=0)) for vector in vectors]
    assert [one.similarity for one in ranked] == pytest.approx(cosines, abs=1e-6)
    assert cosines == sorted(cosines, reverse=True) and len(cosines) > 3


def test_passages_begin_behind_blanks_where_that_is_possible():
    text = "abcdef gh ij klmnopqr"
    offsets = [(0, 3), (3, 6), (7, 9), (10, 12), (13, 15), (15, 17), (17, 19), (19, 21)]
    assert [text[slice(*span)] for span in split_at_blanks(text, offsets, 3)] == ["abcdef gh", "ij", "klmnop", "qr"]
    spaced = [(0, 3), (3, 6), (6, 9), (9, 12)]  # a tokenizer may count the blank before a word to it
    assert [text[slice(*span)] for span in split_at_blanks(text, spaced, 3)] == ["abcdef gh", " ij"]
    words = [match.span() for match in re.finditer(r"\S", "x" * 10)]
    assert split_at_blanks("x" * 10, words, 4) == [(0, 4), (4, 8), (8, 10)]


def test_what_cannot_be_compared_is_told(predictor, tmp_path):
    encoder = TextEncoder.of_predictor(predictor)
    with pytest.raises(DataError, match="text 2: the document is empty"):
        encoder.similarity("sea", " ")
    with pytest.raises(DataError, match="the document is empty"):
        encoder.rank("sea", " ")
    with pytest.raises(ValueError, match="`passage` must be at least 1"):
        encoder.rank("sea", "law", passage=0)
    with pytest.raises(ValueError, match="this one reads images"):
        TextEncoder.of_predictor(Predictor.from_pretrained(write_image_model(tmp_path)))
