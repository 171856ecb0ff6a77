"""Text models: padding on any side changes nothing at real tokens; positions, masks, embeddings act as documented."""

import pytest
import torch
from tiny_models import (
    EXACT,
    HEADS,
    OPTION_SETS,
    VOCAB_SIZE,
    assert_equal_outputs,
    build,
    labels_of,
    loss_of,
    outputs_of,
    text_inputs,
    tiny_config,
)
from torch import Tensor

from fa_transformers import extend_positions
from fa_transformers.models import FABertConfig, FABertForMaskedLM, FABertForQuestionAnswering, FABertModel

TEXT_HEADS = [head for head in HEADS if head[2].main_input_name == "input_ids"]
POSITIONS = ("absolute", "periodic", "none")
every_head = pytest.mark.parametrize(
    ("config_class", "auto_class", "model_class"), TEXT_HEADS, ids=[head[2].__name__ for head in TEXT_HEADS]
)
every_option_set = pytest.mark.parametrize("options", OPTION_SETS)
per_token = ("last_hidden_state", "start_logits", "end_logits")


def pad(inputs: dict[str, Tensor], left: int, right: int) -> dict[str, Tensor]:
    """Put padding that looks like real tokens around every document."""
    fillers = {"input_ids": 7, "attention_mask": 0, "token_type_ids": 1, "labels": -100}  # 7 is an ordinary token
    return {
        name: torch.nn.functional.pad(value, (left, right), value=fillers[name]) if name in fillers else value
        for name, value in inputs.items()
    }


def move(labels: dict[str, Tensor], auto_class: str, left: int, right: int) -> dict[str, Tensor]:
    """The labels of documents that were padded so."""
    if auto_class == "AutoModelForQuestionAnswering":
        return {name: value + left for name, value in labels.items()}
    return pad(labels, left, right) if is_per_token("logits", auto_class) else labels


def is_per_token(name: str, auto_class: str) -> bool:
    return name in per_token or (
        name == "logits" and auto_class in ("AutoModelForMaskedLM", "AutoModelForTokenClassification")
    )


@every_head
@every_option_set
@pytest.mark.parametrize(("left", "right"), [(6, 0), (0, 6), (3, 5)], ids=["left", "right", "both sides"])
def test_padding_does_not_change_real_tokens_logits_or_loss(
    config_class, auto_class, model_class, options, left, right
):
    model = build(config_class, model_class, **OPTION_SETS[options]).double()
    inputs = text_inputs(auto_class)
    labels = labels_of(auto_class, inputs)
    expected = outputs_of(model, {**inputs, **labels})
    actual = outputs_of(model, {**pad(inputs, left, right), **move(labels, auto_class, left, right)})
    real = inputs["attention_mask"].bool()
    for name, value in expected.items():
        other = actual[name]
        if is_per_token(name, auto_class):
            other = other[:, left : other.shape[1] - right]
            value, other = value[real], other[real]
        torch.testing.assert_close(other, value, **EXACT)


@pytest.mark.parametrize(
    ("config_class", "auto_class", "model_class"),
    [head for head in TEXT_HEADS if head[1] != "AutoModel"],  # which has no loss of its own
    ids=lambda value: getattr(value, "__name__", value),
)
def test_padding_does_not_change_gradients(config_class, auto_class, model_class):
    model = build(config_class, model_class, **OPTION_SETS["all"]).double()
    inputs = text_inputs(auto_class)
    gradients = []
    for left, right in ((0, 0), (3, 4)):
        model.zero_grad()
        labels = move(labels_of(auto_class, inputs), auto_class, left, right)
        model(**pad(inputs, left, right), **labels).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for plain, padded in zip(*gradients, strict=True):
        torch.testing.assert_close(padded, plain, **EXACT)


