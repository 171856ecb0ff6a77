"""Attributions equal what the plain model gives: its gradients, its answers without a unit, its dense attention."""

import builtins
import sys

import peft
import pytest
import torch
from dense_attention import dense_matrices, dense_rollout
from oracles import MemoryMeter
from tiny_models import ALL_OPTIONS, VOCAB_SIZE, build, image_inputs, text_inputs
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Metaspace

from fa_transformers import attribute, passage_units, patch_units, sentence_units
from fa_transformers.explain import attribution, encoder, implied
from fa_transformers.explain.attribution import rows_by_layer
from fa_transformers.models import (
    FABertConfig,
    FABertForMaskedLM,
    FABertForMultipleChoice,
    FABertForQuestionAnswering,
    FABertForSequenceClassification,
    FABertForTokenClassification,
    FABertModel,
    FAViTConfig,
    FAViTForImageClassification,
)

METHODS = ("rollout", "rows", "gradient_x_input", "occlusion")
NEAR = {"rtol": 0.0, "atol": 1e-10}


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    for module in (attribution, encoder, implied):
        monkeypatch.setattr(module, "CHUNK_SIZE", 9)


def texts(lengths=(23, 17), **options):
    model = build(FABertConfig, FABertForSequenceClassification, **{**ALL_OPTIONS, **options}).double()
    return model, text_inputs("AutoModel", lengths)


def images(**options):
    options = {**ALL_OPTIONS, "num_register_tokens": 2, **options}
    model = build(FAViTConfig, FAViTForImageClassification, **options).double()
    inputs = {"pixel_values": image_inputs(43, 30)["pixel_values"].double()}
    inputs["attention_mask"] = torch.ones(2, 3 + 6 * 4, dtype=torch.bool)
    inputs["attention_mask"][0, 5:9] = False
    return model, inputs


def packed():
    model, inputs = texts((30,))
    mask = torch.ones(1, 30)
    mask[0, 4] = 0
    return model, {
        "input_ids": inputs["input_ids"],
        "attention_mask": mask,
        "cu_seqlens": torch.tensor([0, 12, 13, 30]),
    }


BATCHES = {"texts": texts, "images": images, "packed": packed}


@pytest.mark.parametrize("batch", BATCHES)
def test_gradient_x_input_equals_the_plain_gradient(batch):
    model, inputs = BATCHES[batch]()
    if batch == "images":
        name, leaf = "pixel_values", inputs["pixel_values"].clone().requires_grad_()
        plain = {**inputs, name: leaf}
    else:
        name, leaf = "inputs_embeds", model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
        plain = {**{key: value for key, value in inputs.items() if key != "input_ids"}, name: leaf}
    (gradient,) = torch.autograd.grad(model(**plain).logits[:, 1].sum(), leaf)
    expected = (gradient * leaf).detach()
    actual = attribute(model, {**inputs, "labels": torch.tensor([0])}, 1, "gradient_x_input")
    if batch == "images":
        expected = torch.nn.functional.pad(expected.sum(dim=1), (0, 2, 0, 5))
        expected = expected.unflatten(2, (4, 8)).unflatten(1, (6, 8)).sum(dim=(2, 4)).flatten(1)
        assert not actual[:, :3].any()
        actual = actual[:, 3:]
    else:
        expected = expected.sum(dim=2)
    torch.testing.assert_close(actual, expected, **NEAR)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("batch", BATCHES)
def test_without_a_target_it_is_the_largest_logit(batch):
    model, inputs = BATCHES[batch]()
    with torch.no_grad():
        largest = model(**inputs).logits.argmax(dim=1)
    alone = torch.stack([attribute(model, inputs, label, "gradient_x_input") for label in range(2)])
    actual = attribute(model, inputs, method="gradient_x_input")
    if batch == "packed":
        documents = torch.tensor([0] * 12 + [1] + [2] * 17)
        expected = alone[largest[documents], 0, torch.arange(30)][None]
    else:
        expected = alone[largest, torch.arange(len(largest))]
    torch.testing.assert_close(actual, expected, **NEAR)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_rollout_and_rows_are_of_the_token_that_the_classifier_reads(pooling):
    model, inputs = images(classifier_pooling=pooling)
    start = inputs["attention_mask"].double()
    start[:, :3] = 0.0
    if pooling == "cls":
        start = torch.zeros_like(start)
        start[:, 0] = 1.0
    start /= start.sum(dim=1, keepdim=True)
    matrices = dense_matrices(model, inputs)
    torch.testing.assert_close(attribute(model, inputs, 0, "rollout"), dense_rollout(matrices, start), **NEAR)
    expected = torch.einsum("bi,bij->bj", start, matrices[-1].mean(dim=1))
    torch.testing.assert_close(attribute(model, inputs, 0, "rows"), expected, **NEAR)
    for row, matrix in zip(rows_by_layer(model, inputs), matrices, strict=True):
        torch.testing.assert_close(row, torch.einsum("bi,bij->bj", start, matrix.mean(dim=1)), **NEAR)


