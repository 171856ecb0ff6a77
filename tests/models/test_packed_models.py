"""Packed batches through the text models: every head gives each document what it gives it alone, gradients included."""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import EXACT, HEADS, OPTION_SETS, VOCAB_SIZE, build, outputs_of
from torch import Tensor

from fa_transformers.models import (
    FABertConfig,
    FABertForMultipleChoice,
    FABertForQuestionAnswering,
    FABertForSequenceClassification,
    FABertModel,
)

# Six documents are two examples of three choices: one token, whole tiles, odd lengths.
LENGTHS = (11, 1, 64, 130, 7, 1)
TEXT_HEADS = [head for head in HEADS if head[2].main_input_name == "input_ids"]
every_head = pytest.mark.parametrize(
    ("config_class", "auto_class", "model_class"), TEXT_HEADS, ids=[head[2].__name__ for head in TEXT_HEADS]
)
PER_DOCUMENT = ("pooler_output", "logits of AutoModelForSequenceClassification", "logits of AutoModelForMultipleChoice")


def make(config_class, model_class, options: str = "all", **fields):
    return build(
        config_class, model_class, **{**OPTION_SETS[options], "max_position_embeddings": 130, **fields}
    ).double()


def pack(lengths=LENGTHS, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCAB_SIZE, (1, sum(lengths)), generator=generator)
    segments = torch.randint(0, 2, ids.shape, generator=generator)
    return {
        "input_ids": ids,
        "token_type_ids": segments,
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(dim=0).int(),
    }


def run_alone(model, auto_class: str, packed: dict[str, Tensor], lengths=LENGTHS) -> dict[str, Tensor]:
    """The outputs of each document on its own, joined as a packed batch has them."""
    outputs = []
    for ids, segments in zip(
        *(packed[name].split(lengths, dim=1) for name in ("input_ids", "token_type_ids")), strict=True
    ):
        if auto_class == "AutoModelForMultipleChoice":
            ids, segments = ids[None], segments[None]
        outputs.append(model(input_ids=ids, token_type_ids=segments))
    joined = {}
    for name in outputs[0]:
        per_document = name in PER_DOCUMENT or f"{name} of {auto_class}" in PER_DOCUMENT
        joined[name] = torch.cat([output[name] for output in outputs], dim=0 if per_document else 1)
    if auto_class == "AutoModelForMultipleChoice":
        joined["logits"] = joined["logits"].view(-1, 3)
    return joined


def labels_and_loss(auto_class: str, packed: dict[str, Tensor], alone: dict[str, Tensor]) -> tuple[dict, Tensor]:
    """Labels of a packed batch, and the loss that they should give, from the outputs of documents alone."""
    if auto_class == "AutoModel":
        return {}, alone["last_hidden_state"].pow(2).mean() + alone["pooler_output"].pow(2).mean()
    logits = alone.get("logits")
    if auto_class in ("AutoModelForMaskedLM", "AutoModelForTokenClassification"):
        labels = packed["input_ids"] % logits.shape[2]
        labels[0, ::3] = -100
        return {"labels": labels}, F.cross_entropy(logits[0], labels[0])
    if auto_class == "AutoModelForQuestionAnswering":
        positions = {
            "start_positions": torch.tensor([0, 0, 63, 64, -1, 5]),  # two lie outside their document
            "end_positions": torch.tensor([10, 0, 0, 129, 3, 0]),
        }
        loss = 0.0
        for name, values in positions.items():
            split = alone[name.replace("positions", "logits")][0].split(LENGTHS)
            pairs = [(part, value) for part, value in zip(split, values, strict=True) if 0 <= value < len(part)]
            loss = loss + torch.stack([F.cross_entropy(part, value) for part, value in pairs]).mean() / 2
        return positions, loss
    labels = torch.tensor([2, 0]) if auto_class == "AutoModelForMultipleChoice" else torch.tensor([0, 1, 1, 0, 1, 0])
    return {"labels": labels}, F.cross_entropy(logits, labels)


@every_head
@pytest.mark.parametrize("options", OPTION_SETS)
def test_each_document_gets_what_it_gets_alone_with_the_same_gradients(config_class, auto_class, model_class, options):
    model = make(config_class, model_class, options)
    packed = pack()
    alone = run_alone(model, auto_class, packed)
    labels, expected_loss = labels_and_loss(auto_class, packed, alone)
    output = model(**packed, **labels)
    for name, value in alone.items():
        torch.testing.assert_close(output[name], value, **EXACT)
    loss = labels_and_loss(auto_class, packed, output)[1] if auto_class == "AutoModel" else output.loss
    torch.testing.assert_close(loss, expected_loss, **EXACT)
    parameters = list(model.parameters())
    # Of the last layer, "cls" uses the first tokens alone: its local terms then get no gradient.
    actual = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    expected = torch.autograd.grad(expected_loss, parameters, allow_unused=True, materialize_grads=True)
    assert any(gradient.abs().max() > 1e-3 for gradient in expected)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


@every_head
def test_embeddings_and_positions_given_directly_equal_the_defaults(config_class, auto_class, model_class):
    model = make(config_class, model_class)
    packed = pack()
    options = {"num_choices": 3} if auto_class == "AutoModelForMultipleChoice" else {}
    expected = outputs_of(model, packed, **options)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    embedded = {**packed, "inputs_embeds": model.get_input_embeddings()(packed["input_ids"]), "position_ids": positions}
    del embedded["input_ids"]
    for name, value in outputs_of(model, embedded, **options).items():
        torch.testing.assert_close(value, expected[name], **EXACT)