@every_head
def test_masks_of_int_bool_and_none_agree(config_class, auto_class, model_class):
    model = build(config_class, model_class, **OPTION_SETS["all"]).double()
    inputs = text_inputs(auto_class)
    mask = inputs["attention_mask"]
    expected = outputs_of(model, inputs)
    for dtype in (torch.bool, torch.int32, torch.uint8):
        assert_equal_outputs(outputs_of(model, {**inputs, "attention_mask": mask.to(dtype)}), expected)
    full = text_inputs(auto_class, lengths=(9, 9))
    without = outputs_of(model, {name: value for name, value in full.items() if name != "attention_mask"})
    for name, value in outputs_of(model, full).items():
        torch.testing.assert_close(without[name], value, **EXACT)


@every_head
@every_option_set
def test_document_of_padding_alone_is_finite_forward_and_backward(config_class, auto_class, model_class, options):
    model = build(config_class, model_class, **OPTION_SETS[options]).train()
    inputs = text_inputs(auto_class)
    inputs["attention_mask"][1] = 0
    labels = {name: value[:] for name, value in labels_of(auto_class, inputs).items()}
    for name, value in outputs_of(model, {**inputs, **labels}).items():
        assert value.isfinite().all(), name
    loss_of(model, auto_class, inputs).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("length", [1, 2, 63, 65])
@pytest.mark.parametrize("options", ["all", "all scaling"])
@pytest.mark.parametrize("is_masked", [True, False], ids=["masked", "unmasked"])
def test_odd_lengths_run_forward_and_backward(length, options, is_masked):
    model = build(FABertConfig, FABertForMaskedLM, **OPTION_SETS[options]).train()
    inputs = text_inputs("AutoModelForMaskedLM", lengths=(length, max(1, length - 5)))
    labels = labels_of("AutoModelForMaskedLM", inputs)
    if not is_masked:
        inputs.pop("attention_mask")
    output = model(**inputs, **labels)
    assert output.logits.shape == (2, length, VOCAB_SIZE) and output.logits.isfinite().all()
    output.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("row", range(12))
def test_random_combinations_of_options_ignore_padding_and_train(row):
    draw = torch.Generator().manual_seed(row)

    def choose(*values):
        return values[torch.randint(0, len(values), (), generator=draw)]

    fields = {
        "attention_normalization": choose("softmax", "scaling"),
        "key_feature_size": choose(None, 16, 17, 31, 48),
        "local_kernel_size": choose(0, 1, 3, 9),
        "local_window": choose(0, 1, 4, 30),
        "softmax_layers": choose([], [0], [2], [0, 2], [0, 1, 2]),
        "position_embedding_type": choose(*POSITIONS),
        "classifier_pooling": choose("cls", "mean"),
        "num_hidden_layers": 3,
    }
    config_class, auto_class, model_class = choose(*TEXT_HEADS)
    model = build(config_class, model_class, **fields).double()
    inputs = text_inputs(auto_class, lengths=(choose(19, 33), choose(1, 2, 17)))
    real = inputs["attention_mask"].bool()
    expected, actual = outputs_of(model, inputs), outputs_of(model, pad(inputs, 4, 3))
    for name, value in expected.items():
        other = actual[name]
        if is_per_token(name, auto_class):
            value, other = value[real], other[:, 4:-3][real]
        torch.testing.assert_close(other, value, **EXACT)
    if auto_class != "AutoModelForQuestionAnswering":
        loss_of(model, auto_class, inputs).backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


@every_head
def test_embeddings_given_directly_equal_token_ids(config_class, auto_class, model_class):
    model = build(config_class, model_class, **OPTION_SETS["all"])
    inputs = text_inputs(auto_class)
    expected = outputs_of(model, inputs)
    embedded = dict(inputs, inputs_embeds=model.get_input_embeddings()(inputs["input_ids"]))
    embedded.pop("input_ids")
    assert_equal_outputs(outputs_of(model, embedded), expected)


def test_token_types_default_to_zero_and_matter():
    model = build(FABertConfig, FABertModel)
    inputs = text_inputs("AutoModel")
    segments = inputs.pop("token_type_ids")
    zeros = outputs_of(model, {**inputs, "token_type_ids": torch.zeros_like(segments)})
    assert_equal_outputs(outputs_of(model, inputs), zeros)
    differ = outputs_of(model, {**inputs, "token_type_ids": segments})["last_hidden_state"]
    assert not torch.allclose(differ, zeros["last_hidden_state"], atol=1e-3)