@pytest.mark.parametrize("batch", BATCHES)
def test_occlusion_is_the_fall_of_the_logit_without_the_unit(batch):
    model, inputs = BATCHES[batch](position_embedding_type="none") if batch == "texts" else BATCHES[batch]()
    mask = inputs["attention_mask"].bool()
    units = torch.full(mask.shape, -1)
    units[:, 5:8], units[:, 14:17], units[0, 18:] = 0, 1, 3
    actual = attribute(model, inputs, 1, "occlusion", units)
    assert actual.shape == (len(mask), 4) and not actual[:, 2].any()
    assert len(mask) == 1 or not actual[1, 3].any()
    with torch.no_grad():
        full = model(**inputs).logits[:, 1]
        for unit in (0, 1):
            without = model(**{**inputs, "attention_mask": mask & (units != unit)}).logits[:, 1]
            expected = (full - without).sum()[None] if batch == "packed" else full - without
            torch.testing.assert_close(actual[:, unit], expected, **NEAR)


def test_occlusion_of_the_first_tokens_moves_no_position():
    model, inputs = texts((9,), position_embedding_type="absolute", classifier_pooling="mean")
    actual = attribute(model, inputs, 0, "occlusion")
    mask = torch.ones(1, 9)
    mask[0, 0] = 0
    with torch.no_grad():
        full = model(**inputs).logits[:, 0]
        without = model(**{**inputs, "attention_mask": mask, "position_ids": torch.arange(9)[None]}).logits[:, 0]
    assert actual.shape == (1, 9)
    torch.testing.assert_close(actual[:, 0], full - without, **NEAR)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_occlusion_in_half_precision_is_the_exact_difference_of_the_models_logits(dtype):
    model, inputs = texts((9,), position_embedding_type="none")
    model.to(dtype)
    units = torch.full((1, 9), -1)
    units[0, :5] = 0  # the token that is read, so that the fall is none of rounding
    with torch.no_grad():
        full, without = (
            model(**{**inputs, "attention_mask": mask}, chunk_size=9).logits[:, 1:].double()
            for mask in (inputs["attention_mask"], units < 0)
        )
    actual = attribute(model, inputs, 1, "occlusion", units)
    assert actual.dtype == torch.float32 and actual.any()
    torch.testing.assert_close(actual.double(), full - without, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch", BATCHES)
def test_padding_scores_zero_and_changes_nothing(batch, method):
    model, inputs = BATCHES[batch]()
    padding = ~inputs["attention_mask"].bool()
    scores = attribute(model, inputs, 0, method)
    assert scores.shape == padding.shape and not scores[padding].any() and scores[~padding].isfinite().all()
    if batch == "images":
        pixels = padding[:, 3:].unflatten(1, (6, 4)).repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None, :43, :30]
        inputs = {**inputs, "pixel_values": inputs["pixel_values"].masked_fill(pixels, torch.nan)}
    else:
        embeddings = model.get_input_embeddings()(inputs["input_ids"]).detach()
        others = {name: value for name, value in inputs.items() if name != "input_ids"}
        inputs = {**others, "inputs_embeds": embeddings.masked_fill(padding[:, :, None], torch.nan)}
    torch.testing.assert_close(attribute(model, inputs, 0, method), scores, **NEAR)


def test_the_default_is_occlusion_of_units_and_without_them_rollout():
    model, inputs = texts()
    units = passage_units(inputs, 6)
    assert torch.equal(attribute(model, inputs), attribute(model, inputs, None, "rollout"))
    assert torch.equal(attribute(model, inputs, units=units), attribute(model, inputs, None, "occlusion", units))