@pytest.mark.parametrize("problem_type", ["multi_label_classification", "regression"])
def test_labels_of_every_kind_belong_to_documents(problem_type):
    num_labels = 1 if problem_type == "regression" else 3
    model = make(FABertConfig, FABertForSequenceClassification, num_labels=num_labels, problem_type=problem_type)
    packed = pack()
    alone = run_alone(model, "AutoModelForSequenceClassification", packed)["logits"]
    if problem_type == "regression":
        labels = torch.randn(len(LENGTHS))
        expected = F.mse_loss(alone[:, 0], labels.double())
    else:
        labels = torch.randint(0, 2, (len(LENGTHS), 3)).float()
        expected = F.binary_cross_entropy_with_logits(alone, labels.double())
    torch.testing.assert_close(model(**packed, labels=labels).loss, expected, **EXACT)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_an_empty_document_pools_to_zeros_and_changes_nothing_else(pooling):
    model = make(FABertConfig, FABertForSequenceClassification, classifier_pooling=pooling)
    packed = pack()
    expected = outputs_of(model, packed)["logits"]
    gaps = torch.tensor([0, 0, *packed["cu_seqlens"][1:3], *packed["cu_seqlens"][2:], sum(LENGTHS)])
    logits = outputs_of(model, {**packed, "cu_seqlens": gaps})["logits"]
    torch.testing.assert_close(logits[[1, 2, 4, 5, 6, 7]], expected, **EXACT)
    zeros = torch.zeros(1, model.config.hidden_size, dtype=torch.float64)
    pooled = torch.tanh(model.bert.pooler.dense(zeros)) if pooling == "cls" else zeros
    for row in (0, 3, 8):
        torch.testing.assert_close(logits[row], model.classifier(pooled)[0], **EXACT)


def test_an_answer_in_an_empty_document_is_left_out():
    model = make(FABertConfig, FABertForQuestionAnswering)
    packed = pack((5, 3))
    loss = model(**packed, start_positions=torch.tensor([1, 2]), end_positions=torch.tensor([4, 2])).loss
    packed["cu_seqlens"] = torch.tensor([0, 5, 5, 8])
    with_empty = model(**packed, start_positions=torch.tensor([1, 0, 2]), end_positions=torch.tensor([4, 0, 2])).loss
    torch.testing.assert_close(with_empty, loss, **EXACT)


def test_choices_are_counted_by_labels_or_as_told():
    model = make(FABertConfig, FABertForMultipleChoice)
    packed = pack()
    by_labels = model(**packed, labels=torch.tensor([1, 0, 1])).logits
    assert by_labels.shape == (3, 2) and torch.equal(model(**packed, num_choices=2).logits, by_labels)
    for wrong in ({}, {"num_choices": 4}, {"labels": torch.tensor([0, 1, 1, 0])}):
        with pytest.raises(ValueError, match="6 documents and `num_choices`"):
            model(**packed, **wrong)


def test_the_position_table_limits_each_document_and_not_their_sum():
    model = make(FABertConfig, FABertModel, "plain", max_position_embeddings=16)
    assert outputs_of(model, pack((16, 15, 16)))["pooler_output"].shape == (3, 32)
    with pytest.raises(ValueError, match="The document has 17 tokens but the position table has 16 rows"):
        model(**pack((3, 17)))


def test_a_batch_that_cannot_be_packed_is_an_error():
    model = make(FABertConfig, FABertModel)
    packed = pack((5, 3))
    with pytest.raises(ValueError, match="one row that holds all documents, got 2"):
        model(input_ids=packed["input_ids"].view(2, 4), cu_seqlens=packed["cu_seqlens"])
    with pytest.raises(ValueError, match="rise from 0 to the number of tokens, 8"):
        model(input_ids=packed["input_ids"], cu_seqlens=torch.tensor([0, 5, 7]))


def test_checkpointed_gradients_of_a_packed_batch_are_the_same():
    model = make(FABertConfig, FABertForSequenceClassification).train()
    batch = {**pack(), "labels": torch.tensor([0, 1, 1, 0, 1, 0])}
    expected = torch.autograd.grad(model(**batch).loss, list(model.bert.encoder.parameters()))
    model.gradient_checkpointing_enable()
    actual = torch.autograd.grad(model(**batch).loss, list(model.bert.encoder.parameters()))
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


def test_autocast_stays_near_float32():
    model = make(FABertConfig, FABertForSequenceClassification).float()
    batch = {**pack(), "labels": torch.tensor([0, 1, 1, 0, 1, 0])}
    expected = model(**batch).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    # Each of two layers rounds about eight tensors on the way; the losses are of order one.
    assert abs(loss - expected) <= 16 * torch.finfo(torch.bfloat16).eps * max(1.0, expected.item())
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.slow
@every_head
def test_one_graph_serves_packed_batches_of_several_sizes(config_class, auto_class, model_class):
    torch.compiler.reset()
    model = make(config_class, model_class, softmax_layers=[])  # softmax layers need lengths, which graphs don't have
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    options = {"num_choices": 2} if auto_class == "AutoModelForMultipleChoice" else {}
    stances = ("default", "fail_on_recompile", "fail_on_recompile")
    for lengths, stance in zip([LENGTHS, (40, 3, 17, 2), (5, 90, 0, 7)], stances, strict=True):
        with torch.compiler.set_stance(stance):
            actual = outputs_of(compiled, pack(lengths), **options)
        for name, value in outputs_of(model, pack(lengths), **options).items():
            # Graphs may reorder sums; in float64 that stays below 2^-30 of values of order one to ten.
            torch.testing.assert_close(actual[name], value, rtol=0.0, atol=2.0**-27)