@pytest.mark.parametrize("kind", POSITIONS)
def test_position_ids_equal_the_default_and_move_as_told(kind):
    model = build(FABertConfig, FABertModel, position_embedding_type=kind)
    inputs = text_inputs("AutoModel")
    length = inputs["input_ids"].shape[1]
    counted = torch.arange(length)[None]
    expected = outputs_of(model, inputs)["last_hidden_state"]
    real = inputs["attention_mask"].bool()
    default = outputs_of(model, {**inputs, "position_ids": counted})["last_hidden_state"]
    assert torch.equal(default[real], expected[real])
    shifted = outputs_of(model, {**inputs, "position_ids": counted + 20})["last_hidden_state"]
    assert torch.allclose(shifted[real], expected[real], atol=1e-3) is (kind == "none")


@pytest.mark.parametrize("options", ["plain", "scaling"])
def test_token_order_matters_only_through_positions(options):
    fields = {**OPTION_SETS[options], "position_embedding_type": "none"}
    model = build(FABertConfig, FABertModel, **fields).double()
    ids = text_inputs("AutoModel", lengths=(12, 12))["input_ids"]
    order = torch.randperm(12)
    expected = outputs_of(model, {"input_ids": ids})["last_hidden_state"][:, order]
    permuted = outputs_of(model, {"input_ids": ids[:, order]})["last_hidden_state"]
    torch.testing.assert_close(permuted, expected, **EXACT)


def test_document_longer_than_the_absolute_table_is_an_error_that_names_the_limit():
    model = build(FABertConfig, FABertModel)
    inputs = text_inputs("AutoModel", lengths=(65, 3))
    for given in (inputs, {"input_ids": inputs["input_ids"]}):
        with pytest.raises(ValueError, match=r"65 tokens .* 64 rows .*`max_position_embeddings`.*periodic"):
            model(**given)


def test_padding_beyond_the_absolute_table_is_no_error():
    model = build(FABertConfig, FABertModel).double()
    inputs = text_inputs("AutoModel", lengths=(60, 9))
    expected = outputs_of(model, inputs)["pooler_output"]
    for left, right in ((30, 0), (0, 30)):
        actual = outputs_of(model, pad(inputs, left, right))["pooler_output"]
        torch.testing.assert_close(actual, expected, **EXACT)


def test_periodic_positions_repeat_the_table_and_take_any_length():
    periodic = build(FABertConfig, FABertModel, position_embedding_type="periodic")
    inputs = text_inputs("AutoModel", lengths=(200, 150))
    tiled = build(FABertConfig, FABertModel)
    tiled.load_state_dict(periodic.state_dict())
    extend_positions(tiled, 200)
    assert tiled.config.max_position_embeddings == 200
    assert_equal_outputs(outputs_of(periodic, inputs), outputs_of(tiled, inputs))


def test_model_without_positions_has_no_table_and_takes_any_length():
    model = build(FABertConfig, FABertModel, position_embedding_type="none")
    assert not any("position_embeddings" in name for name, _ in model.named_parameters())
    assert outputs_of(model, text_inputs("AutoModel", lengths=(200, 3)))["last_hidden_state"].isfinite().all()


def test_vocabulary_can_grow_and_shrink_and_stays_tied(tmp_path):
    model = build(FABertConfig, FABertForMaskedLM)
    inputs = text_inputs("AutoModelForMaskedLM")
    expected = outputs_of(model, inputs)["logits"]
    model.resize_token_embeddings(VOCAB_SIZE + 5)
    assert model.config.vocab_size == VOCAB_SIZE + 5
    grown = outputs_of(model, inputs)["logits"]
    assert grown.shape[-1] == VOCAB_SIZE + 5
    # Another width of the matrix product may sum in another order: float32, 32 terms of order one.
    torch.testing.assert_close(grown[..., :VOCAB_SIZE], expected, rtol=0.0, atol=2.0**-18)
    _assert_tied(model)
    model.save_pretrained(tmp_path)
    loaded = FABertForMaskedLM.from_pretrained(tmp_path).eval()
    _assert_tied(loaded)
    assert torch.equal(outputs_of(loaded, inputs)["logits"], grown)
    model.resize_token_embeddings(VOCAB_SIZE)
    torch.testing.assert_close(outputs_of(model, inputs)["logits"], expected, rtol=0.0, atol=2.0**-18)
    _assert_tied(model)