@pytest.mark.parametrize("method", METHODS[:3])
def test_scores_of_units_are_sums_of_those_of_tokens(method):
    model, inputs = texts()
    units = torch.randint(-1, 5, (2, 23))
    scores = attribute(model, inputs, 0, method)
    expected = torch.stack([scores.where(units == unit, 0.0).sum(dim=1) for unit in range(5)], dim=1)
    torch.testing.assert_close(attribute(model, inputs, 0, method, units), expected, **NEAR)


@pytest.mark.parametrize("method", METHODS[:3])
def test_a_model_inside_adapters_is_explained_like_itself(method):
    model, inputs = texts()
    expected = attribute(model, inputs, 0, method)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query", "key", "value", "dense"])).double()
    torch.testing.assert_close(attribute(adapted, inputs, 0, method), expected, **NEAR)


def test_integrated_gradients_add_up_to_the_difference_of_logits():
    pytest.importorskip("captum")
    model, inputs = texts(softmax_layers=[])
    scores = attribute(model, inputs, 1, "integrated_gradients", steps=200)
    embeddings = model.get_input_embeddings()(inputs["input_ids"]).detach()
    others = {name: value for name, value in inputs.items() if name != "input_ids"}
    with torch.no_grad():
        full, none = (model(inputs_embeds=e, **others).logits[:, 1] for e in (embeddings, 0.0 * embeddings))
    torch.testing.assert_close(scores.sum(dim=1), full - none, rtol=0.0, atol=1e-3)


def test_missing_captum_is_an_error_that_says_how_to_get_it(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "captum"]:
        monkeypatch.delitem(sys.modules, name)
    load = builtins.__import__

    def refuse(name, *arguments):
        if name.split(".")[0] == "captum":
            raise ImportError(name)
        return load(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"pip install \"fa_transformers\[explain\]\""):
        attribute(*texts(), 0, "integrated_gradients")


def test_memory_of_gradients_is_that_of_one_layer(monkeypatch):
    for module in (attribution, encoder, implied):
        monkeypatch.setattr(module, "CHUNK_SIZE", 128)
    sizes = {"num_hidden_layers": 6, "position_embedding_type": "none", "intermediate_size": 128}
    model = build(FABertConfig, FABertForSequenceClassification, **sizes)
    inputs = {"input_ids": torch.randint(VOCAB_SIZE, (1, 1024))}
    with MemoryMeter() as meter:
        attribute(model, inputs, 0, "gradient_x_input")
    states = meter.peak_bytes / (1024 * 32 * 4)
    # Inputs of six layers; within one layer Q, K, V, what they mix and the pieces' output, with gradients of all five;
    # and two for a chunk's inside.
    assert states < 6 + 2 * 5 + 2, states


ERRORS = {
    "`method` must be one of rollout": lambda model, inputs: attribute(model, inputs, 0, "lime"),
    "`target` must be a label from 0 to 1, or None, got 2": lambda model, inputs: attribute(model, inputs, 2),
    "`target` must be a label from 0 to 1, or None, got 3": lambda *both: attribute(*both, 3, "gradient_x_input"),
    "`units` must be integers": lambda model, inputs: attribute(model, inputs, 0, units=torch.zeros(2, 3, dtype=int)),
    "`steps`": lambda model, inputs: attribute(model, inputs, 0, steps=0),
    "`size`": lambda model, inputs: passage_units(inputs, 0),
    "`inputs` have no `input_ids`.*`patch_units`": lambda *_: passage_units(images()[1], 2),
    "`special`": lambda model, inputs: passage_units(inputs, 2, torch.zeros(3, dtype=bool)),
    "`inputs` are texts": lambda model, inputs: patch_units(model, inputs),
    "`offsets`": lambda model, inputs: sentence_units(["a", "b"], torch.zeros(1, 5, 2)),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_name_the_argument(message):
    with pytest.raises(ValueError, match=message):
        ERRORS[message](*texts())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "model_class",
    [
        FABertModel,
        FABertForMaskedLM,
        FABertForTokenClassification,
        FABertForQuestionAnswering,
        FABertForMultipleChoice,
    ],
)
def test_a_model_that_is_no_classifier_of_texts_is_refused(model_class, method):
    kind = "AutoModelForMultipleChoice" if model_class is FABertForMultipleChoice else "AutoModel"
    with pytest.raises(TypeError, match="`model` must be a classifier of whole texts or images"):
        attribute(build(FABertConfig, model_class), text_inputs(kind), 0, method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["embedded", "packed", "embedded and packed"])
def test_multiple_choice_is_refused_in_whatever_form_it_comes(kind, method):
    model = build(FABertConfig, FABertForMultipleChoice)
    inputs = {"inputs_embeds": torch.randn(2, 3, 7, 32)}
    if kind != "embedded":
        inputs = {"input_ids": torch.ones(1, 40, dtype=int), "cu_seqlens": torch.arange(0, 41, 10), "num_choices": 2}
    if kind == "embedded and packed":
        inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    with pytest.raises(TypeError, match="`model` must be a classifier of whole texts or images"):
        attribute(model, inputs, 0, method)


@pytest.mark.parametrize("batch", BATCHES)
def test_rollout_and_rows_embed_their_input_once(batch):
    model, inputs = BATCHES[batch]()
    embedded = []
    model.base_model.embeddings.register_forward_hook(lambda *call: embedded.append(call[2].shape[1]))
    for method in ("rollout", "rows"):
        embedded.clear()
        attribute(model, inputs, 0, method)
        whole = inputs["attention_mask"].shape[1]
        assert embedded.count(whole) == 1 and all(number == whole or number <= 4 for number in embedded)


def test_sentences_end_at_marks_and_empty_lines():
    text = 'One is here. "Is it two?" Three, v1.2!\n\nFour\nlines.  '
    words = ("One", "here", "Is it", "two", "Three", "1.2", "Four", "lines")
    offsets = torch.tensor([[[0, 0], *([text.index(word), text.index(word) + 2] for word in words), [0, 0]]])
    units, sentences = sentence_units([text], offsets)
    assert units.tolist() == [[-1, 0, 0, 1, 1, 2, 2, 3, 3, -1]]
    assert [text[start:stop] for start, stop in sentences[0]] == [
        "One is here.", '"Is it two?"', "Three, v1.2!", "Four\nlines."
    ]  # fmt: skip
    assert sentence_units([""], torch.zeros(1, 2, 2, dtype=int))[0].tolist() == [[-1, -1]]


def test_a_token_that_starts_with_the_blank_before_a_sentence_belongs_to_the_sentence():
    tokenizer = Tokenizer(WordLevel({"▁Hello.": 0, "▁Bye": 1, "▁now.": 2}))
    tokenizer.pre_tokenizer = Metaspace()
    text = "Hello. Bye now."
    offsets = torch.tensor([tokenizer.encode(text).offsets])
    assert offsets[0].tolist() == [[0, 6], [6, 10], [10, 15]]
    assert sentence_units([text], offsets)[0].tolist() == [[0, 1, 1]]


def test_passages_are_runs_of_real_tokens_of_a_document():
    inputs = {
        "input_ids": torch.ones(2, 8, dtype=int),
        "attention_mask": torch.tensor([[0] + [1] * 7, [1] * 5 + [0] * 3]),
    }
    special = torch.tensor([[0, 1, 0, 0, 0, 0, 0, 1], [1, 0, 0, 0, 1, 0, 0, 0]])
    assert passage_units(inputs, 2, special).tolist() == [[-1, -1, 0, 0, 1, 1, 2, -1], [-1, 0, 0, 1, -1, -1, -1, -1]]
    packed = {"input_ids": torch.ones(1, 8, dtype=int), "cu_seqlens": torch.tensor([0, 3, 3, 8])}
    assert passage_units(packed, 2).tolist() == [[0, 0, 1, 2, 2, 3, 3, 4]]


def test_patches_are_joined_to_squares():
    model, inputs = images()
    units, grid = patch_units(model, inputs, 4)
    assert grid == (2, 1)
    assert units[1].tolist() == [-1] * 3 + [0] * 16 + [1] * 8
    assert units[0].tolist() == [-1] * 3 + [0] * 2 + [-1] * 4 + [0] * 10 + [1] * 8
    scores = attribute(model, inputs, 0, "gradient_x_input", units)
    assert scores.shape == (2, 2)