def _assert_tied(model):
    prediction = model.cls["predictions"]
    assert prediction.decoder.weight is model.get_input_embeddings().weight
    assert prediction.decoder.bias is prediction.bias
    assert model.get_output_embeddings() is prediction.decoder


def test_output_embeddings_can_be_replaced():
    model = build(FABertConfig, FABertForMaskedLM)
    model.set_output_embeddings(torch.nn.Linear(32, VOCAB_SIZE + 3))
    assert model.cls["predictions"].bias is model.get_output_embeddings().bias
    assert outputs_of(model, text_inputs("AutoModelForMaskedLM"))["logits"].shape[-1] == VOCAB_SIZE + 3


def test_tied_decoder_survives_saving_and_a_base_checkpoint(tmp_path):
    model = build(FABertConfig, FABertForMaskedLM)
    _assert_tied(model)
    model.save_pretrained(tmp_path / "head")
    _assert_tied(FABertForMaskedLM.from_pretrained(tmp_path / "head"))
    model.bert.save_pretrained(tmp_path / "base")
    loaded = FABertForMaskedLM.from_pretrained(tmp_path / "base")
    _assert_tied(loaded)
    assert torch.equal(loaded.cls["predictions"].decoder.weight, model.bert.embeddings.word_embeddings.weight)


def test_untied_decoder_keeps_its_own_weights(tmp_path):
    model = build(FABertConfig, FABertForMaskedLM, tie_word_embeddings=False)
    assert model.cls["predictions"].decoder.weight is not model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    inputs = text_inputs("AutoModelForMaskedLM")
    loaded = FABertForMaskedLM.from_pretrained(tmp_path).eval()
    assert_equal_outputs(outputs_of(loaded, inputs), outputs_of(model, inputs))


def test_pooler_reads_the_first_real_token_and_can_be_left_out():
    model = build(FABertConfig, FABertModel)
    inputs = pad(text_inputs("AutoModel"), left=4, right=0)
    outputs = outputs_of(model, inputs)
    first = outputs["last_hidden_state"][:, 4]
    assert torch.equal(outputs["pooler_output"], torch.tanh(model.pooler.dense(first)))
    bare = FABertModel(tiny_config(FABertConfig), add_pooling_layer=False).eval()
    assert bare.pooler is None and bare(**inputs).pooler_output is None


def test_answers_are_scored_lowest_at_padding_and_positions_outside_are_ignored():
    model = build(FABertConfig, FABertForQuestionAnswering)
    inputs = text_inputs("AutoModelForQuestionAnswering")
    output = model(**inputs)
    assert (output.start_logits[1, 7:] == torch.finfo(torch.float32).min).all()
    assert output.end_logits[1].argmax() < 7
    within = model(**inputs, start_positions=torch.tensor([1, 2]), end_positions=torch.tensor([3, 4])).loss
    first = model(
        **{name: value[:1] for name, value in inputs.items()},
        start_positions=torch.tensor([1]),
        end_positions=torch.tensor([3]),
    ).loss
    assert not torch.isclose(within, first)
    for outside in (-1, 11, 500):
        ignored = torch.tensor([[1], [outside]]), torch.tensor([[3], [outside]])
        loss = model(**inputs, start_positions=ignored[0], end_positions=ignored[1]).loss
        # The same sum over one document; a batch of one may round its 11 logits another way in float32.
        torch.testing.assert_close(loss, first, rtol=2.0**-16, atol=0.0)
